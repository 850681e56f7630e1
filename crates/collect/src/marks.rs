//! The image that is sent: shrunk to a maximum size, with the regions marked by frames.

use unveil_core::BBox;
use unveil_data::image_store::Image;
use unveil_preprocess::processor::{Filter, resize};

/// Colours of the marks with their names; the one that differs most from the pixels under the marks is used.
const COLOURS: [([u8; 3], &str); 5] = [
    ([255, 0, 0], "red"),
    ([0, 255, 0], "green"),
    ([0, 255, 255], "cyan"),
    ([255, 255, 0], "yellow"),
    ([255, 0, 255], "magenta"),
];

/// An image with marked regions.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct MarkedImage {
    pub(crate) image: Image,
    /// The regions in pixels of the image, `[x1, y1, x2, y2]`.
    pub(crate) boxes: Vec<[i64; 4]>,
    /// Name of the colour of the marks.
    pub(crate) colour: &'static str,
}

/// Shrinks `image` to at most `max_side` pixels per side and draws a frame around each box, outside of it if there is space.
pub(crate) fn mark_regions(image: Image, boxes: &[BBox], max_side: u32) -> MarkedImage {
    let scale = (f64::from(max_side) / f64::from(image.width().max(image.height()))).min(1.0);
    let side = |v: u32| ((f64::from(v) * scale).round() as u32).max(1);
    let w = side(image.width());
    let h = side(image.height());
    let sx = w as f32 / image.width() as f32;
    let sy = h as f32 / image.height() as f32;
    let mut image = if scale < 1.0 { resize(&image, w, h, Filter::Bicubic) } else { image };
    let w = i64::from(w);
    let h = i64::from(h);
    let boxes: Vec<[i64; 4]> = boxes
        .iter()
        .map(|b| b.scaled(sx, sy))
        .map(|b| {
            let pixel = |v: f32, max: i64| (v.round() as i64).clamp(0, max);
            [pixel(b.x1, w), pixel(b.y1, h), pixel(b.x2, w), pixel(b.y2, h)]
        })
        .collect();
    let width = (w.max(h) / 256).max(2);
    let frame: Vec<(u32, u32)> = boxes.iter().flat_map(|b| frame(*b, width, (w, h))).collect();
    let distance = |colour: [u8; 3]| -> u64 {
        let difference = |(x, y): &(u32, u32)| {
            let p = image.pixel(*x, *y);
            p.iter().zip(colour).map(|(a, b)| u64::from(a.abs_diff(b)).pow(2)).sum::<u64>()
        };
        frame.iter().map(difference).sum()
    };
    let (colour, name) = COLOURS.into_iter().rev().max_by_key(|(c, _)| distance(*c)).unwrap_or(COLOURS[0]);
    frame.iter().for_each(|(x, y)| image.set_pixel(*x, *y, colour));
    MarkedImage { image, boxes, colour: name }
}

/// Returns the pixels of a frame of this width around a box, clipped to the image.
fn frame([x1, y1, x2, y2]: [i64; 4], width: i64, (w, h): (i64, i64)) -> impl Iterator<Item = (u32, u32)> {
    let outer = [(x1 - width).max(0), (y1 - width).max(0), (x2 + width).min(w), (y2 + width).min(h)];
    // If the box touches the border of the image, the frame is drawn on the edge of the box.
    let inner = [x1.max(outer[0] + 1), y1.max(outer[1] + 1), x2.min(outer[2] - 1), y2.min(outer[3] - 1)];
    (outer[1]..outer[3]).flat_map(move |y| {
        let inside = move |x: i64| (inner[0]..inner[2]).contains(&x) && (inner[1]..inner[3]).contains(&y);
        (outer[0]..outer[2]).filter(move |x| !inside(*x)).map(move |x| (x as u32, y as u32))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_drawn_outside_the_region() {
        let grey = Image::from_rgb(100, 50, vec![90; 100 * 50 * 3]).unwrap();
        let m = mark_regions(grey.clone(), &[[20.0, 10.0, 40.0, 30.0].into()], 512);
        assert_eq!((m.image.width(), m.boxes.as_slice()), (100, &[[20, 10, 40, 30]][..]));
        let changed = |x, y| m.image.pixel(x, y) != grey.pixel(x, y);
        assert!((20..40).all(|x| (10..30).all(|y| !changed(x, y))));
        assert!(changed(19, 15) && changed(18, 8) && changed(41, 31) && !changed(17, 15) && !changed(42, 15));
    }

    #[test]
    fn colour_contrasts_with_the_image() {
        let colour_on = |rgb: [u8; 3]| {
            let mut image = Image::new(30, 30);
            image.rgb_mut().chunks_exact_mut(3).for_each(|p| p.copy_from_slice(&rgb));
            mark_regions(image, &[[5.0, 5.0, 20.0, 20.0].into()], 64).colour
        };
        assert_eq!(colour_on([200, 30, 30]), "cyan");
        assert_ne!(colour_on([0, 255, 255]), "cyan");
        assert_eq!(colour_on([255, 255, 255]), colour_on([255, 255, 255]));
    }

    #[test]
    fn large_images_shrink_and_full_boxes_are_framed_inside() {
        let m = mark_regions(Image::new(2000, 1000), &[[0.0, 0.0, 2000.0, 1000.0].into()], 500);
        assert_eq!((m.image.width(), m.image.height(), m.boxes[0]), (500, 250, [0, 0, 500, 250]));
        assert!(
            m.image.pixel(0, 100) != [0; 3] && m.image.pixel(499, 249) != [0; 3] && m.image.pixel(250, 125) == [0; 3]
        );
        let tiny = mark_regions(Image::new(1, 1), &[[0.0, 0.0, 1.0, 1.0].into()], 500);
        assert_ne!(tiny.image.pixel(0, 0), [0; 3]);
    }
}
