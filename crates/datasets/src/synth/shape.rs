//! Building blocks of the synthetic images: a seeded random generator, closed curves deformed by harmonics, smooth value noise.

use std::f32::consts::TAU;

use rand::RngCore;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// Random numbers of one record, a function of (seed, index).
pub(crate) struct SampleRng(ChaCha8Rng);

impl SampleRng {
    pub(crate) fn new(seed: u64, index: u64) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&index.to_le_bytes());
        key[16..].copy_from_slice(b"unveil synthetic");
        Self(ChaCha8Rng::from_seed(key))
    }

    /// Returns a uniform number in `[0, 1)`.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.0.next_u32() >> 8) as f32 / (1u32 << 24) as f32
    }

    /// Returns a uniform number in `[lo, hi)`.
    pub(crate) fn range(&mut self, lo: f32, hi: f32) -> f32 {
        lo + (hi - lo) * self.unit()
    }

    /// Returns a uniform integer in `0..n`, `n` small.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        ((f64::from(self.0.next_u32()) / 4_294_967_296.0) * n as f64) as usize
    }

    /// Returns an approximately normal number with mean 0 and deviation 1 (sum of four uniform bytes).
    pub(crate) fn normal(&mut self) -> f32 {
        let sum: i32 = self.0.next_u32().to_le_bytes().iter().map(|&b| i32::from(b)).sum();
        (sum - 510) as f32 / 147.8
    }
}

pub(crate) fn lerp(a: f32, b: f32, t: f32) -> f32 {
    a + (b - a) * t
}

/// Interpolates smoothly from 0 at `from` to 1 at `to`, which may be in either order.
pub(crate) fn smoothstep(from: f32, to: f32, x: f32) -> f32 {
    let t = ((x - from) / (to - from)).clamp(0.0, 1.0);
    t * t * (3.0 - 2.0 * t)
}

/// Number of angles at which the radius of a curve is stored.
const STEPS: usize = 128;

/// A closed star-shaped curve whose radius is deformed by harmonics, stretched to fill a given box (pixels).
#[derive(Debug, Clone)]
pub(crate) struct Shape {
    radius: [f32; STEPS + 1],
    /// Box in pixels that the curve touches on all four sides.
    pub(crate) frame: [f32; 4],
    local: [f32; 4],
}

impl Shape {
    /// Creates a random curve in `frame`; `wobble` is the amplitude of the deformation relative to the radius (0: ellipse, 0.3: very uneven).
    pub(crate) fn new(rng: &mut SampleRng, wobble: f32, frame: [f32; 4]) -> Self {
        let mut radius = [1.0; STEPS + 1];
        for k in 2..=5 {
            let a = rng.range(0.3, 1.0) * wobble / k as f32 * 1.6;
            let phase = rng.range(0.0, TAU);
            for (i, r) in radius.iter_mut().enumerate() {
                *r += a * (k as f32 * i as f32 / STEPS as f32 * TAU + phase).cos();
            }
        }
        let mut local = [f32::MAX, f32::MAX, f32::MIN, f32::MIN];
        for (i, r) in radius.iter_mut().enumerate() {
            *r = r.max(0.3);
            let (s, c) = (i as f32 / STEPS as f32 * TAU).sin_cos();
            local = [local[0].min(*r * c), local[1].min(*r * s), local[2].max(*r * c), local[3].max(*r * s)];
        }
        Self { radius, frame, local }
    }

    /// Returns the curve enlarged by `factor` around its centre.
    pub(crate) fn scaled(&self, factor: f32) -> Self {
        let f = self.frame;
        let cx = (f[0] + f[2]) / 2.0;
        let cy = (f[1] + f[3]) / 2.0;
        let a = (f[2] - f[0]) / 2.0 * factor;
        let b = (f[3] - f[1]) / 2.0 * factor;
        Self { frame: [cx - a, cy - b, cx + a, cy + b], ..self.clone() }
    }

    /// Converts a point in pixels to the coordinates of the curve, in which its mean radius is 1.
    pub(crate) fn local(&self, x: f32, y: f32) -> (f32, f32) {
        let f = self.frame;
        let l = self.local;
        (l[0] + (x - f[0]) * (l[2] - l[0]) / (f[2] - f[0]), l[1] + (y - f[1]) * (l[3] - l[1]) / (f[3] - f[1]))
    }

    /// Returns the distance from the centre relative to the curve: 0 at the centre, 1 on the curve, more outside.
    pub(crate) fn rho(&self, x: f32, y: f32) -> f32 {
        let (u, v) = self.local(x, y);
        let turn = (v.atan2(u) / TAU).rem_euclid(1.0) * STEPS as f32;
        let i = (turn as usize).min(STEPS - 1);
        u.hypot(v) / lerp(self.radius[i], self.radius[i + 1], turn - i as f32)
    }

    /// Calls `f(x, y, rho)` for the pixels of an `n` x `n` image whose centres are inside the curve.
    pub(crate) fn for_each_pixel(&self, n: usize, mut f: impl FnMut(usize, usize, f32)) {
        let clip = |v: f32| v.clamp(0.0, n as f32) as usize;
        for y in clip(self.frame[1].floor())..clip(self.frame[3].ceil()) {
            for x in clip(self.frame[0].floor())..clip(self.frame[2].ceil()) {
                let rho = self.rho(x as f32 + 0.5, y as f32 + 0.5);
                if rho < 1.0 {
                    f(x, y, rho);
                }
            }
        }
    }
}

/// Smooth noise in about `[-1, 1]` on the unit square, with `cells` random values per side.
pub(crate) struct Noise {
    cells: usize,
    values: Vec<f32>,
}

impl Noise {
    pub(crate) fn new(rng: &mut SampleRng, cells: usize) -> Self {
        let side = cells + 1;
        Self { cells, values: (0..side * side).map(|_| rng.range(-1.0, 1.0)).collect() }
    }

    pub(crate) fn at(&self, u: f32, v: f32) -> f32 {
        let x = u.clamp(0.0, 1.0) * self.cells as f32;
        let y = v.clamp(0.0, 1.0) * self.cells as f32;
        let i = (x as usize).min(self.cells - 1);
        let j = (y as usize).min(self.cells - 1);
        let s = smoothstep(0.0, 1.0, x - i as f32);
        let t = smoothstep(0.0, 1.0, y - j as f32);
        let row = |j: usize| {
            let k = j * (self.cells + 1) + i;
            lerp(self.values[k], self.values[k + 1], s)
        };
        lerp(row(j), row(j + 1), t)
    }
}
