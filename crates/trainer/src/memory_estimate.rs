//! Estimate of the memory that an update of either stage needs on a rank.

use tch::{Device, Kind, Tensor};
use unveil_core::selects_parameter;
use unveil_model::{Vlm, activation_kind, is_adapter};
use unveil_plan::{Activations, Numerics, PassSize, TrainedParts};

use crate::memory_plan::MemoryPlan;
use crate::micro_batch::{BatchItem, Division};
use crate::optim::AdamW;
use crate::partition::MicroBatches;
use crate::shard::{Ranks, ZeroStage};

/// The largest micro-batch of an update.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct LargestPass {
    /// Positions, padding included.
    pub positions: u64,
    /// Response tokens.
    pub tokens: u64,
    /// Image patches.
    pub patches: u64,
}

impl LargestPass {
    /// Finds the largest one of `micro_batches`.
    pub(crate) fn of<T: BatchItem>(division: Division, micro_batches: &MicroBatches<'_, T>) -> Self {
        let largest = micro_batches.iter().max_by_key(|m| division.positions(m)).unwrap_or(&[]);
        let tokens = largest.iter().map(|item| item.token_count()).sum::<usize>() as u64;
        let grids = largest.iter().flat_map(|item| &item.packed().prompt.grids);
        let patches = grids.map(|[t, h, w]| (t * h * w).max(0) as u64).sum();
        Self { positions: division.positions(largest) as u64, tokens, patches }
    }
}

/// Returns the bytes of the activations of a pass through `vlm` at their highest.
fn activation_bytes(vlm: &Vlm, optimizer: &AdamW, pass: LargestPass, recompute: bool) -> u64 {
    let LargestPass { positions, tokens, patches } = pass;
    let size = |kind: Kind| kind.elt_size_in_bytes() as u64;
    let activation = size(activation_kind(vlm.kind()));
    let numerics = Numerics {
        weight: size(vlm.kind()),
        activation,
        operand: if vlm.device() == Device::Cpu { activation } else { size(vlm.cache_kind()) },
        cache: size(vlm.cache_kind()),
        keeps_normalised: vlm.device() == Device::Cpu,
    };
    let trained = TrainedParts {
        decoder: optimizer.names().any(|name| !is_adapter(name) && selects_parameter("language_model", name)),
        vision: optimizer.names().any(|name| selects_parameter("vision_tower", name)),
        adapter_rank: vlm.adapters().map_or(0, |a| a.spec().rank.max(0) as u64),
    };
    let pass = PassSize { positions, tokens, patches, entropy: true };
    Activations::of(&vlm.config().shape(), &pass, &numerics, &trained, recompute).peak()
}

/// Quantities that the memory of an update depends on.
pub(crate) struct MemoryInputs<'a> {
    /// The trained model and all others on the rank.
    pub models: Vec<&'a Vlm>,
    pub optimizer: &'a AdamW,
    pub ranks: &'a Ranks,
    pub largest: LargestPass,
    pub recompute: bool,
    /// Ways to need less memory, the most promising first; `zero` and `ranks` are added.
    pub advice: Vec<String>,
}

impl MemoryInputs<'_> {
    /// Estimates the memory by use.
    pub(crate) fn plan(self) -> MemoryPlan {
        let bytes = |vlm: &Vlm| {
            let tensor_bytes = |(_, t): &(String, Tensor)| (t.numel() * t.kind().elt_size_in_bytes()) as u64;
            vlm.named_parameters().iter().map(tensor_bytes).sum::<u64>()
        };
        let ranks = self.ranks;
        let shards = ranks.shard().1 as u64;
        let numel = self.optimizer.numel() as u64;
        let sharded_from = |stage: ZeroStage, n: u64| if ranks.zero_stage() >= stage { n / shards } else { n };
        let mut advice = self.advice;
        if ranks.zero_stage() < ZeroStage::Parameters {
            advice.push(format!(
                "shard the state over more ranks (learner.parallel.ranks, now {}, and .zero)",
                ranks.size()
            ));
        }
        let activations =
            self.models.first().map_or(0, |vlm| activation_bytes(vlm, self.optimizer, self.largest, self.recompute));
        MemoryPlan {
            weights: sharded_from(ZeroStage::Parameters, self.models.iter().map(|vlm| bytes(vlm)).sum()),
            optimizer: sharded_from(ZeroStage::Optimizer, self.optimizer.bytes()),
            gradients: sharded_from(ZeroStage::Gradients, numel * 4),
            activations,
            positions: self.largest.positions,
            advice,
        }
    }
}
