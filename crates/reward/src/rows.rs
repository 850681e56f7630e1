//! Sums over rows of attention, in a form that compilers vectorise: scoring spends most of its time here.

/// Values that are summed in parallel.
const LANES: usize = 8;

/// Sums over one row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct RowSums {
    /// `sum_j M_j p_j`.
    pub inside: f64,
    /// `sum_j p_j`.
    pub total: f64,
}

/// Sums a row with the coverage of its cells; both have the same length.
pub(crate) fn row_sums(row: &[f32], m: &[f32]) -> RowSums {
    let mut inside = [0.0_f64; LANES];
    let mut total = [0.0_f64; LANES];
    let rows = row.chunks_exact(LANES);
    let ms = m.chunks_exact(LANES);
    let rest = rows.remainder().iter().zip(ms.remainder());
    for (p, m) in rows.zip(ms) {
        for i in 0..LANES {
            let v = f64::from(p[i]);
            inside[i] += v * f64::from(m[i]);
            total[i] += v;
        }
    }
    for (p, m) in rest {
        inside[0] += f64::from(*p) * f64::from(*m);
        total[0] += f64::from(*p);
    }
    RowSums { inside: inside.iter().sum(), total: total.iter().sum() }
}

/// Whether all values are finite and not negative and their sum is within `slack` of 1.
pub(crate) fn is_distribution(row: &[f32], slack: f64) -> bool {
    let mut total = [0.0_f64; LANES];
    let mut least = [0.0_f32; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder();
    for p in chunks {
        for i in 0..LANES {
            total[i] += f64::from(p[i]);
            least[i] = if p[i] < least[i] { p[i] } else { least[i] };
        }
    }
    let total: f64 = total.iter().sum::<f64>() + rest.iter().map(|p| f64::from(*p)).sum::<f64>();
    // NaN and infinity show in the sum.
    (total - 1.0).abs() <= slack && least.iter().chain(rest).all(|p| *p >= 0.0)
}

/// Returns the entropy of a row of non-negative values, normalised to sum 1, as a share of its maximum (ln of the length), in
/// `[0, 1]`; 0 for a single cell. Within 1e-5 of the exact value: logarithms are computed in f32.
pub(crate) fn entropy(row: &[f32]) -> f64 {
    let mut weighted = [0.0_f32; LANES];
    let mut total = [0.0_f64; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder();
    for p in chunks {
        for i in 0..LANES {
            weighted[i] += p[i] * ln(p[i]);
            total[i] += f64::from(p[i]);
        }
    }
    let total: f64 = total.iter().sum::<f64>() + rest.iter().map(|p| f64::from(*p)).sum::<f64>();
    let weighted =
        weighted.iter().map(|v| f64::from(*v)).sum::<f64>() + rest.iter().map(|p| f64::from(p * ln(*p))).sum::<f64>();
    if row.len() < 2 || total <= 0.0 {
        return 0.0;
    }
    ((total.ln() - weighted / total) / (row.len() as f64).ln()).clamp(0.0, 1.0)
}

/// Returns the natural logarithm of a normal positive f32 without branches; for 0 and subnormals a finite number, whose product with
/// them vanishes. From ln m = 2 artanh((m - 1) / (m + 1)) with m in [0.7, 1.42), whose series is cut after the 9th power.
fn ln(x: f32) -> f32 {
    let bits = x.to_bits();
    // Moves the split between exponent and mantissa to sqrt(1/2).
    let shifted = bits.wrapping_sub(0x3f35_04f3);
    let exponent = (shifted as i32) >> 23;
    let m = f32::from_bits((shifted & 0x007f_ffff).wrapping_add(0x3f35_04f3));
    let t = (m - 1.0) / (m + 1.0);
    let t2 = t * t;
    let series = 1.0 + t2 * (1.0 / 3.0 + t2 * (0.2 + t2 * (1.0 / 7.0 + t2 * (1.0 / 9.0))));
    exponent as f32 * std::f32::consts::LN_2 + 2.0 * t * series
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1_u32 << 24) as f32
        };
        let raw: Vec<f32> = (0..n).map(|_| next().powi(8) + 1e-12).collect();
        let sum: f32 = raw.iter().sum();
        raw.iter().map(|v| v / sum).collect()
    }

    #[test]
    fn logarithm_matches_f64() {
        for i in 0..2_000_000_u32 {
            let x = f32::from_bits(0x0080_0000 + i * 500);
            assert!((f64::from(ln(x)) - f64::from(x).ln()).abs() <= 1e-6 * f64::from(x).ln().abs().max(1.0), "{x}");
        }
        assert!(ln(0.0).is_finite());
    }

    #[test]
    fn sums_and_entropy_match_plain_loops() {
        for n in [1, 2, 7, 8, 9, 64, 1023, 1024] {
            let p = numbers(n, n as u64);
            let m = numbers(n, 99);
            let plain = |f: fn(f64, f64) -> f64| -> f64 {
                p.iter().zip(&m).map(|(p, m)| f(f64::from(*p), f64::from(*m))).sum()
            };
            let s = row_sums(&p, &m);
            assert!((s.inside - plain(|p, m| p * m)).abs() < 1e-12 && (s.total - plain(|p, _| p)).abs() < 1e-12);
            let exact = if n == 1 { 0.0 } else { -plain(|p, _| p * p.ln()) / (n as f64).ln() };
            assert!((entropy(&p) - exact).abs() < 1e-5, "{n}: {} {exact}", entropy(&p));
            assert!(is_distribution(&p, 0.05));
            for bad in [f32::NAN, f32::INFINITY, -1.0, 1e8] {
                let mut q = p.clone();
                q[n - 1] = bad;
                assert!(!is_distribution(&q, 0.05), "{n} {bad}");
            }
        }
        assert_eq!(entropy(&[0.0; 9]), 0.0);
        assert_eq!(entropy(&[0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]), 0.0);
    }
}
