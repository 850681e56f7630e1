//! Samples tokens from logits on the device: filters and inverse CDF with one uniform number per row, or the most probable token.
//! Rows of one batch may differ in every setting.

use tch::{Kind, Tensor};
use unveil_core::Sampling;
use unveil_model::masked_logits;

use crate::Result;

/// Sampling parameters of one row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowSampler {
    pub sampling: Sampling,
    /// Uniform random number in `[0, 1)`.
    pub uniform: f64,
}

impl RowSampler {
    fn is_greedy(&self) -> bool {
        self.sampling.temperature == 0.0
    }

    fn temperature(&self) -> f64 {
        if self.is_greedy() { 1.0 } else { self.sampling.temperature }
    }

    fn has_filters(&self) -> bool {
        let s = &self.sampling;
        !self.is_greedy() && (s.top_k > 0 || s.top_p < 1.0 || s.min_p > 0.0)
    }

    /// Returns whether the recorded log-probability has another temperature than the distribution that is sampled.
    fn records_untempered(&self) -> bool {
        self.sampling.logprobs.temperature(self.sampling.temperature) != self.temperature()
    }
}

/// Number of tokens per block of the two-level search.
const BLOCK_LEN: i64 = 128;

/// Samples one token per row of `logits [R, V]`, and returns the tokens and their fp32 log-probabilities.
///
/// A row with temperature 0 selects the most probable token. Other rows sample by inverse CDF from the tempered distribution without
/// `banned`, filtered by top-k, then top-p, then min-p. The log-probability is that of the unfiltered distribution, tempered or not
/// depending on the row's settings.
pub(crate) fn sample_rows(logits: &Tensor, banned: &[u32], samplers: &[RowSampler]) -> Result<(Vec<u32>, Vec<f32>)> {
    let untempered = masked_logits(logits, 1.0, banned);
    let tempered = match samplers.first().map(RowSampler::temperature) {
        Some(t) if samplers.iter().all(|s| s.temperature() == t) => match t {
            1.0 => untempered.shallow_clone(),
            t => &untempered / t,
        },
        _ => &untempered / column(samplers, &untempered, RowSampler::temperature)?.f_to_kind(Kind::Float)?,
    };
    let probabilities = tempered.f_softmax(-1, Kind::Float)?;
    let (max_logits, most_probable) = tempered.f_max_dim(-1, true)?;
    // The log of the normaliser, computed from the most probable token, whose probability is the most precise.
    let log_normaliser = &max_logits - probabilities.f_gather(-1, &most_probable, false)?.f_log()?;
    let tokens = if samplers.iter().all(RowSampler::is_greedy) {
        most_probable
    } else {
        let sampled = if samplers.iter().any(RowSampler::has_filters) {
            sample_filtered(&probabilities, samplers)?
        } else {
            sample_blockwise(&probabilities, samplers)?
        };
        if samplers.iter().any(RowSampler::is_greedy) {
            most_probable.f_where_self(&flags(samplers, &untempered, RowSampler::is_greedy)?, &sampled)?
        } else {
            sampled
        }
    };
    let mut logprobs = tempered.f_gather(-1, &tokens, false)? - log_normaliser;
    if samplers.iter().any(RowSampler::records_untempered) {
        let untempered_logprobs =
            untempered.f_gather(-1, &tokens, false)? - untempered.f_logsumexp([-1i64].as_slice(), true)?;
        let selected = flags(samplers, &untempered, RowSampler::records_untempered)?;
        logprobs = untempered_logprobs.f_where_self(&selected, &logprobs)?;
    }
    let ids = Vec::<i64>::try_from(tokens.f_view(-1)?)?;
    Ok((ids.into_iter().map(|i| i as u32).collect(), Vec::<f32>::try_from(logprobs.f_view(-1)?)?))
}

/// Creates a column of one f64 per row, `[R, 1]`, on the device of `like`.
fn column(samplers: &[RowSampler], like: &Tensor, value: impl Fn(&RowSampler) -> f64) -> Result<Tensor> {
    let values: Vec<f64> = samplers.iter().map(value).collect();
    Ok(Tensor::f_from_slice(&values)?.f_view([-1, 1])?.f_to_device(like.device())?)
}

/// Creates a column of one boolean per row, `[R, 1]`, on the device of `like`.
fn flags(samplers: &[RowSampler], like: &Tensor, flag: impl Fn(&RowSampler) -> bool) -> Result<Tensor> {
    Ok(column(samplers, like, |s| f64::from(u8::from(flag(s))))?.f_gt(0.5)?)
}

/// Samples one token per row, `[R, 1]`, from `probabilities [R, V]` by inverse CDF. The search has two levels, so that only one block per
/// row is accumulated token by token.
fn sample_blockwise(probabilities: &Tensor, samplers: &[RowSampler]) -> Result<Tensor> {
    let size = probabilities.size();
    let rows = size[0];
    let vocab = size[1];
    let blocks = (vocab + BLOCK_LEN - 1) / BLOCK_LEN;
    let padding = blocks * BLOCK_LEN - vocab;
    let padded =
        if padding > 0 { probabilities.f_constant_pad_nd([0, padding])? } else { probabilities.shallow_clone() };
    let padded = padded.f_view([rows, blocks, BLOCK_LEN])?;
    let sums = padded.f_sum_dim_intlist([-1i64].as_slice(), false, Kind::Float)?;
    let (block, rest) = inverse_cdf(&sums, |total| Ok(total * column(samplers, probabilities, |s| s.uniform)?))?;
    let index = block.f_unsqueeze(-1)?.f_expand([rows, 1, BLOCK_LEN], false)?;
    let (token, _) = inverse_cdf(&padded.f_gather(1, &index, false)?.f_squeeze_dim(1)?, |_| Ok(rest))?;
    // Only NaN logits lead beyond the vocabulary.
    Ok((block * BLOCK_LEN + token).f_clamp_max(vocab - 1)?)
}

/// Returns, per row, the index at which the cumulative sum (in f64) of `weights [R, N]` exceeds a threshold `[R, 1]`, which may depend on
/// their total, and the threshold less the sum before that index. The weight at the index is positive, regardless of rounding.
fn inverse_cdf(weights: &Tensor, threshold: impl FnOnce(Tensor) -> Result<Tensor>) -> Result<(Tensor, Tensor)> {
    let sums = weights.f_cumsum(-1, Kind::Double)?;
    let total = sums.f_narrow(-1, sums.size()[1] - 1, 1)?.f_contiguous()?;
    let threshold = threshold(total.shallow_clone())?;
    let search = |value: &Tensor, side: &str| value.f_searchsorted(&sums, false, side == "right", side, None::<Tensor>);
    // The last positive weight is where the sum first reaches its total.
    let last = search(&total, "left")?;
    let index = search(&threshold, "right")?.f_minimum(&last)?.f_clamp_max(sums.size()[1] - 1)?;
    let before = sums.f_gather(-1, &index, false)? - weights.f_gather(-1, &index, false)?.f_to_kind(Kind::Double)?;
    Ok((index, (threshold - before).f_clamp_min(0.0)?))
}

/// Samples one token per row, `[R, 1]`, from the tokens that pass the row's filters.
fn sample_filtered(probabilities: &Tensor, samplers: &[RowSampler]) -> Result<Tensor> {
    let (filtered, order) = apply_filters(probabilities, samplers)?;
    let (index, _) = inverse_cdf(&filtered, |total| Ok(total * column(samplers, probabilities, |s| s.uniform)?))?;
    Ok(order.f_gather(-1, &index, false)?)
}

/// Returns the probabilities `[R, V]` in descending order, 0 for tokens that a filter removes, and the tokens in that order.
fn apply_filters(probabilities: &Tensor, samplers: &[RowSampler]) -> Result<(Tensor, Tensor)> {
    let vocab = *probabilities.size().last().unwrap_or(&0);
    let (sorted, order) = probabilities.f_sort_stable(true, -1, true)?;
    let sorted = sorted.f_to_kind(Kind::Double)?;
    let rank = Tensor::f_arange(vocab, (Kind::Double, probabilities.device()))?.f_unsqueeze(0)?;
    let top_k =
        |s: &RowSampler| if s.has_filters() && s.sampling.top_k > 0 { s.sampling.top_k as f64 } else { vocab as f64 };
    let within_k = rank.f_lt_tensor(&column(samplers, probabilities, top_k)?)?;
    let filtered = &sorted * within_k.f_to_kind(Kind::Double)?;
    let renormalised = &filtered / filtered.f_sum_dim_intlist([-1i64].as_slice(), true, Kind::Double)?;
    // A token is kept if the sum before it has not reached p; it never reaches 2.
    let top_p = |s: &RowSampler| if s.has_filters() && s.sampling.top_p < 1.0 { s.sampling.top_p } else { 2.0 };
    let before = renormalised.f_cumsum(-1, Kind::Double)? - &renormalised;
    let within_p = before.f_lt_tensor(&column(samplers, probabilities, top_p)?)?;
    let min_p = |s: &RowSampler| if s.has_filters() { s.sampling.min_p } else { 0.0 };
    let floor = sorted.f_narrow(-1, 0, 1)? * column(samplers, probabilities, min_p)?;
    let above_floor = sorted.f_ge_tensor(&floor)?;
    let filtered = filtered * within_p.f_logical_and(&above_floor)?.f_to_kind(Kind::Double)?;
    Ok((filtered, order))
}

#[cfg(test)]
mod tests {
    use unveil_core::LogprobKind;

    use super::*;
    use crate::random::uniform;

    fn sampler(temperature: f64, uniform: f64) -> RowSampler {
        RowSampler { sampling: Sampling { temperature, ..Default::default() }, uniform }
    }

    fn probabilities(logits: &Tensor, temperature: f64, banned: &[u32]) -> Vec<f32> {
        Vec::<f32>::try_from(unveil_model::log_softmax(logits, temperature, banned).exp().view(-1)).unwrap()
    }

    fn frequencies(tokens: &[u32], vocab: usize) -> Vec<f32> {
        (0..vocab).map(|id| tokens.iter().filter(|&&x| x as usize == id).count() as f32 / tokens.len() as f32).collect()
    }

    #[test]
    fn frequencies_follow_the_distribution() {
        let logits = Tensor::from_slice(&[0.0f32, 1.0, 2.0, 3.0]).view([1, 4]);
        let n = 20_000;
        for (t, banned) in [(1.0, vec![]), (0.5, vec![]), (2.0, vec![3u32])] {
            let samplers: Vec<RowSampler> = (0..n).map(|p| sampler(t, uniform(3, 5, 0, p))).collect();
            let (tokens, logprobs) = sample_rows(&logits.repeat([n as i64, 1]), &banned, &samplers).unwrap();
            let p = probabilities(&logits, t, &banned);
            for (f, p) in frequencies(&tokens, 4).iter().zip(&p) {
                assert!((f - p).abs() < 0.012, "{f} against {p} at temperature {t}");
            }
            assert!(banned.iter().all(|b| !tokens.contains(b)));
            assert!(tokens.iter().zip(&logprobs).all(|(&t, lp)| (lp.exp() - p[t as usize]).abs() < 1e-6));
        }
    }

    /// The two-level search samples the same tokens as one f64 sum over the whole vocabulary.
    #[test]
    fn blockwise_sampling_equals_one_sum() {
        tch::manual_seed(1);
        for vocab in [100, 128, 129, 1000, 5000] {
            let logits = Tensor::randn([1, vocab], (Kind::Float, tch::Device::Cpu)) * 3.0;
            let n = 2000;
            let samplers: Vec<RowSampler> = (0..n).map(|p| sampler(1.0, uniform(9, 1, 2, p))).collect();
            let (tokens, logprobs) = sample_rows(&logits.repeat([i64::from(n), 1]), &[7], &samplers).unwrap();
            let p: Vec<f64> = probabilities(&logits, 1.0, &[7]).into_iter().map(f64::from).collect();
            let total: f64 = p.iter().sum();
            let mut different = 0;
            let expected_logprobs = unveil_model::log_softmax(&logits, 1.0, &[7]);
            for ((token, logprob), s) in tokens.iter().zip(&logprobs).zip(&samplers) {
                let mut sum = 0.0;
                let expected = p.iter().position(|x| {
                    sum += x;
                    sum > s.uniform * total
                });
                different += u32::from(expected != Some(*token as usize));
                assert!((f64::from(*logprob) - expected_logprobs.double_value(&[0, i64::from(*token)])).abs() < 1e-5);
            }
            assert!(different <= 2, "{different} of {n} tokens differ at a vocabulary of {vocab}");
        }
    }

    /// The filtered probabilities equal those of transformers' logits warpers, for random logits and settings.
    #[test]
    #[expect(clippy::disallowed_methods, reason = "the user may choose a seed")]
    fn filters_equal_transformers() {
        let seed = std::env::var("UNVEIL_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0);
        tch::manual_seed(seed);
        let rows = 40i64;
        let vocab = 300i64;
        let logits = Tensor::randn([rows, vocab], (Kind::Float, tch::Device::Cpu)) * 2.5;
        let random = |r: i64, k: u32| uniform(seed as u64, 3, k, r as u32);
        let samplers: Vec<RowSampler> = (0..rows)
            .map(|r| {
                let sampling = Sampling {
                    temperature: 0.3 + 2.0 * random(r, 0),
                    top_k: if random(r, 1) < 0.3 { 0 } else { 1 + (random(r, 2) * 60.0) as usize },
                    top_p: if random(r, 3) < 0.3 { 1.0 } else { 0.05 + 0.9 * random(r, 4) },
                    min_p: if random(r, 5) < 0.5 { 0.0 } else { 0.3 * random(r, 6) },
                    ..Default::default()
                };
                RowSampler { sampling, uniform: 0.0 }
            })
            .collect();
        let dir = tempfile::tempdir().unwrap();
        let settings: Vec<f64> = samplers
            .iter()
            .flat_map(|s| [s.sampling.temperature, s.sampling.top_k as f64, s.sampling.top_p, s.sampling.min_p])
            .collect();
        let named = [("logits", logits.shallow_clone()), ("settings", Tensor::from_slice(&settings).view([rows, 4]))];
        Tensor::write_safetensors(&named, dir.path().join("in.st")).unwrap();
        let crate_dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let python = unveil_testkit::python();
        let script = crate_dir.join("tests/warpers.py");
        let output = std::process::Command::new(python).arg(script).arg(dir.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let expected = Tensor::read_safetensors(dir.path().join("out.st")).unwrap().remove(0).1;
        let tempered = &logits / column(&samplers, &logits, RowSampler::temperature).unwrap().to_kind(Kind::Float);
        let (filtered, order) = apply_filters(&tempered.softmax(-1, Kind::Float), &samplers).unwrap();
        let renormalised = &filtered / filtered.sum_dim_intlist([-1i64].as_slice(), true, Kind::Double);
        let zeros = Tensor::zeros([rows, vocab], (Kind::Double, tch::Device::Cpu));
        let actual = zeros.scatter(-1, &order, &renormalised);
        assert_eq!(actual.gt(0.0).ne_tensor(&expected.gt(0.0)).sum(Kind::Int64).int64_value(&[]), 0);
        assert!((actual - expected).abs().max().double_value(&[]) < 1e-5);
    }

    #[test]
    fn rows_with_different_settings_are_independent() {
        let logits = Tensor::from_slice(&[2.0f32, 1.9, 1.0, 0.0, -1.0, -8.0]).view([1, 6]);
        let s = Sampling::default();
        let settings = [
            Sampling { temperature: 0.0, ..s },
            Sampling { temperature: 0.7, ..s },
            Sampling { top_k: 2, ..s },
            Sampling { top_p: 0.75, temperature: 2.0, ..s },
            Sampling { min_p: 0.3, ..s },
            Sampling { top_k: 4, top_p: 0.9, min_p: 0.05, temperature: 1.5, logprobs: LogprobKind::Untempered, ..s },
        ];
        let n = 4000u32;
        let untempered = probabilities(&logits, 1.0, &[]);
        let samplers: Vec<RowSampler> = (0..n)
            .flat_map(|p| (0..settings.len()).map(move |k| (p, k)))
            .map(|(p, k)| RowSampler { sampling: settings[k], uniform: uniform(1, 2, k as u32, p) })
            .collect();
        let (tokens, logprobs) = sample_rows(&logits.repeat([samplers.len() as i64, 1]), &[], &samplers).unwrap();
        for (k, sampling) in settings.iter().enumerate() {
            let sampled: Vec<u32> = tokens.iter().skip(k).step_by(settings.len()).copied().collect();
            let p = probabilities(&logits, sampling.temperature, &[]);
            // Apply the filters by hand; the tokens are in descending order of probability.
            let mut filtered = vec![0.0f32; 6];
            let top_k = if sampling.top_k > 0 { sampling.top_k.min(6) } else { 6 };
            let mass: f32 = p[..top_k].iter().sum();
            let mut before = 0.0;
            for i in 0..top_k {
                if before < sampling.top_p as f32 && p[i] >= sampling.min_p as f32 * p[0] {
                    filtered[i] = p[i];
                }
                before += p[i] / mass;
            }
            if sampling.temperature == 0.0 {
                filtered = vec![1.0, 0.0, 0.0, 0.0, 0.0, 0.0];
            }
            let total: f32 = filtered.iter().sum();
            for (f, q) in frequencies(&sampled, 6).iter().zip(&filtered) {
                assert!((f - q / total).abs() < 0.03, "settings {k}: {f} against {}", q / total);
                assert!(*q > 0.0 || *f == 0.0, "settings {k} sample a filtered token");
            }
            let recorded = if sampling.logprobs == LogprobKind::Untempered { &untempered } else { &p };
            for (token, logprob) in sampled.iter().zip(logprobs.iter().skip(k).step_by(settings.len())) {
                assert!((logprob.exp() - recorded[*token as usize]).abs() < 1e-5, "settings {k}");
            }
        }
    }

    #[test]
    fn extreme_uniforms_and_greedy_rows_select_valid_tokens() {
        let logits = Tensor::from_slice(&[5.0f32, f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY]).view([1, 4]);
        let two_rows = logits.repeat([2, 1]);
        let largest = 1.0 - 2f64.powi(-52);
        let (tokens, logprobs) = sample_rows(&two_rows, &[], &[sampler(1.0, 0.0), sampler(1.0, largest)]).unwrap();
        assert_eq!(tokens, [0, 2]);
        assert!(logprobs.iter().all(|l| l.is_finite()));
        let with_top_p = |s: RowSampler| RowSampler { sampling: Sampling { top_p: 0.999, ..s.sampling }, ..s };
        let samplers = [with_top_p(sampler(1.0, 0.0)), with_top_p(sampler(1.0, largest))];
        assert_eq!(sample_rows(&two_rows, &[], &samplers).unwrap().0, [0, 2]);
        let greedy = [sampler(0.0, 0.0), sampler(0.0, 0.9)];
        assert_eq!(sample_rows(&two_rows, &[0], &greedy).unwrap(), (vec![2, 2], vec![0.0, 0.0]));
    }
}
