//! Lesions: intensity change, cut-and-paste and deformation inside an exact mask. Nothing outside a mask is touched.

use std::f32::consts::TAU;

use serde::{Deserialize, Serialize};
use unveil_core::BBox;

use super::phantom::{Canvas, Scene};
use super::shape::{Dice, Shape, lerp, smooth};

/// Where an image comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Modality {
    /// Axial slice.
    Ct,
    /// Chest film.
    Xray,
    /// Mucosa through an endoscope.
    Endoscopy,
}

impl Modality {
    /// The name written to records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ct => "ct",
            Self::Xray => "xray",
            Self::Endoscopy => "endoscopy",
        }
    }
}

/// Kind of lesion; each has its own look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Category {
    /// Bright round blob (CT, X-ray).
    Nodule,
    /// Dark smooth ellipse that bulges what is under it (CT).
    Cyst,
    /// Fuzzy bright patch (X-ray).
    Opacity,
    /// Texture pasted from elsewhere and bulged, lit from one side (endoscopy).
    Polyp,
    /// Small and very bright (CT).
    Stone,
}

impl Category {
    /// All categories, in the order in which they are drawn.
    pub const ALL: [Self; 5] = [Self::Nodule, Self::Cyst, Self::Opacity, Self::Polyp, Self::Stone];

    /// The name written to records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nodule => "nodule",
            Self::Cyst => "cyst",
            Self::Opacity => "opacity",
            Self::Polyp => "polyp",
            Self::Stone => "stone",
        }
    }

    /// The technique written to records under `technique`.
    pub fn technique(self) -> &'static str {
        match self {
            Self::Nodule | Self::Opacity | Self::Stone => "intensity",
            Self::Cyst => "deformation",
            Self::Polyp => "cut-and-paste",
        }
    }

    pub(crate) fn modalities(self) -> &'static [Modality] {
        match self {
            Self::Nodule => &[Modality::Ct, Modality::Xray],
            Self::Cyst | Self::Stone => &[Modality::Ct],
            Self::Opacity => &[Modality::Xray],
            Self::Polyp => &[Modality::Endoscopy],
        }
    }

    /// Smallest and largest box side as a share of the image side (14 to 40 pixels of 96).
    fn sides(self) -> (f32, f32) {
        let (lo, hi) = match self {
            Self::Nodule => (16.0, 32.0),
            Self::Cyst => (18.0, 36.0),
            Self::Opacity => (22.0, 39.0),
            Self::Polyp => (18.0, 38.0),
            Self::Stone => (14.0, 21.0),
        };
        (lo / 96.0, hi / 96.0)
    }

    fn wobble(self) -> f32 {
        match self {
            Self::Nodule => 0.10,
            Self::Cyst => 0.06,
            Self::Opacity => 0.22,
            Self::Polyp => 0.13,
            Self::Stone => 0.22,
        }
    }
}

/// A lesion's mask: exactly the pixels that it changes.
#[derive(Debug, Clone)]
pub struct Mask {
    /// Side of the image in pixels.
    pub side: u32,
    /// `side * side` flags, row-major.
    pub inside: Vec<bool>,
}

impl Mask {
    /// The exact bounding box: integer pixels, right and bottom edge exclusive; `None` for an empty mask.
    pub fn bounds(&self) -> Option<BBox> {
        let n = self.side as usize;
        let (mut x1, mut y1, mut x2, mut y2) = (n, n, 0, 0);
        for i in (0..n * n).filter(|&i| self.inside[i]) {
            let (x, y) = (i % n, i / n);
            (x1, y1, x2, y2) = (x1.min(x), y1.min(y), x2.max(x + 1), y2.max(y + 1));
        }
        (x2 > 0).then(|| [x1 as f32, y1 as f32, x2 as f32, y2 as f32].into())
    }
}

/// Places `count` lesions of one category apart from each other; `None` when the scene has no room (draw another scene).
pub(crate) fn place(dice: &mut Dice, scene: &Scene, category: Category, count: usize) -> Option<Vec<Shape>> {
    let n = scene.canvas.n as f32;
    let (lo, hi) = category.sides();
    let hi = if count > 1 { lerp(lo, hi, 0.7) } else { hi };
    let mut out: Vec<Shape> = Vec::with_capacity(count);
    for _ in 0..60 * count {
        let w = dice.range(lo, hi) * n;
        let h = (w * dice.range(0.72, 1.38)).clamp(lo * n, hi * n);
        let (x, y) = (dice.range(1.0, n - w - 1.0), dice.range(1.0, n - h - 1.0));
        let frame = [x, y, x + w, y + h];
        let apart = |s: &Shape| {
            let f = s.frame;
            x + w + 2.0 < f[0] || f[2] + 2.0 < x || y + h + 2.0 < f[1] || f[3] + 2.0 < y
        };
        if scene.allows(frame) && out.iter().all(apart) {
            out.push(Shape::new(dice, category.wobble(), frame));
            if out.len() == count {
                return Some(out);
            }
        }
    }
    None
}

/// Draws one lesion into the canvas and returns its mask.
pub(crate) fn draw(dice: &mut Dice, canvas: &mut Canvas, shape: &Shape, category: Category, contrast: f32) -> Mask {
    let n = canvas.n;
    let mut mask = Mask { side: n as u32, inside: vec![false; n * n] };
    let under = canvas.clone();
    let f = shape.frame;
    let middle = ((f[0] + f[2]) / 2.0, (f[1] + f[3]) / 2.0);
    let amount = contrast * dice.range(0.0, 1.0);
    let patch = source(dice, n, shape);
    let lit = dice.range(-2.6, -0.6);
    let light = (lit.cos(), lit.sin());
    let spots: [f32; 2] = [dice.range(0.0, TAU), dice.range(0.0, TAU)];
    shape.each(n, |x, y, rho| {
        let i = y * n + x;
        let (px, py) = (x as f32 + 0.5, y as f32 + 0.5);
        let (u, v) = shape.local(px, py);
        mask.inside[i] = true;
        canvas.px[i] = match category {
            Category::Nodule => {
                let t = smooth(1.02, 0.72, rho) * lerp(0.40, 0.58, amount) * contrast;
                under.px[i].map(|p| lerp(p, 0.94, t))
            }
            Category::Opacity => {
                let cloud = 0.85 + 0.15 * (2.6 * u + spots[0]).sin() * (2.9 * v + spots[1]).sin();
                let t = smooth(1.06, 0.62, rho) * lerp(0.55, 0.68, amount) * contrast * cloud;
                under.px[i].map(|p| lerp(p, 0.92, t))
            }
            Category::Stone => {
                let t = smooth(1.0, 0.70, rho) * lerp(0.85, 0.97, amount) * contrast;
                under.px[i].map(|p| lerp(p, 1.0, t.min(1.0)))
            }
            Category::Cyst => {
                let bulge = 0.45 + 0.55 * rho * rho;
                let p = under.sample(middle.0 + (px - middle.0) * bulge, middle.1 + (py - middle.1) * bulge);
                let t = smooth(1.02, 0.78, rho) * lerp(0.68, 0.85, amount) * contrast;
                let rim = 0.10 * smooth(0.70, 0.88, rho) * smooth(1.0, 0.92, rho);
                p.map(|p| lerp(p, 0.12, t.min(1.0)) + rim)
            }
            Category::Polyp => {
                let bulge = 0.50 + 0.50 * rho * rho;
                let p = under.sample(patch.0 + (px - middle.0) * bulge, patch.1 + (py - middle.1) * bulge);
                polyp(p, under.px[i], rho, (u, v), light, amount, contrast)
            }
        };
    });
    mask
}

/// Middle of the texture that is cut out for pasting: in the lit part of the view, away from the lesion itself.
fn source(dice: &mut Dice, n: usize, shape: &Shape) -> (f32, f32) {
    let half = n as f32 / 2.0;
    let (mut best, mut far) = ((half, half), -1.0);
    for _ in 0..4 {
        let (r, t) = (dice.range(0.0, 0.24) * n as f32, dice.range(0.0, TAU));
        let at = (half + r * t.cos(), half + r * t.sin());
        let f = shape.frame;
        let d = (at.0 - (f[0] + f[2]) / 2.0).hypot(at.1 - (f[1] + f[3]) / 2.0);
        if d > far {
            (best, far) = (at, d);
        }
    }
    best
}

/// Colour of a polyp: pasted texture made redder, lit from one side, with a dark rim and one highlight.
fn polyp(
    pasted: [f32; 3],
    under: [f32; 3],
    rho: f32,
    (u, v): (f32, f32),
    light: (f32, f32),
    amount: f32,
    contrast: f32,
) -> [f32; 3] {
    let mean = (pasted[0] + pasted[1] + pasted[2]) / 3.0;
    let red = lerp(0.70, 0.95, amount) * contrast;
    let tint = [mean * 1.30 + 0.14, mean * 0.52 + 0.05, mean * 0.46 + 0.06];
    let lambert = 0.92 + 0.26 * (u * light.0 + v * light.1) - 0.42 * smooth(0.74, 1.0, rho);
    let (hx, hy) = (u - 0.42 * light.0, v - 0.42 * light.1);
    let glint = 0.75 * (-(hx * hx + hy * hy) / 0.022).exp();
    let edge = smooth(1.0, 0.90, rho);
    std::array::from_fn(|k| {
        let body = lerp(pasted[k], tint[k], red.min(1.0)) * lambert;
        lerp(under[k] * 0.72, body + (1.0 - body) * glint, edge)
    })
}
