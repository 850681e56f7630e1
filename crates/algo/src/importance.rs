//! Importance weights for tokens that another policy made than the one whose ratio is clipped. Must not know: the surrogate.

use tch::Tensor;

/// What is done about the difference between the behaviour policy (the one that made a token, as the rollout recorded it) and
/// the proximal policy (the learner's own log-probabilities before the update, the denominator of the ratio).
///
/// With `w = exp(proximal - behaviour)` per token, the clipped surrogate is multiplied by a weight without gradient. For tokens
/// of the same weight version `w` measures the mismatch of two implementations; for older ones it is the importance weight of
/// the decoupled objective (AReaL, arXiv 2505.24298, the decoupled PPO objective; after arXiv 2110.00641): the ratio to the
/// proximal policy is clipped, the weight stands outside.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Correction {
    /// No weight.
    None,
    /// `w` as it is: the decoupled objective as printed.
    Full,
    /// `min(w, cap)`: truncated importance sampling (F. Yao et al., "Your efficient RL framework secretly brings you off-policy
    /// RL training", 2025; truncation after Ionides, 2008).
    Truncate {
        /// C, at least 1.
        cap: f64,
    },
    /// `w` where it lies in `[1 / cap, cap]`, else 0: the token is dropped. Means keep their divisor, so that the other tokens
    /// weigh what they did.
    Mask {
        /// C, above 1.
        cap: f64,
    },
}

/// Weights per token, and where the cap took effect.
#[derive(Debug)]
pub struct ImportanceWeights {
    /// `[N]`, no gradient, of the kind of the inputs.
    pub weights: Tensor,
    /// `[N]`, 1 where the weight was truncated or the token dropped, else 0.
    pub bounded: Tensor,
}

impl Correction {
    /// The weights for log-probabilities under both policies, each `[N]`; none where nothing is corrected.
    pub fn weights(self, proximal: &Tensor, behaviour: &Tensor) -> Option<ImportanceWeights> {
        let w = (proximal.detach() - behaviour.detach()).exp();
        let mark = |t: Tensor| t.to_kind(w.kind());
        let (weights, bounded) = match self {
            Self::None => return None,
            Self::Full => (w.shallow_clone(), w.zeros_like()),
            Self::Truncate { cap } => (w.clamp_max(cap), mark(w.gt(cap))),
            Self::Mask { cap } => {
                let outside = w.lt(1.0 / cap).logical_or(&w.gt(cap));
                (w.masked_fill(&outside, 0.0), mark(outside))
            }
        };
        Some(ImportanceWeights { weights, bounded })
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn weights_by_hand() {
        let behaviour = Tensor::from_slice(&[0.0f64; 4]);
        let proximal = Tensor::from_slice(&[0.25f64, 0.8, 1.5, 4.0]).log();
        let of = |c: Correction| {
            let w = c.weights(&proximal, &behaviour).unwrap();
            assert_eq!(w.weights.kind(), Kind::Double);
            let host = |t: &Tensor| Vec::<f64>::try_from((t * 1e6).round() / 1e6).unwrap();
            (host(&w.weights), host(&w.bounded))
        };
        assert!(Correction::None.weights(&proximal, &behaviour).is_none());
        assert_eq!(of(Correction::Full), (vec![0.25, 0.8, 1.5, 4.0], vec![0.0; 4]));
        assert_eq!(of(Correction::Truncate { cap: 2.0 }), (vec![0.25, 0.8, 1.5, 2.0], vec![0.0, 0.0, 0.0, 1.0]));
        assert_eq!(of(Correction::Mask { cap: 2.0 }), (vec![0.0, 0.8, 1.5, 0.0], vec![1.0, 0.0, 0.0, 1.0]));
    }
}
