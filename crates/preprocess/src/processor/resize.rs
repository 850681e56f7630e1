//! Separable antialiased resampling of 8-bit RGB, in the fixed-point arithmetic of PyTorch's `interpolate(antialias=True)` on uint8
//! (`UpSampleKernelAVXAntialias.h`, itself after Pillow): weights in double precision, rounded to 16-bit integers, columns first.

use unveil_data::image_store::Image;

/// A resampling filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// Triangle filter over two pixels.
    Bilinear,
    /// Keys' cubic with a = -0.5 over four pixels.
    Bicubic,
}

impl Filter {
    /// Returns the number of pixels that the filter spans at scale 1.
    fn span(self) -> f64 {
        match self {
            Self::Bilinear => 2.0,
            Self::Bicubic => 4.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        let x = x.abs();
        match self {
            Self::Bilinear => (1.0 - x).max(0.0),
            Self::Bicubic if x < 1.0 => ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1.0,
            Self::Bicubic if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5,
            Self::Bicubic => 0.0,
        }
    }
}

/// Integer filter weights for every output position along one axis.
struct Taps {
    /// First input position and number of weights, per output position.
    ranges: Vec<(usize, usize)>,
    /// `width` weights per output position, zero beyond its range.
    weights: Vec<i32>,
    width: usize,
    /// Weights are multiples of `2^-precision`.
    precision: u32,
}

impl Taps {
    fn new(input: usize, output: usize, filter: Filter) -> Self {
        let scale = input as f64 / output as f64;
        let support = filter.span() * 0.5 * scale.max(1.0);
        let inverse = if scale >= 1.0 { 1.0 / scale } else { 1.0 };
        let width = support.ceil() as usize * 2 + 1;
        let mut ranges = Vec::with_capacity(output);
        let mut exact = vec![0.0f64; output * width];
        for (i, row) in exact.chunks_exact_mut(width).enumerate() {
            let centre = scale * (i as f64 + 0.5);
            let first = ((centre - support + 0.5) as i64).max(0);
            let count = (((centre + support + 0.5) as i64).min(input as i64) - first).clamp(0, width as i64);
            let row = &mut row[..count as usize];
            for (j, w) in row.iter_mut().enumerate() {
                *w = filter.weight((j as f64 + first as f64 - centre + 0.5) * inverse);
            }
            let total: f64 = row.iter().sum();
            if total != 0.0 {
                row.iter_mut().for_each(|w| *w /= total);
            }
            ranges.push((first as usize, count as usize));
        }
        let largest = exact.iter().fold(0.0f64, |m, w| m.max(*w));
        let mut precision = 0u32;
        while precision < 22 && ((0.5 + largest * f64::from(1 << (precision + 1))) as i64) < (1 << 15) {
            precision += 1;
        }
        let one = f64::from(1 << precision);
        let weights = exact.iter().map(|w| (w * one + 0.5f64.copysign(*w)) as i32).collect();
        Self { ranges, weights, width, precision }
    }

    fn window(&self, i: usize) -> (usize, &[i32]) {
        let (first, count) = self.ranges[i];
        (first, &self.weights[i * self.width..i * self.width + count])
    }

    fn pixel(&self, sum: i32) -> u8 {
        (sum >> self.precision).clamp(0, 255) as u8
    }

    fn half(&self) -> i32 {
        (1 << self.precision) >> 1
    }
}

/// Resizes to `width` x `height` pixels (both at least 1). An axis that keeps its length is left exactly as it is.
pub fn resize(image: &Image, width: u32, height: u32, filter: Filter) -> Image {
    let mut out = image.clone();
    if width != image.width() {
        out = columns(&out, width as usize, filter);
    }
    if height != image.height() {
        out = rows(&out, height as usize, filter);
    }
    out
}

fn columns(image: &Image, width: usize, filter: Filter) -> Image {
    let taps = Taps::new(image.width() as usize, width, filter);
    let mut out = Image::new(width as u32, image.height());
    let lines = image.rgb().chunks_exact(image.width() as usize * 3);
    for (line, target) in lines.zip(out.rgb_mut().chunks_exact_mut(width * 3)) {
        for (i, pixel) in target.chunks_exact_mut(3).enumerate() {
            let (first, weights) = taps.window(i);
            let mut sum = [taps.half(); 3];
            for (w, p) in weights.iter().zip(line[first * 3..].chunks_exact(3)) {
                for c in 0..3 {
                    sum[c] += w * i32::from(p[c]);
                }
            }
            pixel.copy_from_slice(&sum.map(|s| taps.pixel(s)));
        }
    }
    out
}

fn rows(image: &Image, height: usize, filter: Filter) -> Image {
    let taps = Taps::new(image.height() as usize, height, filter);
    let stride = image.width() as usize * 3;
    let mut out = Image::new(image.width(), height as u32);
    let mut sums = vec![0i32; stride];
    for (i, target) in out.rgb_mut().chunks_exact_mut(stride).enumerate() {
        let (first, weights) = taps.window(i);
        sums.fill(taps.half());
        for (w, line) in weights.iter().zip(image.rgb()[first * stride..].chunks_exact(stride)) {
            for (s, p) in sums.iter_mut().zip(line) {
                *s += w * i32::from(*p);
            }
        }
        for (t, s) in target.iter_mut().zip(&sums) {
            *t = taps.pixel(*s);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(w: u32, h: u32) -> Image {
        let mut i = Image::new(w, h);
        let mut s = 7u32;
        for b in i.rgb_mut() {
            s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *b = (s >> 24) as u8;
        }
        i
    }

    #[test]
    fn same_size_is_the_identity() {
        let i = noise(17, 9);
        assert_eq!(resize(&i, 17, 9, Filter::Bicubic), i);
    }

    #[test]
    fn flat_images_stay_flat() {
        for v in [0u8, 1, 77, 254, 255] {
            let mut i = Image::new(13, 29);
            i.rgb_mut().fill(v);
            for filter in [Filter::Bicubic, Filter::Bilinear] {
                for (w, h) in [(1, 1), (7, 5), (40, 64), (13, 60)] {
                    assert!(resize(&i, w, h, filter).rgb().iter().all(|p| *p == v));
                }
            }
        }
    }

    #[test]
    fn single_pixel_fills_the_image() {
        let out = resize(&noise(1, 1), 16, 32, Filter::Bicubic);
        assert!(out.rgb().chunks_exact(3).all(|p| p == noise(1, 1).rgb()));
    }
}
