//! Organ-like backgrounds: CT, X-ray, endoscopy. Each says where lesions may lie; none knows of lesions.

use std::f32::consts::TAU;

use super::Modality;
use super::shape::{Dice, Noise, Shape, lerp, smooth};

/// Square image in linear intensities, `[0, 1]` before clamping, three channels a pixel.
#[derive(Clone)]
pub(crate) struct Canvas {
    pub(crate) n: usize,
    pub(crate) px: Vec<[f32; 3]>,
}

impl Canvas {
    fn fill(n: usize, mut f: impl FnMut(f32, f32) -> [f32; 3]) -> Self {
        let at = |i: usize| (i as f32 + 0.5) / n as f32;
        Self { n, px: (0..n * n).map(|i| f(at(i % n), at(i / n))).collect() }
    }

    /// Blends `value` into the inside of `shape`; `soft` is the width of the edge relative to the radius.
    fn paint(&mut self, shape: &Shape, value: f32, soft: f32) {
        let n = self.n;
        shape.each(n, |x, y, rho| {
            let t = smooth(1.0, 1.0 - soft, rho);
            self.px[y * n + x] = self.px[y * n + x].map(|v| lerp(v, value, t));
        });
    }

    /// Bilinear sample at a position in pixels.
    pub(crate) fn sample(&self, x: f32, y: f32) -> [f32; 3] {
        let top = (self.n - 1) as f32;
        let (x, y) = ((x - 0.5).clamp(0.0, top), (y - 0.5).clamp(0.0, top));
        let (i, j) = ((x as usize).min(self.n - 2), (y as usize).min(self.n - 2));
        let (s, t) = (x - i as f32, y - j as f32);
        let at = |i: usize, j: usize| self.px[j * self.n + i];
        let (a, b, c, d) = (at(i, j), at(i + 1, j), at(i, j + 1), at(i + 1, j + 1));
        std::array::from_fn(|k| lerp(lerp(a[k], b[k], s), lerp(c[k], d[k], s), t))
    }
}

/// A background with the noise that the detector adds last, and the places where lesions may lie.
pub(crate) struct Scene {
    pub(crate) canvas: Canvas,
    /// Added to all channels of each pixel after the lesions.
    pub(crate) grain: Vec<f32>,
    inside: Vec<Shape>,
    outside: Vec<Shape>,
    /// How much of a lesion's half size must lie inside.
    hold: f32,
}

impl Scene {
    pub(crate) fn new(dice: &mut Dice, modality: Modality, n: usize) -> Self {
        match modality {
            Modality::Ct => ct(dice, n),
            Modality::Xray => xray(dice, n),
            Modality::Endoscopy => endoscopy(dice, n),
        }
    }

    /// True when a lesion with this frame (pixels) lies where lesions of the modality may lie.
    pub(crate) fn allows(&self, f: [f32; 4]) -> bool {
        let (cx, cy) = ((f[0] + f[2]) / 2.0, (f[1] + f[3]) / 2.0);
        let (a, b) = ((f[2] - f[0]) / 2.0 * self.hold, (f[3] - f[1]) / 2.0 * self.hold);
        let ring = (0..8).map(|k| (k as f32 * std::f32::consts::FRAC_PI_4).sin_cos());
        let points: Vec<(f32, f32)> = ring.map(|(s, c)| (cx + a * c, cy + b * s)).chain([(cx, cy)]).collect();
        self.inside.iter().any(|s| points.iter().all(|&(x, y)| s.rho(x, y) < 1.0))
            && !self.outside.iter().any(|s| points.iter().any(|&(x, y)| s.rho(x, y) < 1.0))
    }
}

/// A box about a middle, in pixels of an image of side `n`; middle and half sides relative to the image.
fn about(n: usize, cx: f32, cy: f32, a: f32, b: f32) -> [f32; 4] {
    [cx - a, cy - b, cx + a, cy + b].map(|v| v * n as f32)
}

fn grain(dice: &mut Dice, n: usize, deviation: f32) -> Vec<f32> {
    (0..n * n).map(|_| dice.normal() * deviation).collect()
}

/// Axial slice: air, fat ring, soft tissue, a liver-like and a stomach-like organ, two kidneys, vessel and spine.
fn ct(d: &mut Dice, n: usize) -> Scene {
    let (cx, cy) = (d.range(0.48, 0.52), d.range(0.48, 0.51));
    let (a, b) = (d.range(0.43, 0.47), d.range(0.37, 0.42));
    let mut canvas = Canvas::fill(n, |_, _| [0.03; 3]);
    let body = Shape::new(d, 0.035, about(n, cx, cy, a, b));
    canvas.paint(&body, d.range(0.24, 0.29), 0.03);
    let inner = body.scaled(d.range(0.89, 0.93));
    canvas.paint(&inner, d.range(0.36, 0.41), 0.05);
    let organ = |d: &mut Dice, canvas: &mut Canvas, at: [f32; 4], wobble: f32, lo: f32, hi: f32| {
        let (x, y) = (cx + at[0] * a + d.range(-0.015, 0.015), cy + at[1] * b + d.range(-0.015, 0.015));
        let grow = d.range(0.9, 1.1);
        let s = Shape::new(d, wobble, about(n, x, y, at[2] * a * grow, at[3] * b * grow));
        canvas.paint(&s, d.range(lo, hi), 0.16);
    };
    let mirror = if d.unit() < 0.5 { -1.0 } else { 1.0 };
    organ(d, &mut canvas, [-0.40 * mirror, -0.22, 0.42, 0.50], 0.16, 0.45, 0.50);
    organ(d, &mut canvas, [0.42 * mirror, -0.30, 0.30, 0.34], 0.20, 0.41, 0.46);
    organ(d, &mut canvas, [0.58 * mirror, 0.12, 0.17, 0.24], 0.16, 0.45, 0.49);
    for side in [-1.0, 1.0] {
        organ(d, &mut canvas, [0.38 * side, 0.50, 0.15, 0.20], 0.14, 0.46, 0.52);
    }
    organ(d, &mut canvas, [0.07 * mirror, 0.24, 0.075, 0.085], 0.03, 0.47, 0.51);
    let (sx, sy) = (cx + d.range(-0.01, 0.01), cy + 0.56 * b);
    let spine = Shape::new(d, 0.05, about(n, sx, sy, 0.075, 0.062));
    canvas.paint(&spine, d.range(0.68, 0.74), 0.20);
    canvas.paint(&Shape::new(d, 0.05, about(n, sx, sy, 0.05, 0.04)), d.range(0.56, 0.60), 0.4);
    let arch = Shape::new(d, 0.12, about(n, sx, sy + 0.21 * b, 0.060, 0.045));
    canvas.paint(&arch, d.range(0.60, 0.66), 0.25);
    canvas.paint(&Shape::new(d, 0.03, about(n, sx, sy + 0.18 * b, 0.026, 0.022)), 0.34, 0.3);
    let (coarse, fine) = (Noise::new(d, 5), Noise::new(d, 22));
    let table = cy + b + 0.035;
    let texture = Canvas::fill(n, |u, v| {
        let line = (-((v - table - 0.10 * (u - 0.5).powi(2)) / 0.008).powi(2)).exp() * 0.14;
        [0.022 * coarse.at(u, v) + 0.020 * fine.at(u, v), line, 0.0]
    });
    for (p, t) in canvas.px.iter_mut().zip(&texture.px) {
        let tissue = smooth(0.05, 0.2, p[0]);
        *p = p.map(|v| v + t[0] * tissue + t[1] * (1.0 - tissue));
    }
    let grain = grain(d, n, 0.016);
    let spine = Shape::new(d, 0.0, about(n, sx, sy + 0.1 * b, 0.10, 0.12));
    Scene { canvas, grain, inside: vec![inner.scaled(0.94)], outside: vec![spine], hold: 0.95 }
}

/// Chest film: two dark lung fields with ribs, bright mediastinum, heart and diaphragm, collar bones.
fn xray(d: &mut Dice, n: usize) -> Scene {
    let (cx, cy) = (d.range(0.485, 0.515), d.range(0.45, 0.49));
    let (top, tilt) = (d.range(0.50, 0.56), d.range(-0.05, 0.05));
    let shoulder = d.range(0.02, 0.08);
    let mut canvas = Canvas::fill(n, |u, v| {
        let edge = smooth(0.49, 0.44, (u - cx).abs() - shoulder * v);
        let neck = smooth(0.0, 0.16, v - 0.30 * ((u - cx).abs() - 0.16).max(0.0));
        [lerp(0.05, top + 0.10 * v + tilt * (u - cx), edge * (0.45 + 0.55 * neck)); 3]
    });
    let lung = d.range(0.17, 0.23);
    let (w, h) = (d.range(0.185, 0.205), d.range(0.34, 0.38));
    let lungs: Vec<Shape> =
        [-1.0, 1.0].iter().map(|side| Shape::new(d, 0.09, about(n, cx + side * 0.235, cy, w, h))).collect();
    for s in &lungs {
        canvas.paint(s, lung, 0.28);
    }
    let heart = about(n, cx + 0.07, cy + 0.19, d.range(0.13, 0.16), d.range(0.15, 0.18));
    let heart = Shape::new(d, 0.08, heart);
    canvas.paint(&heart, top + 0.06, 0.30);
    let (rate, phase, bend) = (d.range(8.0, 9.5), d.range(0.0, 1.0), d.range(0.9, 1.3));
    let floor = cy + h * d.range(0.72, 0.80);
    let (coarse, fine) = (Noise::new(d, 6), Noise::new(d, 26));
    let texture = Canvas::fill(n, |u, v| {
        let x = (u - cx).abs();
        let wave = (TAU * (rate * (v - bend * (x - 0.22).powi(2) * 1.8 - 0.12 * x) + phase)).sin();
        let ribs = smooth(0.15, 0.85, wave)
            * smooth(0.05, 0.14, x)
            * smooth(0.46, 0.40, x)
            * lerp(1.0, 0.35, smooth(-0.04, 0.04, v - floor));
        let dome = smooth(-0.02, 0.03, v - floor + 0.16 * (0.5 - (2.4 * (x - 0.21)).abs()).max(0.0));
        let bone = (-((v - 0.125 - 0.22 * (x - 0.1).abs()) / 0.016).powi(2)).exp() * smooth(0.03, 0.08, x);
        let spine = (-((u - cx) / 0.045).powi(2)).exp() * (0.05 + 0.02 * (v * 70.0).sin());
        [0.055 * ribs + 0.08 * bone + spine + 0.02 * coarse.at(u, v) + 0.022 * fine.at(u, v), dome, 0.0]
    });
    for (p, t) in canvas.px.iter_mut().zip(&texture.px) {
        let body = smooth(0.06, 0.2, p[0]);
        *p = p.map(|v| lerp(v, (top + 0.08).max(v), t[1] * body) + t[0] * body);
    }
    let inside = lungs.iter().map(|s| lift(s, floor * n as f32)).collect();
    let grain = grain(d, n, 0.014);
    Scene { canvas, grain, inside, outside: vec![heart.scaled(0.8)], hold: 0.82 }
}

/// The part of a lung field above the diaphragm, as a frame that lesions keep to.
fn lift(lung: &Shape, floor: f32) -> Shape {
    let mut s = lung.scaled(1.02);
    s.frame[3] = s.frame[3].min(floor);
    s
}

/// Mucosa: pink texture with folds, vessels, a dark lumen, vignetting and specular dots.
fn endoscopy(d: &mut Dice, n: usize) -> Scene {
    let base = [d.range(0.74, 0.82), d.range(0.44, 0.50), d.range(0.36, 0.42)];
    let (coarse, mid, fine) = (Noise::new(d, 4), Noise::new(d, 11), Noise::new(d, 30));
    let vessels = Noise::new(d, 7);
    let (turn, away) = (d.range(0.0, TAU), d.range(0.30, 0.42));
    let (lx, ly) = (0.5 + away * turn.cos(), 0.5 + away * turn.sin());
    let (folds, phase) = (d.range(2.5, 4.0), d.range(0.0, 6.0));
    let (depth, lumen) = (d.range(0.07, 0.12), d.range(0.10, 0.15));
    let mut canvas = Canvas::fill(n, |u, v| {
        let far = (u - lx).hypot(v - ly);
        let fold = (TAU * folds * far.sqrt() + phase + 1.3 * coarse.at(u, v)).sin();
        let light = 1.0 + depth * fold + 0.10 * coarse.at(v, u) + 0.05 * mid.at(u, v) + 0.035 * fine.at(u, v);
        let hole = smooth(0.0, lumen * 2.0, far);
        let line = smooth(0.09, 0.0, vessels.at(u, v).abs()) * 0.16;
        let k = light * lerp(0.28, 1.0, hole);
        [base[0] * k * (1.0 - 0.3 * line), base[1] * k * (1.0 - line), base[2] * k * (1.0 - line)]
    });
    for _ in 0..6 + d.below(8) {
        let (r, t, size) = (d.range(0.05, 0.42), d.range(0.0, TAU), d.range(0.010, 0.022));
        let dot = about(n, 0.5 + r * t.cos(), 0.5 + r * t.sin(), size * d.range(0.8, 1.6), size);
        let s = Shape::new(d, 0.2, dot);
        canvas.paint(&s, 0.97, 0.7);
    }
    for i in 0..n * n {
        let at = |i: usize| (i as f32 + 0.5) / n as f32 - 0.5;
        let r = at(i % n).hypot(at(i / n));
        let shade = (1.0 - 0.9 * r * r) * smooth(0.64, 0.55, r);
        canvas.px[i] = canvas.px[i].map(|v| v * shade + 0.02);
    }
    let grain = grain(d, n, 0.010);
    let view = Shape::new(d, 0.0, about(n, 0.5, 0.5, 0.46, 0.46));
    let hole = Shape::new(d, 0.0, about(n, lx, ly, lumen * 0.8, lumen * 0.8));
    Scene { canvas, grain, inside: vec![view], outside: vec![hole], hold: 0.95 }
}
