//! Where an annotated object lies in its image: frame, fractions, overhang. Pure.

use unveil_core::{BBox, BoxFault};

use super::item::Coords;

/// A frame has the shape of an image when their aspect ratios differ by less than this share.
const SAME_SHAPE: f64 = 0.01;

/// What was done to a box.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Placed {
    pub(super) b: BBox,
    pub(super) clipped: bool,
    pub(super) scaled: bool,
}

/// The box in pixels of the image, or the rule by which it is left out.
pub(super) fn place(
    coords: Coords,
    frame: Option<(u32, u32)>,
    (width, height): (u32, u32),
    strict: bool,
) -> Result<Placed, String> {
    let (w, h) = (width as f32, height as f32);
    let mut scaled = false;
    let b = match coords {
        Coords::Fractions([x1, y1, x2, y2]) => {
            let (w, h) = (f64::from(width), f64::from(height));
            BBox::from([x1 * w, y1 * h, x2 * w, y2 * h].map(|v| v as f32))
        }
        Coords::Pixels(c) => match frame.filter(|f| !strict && *f != (width, height)) {
            None => BBox::from(c),
            Some((fw, fh)) => {
                let (a, b) = (f64::from(fw) * f64::from(height), f64::from(fh) * f64::from(width));
                if fw == 0 || fh == 0 || (a - b).abs() > SAME_SHAPE * a.max(b) {
                    return Err("its stated size has another shape than the image".to_owned());
                }
                scaled = true;
                BBox::from(c).scaled(w / fw as f32, h / fh as f32)
            }
        },
    };
    match b.fault(f32::INFINITY, f32::INFINITY) {
        None | Some(BoxFault::Outside) => {}
        Some(fault) => return Err(fault.to_string()),
    }
    let overhang = b.x1 < 0.0 || b.y1 < 0.0 || b.x2 > w || b.y2 > h;
    if !overhang {
        return Ok(Placed { b, clipped: false, scaled });
    }
    // Stricter than `BBox::fault`, which grants a model's answer a pixel: an annotation has no reason to overhang.
    if strict {
        return Err(BoxFault::Outside.to_string());
    }
    let cut = BBox { x1: b.x1.max(0.0), y1: b.y1.max(0.0), x2: b.x2.min(w), y2: b.y2.min(h) };
    if cut.area() < 0.5 * b.area() || cut.area() == 0.0 {
        return Err("lies outside the image by more than half".to_owned());
    }
    Ok(Placed { b: cut, clipped: true, scaled })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_fractions_and_overhang() {
        let at = |c, frame| place(c, frame, (200, 100), false);
        let px = |c| Coords::Pixels(c);
        let whole = at(Coords::Fractions([0.25, 0.5, 1.0, 1.0]), None).unwrap();
        assert_eq!((whole.b, whole.clipped), ([50.0, 50.0, 200.0, 100.0].into(), false));
        let scaled = at(px([10.0, 10.0, 20.0, 20.0]), Some((100, 50))).unwrap();
        assert_eq!((scaled.b, scaled.scaled), ([20.0, 20.0, 40.0, 40.0].into(), true));
        assert!(at(px([1.0, 1.0, 2.0, 2.0]), Some((100, 100))).unwrap_err().contains("another shape"));
        assert!(at(px([1.0, 1.0, 2.0, 2.0]), Some((0, 0))).unwrap_err().contains("another shape"));
        let cut = at(px([-10.0, 0.0, 30.0, 10.0]), None).unwrap();
        assert_eq!((cut.b, cut.clipped), ([0.0, 0.0, 30.0, 10.0].into(), true));
        assert!(at(px([-40.0, 0.0, 30.0, 10.0]), None).unwrap_err().contains("by more than half"));
        assert!(at(px([500.0, 0.0, 530.0, 10.0]), None).unwrap_err().contains("by more than half"));
        assert!(at(px([9.0, 0.0, 1.0, 1.0]), None).unwrap_err().contains("inverted"));
        assert!(at(px([1.0, 1.0, 1.0, 2.0]), None).unwrap_err().contains("no area"));
        assert!(at(px([f32::NAN, 1.0, 1.0, 2.0]), None).unwrap_err().contains("not finite"));
        let strict = |c| place(c, Some((7, 7)), (200, 100), true);
        assert_eq!(strict(px([0.0, 0.0, 200.5, 9.0])).unwrap_err(), "lies outside the image");
        assert!(!strict(px([0.0, 0.0, 200.0, 9.0])).unwrap().scaled);
    }
}
