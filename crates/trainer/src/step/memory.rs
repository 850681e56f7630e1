//! Memory needed by an update, by use, and what to lower when it does not suffice.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Once;

use tch::{Kind, Tensor};
use unveil_core::TrainGroup;
use unveil_model::Vlm;

use crate::batch::TrainableGroup;
use crate::error::Result;
use crate::memory_plan::MemoryPlan;
use crate::partition::Partition;
use crate::shard::ZeroStage;

use super::{PolicyTrainer, trainable_groups};

/// Dimensions of a decoder, for the estimate of activations.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DecoderShape {
    pub layers: u64,
    pub hidden: u64,
    pub intermediate: u64,
    pub vocab: u64,
}

impl DecoderShape {
    /// Returns the bytes of activations kept by a forward pass. A layer keeps about a dozen tensors of the hidden width (norms, queries,
    /// keys, values, attention output, residuals; attention itself is recomputed) and four of the MLP's width; the head keeps logits
    /// and their softmax for every response token. With `recompute` a layer keeps its input only, and one layer at a time the rest.
    pub(super) fn activation_bytes(&self, positions: u64, tokens: u64, recompute: bool, kind: Kind) -> u64 {
        let layer = positions * (12 * self.hidden + 4 * self.intermediate);
        let layers = if recompute { layer + positions * self.hidden * self.layers } else { layer * self.layers };
        let rows = if recompute { tokens.min(1024) } else { tokens };
        let size = if kind == Kind::Double { 8 } else { 4 };
        (layers + 3 * rows * self.vocab) * size
    }
}

impl PolicyTrainer {
    /// Estimates the memory that the update of a batch needs on this rank.
    pub fn memory_plan(&self, groups: &[TrainGroup]) -> MemoryPlan {
        let policy = &self.policy;
        let settings = &policy.settings;
        let ranks = &self.ranks;
        let trainable = trainable_groups(groups);
        let partition = Partition::new(&trainable, ranks.clone(), settings.token_budget, policy.vlm.device());
        let micro_batches = partition.micro_batches(&trainable, &(0..trainable.len()).collect::<Vec<_>>());
        let padded = |micro_batch: &&[&TrainableGroup<'_>]| {
            micro_batch.len() * micro_batch.iter().map(|g| g.packed_len()).max().unwrap_or(0)
        };
        let largest = micro_batches.iter().max_by_key(padded).unwrap_or(&[]);
        let positions = padded(&largest) as u64;
        let tokens = largest.iter().map(|g| g.token_count()).sum::<usize>() as u64;
        let c = &policy.vlm.config().text;
        let shape = DecoderShape {
            layers: c.num_hidden_layers as u64,
            hidden: c.hidden_size as u64,
            intermediate: c.intermediate_size as u64,
            vocab: c.vocab_size as u64,
        };
        let bytes = |vlm: &Vlm| {
            let tensor_bytes = |(_, t): &(String, Tensor)| (t.numel() * t.kind().elt_size_in_bytes()) as u64;
            vlm.named_parameters().iter().map(tensor_bytes).sum::<u64>()
        };
        let models =
            std::iter::once(&policy.vlm).chain(policy.critic.as_ref()).chain(policy.reference.as_ref().map(|r| &r.vlm));
        let shards = ranks.shard().1 as u64;
        let numel = self.optimizer.numel() as u64;
        let sharded_from = |stage: ZeroStage, n: u64| if ranks.zero_stage() >= stage { n / shards } else { n };
        let mut advice = vec![format!(
            "lower learner.token_budget (now {}; the longest group has {})",
            settings.token_budget,
            trainable.iter().map(TrainableGroup::packed_len).max().unwrap_or(0)
        )];
        if !settings.recompute {
            advice.push("set learner.recompute = true".into());
        }
        advice.push("lower rollout.n or rollout.max_new_tokens".into());
        if ranks.zero_stage() < ZeroStage::Parameters {
            advice.push(format!(
                "shard the state over more ranks (learner.parallel.ranks, now {}, and .zero)",
                ranks.size()
            ));
        }
        if policy.vlm.adapters().is_none() {
            advice.push("train adapters only (learner.lora.rank)".into());
        }
        MemoryPlan {
            weights: sharded_from(ZeroStage::Parameters, models.map(bytes).sum()),
            optimizer: sharded_from(ZeroStage::Optimizer, self.optimizer.bytes()),
            gradients: sharded_from(ZeroStage::Gradients, numel * 4),
            activations: shape.activation_bytes(positions, tokens, settings.recompute, policy.vlm.kind()),
            positions,
            advice,
        }
    }
}

/// Returns whether a message of libtorch reports a lack of memory.
fn is_out_of_memory(message: &str) -> bool {
    ["out of memory", "can't allocate memory", "not enough memory", "bad allocation"]
        .iter()
        .any(|w| message.contains(w))
}

/// Runs `work` and returns its result.
///
/// # Errors
/// Returns libtorch's message if there was not enough memory.
pub(crate) fn catch_out_of_memory<T>(work: impl FnOnce() -> Result<T>) -> Result<Result<T>, String> {
    silence_out_of_memory_panics();
    // The operators of tch panic on errors. The learner ends after this one, so no broken state is used.
    let outcome = catch_unwind(AssertUnwindSafe(work));
    let message = match outcome {
        Ok(Ok(value)) => return Ok(Ok(value)),
        Ok(Err(e)) => match e.to_string() {
            m if is_out_of_memory(&m) => m,
            _ => return Ok(Err(e)),
        },
        Err(panic) => match panic_message(panic.as_ref()) {
            Some(m) if is_out_of_memory(m) => m.to_owned(),
            _ => resume_unwind(panic),
        },
    };
    Err(message.lines().find(|l| is_out_of_memory(l)).unwrap_or_default().trim().to_owned())
}

/// Returns the message of a panic, if it has one.
fn panic_message(panic: &(dyn std::any::Any + Send)) -> Option<&str> {
    panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied())
}

/// Keeps panics for lack of memory off the terminal; they become errors, which say more.
fn silence_out_of_memory_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !info.payload_as_str().is_some_and(is_out_of_memory) {
                previous(info);
            }
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::TrainerError;

    #[test]
    fn out_of_memory_is_distinguished_from_other_errors() {
        let out_of_memory = || -> Result<()> {
            panic!("Torch(\"[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\")")
        };
        assert!(catch_out_of_memory(out_of_memory).unwrap_err().contains("can't allocate memory"));
        let other = || -> Result<()> { Err(TrainerError::Setting("another error".into())) };
        assert_eq!(catch_out_of_memory(other).unwrap().unwrap_err().to_string(), "another error");
        assert!(catch_unwind(|| catch_out_of_memory(|| -> Result<()> { panic!("a bug") })).is_err());
        assert_eq!(catch_out_of_memory(|| Ok(3)).unwrap().unwrap(), 3);
    }

    #[test]
    fn recomputation_needs_less_memory() {
        let shape = DecoderShape { layers: 36, hidden: 2048, intermediate: 11008, vocab: 151_936 };
        let kept = shape.activation_bytes(65_536, 8192, false, Kind::BFloat16);
        let recomputed = shape.activation_bytes(65_536, 8192, true, Kind::BFloat16);
        assert!(recomputed * 5 < kept, "{recomputed} {kept}");
        assert!(shape.activation_bytes(32_768, 4096, false, Kind::Float) < kept);
    }
}
