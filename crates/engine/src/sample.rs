//! From logits to tokens: inverse CDF on the device with one uniform number per row, or the most probable token.

use tch::{Kind, Tensor};
use unveil_model::log_softmax;

use crate::Result;

/// Tokens and their fp32 log-probabilities for `logits` `[R, V]`.
///
/// `uniforms` (one per row, in `[0, 1)`) choose by inverse CDF, summed in f64; an empty slice chooses the most probable
/// token. The log-probability is that of the tempered distribution without `banned`.
pub(crate) fn draw(
    logits: &Tensor,
    temperature: f64,
    banned: &[u32],
    uniforms: &[f64],
) -> Result<(Vec<u32>, Vec<f32>)> {
    let log_probs = log_softmax(logits, temperature, banned);
    let vocab = *log_probs.size().last().unwrap_or(&0);
    let picked = if uniforms.is_empty() {
        log_probs.f_argmax(-1, true)?
    } else {
        let cdf = log_probs.f_exp()?.f_cumsum(-1, Kind::Double)?;
        let total = cdf.f_narrow(-1, vocab - 1, 1)?;
        let u = Tensor::f_from_slice(uniforms)?.f_view([-1, 1])?.f_to_device(log_probs.device())?;
        // The first entry above u * total: it has a probability above 0, since the sum rose there.
        (total * u).f_searchsorted(&cdf, false, true, "right", None::<Tensor>)?.f_clamp_max(vocab - 1)?
    };
    let chosen = log_probs.f_gather(-1, &picked, false)?;
    let ids = Vec::<i64>::try_from(picked.f_view(-1)?)?;
    Ok((ids.into_iter().map(|i| i as u32).collect(), Vec::<f32>::try_from(chosen.f_view(-1)?)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::uniform;

    #[test]
    fn frequencies_follow_the_distribution() {
        let logits = Tensor::from_slice(&[0.0f32, 1.0, 2.0, 3.0]).view([1, 4]);
        let n = 20_000;
        let us: Vec<f64> = (0..n).map(|p| uniform(3, 5, 0, p)).collect();
        for (t, banned) in [(1.0, vec![]), (0.5, vec![]), (2.0, vec![3u32])] {
            let (tokens, lps) = draw(&logits.repeat([n as i64, 1]), t, &banned, &us).unwrap();
            let p = Vec::<f32>::try_from(log_softmax(&logits, t, &banned).exp().view(-1)).unwrap();
            for (id, p) in p.iter().enumerate() {
                let f = tokens.iter().filter(|&&x| x as usize == id).count() as f32 / n as f32;
                assert!((f - p).abs() < 0.012, "token {id} at temperature {t}: {f} against {p}");
            }
            assert!(banned.iter().all(|b| !tokens.contains(b)));
            assert!(tokens.iter().zip(&lps).all(|(&t, lp)| (lp.exp() - p[t as usize]).abs() < 1e-6));
        }
    }

    #[test]
    fn edges_and_greedy() {
        let logits = Tensor::from_slice(&[5.0f32, f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY]).view([1, 4]);
        let two = logits.repeat([2, 1]);
        let last = 1.0 - 2f64.powi(-52);
        let (tokens, lps) = draw(&two, 1.0, &[], &[0.0, last]).unwrap();
        assert_eq!(tokens, [0, 2]);
        assert!(lps.iter().all(|l| l.is_finite()));
        assert_eq!(draw(&two, 0.0, &[0], &[]).unwrap(), (vec![2, 2], vec![0.0, 0.0]));
    }
}
