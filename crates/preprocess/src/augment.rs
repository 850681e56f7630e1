//! Augmentation of an image and its boxes: crop, flips, quarter turns, brightness and contrast.
//!
//! The result is a function of (seed, pass, record id), so it is the same on every process. Resizing is left to the image processor.

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use unveil_core::{BBox, BoxFault};
use unveil_data::image_store::Image;

/// Minimum share of a box's area inside the crop for the box to be kept (clipped).
pub const MIN_KEPT_SHARE: f64 = 0.60;
/// A box with less than this share of its area inside the crop is dropped; between the two limits, another crop is drawn.
pub const MAX_DROPPED_SHARE: f64 = 0.15;
/// Number of crops that are drawn before the image is left whole.
const MAX_CROP_ATTEMPTS: usize = 24;
/// Minimum side of a crop in pixels, unless the image is smaller.
const MIN_CROP_SIDE: u32 = 16;

/// Augmentations that may be applied to an image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AugmentSpec {
    /// Minimum side of a crop as a share of the image side, `(0, 1]`; 1 disables cropping.
    pub crop_min: f32,
    /// Mirror left to right with probability 1/2.
    pub flip_h: bool,
    /// Mirror top to bottom with probability 1/2.
    pub flip_v: bool,
    /// Rotate by 0, 90, 180 or 270 degrees with equal probability. This changes the shape of images that are not square.
    pub turn: bool,
    /// Maximum brightness shift and contrast change, each as a share in `[0, 1)`.
    pub jitter: f32,
}

impl Default for AugmentSpec {
    /// Returns a specification that changes nothing.
    fn default() -> Self {
        Self { crop_min: 1.0, flip_h: false, flip_v: false, turn: false, jitter: 0.0 }
    }
}

/// Why an image was not augmented.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum AugmentError {
    /// A field of the specification is out of range.
    #[error("augmentation: {0}")]
    Spec(String),
    /// A box is not valid for the image.
    #[error("record \"{id}\": box {index} {fault}")]
    Box {
        /// Id of the record.
        id: String,
        /// Index of the box.
        index: usize,
        /// Description of the problem.
        fault: BoxFault,
    },
}

/// An augmented image.
#[derive(Debug, Clone, PartialEq)]
pub struct Augmented {
    /// The new image.
    pub image: Image,
    /// Boxes in the new image's pixels.
    pub boxes: Vec<BBox>,
    /// Original index of each box; a crop may drop some boxes but never all of them.
    pub kept: Vec<usize>,
}

impl AugmentSpec {
    /// Checks the ranges of all fields.
    ///
    /// # Errors
    /// Returns [`AugmentError::Spec`] naming the field that is out of range.
    pub fn validate(&self) -> Result<(), AugmentError> {
        if !(self.crop_min > 0.0 && self.crop_min <= 1.0) {
            Err(AugmentError::Spec(format!("crop_min = {} must be above 0 and at most 1", self.crop_min)))
        } else if !(0.0..1.0).contains(&self.jitter) {
            Err(AugmentError::Spec(format!("jitter = {} must be at least 0 and below 1", self.jitter)))
        } else {
            Ok(())
        }
    }

    /// Returns whether the specification changes nothing.
    pub fn is_off(&self) -> bool {
        *self == Self::default()
    }
}

/// Augments one image for one pass over the data.
///
/// A crop keeps a box with at least [`MIN_KEPT_SHARE`] of its area inside (clipped) and drops one with less than [`MAX_DROPPED_SHARE`]. It
/// is drawn again if a box is in between or if all boxes would be dropped; after 24 attempts the image stays whole.
///
/// # Errors
/// Returns [`AugmentError::Spec`] for a specification out of range and [`AugmentError::Box`] for a box that is invalid for the image.
pub fn augment(
    spec: &AugmentSpec,
    seed: u64,
    pass: u64,
    id: &str,
    image: &Image,
    boxes: &[BBox],
) -> Result<Augmented, AugmentError> {
    spec.validate()?;
    let w = image.width() as f32;
    let h = image.height() as f32;
    let boxes =
        &clip_to(w, h, boxes).map_err(|(index, fault)| AugmentError::Box { id: id.to_owned(), index, fault })?[..];
    let mut key = blake3::Hasher::new();
    key.update(b"unveil augment").update(&seed.to_le_bytes()).update(&pass.to_le_bytes()).update(id.as_bytes());
    let mut rng = ChaCha8Rng::from_seed(*key.finalize().as_bytes());
    let mut out = Augmented { image: image.clone(), boxes: boxes.to_vec(), kept: (0..boxes.len()).collect() };
    if spec.crop_min < 1.0
        && let Some(cropped) = random_crop(spec.crop_min, &mut rng, image, boxes)
    {
        out = cropped;
    }
    if spec.flip_h && rng.next_u32() & 1 == 1 {
        flip_h(&mut out.image, &mut out.boxes);
    }
    if spec.flip_v && rng.next_u32() & 1 == 1 {
        flip_v(&mut out.image, &mut out.boxes);
    }
    if spec.turn {
        for _ in 0..rng.next_u32() & 3 {
            rotate_clockwise(&mut out.image, &mut out.boxes);
        }
    }
    if spec.jitter > 0.0 {
        let mut random_share = || (2.0 * unit(&mut rng) - 1.0) * spec.jitter;
        let brightness = random_share();
        let contrast = random_share();
        jitter(&mut out.image, brightness, contrast);
    }
    Ok(out)
}

/// Clips the overhang of up to one pixel that [`BBox::fault`] permits.
fn clip_to(w: f32, h: f32, boxes: &[BBox]) -> Result<Vec<BBox>, (usize, BoxFault)> {
    let clip = |(index, b): (usize, &BBox)| match b.fault(w, h) {
        Some(fault) => Err((index, fault)),
        None => {
            let b = BBox { x1: b.x1.max(0.0), y1: b.y1.max(0.0), x2: b.x2.min(w), y2: b.y2.min(h) };
            if b.area() > 0.0 { Ok(b) } else { Err((index, BoxFault::Outside)) }
        }
    };
    boxes.iter().enumerate().map(clip).collect()
}

/// Draws a number in `[0, 1)`.
fn unit(rng: &mut ChaCha8Rng) -> f32 {
    (rng.next_u32() >> 8) as f32 / (1u32 << 24) as f32
}

fn random_crop(crop_min: f32, rng: &mut ChaCha8Rng, image: &Image, boxes: &[BBox]) -> Option<Augmented> {
    for _ in 0..MAX_CROP_ATTEMPTS {
        let share = crop_min + (1.0 - crop_min) * unit(rng);
        let side = |full: u32| ((full as f32 * share).round() as u32).clamp(MIN_CROP_SIDE.min(full), full);
        let w = side(image.width());
        let h = side(image.height());
        let start = |rng: &mut ChaCha8Rng, slack: u32| ((unit(rng) * (slack + 1) as f32) as u32).min(slack);
        let x = start(rng, image.width() - w);
        let y = start(rng, image.height() - h);
        if let Some((boxes, kept)) = crop_boxes(boxes, [x, y, w, h]) {
            return Some(Augmented { image: image.crop([x, y, w, h]), boxes, kept });
        }
    }
    None
}

/// Returns the boxes after cropping to `[x, y, width, height]` and their original indices, or `None` if the crop would cut through a box or
/// drop all of them.
fn crop_boxes(boxes: &[BBox], [x, y, w, h]: [u32; 4]) -> Option<(Vec<BBox>, Vec<usize>)> {
    let x = x as f32;
    let y = y as f32;
    let w = w as f32;
    let h = h as f32;
    let frame = BBox { x1: x, y1: y, x2: x + w, y2: y + h };
    let mut out = Vec::new();
    let mut kept = Vec::new();
    for (i, b) in boxes.iter().enumerate() {
        let inside = b.intersection(&frame) / b.area();
        if inside >= MIN_KEPT_SHARE {
            let clip = |v: f32, from: f32, top: f32| (v - from).clamp(0.0, top);
            out.push(BBox { x1: clip(b.x1, x, w), y1: clip(b.y1, y, h), x2: clip(b.x2, x, w), y2: clip(b.y2, y, h) });
            kept.push(i);
        } else if inside >= MAX_DROPPED_SHARE {
            return None;
        }
    }
    (boxes.is_empty() || !out.is_empty()).then_some((out, kept))
}

/// Mirrors image and boxes left to right.
pub fn flip_h(image: &mut Image, boxes: &mut [BBox]) {
    image.flip_h();
    let w = image.width() as f32;
    boxes.iter_mut().for_each(|b| (b.x1, b.x2) = (w - b.x2, w - b.x1));
}

/// Mirrors image and boxes top to bottom.
pub fn flip_v(image: &mut Image, boxes: &mut [BBox]) {
    image.flip_v();
    let h = image.height() as f32;
    boxes.iter_mut().for_each(|b| (b.y1, b.y2) = (h - b.y2, h - b.y1));
}

/// Rotates image and boxes clockwise by 90 degrees, which swaps width and height.
pub fn rotate_clockwise(image: &mut Image, boxes: &mut [BBox]) {
    let h = image.height() as f32;
    image.rotate_clockwise();
    for b in boxes {
        *b = BBox { x1: h - b.y2, y1: b.x1, x2: h - b.y1, y2: b.x2 };
    }
}

/// Scales pixel values about mid-grey by `1 + contrast` and adds `brightness` (a share of the full range).
pub fn jitter(image: &mut Image, brightness: f32, contrast: f32) {
    let table: [u8; 256] = std::array::from_fn(|v| {
        let v = (v as f32 - 127.5) * (1.0 + contrast) + 127.5 + 255.0 * brightness;
        v.round().clamp(0.0, 255.0) as u8
    });
    image.rgb_mut().iter_mut().for_each(|v| *v = table[usize::from(*v)]);
}

#[cfg(test)]
#[path = "augment_tests.rs"]
mod tests;
