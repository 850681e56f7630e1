//! Converts annotated coordinates to boxes in image pixels: scaling from the stated size, fractions, clipping.

use unveil_core::{BBox, BoxFault};

use super::draft::Coords;

/// Largest relative difference of two aspect ratios that count as the same shape.
const SAME_SHAPE: f64 = 0.01;

/// A box in image pixels, and how it was changed to fit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct PlacedBox {
    /// The box in pixels of the image.
    pub(super) bbox: BBox,
    /// It overhung the image and was clipped to it.
    pub(super) clipped: bool,
    /// It was scaled from the stated size to the size of the image.
    pub(super) scaled: bool,
}

/// Converts `coords`, given in pixels of `frame` (the stated size) or as fractions, to a box in pixels of the image.
///
/// # Errors
/// Returns the rule by which the box is left out.
pub(super) fn place_box(
    coords: Coords,
    frame: Option<(u32, u32)>,
    (width, height): (u32, u32),
    strict: bool,
) -> Result<PlacedBox, String> {
    let w = width as f32;
    let h = height as f32;
    let mut scaled = false;
    let bbox = match coords {
        Coords::Fractions([x1, y1, x2, y2]) => {
            let w = f64::from(width);
            let h = f64::from(height);
            BBox::from([x1 * w, y1 * h, x2 * w, y2 * h].map(|v| v as f32))
        }
        Coords::Pixels(c) => match frame.filter(|f| !strict && *f != (width, height)) {
            None => BBox::from(c),
            Some((fw, fh)) => {
                let a = f64::from(fw) * f64::from(height);
                let b = f64::from(fh) * f64::from(width);
                if fw == 0 || fh == 0 || (a - b).abs() > SAME_SHAPE * a.max(b) {
                    return Err("its stated size has another shape than the image".to_owned());
                }
                scaled = true;
                BBox::from(c).scaled(w / fw as f32, h / fh as f32)
            }
        },
    };
    match bbox.fault(f32::INFINITY, f32::INFINITY) {
        None | Some(BoxFault::Outside) => {}
        Some(fault) => return Err(fault.to_string()),
    }
    let overhang = bbox.x1 < 0.0 || bbox.y1 < 0.0 || bbox.x2 > w || bbox.y2 > h;
    if !overhang {
        return Ok(PlacedBox { bbox, clipped: false, scaled });
    }
    // Stricter than `BBox::fault`, which allows a model's answer one pixel of overhang: an annotation has no reason to overhang.
    if strict {
        return Err(BoxFault::Outside.to_string());
    }
    let clipped = BBox { x1: bbox.x1.max(0.0), y1: bbox.y1.max(0.0), x2: bbox.x2.min(w), y2: bbox.y2.min(h) };
    if clipped.area() < 0.5 * bbox.area() || clipped.area() == 0.0 {
        return Err("lies outside the image by more than half".to_owned());
    }
    Ok(PlacedBox { bbox: clipped, clipped: true, scaled })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boxes_are_scaled_and_clipped() {
        let lenient = |c, frame| place_box(c, frame, (200, 100), false);
        let px = |c| Coords::Pixels(c);
        let whole = lenient(Coords::Fractions([0.25, 0.5, 1.0, 1.0]), None).unwrap();
        assert_eq!((whole.bbox, whole.clipped), ([50.0, 50.0, 200.0, 100.0].into(), false));
        let scaled = lenient(px([10.0, 10.0, 20.0, 20.0]), Some((100, 50))).unwrap();
        assert_eq!((scaled.bbox, scaled.scaled), ([20.0, 20.0, 40.0, 40.0].into(), true));
        assert!(lenient(px([1.0, 1.0, 2.0, 2.0]), Some((100, 100))).unwrap_err().contains("another shape"));
        assert!(lenient(px([1.0, 1.0, 2.0, 2.0]), Some((0, 0))).unwrap_err().contains("another shape"));
        let cut = lenient(px([-10.0, 0.0, 30.0, 10.0]), None).unwrap();
        assert_eq!((cut.bbox, cut.clipped), ([0.0, 0.0, 30.0, 10.0].into(), true));
        assert!(lenient(px([-40.0, 0.0, 30.0, 10.0]), None).unwrap_err().contains("by more than half"));
        assert!(lenient(px([500.0, 0.0, 530.0, 10.0]), None).unwrap_err().contains("by more than half"));
        assert!(lenient(px([9.0, 0.0, 1.0, 1.0]), None).unwrap_err().contains("inverted"));
        assert!(lenient(px([1.0, 1.0, 1.0, 2.0]), None).unwrap_err().contains("no area"));
        assert!(lenient(px([f32::NAN, 1.0, 1.0, 2.0]), None).unwrap_err().contains("not finite"));
        let strict = |c| place_box(c, Some((7, 7)), (200, 100), true);
        assert_eq!(strict(px([0.0, 0.0, 200.5, 9.0])).unwrap_err(), "lies outside the image");
        assert!(!strict(px([0.0, 0.0, 200.0, 9.0])).unwrap().scaled);
    }
}
