//! Lesions: intensity change, cut-and-paste and deformation inside an exact mask. Pixels outside the mask are unchanged.

use std::f32::consts::TAU;

use serde::{Deserialize, Serialize};
use unveil_core::BBox;

use super::modality::Modality;
use super::phantom::{Canvas, Scene};
use super::shape::{SampleRng, Shape, lerp, smoothstep};

/// Kind of lesion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Category {
    /// Bright round blob (CT, X-ray).
    Nodule,
    /// Dark smooth ellipse that magnifies the texture under it (CT).
    Cyst,
    /// Fuzzy bright patch (X-ray).
    Opacity,
    /// Magnified texture pasted from elsewhere, lit from one side (endoscopy).
    Polyp,
    /// Small and very bright (CT).
    Stone,
}

impl Category {
    /// All categories, in the order in which they are drawn.
    pub const ALL: [Self; 5] = [Self::Nodule, Self::Cyst, Self::Opacity, Self::Polyp, Self::Stone];

    /// Returns the name used in records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nodule => "nodule",
            Self::Cyst => "cyst",
            Self::Opacity => "opacity",
            Self::Polyp => "polyp",
            Self::Stone => "stone",
        }
    }

    /// Returns the value of the key `technique` in records.
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

    /// Returns the smallest and largest box side as a share of the image side (14 to 40 pixels of 96).
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

/// Mask of a lesion: exactly the pixels that it changes.
#[derive(Debug, Clone)]
pub struct Mask {
    /// Side of the image in pixels.
    pub side: u32,
    /// `side * side` flags, row-major.
    pub inside: Vec<bool>,
}

impl Mask {
    /// Returns the exact bounding box: integer pixels, right and bottom edge exclusive; `None` for an empty mask.
    pub fn bounds(&self) -> Option<BBox> {
        let n = self.side as usize;
        let mut x1 = n;
        let mut y1 = n;
        let mut x2 = 0;
        let mut y2 = 0;
        for i in (0..n * n).filter(|&i| self.inside[i]) {
            let x = i % n;
            let y = i / n;
            (x1, y1, x2, y2) = (x1.min(x), y1.min(y), x2.max(x + 1), y2.max(y + 1));
        }
        (x2 > 0).then(|| [x1 as f32, y1 as f32, x2 as f32, y2 as f32].into())
    }
}

/// Places `count` lesions of one category apart from each other; `None` if the scene has no space (draw another scene).
pub(crate) fn place(rng: &mut SampleRng, scene: &Scene, category: Category, count: usize) -> Option<Vec<Shape>> {
    let n = scene.canvas.n as f32;
    let (lo, hi) = category.sides();
    let hi = if count > 1 { lerp(lo, hi, 0.7) } else { hi };
    let mut out: Vec<Shape> = Vec::with_capacity(count);
    for _ in 0..60 * count {
        let w = rng.range(lo, hi) * n;
        let h = (w * rng.range(0.72, 1.38)).clamp(lo * n, hi * n);
        let x = rng.range(1.0, n - w - 1.0);
        let y = rng.range(1.0, n - h - 1.0);
        let frame = [x, y, x + w, y + h];
        let apart = |s: &Shape| {
            let f = s.frame;
            x + w + 2.0 < f[0] || f[2] + 2.0 < x || y + h + 2.0 < f[1] || f[3] + 2.0 < y
        };
        if scene.allows(frame) && out.iter().all(apart) {
            out.push(Shape::new(rng, category.wobble(), frame));
            if out.len() == count {
                return Some(out);
            }
        }
    }
    None
}

/// Draws one lesion into the canvas and returns its mask.
pub(crate) fn draw(rng: &mut SampleRng, canvas: &mut Canvas, shape: &Shape, category: Category, contrast: f32) -> Mask {
    let n = canvas.n;
    let mut mask = Mask { side: n as u32, inside: vec![false; n * n] };
    let under = canvas.clone();
    let f = shape.frame;
    let middle = ((f[0] + f[2]) / 2.0, (f[1] + f[3]) / 2.0);
    let amount = contrast * rng.range(0.0, 1.0);
    let patch = patch_center(rng, n, shape);
    let lit = rng.range(-2.6, -0.6);
    let light = (lit.cos(), lit.sin());
    let spots: [f32; 2] = [rng.range(0.0, TAU), rng.range(0.0, TAU)];
    shape.for_each_pixel(n, |x, y, rho| {
        let i = y * n + x;
        let px = x as f32 + 0.5;
        let py = y as f32 + 0.5;
        let (u, v) = shape.local(px, py);
        mask.inside[i] = true;
        canvas.px[i] = match category {
            Category::Nodule => {
                let t = smoothstep(1.02, 0.72, rho) * lerp(0.40, 0.58, amount) * contrast;
                under.px[i].map(|p| lerp(p, 0.94, t))
            }
            Category::Opacity => {
                let cloud = 0.85 + 0.15 * (2.6 * u + spots[0]).sin() * (2.9 * v + spots[1]).sin();
                let t = smoothstep(1.06, 0.62, rho) * lerp(0.55, 0.68, amount) * contrast * cloud;
                under.px[i].map(|p| lerp(p, 0.92, t))
            }
            Category::Stone => {
                let t = smoothstep(1.0, 0.70, rho) * lerp(0.85, 0.97, amount) * contrast;
                under.px[i].map(|p| lerp(p, 1.0, t.min(1.0)))
            }
            Category::Cyst => {
                let bulge = 0.45 + 0.55 * rho * rho;
                let p = under.sample(middle.0 + (px - middle.0) * bulge, middle.1 + (py - middle.1) * bulge);
                let t = smoothstep(1.02, 0.78, rho) * lerp(0.68, 0.85, amount) * contrast;
                let rim = 0.10 * smoothstep(0.70, 0.88, rho) * smoothstep(1.0, 0.92, rho);
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

/// Chooses the centre of the texture that is pasted: in the lit part of the view, away from the lesion itself.
fn patch_center(rng: &mut SampleRng, n: usize, shape: &Shape) -> (f32, f32) {
    let half = n as f32 / 2.0;
    let mut best = (half, half);
    let mut farthest = -1.0;
    for _ in 0..4 {
        let r = rng.range(0.0, 0.24) * n as f32;
        let t = rng.range(0.0, TAU);
        let center = (half + r * t.cos(), half + r * t.sin());
        let f = shape.frame;
        let distance = (center.0 - (f[0] + f[2]) / 2.0).hypot(center.1 - (f[1] + f[3]) / 2.0);
        if distance > farthest {
            best = center;
            farthest = distance;
        }
    }
    best
}

/// Returns the colour of a polyp: pasted texture made redder, lit from one side, with a dark rim and one highlight.
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
    let lambert = 0.92 + 0.26 * (u * light.0 + v * light.1) - 0.42 * smoothstep(0.74, 1.0, rho);
    let hx = u - 0.42 * light.0;
    let hy = v - 0.42 * light.1;
    let glint = 0.75 * (-(hx * hx + hy * hy) / 0.022).exp();
    let edge = smoothstep(1.0, 0.90, rho);
    std::array::from_fn(|k| {
        let body = lerp(pasted[k], tint[k], red.min(1.0)) * lambert;
        lerp(under[k] * 0.72, body + (1.0 - body) * glint, edge)
    })
}
