//! Estimates of the divergence from a reference per token, with the gradients that they have, and the controller of its weight.
//! Must not know: where the terms go, loss or reward.

use serde::{Deserialize, Serialize};
use tch::Tensor;

/// Estimators of KL(policy || reference) from samples of the policy, with d = log policy - log reference (J. Schulman,
/// "Approximating KL divergence", 2020). In the reward only their value counts. In the loss their gradient does, and it is not
/// the gradient of the value they estimate (arXiv 2510.01555); for on-policy samples its expectation is given with each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KlForm {
    /// d. Unbiased, of either sign. As a loss its gradient is grad log policy: zero in expectation, so it only adds noise. In
    /// the reward it is the form whose policy gradient is that of KL(policy || reference).
    K1,
    /// d^2 / 2. Biased, never negative, small variance. As a loss: d grad log policy, the gradient of KL(policy || reference).
    K2,
    /// exp(-d) - 1 + d. Unbiased, never negative (GRPO, arXiv 2402.03300, eq. 4). As a loss: (1 - exp(-d)) grad log policy, the
    /// gradient of KL(reference || policy); equal to that of k2 to first order in d.
    K3,
}

/// Which gradient a KL term in the loss has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KlGradient {
    /// Of the form itself, see [`KlForm`].
    Own,
    /// Of k2 under the value of the form (straight through): for on-policy samples that of KL(policy || reference), whichever
    /// form is reported.
    Reverse,
}

/// KL per token, `[N]`, of the kind of `logprobs`; differentiable in `logprobs` as `gradient` says. Not clamped: where the
/// reference gives a token far more probability than the policy, k3 grows exponentially and may overflow.
pub fn kl_terms(form: KlForm, gradient: KlGradient, logprobs: &Tensor, reference: &Tensor) -> Tensor {
    let d = logprobs - reference;
    let own = match form {
        KlForm::K1 => d.shallow_clone(),
        KlForm::K2 => d.square() * 0.5,
        KlForm::K3 => (-&d).exp() - 1.0 + &d,
    };
    match gradient {
        KlGradient::Own => own,
        KlGradient::Reverse => {
            let k2 = d.square() * 0.5;
            own.detach() + (&k2 - k2.detach())
        }
    }
}

/// Relative error beyond which one update of the adaptive controller does not look (arXiv 1909.08593, section 2.2).
const ERROR_LIMIT: f64 = 0.2;

/// The weight of KL and how it changes; the state of a run, to be saved with it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum KlController {
    /// A constant weight.
    Fixed {
        /// The weight.
        coef: f64,
    },
    /// Follows a target by proportional control in log space (Ziegler et al., arXiv 1909.08593, section 2.2).
    Adaptive {
        /// The present weight; saved as its bits in hexadecimal, so that a resumed run goes on exactly whatever the format.
        #[serde(with = "bits")]
        coef: f64,
        /// KL to reach, in the unit of what is observed.
        target: f64,
        /// K, the relative change of the weight at a relative error of 1; 0.1 in the source.
        gain: f64,
    },
}

impl KlController {
    /// The present weight.
    pub fn coef(&self) -> f64 {
        match self {
            Self::Fixed { coef } | Self::Adaptive { coef, .. } => *coef,
        }
    }

    /// After an update at which `kl` was observed: coef *= 1 + gain clip((kl - target) / target, -0.2, 0.2). A value that is not
    /// finite changes nothing, nor does anything change a fixed weight.
    pub fn observe(&mut self, kl: f64) {
        if let Self::Adaptive { coef, target, gain } = self
            && kl.is_finite()
        {
            let error = ((kl - *target) / *target).clamp(-ERROR_LIMIT, ERROR_LIMIT);
            *coef *= 1.0 + *gain * error;
        }
    }

    /// Goes on from a saved state: an adaptive weight is taken over, target and gain stay as they are set now. Where either is
    /// fixed, nothing is taken over.
    pub fn resume(&mut self, saved: &Self) {
        if let (Self::Adaptive { coef, .. }, Self::Adaptive { coef: was, .. }) = (self, saved) {
            *coef = *was;
        }
    }
}

/// A number as the hexadecimal text of its 64 bits.
mod bits {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(v: &f64, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{:016x}", v.to_bits()))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
        let text = String::deserialize(from)?;
        let fault = || D::Error::custom(format!("`{text}` is not a finite number in 16 hexadecimal digits"));
        let found = u64::from_str_radix(&text, 16).map(f64::from_bits).map_err(|_| fault())?;
        if found.is_finite() { Ok(found) } else { Err(fault()) }
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
    fn controller_goes_on_from_its_state() {
        let mut c = KlController::Adaptive { coef: 0.1, target: 6.0, gain: 0.1 };
        c.observe(9.0);
        let saved: KlController = serde_json::from_str(&serde_json::to_string(&c).unwrap()).unwrap();
        assert_eq!(saved, c);
        for bad in ["zz", "7ff0000000000000"] {
            let text = format!(r#"{{"kind":"adaptive","coef":"{bad}","target":1.0,"gain":0.1}}"#);
            let e = serde_json::from_str::<KlController>(&text).unwrap_err().to_string();
            assert!(e.contains(bad), "{e}");
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
