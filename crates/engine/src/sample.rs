//! From logits to tokens on the device: filters, inverse CDF with one uniform number per row, or the most probable token.
//! Rows of one batch may differ in every setting.

use tch::{Kind, Tensor};
use unveil_core::Sampling;
use unveil_model::masked_logits;

use crate::Result;

/// How one row is drawn.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Draw {
    pub sampling: Sampling,
    /// In `[0, 1)`.
    pub uniform: f64,
}

impl Draw {
    fn greedy(&self) -> bool {
        self.sampling.temperature == 0.0
    }

    fn temperature(&self) -> f64 {
        if self.greedy() { 1.0 } else { self.sampling.temperature }
    }

    fn filtered(&self) -> bool {
        let s = &self.sampling;
        !self.greedy() && (s.top_k > 0 || s.top_p < 1.0 || s.min_p > 0.0)
    }

    /// Its log-probability is of another distribution than the one it is drawn from.
    fn untempered(&self) -> bool {
        self.sampling.logprobs.temperature(self.sampling.temperature) != self.temperature()
    }
}

/// Width of the blocks in which probabilities are summed before one is entered.
const BLOCK: i64 = 128;

/// Tokens and their fp32 log-probabilities for `logits [R, V]`, one draw per row.
///
/// A row of temperature 0 takes the most probable token. The others choose by inverse CDF over the tempered distribution
/// without `banned`, cut by top-k, then top-p, then min-p. The log-probability is that of the whole distribution, tempered
/// or not as the row's sampling says: filters do not enter it.
pub(crate) fn draw(logits: &Tensor, banned: &[u32], draws: &[Draw]) -> Result<(Vec<u32>, Vec<f32>)> {
    let plain = masked_logits(logits, 1.0, banned);
    let tempered = match draws.first().map(Draw::temperature) {
        Some(t) if draws.iter().all(|d| d.temperature() == t) => match t {
            1.0 => plain.shallow_clone(),
            t => &plain / t,
        },
        _ => &plain / column(draws, &plain, Draw::temperature)?.f_to_kind(Kind::Float)?,
    };
    let probabilities = tempered.f_softmax(-1, Kind::Float)?;
    let (top, best) = tempered.f_max_dim(-1, true)?;
    // The log of the sum by way of the most probable token, whose probability has all its digits.
    let normaliser = &top - probabilities.f_gather(-1, &best, false)?.f_log()?;
    let picked = if draws.iter().all(Draw::greedy) {
        best
    } else {
        let drawn = if draws.iter().any(Draw::filtered) {
            filtered(&probabilities, draws)?
        } else {
            blockwise(&probabilities, draws)?
        };
        if draws.iter().any(Draw::greedy) {
            best.f_where_self(&flags(draws, &plain, Draw::greedy)?, &drawn)?
        } else {
            drawn
        }
    };
    let mut chosen = tempered.f_gather(-1, &picked, false)? - normaliser;
    if draws.iter().any(Draw::untempered) {
        let own = plain.f_gather(-1, &picked, false)? - plain.f_logsumexp([-1i64].as_slice(), true)?;
        chosen = own.f_where_self(&flags(draws, &plain, Draw::untempered)?, &chosen)?;
    }
    let ids = Vec::<i64>::try_from(picked.f_view(-1)?)?;
    Ok((ids.into_iter().map(|i| i as u32).collect(), Vec::<f32>::try_from(chosen.f_view(-1)?)?))
}

/// One number per row, f64 `[R, 1]`, where `like` is.
fn column(draws: &[Draw], like: &Tensor, of: impl Fn(&Draw) -> f64) -> Result<Tensor> {
    let values: Vec<f64> = draws.iter().map(of).collect();
    Ok(Tensor::f_from_slice(&values)?.f_view([-1, 1])?.f_to_device(like.device())?)
}

/// One truth value per row, `[R, 1]`.
fn flags(draws: &[Draw], like: &Tensor, of: impl Fn(&Draw) -> bool) -> Result<Tensor> {
    Ok(column(draws, like, |d| f64::from(u8::from(of(d))))?.f_gt(0.5)?)
}

/// The token in which the cumulated probabilities `[R, V]` pass the row's uniform number, `[R, 1]`. In two levels, so that only
/// one block per row is cumulated token by token.
fn blockwise(probabilities: &Tensor, draws: &[Draw]) -> Result<Tensor> {
    let size = probabilities.size();
    let (rows, vocab) = (size[0], size[1]);
    let blocks = (vocab + BLOCK - 1) / BLOCK;
    let short = blocks * BLOCK - vocab;
    let padded = if short > 0 { probabilities.f_constant_pad_nd([0, short])? } else { probabilities.shallow_clone() };
    let padded = padded.f_view([rows, blocks, BLOCK])?;
    let sums = padded.f_sum_dim_intlist([-1i64].as_slice(), false, Kind::Float)?;
    let (block, rest) = pass(&sums, |total| Ok(total * column(draws, probabilities, |d| d.uniform)?))?;
    let index = block.f_unsqueeze(-1)?.f_expand([rows, 1, BLOCK], false)?;
    let (token, _) = pass(&padded.f_gather(1, &index, false)?.f_squeeze_dim(1)?, |_| Ok(rest))?;
    // Only logits that are no numbers lead past the vocabulary.
    Ok((block * BLOCK + token).f_clamp_max(vocab - 1)?)
}

/// The entry in which the sums (in f64) of `weights [R, N]` pass a number `[R, 1]`, which may depend on their total, and how much
/// of the number that entry covers. The entry has a weight above 0, whatever rounding does.
fn pass(weights: &Tensor, number: impl FnOnce(Tensor) -> Result<Tensor>) -> Result<(Tensor, Tensor)> {
    let sums = weights.f_cumsum(-1, Kind::Double)?;
    let total = sums.f_narrow(-1, sums.size()[1] - 1, 1)?.f_contiguous()?;
    let number = number(total.shallow_clone())?;
    let search = |at: &Tensor, side: &str| at.f_searchsorted(&sums, false, side == "right", side, None::<Tensor>);
    // The last entry with a weight is where the sum first reaches its total.
    let found = search(&number, "right")?.f_minimum(&search(&total, "left")?)?.f_clamp_max(sums.size()[1] - 1)?;
    let before = sums.f_gather(-1, &found, false)? - weights.f_gather(-1, &found, false)?.f_to_kind(Kind::Double)?;
    Ok((found, (number - before).f_clamp_min(0.0)?))
}

/// The same among the tokens that the row's filters leave.
fn filtered(probabilities: &Tensor, draws: &[Draw]) -> Result<Tensor> {
    let (kept, order) = keep(probabilities, draws)?;
    let (place, _) = pass(&kept, |total| Ok(total * column(draws, probabilities, |d| d.uniform)?))?;
    Ok(order.f_gather(-1, &place, false)?)
}

/// Probabilities `[R, V]` in falling order, 0 where a filter leaves the token out, and the tokens in that order.
fn keep(probabilities: &Tensor, draws: &[Draw]) -> Result<(Tensor, Tensor)> {
    let vocab = *probabilities.size().last().unwrap_or(&0);
    let (sorted, order) = probabilities.f_sort_stable(true, -1, true)?;
    let sorted = sorted.f_to_kind(Kind::Double)?;
    let rank = Tensor::f_arange(vocab, (Kind::Double, probabilities.device()))?.f_unsqueeze(0)?;
    let limit = |d: &Draw| if d.filtered() && d.sampling.top_k > 0 { d.sampling.top_k as f64 } else { vocab as f64 };
    let kept = &sorted * rank.f_lt_tensor(&column(draws, probabilities, limit)?)?.f_to_kind(Kind::Double)?;
    let shares = &kept / kept.f_sum_dim_intlist([-1i64].as_slice(), true, Kind::Double)?;
    // What comes before a token has not reached p yet; 2 is never reached.
    let reach = |d: &Draw| if d.filtered() && d.sampling.top_p < 1.0 { d.sampling.top_p } else { 2.0 };
    let before = shares.f_cumsum(-1, Kind::Double)? - &shares;
    let within = before.f_lt_tensor(&column(draws, probabilities, reach)?)?;
    let least = |d: &Draw| if d.filtered() { d.sampling.min_p } else { 0.0 };
    let floor = sorted.f_narrow(-1, 0, 1)? * column(draws, probabilities, least)?;
    let kept = kept * within.f_logical_and(&sorted.f_ge_tensor(&floor)?)?.f_to_kind(Kind::Double)?;
    Ok((kept, order))
}

#[cfg(test)]
mod tests {
    use unveil_core::Logprobs;

    use super::*;
    use crate::random::uniform;

    fn at(temperature: f64, uniform: f64) -> Draw {
        Draw { sampling: Sampling { temperature, ..Default::default() }, uniform }
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
            let draws: Vec<Draw> = (0..n).map(|p| at(t, uniform(3, 5, 0, p))).collect();
            let (tokens, lps) = draw(&logits.repeat([n as i64, 1]), &banned, &draws).unwrap();
            let p = probabilities(&logits, t, &banned);
            for (f, p) in frequencies(&tokens, 4).iter().zip(&p) {
                assert!((f - p).abs() < 0.012, "{f} against {p} at temperature {t}");
            }
            assert!(banned.iter().all(|b| !tokens.contains(b)));
            assert!(tokens.iter().zip(&lps).all(|(&t, lp)| (lp.exp() - p[t as usize]).abs() < 1e-6));
        }
    }

    /// Many blocks: what is drawn is what one sum over the whole vocabulary in f64 gives.
    #[test]
    fn blocks_equal_one_sum() {
        tch::manual_seed(1);
        for vocab in [100, 128, 129, 1000, 5000] {
            let logits = Tensor::randn([1, vocab], (Kind::Float, tch::Device::Cpu)) * 3.0;
            let n = 2000;
            let draws: Vec<Draw> = (0..n).map(|p| at(1.0, uniform(9, 1, 2, p))).collect();
            let (tokens, lps) = draw(&logits.repeat([i64::from(n), 1]), &[7], &draws).unwrap();
            let p: Vec<f64> = probabilities(&logits, 1.0, &[7]).into_iter().map(f64::from).collect();
            let total: f64 = p.iter().sum();
            let (mut off, lp) = (0, unveil_model::log_softmax(&logits, 1.0, &[7]));
            for ((token, logprob), d) in tokens.iter().zip(&lps).zip(&draws) {
                let mut sum = 0.0;
                let expected = p.iter().position(|x| {
                    sum += x;
                    sum > d.uniform * total
                });
                off += u32::from(expected != Some(*token as usize));
                assert!((f64::from(*logprob) - lp.double_value(&[0, i64::from(*token)])).abs() < 1e-5);
            }
            assert!(off <= 2, "{off} of {n} draws differ at a vocabulary of {vocab}");
        }
    }

    /// What the filters leave equals transformers' logits warpers on random logits and settings.
    #[test]
    fn filters_equal_transformers() {
        let seed = std::env::var("UNVEIL_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0);
        tch::manual_seed(seed);
        let (rows, vocab) = (40i64, 300i64);
        let logits = Tensor::randn([rows, vocab], (Kind::Float, tch::Device::Cpu)) * 2.5;
        let pick = |r: i64, k: u32| uniform(seed as u64, 3, k, r as u32);
        let draws: Vec<Draw> = (0..rows)
            .map(|r| {
                let sampling = Sampling {
                    temperature: 0.3 + 2.0 * pick(r, 0),
                    top_k: if pick(r, 1) < 0.3 { 0 } else { 1 + (pick(r, 2) * 60.0) as usize },
                    top_p: if pick(r, 3) < 0.3 { 1.0 } else { 0.05 + 0.9 * pick(r, 4) },
                    min_p: if pick(r, 5) < 0.5 { 0.0 } else { 0.3 * pick(r, 6) },
                    ..Default::default()
                };
                Draw { sampling, uniform: 0.0 }
            })
            .collect();
        let dir = tempfile::tempdir().unwrap();
        let settings: Vec<f64> = draws
            .iter()
            .flat_map(|d| [d.sampling.temperature, d.sampling.top_k as f64, d.sampling.top_p, d.sampling.min_p])
            .collect();
        let named = [("logits", logits.shallow_clone()), ("settings", Tensor::from_slice(&settings).view([rows, 4]))];
        Tensor::write_safetensors(&named, dir.path().join("in.st")).unwrap();
        let here = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let python = unveil_testkit::python();
        let run =
            std::process::Command::new(python).arg(here.join("tests/warpers.py")).arg(dir.path()).output().unwrap();
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        let expected = Tensor::read_safetensors(dir.path().join("out.st")).unwrap().remove(0).1;
        let tempered = &logits / column(&draws, &logits, Draw::temperature).unwrap().to_kind(Kind::Float);
        let (kept, order) = keep(&tempered.softmax(-1, Kind::Float), &draws).unwrap();
        let shares = &kept / kept.sum_dim_intlist([-1i64].as_slice(), true, Kind::Double);
        let mine = Tensor::zeros([rows, vocab], (Kind::Double, tch::Device::Cpu)).scatter(-1, &order, &shares);
        assert_eq!(mine.gt(0.0).ne_tensor(&expected.gt(0.0)).sum(Kind::Int64).int64_value(&[]), 0);
        assert!((mine - expected).abs().max().double_value(&[]) < 1e-5);
    }

    #[test]
    fn rows_differ_in_every_setting() {
        let logits = Tensor::from_slice(&[2.0f32, 1.9, 1.0, 0.0, -1.0, -8.0]).view([1, 6]);
        let s = Sampling::default();
        let kinds = [
            Sampling { temperature: 0.0, ..s },
            Sampling { temperature: 0.7, ..s },
            Sampling { top_k: 2, ..s },
            Sampling { top_p: 0.75, temperature: 2.0, ..s },
            Sampling { min_p: 0.3, ..s },
            Sampling { top_k: 4, top_p: 0.9, min_p: 0.05, temperature: 1.5, logprobs: Logprobs::Untempered, ..s },
        ];
        let (n, own) = (4000u32, probabilities(&logits, 1.0, &[]));
        let draws: Vec<Draw> = (0..n)
            .flat_map(|p| (0..kinds.len()).map(move |k| (p, k)))
            .map(|(p, k)| Draw { sampling: kinds[k], uniform: uniform(1, 2, k as u32, p) })
            .collect();
        let (tokens, lps) = draw(&logits.repeat([draws.len() as i64, 1]), &[], &draws).unwrap();
        for (k, sampling) in kinds.iter().enumerate() {
            let mine: Vec<u32> = tokens.iter().skip(k).step_by(kinds.len()).copied().collect();
            let p = probabilities(&logits, sampling.temperature, &[]);
            // Filters by hand: the tokens are in the order of their probability.
            let mut keep = vec![0.0f32; 6];
            let first = if sampling.top_k > 0 { sampling.top_k.min(6) } else { 6 };
            let mass: f32 = p[..first].iter().sum();
            let mut before = 0.0;
            for i in 0..first {
                if before < sampling.top_p as f32 && p[i] >= sampling.min_p as f32 * p[0] {
                    keep[i] = p[i];
                }
                before += p[i] / mass;
            }
            if sampling.temperature == 0.0 {
                keep = vec![1.0, 0.0, 0.0, 0.0, 0.0, 0.0];
            }
            let kept: f32 = keep.iter().sum();
            for (f, q) in frequencies(&mine, 6).iter().zip(&keep) {
                assert!((f - q / kept).abs() < 0.03, "kind {k}: {f} against {}", q / kept);
                assert!(*q > 0.0 || *f == 0.0, "kind {k} draws what its filters leave out");
            }
            let recorded = if sampling.logprobs == Logprobs::Untempered { &own } else { &p };
            for (token, lp) in mine.iter().zip(lps.iter().skip(k).step_by(kinds.len())) {
                assert!((lp.exp() - recorded[*token as usize]).abs() < 1e-5, "kind {k}");
            }
        }
    }

    #[test]
    fn edges_and_greedy() {
        let logits = Tensor::from_slice(&[5.0f32, f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY]).view([1, 4]);
        let two = logits.repeat([2, 1]);
        let last = 1.0 - 2f64.powi(-52);
        let (tokens, lps) = draw(&two, &[], &[at(1.0, 0.0), at(1.0, last)]).unwrap();
        assert_eq!(tokens, [0, 2]);
        assert!(lps.iter().all(|l| l.is_finite()));
        let top = |d: Draw| Draw { sampling: Sampling { top_p: 0.999, ..d.sampling }, ..d };
        assert_eq!(draw(&two, &[], &[top(at(1.0, 0.0)), top(at(1.0, last))]).unwrap().0, [0, 2]);
        assert_eq!(draw(&two, &[0], &[at(0.0, 0.0), at(0.0, 0.9)]).unwrap(), (vec![2, 2], vec![0.0, 0.0]));
    }
}
