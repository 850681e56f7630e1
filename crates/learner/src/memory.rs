//! What an update needs memory for, and what to lower when there is not enough of it.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Once;

use tch::{Kind, Tensor};
use unveil_model::Vlm;

use crate::batch::{Member, TrainGroup};
use crate::error::Result;
use crate::shard::Zero;
use crate::share::Share;
use crate::step::{Learner, members};

/// Bytes by use, on one rank. Activations are an estimate.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MemoryPlan {
    /// Weights of all models that are there.
    pub weights: u64,
    /// Master weights and moments.
    pub optimizer: u64,
    /// Gradients.
    pub gradients: u64,
    /// What the largest pass keeps for its backward pass, logits among it.
    pub activations: u64,
    /// Padded positions of that pass.
    pub positions: u64,
    /// What can be done, most promising first.
    pub advice: Vec<String>,
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| format!("{} MiB", bytes.div_ceil(1 << 20));
        write!(
            f,
            "weights {}, optimiser {}, gradients {}, activations of a pass over {} positions about {}; {}",
            mib(self.weights),
            mib(self.optimizer),
            mib(self.gradients),
            self.positions,
            mib(self.activations),
            self.advice.join("; or ")
        )
    }
}

/// Shape of a decoder, for the estimate of activations.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub layers: u64,
    pub hidden: u64,
    pub intermediate: u64,
    pub vocab: u64,
}

impl Shape {
    /// Bytes that a pass keeps. A layer keeps about a dozen tensors of the hidden width (norms, queries, keys, values, what is
    /// attended, residuals; attention itself is computed again) and four of the MLP's; the last one keeps logits and their softmax
    /// for every response token. With `recompute` a layer keeps its input, and one at a time the rest.
    pub fn activations(&self, positions: u64, tokens: u64, recompute: bool, kind: Kind) -> u64 {
        let layer = positions * (12 * self.hidden + 4 * self.intermediate);
        let kept = if recompute { layer + positions * self.hidden * self.layers } else { layer * self.layers };
        let rows = if recompute { tokens.min(1024) } else { tokens };
        let size = if kind == Kind::Double { 8 } else { 4 };
        (kept + 3 * rows * self.vocab) * size
    }
}

impl Learner {
    /// What the update of a batch needs memory for on this rank.
    pub fn memory_plan(&self, groups: &[TrainGroup]) -> MemoryPlan {
        let (policy, settings, ranks) = (&self.policy, &self.policy.settings, &self.ranks);
        let members = members(groups);
        let share = Share::new(&members, ranks.clone(), settings.token_budget, policy.vlm.device());
        let work = share.work(&members, &(0..members.len()).collect::<Vec<_>>());
        let pass = |part: &&[&Member<'_>]| part.len() * part.iter().map(|m| m.width()).max().unwrap_or(0);
        let largest = work.passes().max_by_key(pass).unwrap_or(&[]);
        let (positions, tokens) = (pass(&largest) as u64, largest.iter().map(|m| m.tokens()).sum::<usize>() as u64);
        let c = &policy.vlm.config().text;
        let shape = Shape {
            layers: c.num_hidden_layers as u64,
            hidden: c.hidden_size as u64,
            intermediate: c.intermediate_size as u64,
            vocab: c.vocab_size as u64,
        };
        let bytes = |vlm: &Vlm| {
            let of = |(_, t): &(String, Tensor)| (t.numel() * t.kind().elt_size_in_bytes()) as u64;
            vlm.named_parameters().iter().map(of).sum::<u64>()
        };
        let models =
            std::iter::once(&policy.vlm).chain(policy.critic.as_ref()).chain(policy.reference.as_ref().map(|r| &r.vlm));
        let (shards, numel) = (ranks.shard().1 as u64, self.optimizer.numel() as u64);
        let divided = |from: Zero, n: u64| if ranks.zero() >= from { n / shards } else { n };
        let mut advice = vec![format!(
            "lower learner.token_budget (now {}, the widest group has {})",
            settings.token_budget,
            members.iter().map(Member::width).max().unwrap_or(0)
        )];
        if !settings.recompute {
            advice.push("set learner.recompute = true".into());
        }
        advice.push("lower rollout.n or rollout.max_new_tokens".into());
        if ranks.zero() < Zero::Parameters {
            advice.push(format!(
                "divide state over more ranks (learner.parallel.ranks, now {}, and .zero)",
                ranks.size()
            ));
        }
        if policy.vlm.adapters().is_none() {
            advice.push("train adapters alone (learner.lora.rank)".into());
        }
        MemoryPlan {
            weights: divided(Zero::Parameters, models.map(bytes).sum()),
            optimizer: divided(Zero::Optimizer, self.optimizer.bytes()),
            gradients: divided(Zero::Gradients, numel * 4),
            activations: shape.activations(positions, tokens, settings.recompute, policy.vlm.kind()),
            positions,
            advice,
        }
    }
}

/// Whether libtorch says that there is not enough memory.
fn is_short(message: &str) -> bool {
    ["out of memory", "can't allocate memory", "not enough memory", "bad allocation"]
        .iter()
        .any(|w| message.contains(w))
}

/// Runs `work`.
///
/// # Errors
/// Memory did not suffice; what libtorch said.
pub(crate) fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<Result<T>, String> {
    quiet();
    // Operators of tch panic where its functions fail; after this error the learner ends, so nothing is used again.
    let outcome = catch_unwind(AssertUnwindSafe(work));
    let message = match outcome {
        Ok(Ok(done)) => return Ok(Ok(done)),
        Ok(Err(e)) => match e.to_string() {
            m if is_short(&m) => m,
            _ => return Ok(Err(e)),
        },
        Err(panic) => match text(panic.as_ref()) {
            Some(m) if is_short(m) => m.to_owned(),
            _ => resume_unwind(panic),
        },
    };
    Err(message.lines().find(|l| is_short(l)).unwrap_or_default().trim().to_owned())
}

fn text(panic: &(dyn std::any::Any + Send)) -> Option<&str> {
    panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied())
}

/// Panics for want of memory become errors, which say more: they are not shown by themselves.
fn quiet() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let shown = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !info.payload_as_str().is_some_and(is_short) {
                shown(info);
            }
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::LearnerError;

    #[test]
    fn want_of_memory_is_told_from_other_faults() {
        let short = || -> Result<()> {
            panic!("Torch(\"[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\")")
        };
        assert!(guarded(short).unwrap_err().contains("can't allocate memory"));
        let other = || -> Result<()> { Err(LearnerError::Setting("another fault".into())) };
        assert_eq!(guarded(other).unwrap().unwrap_err().to_string(), "another fault");
        assert!(catch_unwind(|| guarded(|| -> Result<()> { panic!("a bug") })).is_err());
        assert_eq!(guarded(|| Ok(3)).unwrap().unwrap(), 3);
    }

    #[test]
    fn recomputing_keeps_less() {
        let shape = Shape { layers: 36, hidden: 2048, intermediate: 11008, vocab: 151_936 };
        let (plain, less) = (
            shape.activations(65_536, 8192, false, Kind::BFloat16),
            shape.activations(65_536, 8192, true, Kind::BFloat16),
        );
        assert!(less * 5 < plain, "{less} {plain}");
        assert!(shape.activations(32_768, 4096, false, Kind::Float) < plain);
    }
}
