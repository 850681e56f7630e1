//! Estimators of the KL divergence from a reference per token, with their gradients, and the controller of the KL coefficient.

use serde::{Deserialize, Serialize};
use tch::Tensor;
use unveil_core::{KlForm, KlGradient};

/// Returns the KL per token, `[N]`, of the dtype of `logprobs`; differentiable in `logprobs` as `gradient` says. Not clamped: for a token
/// that is far more probable under the reference than under the policy, k3 grows exponentially and may overflow.
///
/// The forms estimate KL(policy || reference) from samples of the policy, with d = log policy - log reference (J. Schulman, "Approximating
/// KL divergence", 2020). In the reward only the value matters. In the loss the gradient matters, and it is not the gradient of the
/// quantity that they estimate (arXiv 2510.01555). Expected for on-policy samples:
///
/// - k1 is unbiased, of either sign. As a loss its gradient is grad log policy, which is zero in expectation and only adds noise. In the
///   reward it is the form whose policy gradient is that of KL(policy || reference).
/// - k2 is biased, never negative, of small variance. As a loss: d grad log policy, the gradient of KL(policy || reference).
/// - k3 is unbiased, never negative (GRPO, arXiv 2402.03300, eq. 4). As a loss: (1 - exp(-d)) grad log policy, the gradient of
///   KL(reference || policy); equal to that of k2 to first order in d.
///
/// [`KlGradient::Reverse`] puts the gradient of k2 under the value of the form (straight-through), whichever form is reported.
pub fn kl_terms(form: KlForm, gradient: KlGradient, logprobs: &Tensor, reference: &Tensor) -> Tensor {
    let d = logprobs - reference;
    let value = match form {
        KlForm::K1 => d.shallow_clone(),
        KlForm::K2 => d.square() * 0.5,
        KlForm::K3 => (-&d).exp() - 1.0 + &d,
    };
    match gradient {
        KlGradient::Own => value,
        KlGradient::Reverse => {
            let k2 = d.square() * 0.5;
            value.detach() + (&k2 - k2.detach())
        }
    }
}

/// Bound of the relative error in one update of the adaptive controller (arXiv 1909.08593, section 2.2).
const ERROR_LIMIT: f64 = 0.2;

/// Controller of the KL coefficient; its state is saved with the run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum KlController {
    /// A constant coefficient.
    Fixed {
        /// The coefficient.
        coef: f64,
    },
    /// Follows a target by proportional control in log space (Ziegler et al., arXiv 1909.08593, section 2.2).
    Adaptive {
        /// The present coefficient; saved as its bits in hexadecimal, so that a resumed run continues exactly in any format.
        #[serde(with = "bits")]
        coef: f64,
        /// Target of KL, in the unit of the observed values.
        target: f64,
        /// K, the relative change of the coefficient at a relative error of 1; 0.1 in the source.
        gain: f64,
    },
}

impl KlController {
    /// Returns the present coefficient.
    pub fn coef(&self) -> f64 {
        match self {
            Self::Fixed { coef } | Self::Adaptive { coef, .. } => *coef,
        }
    }

    /// Adapts the coefficient after an update with the given `kl`: coef *= 1 + gain clip((kl - target) / target, -0.2, 0.2). A value that
    /// is not finite is ignored, and a fixed coefficient never changes.
    pub fn observe(&mut self, kl: f64) {
        if let Self::Adaptive { coef, target, gain } = self
            && kl.is_finite()
        {
            let error = ((kl - *target) / *target).clamp(-ERROR_LIMIT, ERROR_LIMIT);
            *coef *= 1.0 + *gain * error;
        }
    }

    /// Resumes from a saved state: copies an adaptive coefficient, but keeps the present target and gain. Does nothing if either
    /// controller is fixed.
    pub fn resume(&mut self, saved: &Self) {
        if let (Self::Adaptive { coef, .. }, Self::Adaptive { coef: saved_coef, .. }) = (self, saved) {
            *coef = *saved_coef;
        }
    }
}

/// Serializes a number as its 64 bits in hexadecimal.
mod bits {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(v: &f64, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{:016x}", v.to_bits()))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
        let text = String::deserialize(from)?;
        let invalid = || D::Error::custom(format!("`{text}` is not a finite number in 16 hexadecimal digits"));
        let value = u64::from_str_radix(&text, 16).map(f64::from_bits).map_err(|_| invalid())?;
        if value.is_finite() { Ok(value) } else { Err(invalid()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controller_follows_its_target() {
        let mut c = KlController::Adaptive { coef: 0.1, target: 6.0, gain: 0.1 };
        c.observe(6.6);
        assert!((c.coef() - 0.1 * 1.01).abs() < 1e-12);
        c.observe(1e9);
        assert!((c.coef() - 0.1 * 1.01 * 1.02).abs() < 1e-12, "clipped at 20 %");
        let before = c.coef();
        c.observe(f64::NAN);
        assert_eq!(c.coef(), before);
        c.observe(0.0);
        assert!((c.coef() - before * 0.98).abs() < 1e-12);
    }

    #[test]
    fn controller_resumes_from_its_state() {
        let mut c = KlController::Adaptive { coef: 0.1, target: 6.0, gain: 0.1 };
        c.observe(9.0);
        let saved: KlController = serde_json::from_str(&serde_json::to_string(&c).unwrap()).unwrap();
        assert_eq!(saved, c);
        for malformed in ["zz", "7ff0000000000000"] {
            let text = format!(r#"{{"kind":"adaptive","coef":"{malformed}","target":1.0,"gain":0.1}}"#);
            let e = serde_json::from_str::<KlController>(&text).unwrap_err().to_string();
            assert!(e.contains(malformed), "{e}");
        }
        let mut again = KlController::Adaptive { coef: 0.3, target: 5.0, gain: 0.1 };
        again.resume(&saved);
        assert_eq!(again, KlController::Adaptive { coef: c.coef(), target: 5.0, gain: 0.1 });
        let mut fixed = KlController::Fixed { coef: 0.3 };
        fixed.resume(&saved);
        fixed.observe(100.0);
        assert_eq!(fixed.coef(), 0.3);
    }
}
