//! Organ-like backgrounds: CT, X-ray, endoscopy. Each defines the regions in which lesions may be placed.

use std::f32::consts::TAU;

use super::modality::Modality;
use super::shape::{Noise, SampleRng, Shape, lerp, smoothstep};

/// Square image of linear intensities, nominally in `[0, 1]`, three channels per pixel.
#[derive(Clone)]
pub(crate) struct Canvas {
    pub(crate) n: usize,
    pub(crate) px: Vec<[f32; 3]>,
}

impl Canvas {
    fn fill(n: usize, mut f: impl FnMut(f32, f32) -> [f32; 3]) -> Self {
        let center = |i: usize| (i as f32 + 0.5) / n as f32;
        Self { n, px: (0..n * n).map(|i| f(center(i % n), center(i / n))).collect() }
    }

    /// Blends `value` into the inside of `shape`; `soft` is the width of the edge relative to the radius.
    fn paint(&mut self, shape: &Shape, value: f32, soft: f32) {
        let n = self.n;
        shape.for_each_pixel(n, |x, y, rho| {
            let t = smoothstep(1.0, 1.0 - soft, rho);
            self.px[y * n + x] = self.px[y * n + x].map(|v| lerp(v, value, t));
        });
    }

    /// Samples bilinearly at a position in pixels.
    pub(crate) fn sample(&self, x: f32, y: f32) -> [f32; 3] {
        let top = (self.n - 1) as f32;
        let x = (x - 0.5).clamp(0.0, top);
        let y = (y - 0.5).clamp(0.0, top);
        let i = (x as usize).min(self.n - 2);
        let j = (y as usize).min(self.n - 2);
        let s = x - i as f32;
        let t = y - j as f32;
        let pixel = |i: usize, j: usize| self.px[j * self.n + i];
        let a = pixel(i, j);
        let b = pixel(i + 1, j);
        let c = pixel(i, j + 1);
        let d = pixel(i + 1, j + 1);
        std::array::from_fn(|k| lerp(lerp(a[k], b[k], s), lerp(c[k], d[k], s), t))
    }
}

/// A background, the detector noise added last, and the regions in which lesions may be placed.
pub(crate) struct Scene {
    pub(crate) canvas: Canvas,
    /// Noise added to all channels of each pixel after the lesions.
    pub(crate) grain: Vec<f32>,
    /// A lesion must be inside one of these.
    inside: Vec<Shape>,
    /// A lesion must not touch any of these.
    outside: Vec<Shape>,
    /// Share of a lesion's half size that must be inside.
    inner_share: f32,
}

impl Scene {
    pub(crate) fn new(rng: &mut SampleRng, modality: Modality, n: usize) -> Self {
        match modality {
            Modality::Ct => ct(rng, n),
            Modality::Xray => xray(rng, n),
            Modality::Endoscopy => endoscopy(rng, n),
        }
    }

    /// Returns whether a lesion with this frame (pixels) may be placed here.
    pub(crate) fn allows(&self, f: [f32; 4]) -> bool {
        let cx = (f[0] + f[2]) / 2.0;
        let cy = (f[1] + f[3]) / 2.0;
        let a = (f[2] - f[0]) / 2.0 * self.inner_share;
        let b = (f[3] - f[1]) / 2.0 * self.inner_share;
        let ring = (0..8).map(|k| (k as f32 * std::f32::consts::FRAC_PI_4).sin_cos());
        let points: Vec<(f32, f32)> = ring.map(|(s, c)| (cx + a * c, cy + b * s)).chain([(cx, cy)]).collect();
        self.inside.iter().any(|s| points.iter().all(|&(x, y)| s.rho(x, y) < 1.0))
            && !self.outside.iter().any(|s| points.iter().any(|&(x, y)| s.rho(x, y) < 1.0))
    }
}

/// Returns a box around a centre, in pixels of an image of side `n`; centre and half sides are relative to the image.
fn box_around(n: usize, cx: f32, cy: f32, a: f32, b: f32) -> [f32; 4] {
    [cx - a, cy - b, cx + a, cy + b].map(|v| v * n as f32)
}

fn grain(rng: &mut SampleRng, n: usize, deviation: f32) -> Vec<f32> {
    (0..n * n).map(|_| rng.normal() * deviation).collect()
}

/// Draws an axial CT slice: air, fat ring, soft tissue, a liver-like and a stomach-like organ, two kidneys, vessel and spine.
fn ct(rng: &mut SampleRng, n: usize) -> Scene {
    let cx = rng.range(0.48, 0.52);
    let cy = rng.range(0.48, 0.51);
    let a = rng.range(0.43, 0.47);
    let b = rng.range(0.37, 0.42);
    let mut canvas = Canvas::fill(n, |_, _| [0.03; 3]);
    let body = Shape::new(rng, 0.035, box_around(n, cx, cy, a, b));
    canvas.paint(&body, rng.range(0.24, 0.29), 0.03);
    let inner = body.scaled(rng.range(0.89, 0.93));
    canvas.paint(&inner, rng.range(0.36, 0.41), 0.05);
    let organ = |rng: &mut SampleRng, canvas: &mut Canvas, at: [f32; 4], wobble: f32, lo: f32, hi: f32| {
        let x = cx + at[0] * a + rng.range(-0.015, 0.015);
        let y = cy + at[1] * b + rng.range(-0.015, 0.015);
        let grow = rng.range(0.9, 1.1);
        let s = Shape::new(rng, wobble, box_around(n, x, y, at[2] * a * grow, at[3] * b * grow));
        canvas.paint(&s, rng.range(lo, hi), 0.16);
    };
    let mirror = if rng.unit() < 0.5 { -1.0 } else { 1.0 };
    organ(rng, &mut canvas, [-0.40 * mirror, -0.22, 0.42, 0.50], 0.16, 0.45, 0.50);
    organ(rng, &mut canvas, [0.42 * mirror, -0.30, 0.30, 0.34], 0.20, 0.41, 0.46);
    organ(rng, &mut canvas, [0.58 * mirror, 0.12, 0.17, 0.24], 0.16, 0.45, 0.49);
    for side in [-1.0, 1.0] {
        organ(rng, &mut canvas, [0.38 * side, 0.50, 0.15, 0.20], 0.14, 0.46, 0.52);
    }
    organ(rng, &mut canvas, [0.07 * mirror, 0.24, 0.075, 0.085], 0.03, 0.47, 0.51);
    let sx = cx + rng.range(-0.01, 0.01);
    let sy = cy + 0.56 * b;
    let spine = Shape::new(rng, 0.05, box_around(n, sx, sy, 0.075, 0.062));
    canvas.paint(&spine, rng.range(0.68, 0.74), 0.20);
    canvas.paint(&Shape::new(rng, 0.05, box_around(n, sx, sy, 0.05, 0.04)), rng.range(0.56, 0.60), 0.4);
    let arch = Shape::new(rng, 0.12, box_around(n, sx, sy + 0.21 * b, 0.060, 0.045));
    canvas.paint(&arch, rng.range(0.60, 0.66), 0.25);
    canvas.paint(&Shape::new(rng, 0.03, box_around(n, sx, sy + 0.18 * b, 0.026, 0.022)), 0.34, 0.3);
    let coarse = Noise::new(rng, 5);
    let fine = Noise::new(rng, 22);
    let table = cy + b + 0.035;
    let texture = Canvas::fill(n, |u, v| {
        let line = (-((v - table - 0.10 * (u - 0.5).powi(2)) / 0.008).powi(2)).exp() * 0.14;
        [0.022 * coarse.at(u, v) + 0.020 * fine.at(u, v), line, 0.0]
    });
    for (p, t) in canvas.px.iter_mut().zip(&texture.px) {
        let tissue = smoothstep(0.05, 0.2, p[0]);
        *p = p.map(|v| v + t[0] * tissue + t[1] * (1.0 - tissue));
    }
    let grain = grain(rng, n, 0.016);
    let spine = Shape::new(rng, 0.0, box_around(n, sx, sy + 0.1 * b, 0.10, 0.12));
    Scene { canvas, grain, inside: vec![inner.scaled(0.94)], outside: vec![spine], inner_share: 0.95 }
}

/// Draws a chest X-ray: two dark lung fields with ribs, bright mediastinum, heart and diaphragm, collar bones.
fn xray(rng: &mut SampleRng, n: usize) -> Scene {
    let cx = rng.range(0.485, 0.515);
    let cy = rng.range(0.45, 0.49);
    let top = rng.range(0.50, 0.56);
    let tilt = rng.range(-0.05, 0.05);
    let shoulder = rng.range(0.02, 0.08);
    let mut canvas = Canvas::fill(n, |u, v| {
        let edge = smoothstep(0.49, 0.44, (u - cx).abs() - shoulder * v);
        let neck = smoothstep(0.0, 0.16, v - 0.30 * ((u - cx).abs() - 0.16).max(0.0));
        [lerp(0.05, top + 0.10 * v + tilt * (u - cx), edge * (0.45 + 0.55 * neck)); 3]
    });
    let lung = rng.range(0.17, 0.23);
    let w = rng.range(0.185, 0.205);
    let h = rng.range(0.34, 0.38);
    let lungs: Vec<Shape> =
        [-1.0, 1.0].iter().map(|side| Shape::new(rng, 0.09, box_around(n, cx + side * 0.235, cy, w, h))).collect();
    for s in &lungs {
        canvas.paint(s, lung, 0.28);
    }
    let heart = box_around(n, cx + 0.07, cy + 0.19, rng.range(0.13, 0.16), rng.range(0.15, 0.18));
    let heart = Shape::new(rng, 0.08, heart);
    canvas.paint(&heart, top + 0.06, 0.30);
    let rate = rng.range(8.0, 9.5);
    let phase = rng.range(0.0, 1.0);
    let bend = rng.range(0.9, 1.3);
    let floor = cy + h * rng.range(0.72, 0.80);
    let coarse = Noise::new(rng, 6);
    let fine = Noise::new(rng, 26);
    let texture = Canvas::fill(n, |u, v| {
        let x = (u - cx).abs();
        let wave = (TAU * (rate * (v - bend * (x - 0.22).powi(2) * 1.8 - 0.12 * x) + phase)).sin();
        let ribs = smoothstep(0.15, 0.85, wave)
            * smoothstep(0.05, 0.14, x)
            * smoothstep(0.46, 0.40, x)
            * lerp(1.0, 0.35, smoothstep(-0.04, 0.04, v - floor));
        let dome = smoothstep(-0.02, 0.03, v - floor + 0.16 * (0.5 - (2.4 * (x - 0.21)).abs()).max(0.0));
        let bone = (-((v - 0.125 - 0.22 * (x - 0.1).abs()) / 0.016).powi(2)).exp() * smoothstep(0.03, 0.08, x);
        let spine = (-((u - cx) / 0.045).powi(2)).exp() * (0.05 + 0.02 * (v * 70.0).sin());
        [0.055 * ribs + 0.08 * bone + spine + 0.02 * coarse.at(u, v) + 0.022 * fine.at(u, v), dome, 0.0]
    });
    for (p, t) in canvas.px.iter_mut().zip(&texture.px) {
        let body = smoothstep(0.06, 0.2, p[0]);
        *p = p.map(|v| lerp(v, (top + 0.08).max(v), t[1] * body) + t[0] * body);
    }
    let inside = lungs.iter().map(|s| above_diaphragm(s, floor * n as f32)).collect();
    let grain = grain(rng, n, 0.014);
    Scene { canvas, grain, inside, outside: vec![heart.scaled(0.8)], inner_share: 0.82 }
}

/// Returns the part of a lung field above the diaphragm, in which lesions are placed.
fn above_diaphragm(lung: &Shape, floor: f32) -> Shape {
    let mut s = lung.scaled(1.02);
    s.frame[3] = s.frame[3].min(floor);
    s
}

/// Draws mucosa: pink texture with folds, vessels, a dark lumen, vignetting and specular dots.
fn endoscopy(rng: &mut SampleRng, n: usize) -> Scene {
    let base = [rng.range(0.74, 0.82), rng.range(0.44, 0.50), rng.range(0.36, 0.42)];
    let coarse = Noise::new(rng, 4);
    let mid = Noise::new(rng, 11);
    let fine = Noise::new(rng, 30);
    let vessels = Noise::new(rng, 7);
    let turn = rng.range(0.0, TAU);
    let away = rng.range(0.30, 0.42);
    let lx = 0.5 + away * turn.cos();
    let ly = 0.5 + away * turn.sin();
    let folds = rng.range(2.5, 4.0);
    let phase = rng.range(0.0, 6.0);
    let depth = rng.range(0.07, 0.12);
    let lumen = rng.range(0.10, 0.15);
    let mut canvas = Canvas::fill(n, |u, v| {
        let far = (u - lx).hypot(v - ly);
        let fold = (TAU * folds * far.sqrt() + phase + 1.3 * coarse.at(u, v)).sin();
        let light = 1.0 + depth * fold + 0.10 * coarse.at(v, u) + 0.05 * mid.at(u, v) + 0.035 * fine.at(u, v);
        let hole = smoothstep(0.0, lumen * 2.0, far);
        let line = smoothstep(0.09, 0.0, vessels.at(u, v).abs()) * 0.16;
        let k = light * lerp(0.28, 1.0, hole);
        [base[0] * k * (1.0 - 0.3 * line), base[1] * k * (1.0 - line), base[2] * k * (1.0 - line)]
    });
    for _ in 0..6 + rng.below(8) {
        let r = rng.range(0.05, 0.42);
        let t = rng.range(0.0, TAU);
        let size = rng.range(0.010, 0.022);
        let dot = box_around(n, 0.5 + r * t.cos(), 0.5 + r * t.sin(), size * rng.range(0.8, 1.6), size);
        let s = Shape::new(rng, 0.2, dot);
        canvas.paint(&s, 0.97, 0.7);
    }
    for i in 0..n * n {
        let offset = |i: usize| (i as f32 + 0.5) / n as f32 - 0.5;
        let r = offset(i % n).hypot(offset(i / n));
        let shade = (1.0 - 0.9 * r * r) * smoothstep(0.64, 0.55, r);
        canvas.px[i] = canvas.px[i].map(|v| v * shade + 0.02);
    }
    let grain = grain(rng, n, 0.010);
    let view = Shape::new(rng, 0.0, box_around(n, 0.5, 0.5, 0.46, 0.46));
    let hole = Shape::new(rng, 0.0, box_around(n, lx, ly, lumen * 0.8, lumen * 0.8));
    Scene { canvas, grain, inside: vec![view], outside: vec![hole], inner_share: 0.95 }
}
