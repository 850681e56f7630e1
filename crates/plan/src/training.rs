//! Memory of a process that trains: one rank of the learner, or of stage 1.

use crate::activations::{Activations, Numerics};
use crate::shape::Counts;

/// Bytes of a moment, a master weight or a summed gradient.
const FP32: u64 = 4;

/// State that is sharded over the ranks of a replica (ZeRO, arXiv 1910.02054).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sharding {
    /// All ranks.
    pub ranks: u64,
    /// Ranks of a replica.
    pub shards: u64,
    /// ZeRO stage: from 1 optimiser state, from 2 also gradients, from 3 also parameters are sharded.
    pub zero: u8,
}

impl Sharding {
    /// A single rank.
    pub const SOLO: Self = Self { ranks: 1, shards: 1, zero: 0 };

    /// Returns this rank's part of `bytes` of state that is sharded from ZeRO stage `from`.
    pub fn part(&self, from: u8, bytes: u64) -> u64 {
        if self.zero >= from { bytes.div_ceil(self.shards.max(1)) } else { bytes }
    }

    /// Returns whether optimiser state is sharded.
    fn shards_optimizer(&self) -> bool {
        self.zero >= 1 && self.shards > 1
    }
}

/// Parameters and activations of a rank.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainingCase {
    /// Parameters of the policy.
    pub parameters: Counts,
    /// Decoder layers.
    pub layers: u64,
    /// Parameters of the policy that are trained in place.
    pub whole: Counts,
    /// Parameters of adapters, which are fp32 and come on top of the policy.
    pub adapters: Counts,
    /// Trained parameters of a separate critic of the same size; 0 without.
    pub critic: u64,
    /// Whether there is a reference model of the same size.
    pub reference: bool,
    /// Bytes per value.
    pub numerics: Numerics,
    /// Ranks and ZeRO stage.
    pub sharding: Sharding,
    /// Passes per update and rank.
    pub micro_batches: u64,
    /// Activations of the largest pass.
    pub activations: Activations,
}

/// Bytes of a training process at its peak, by use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TrainingMemory {
    /// Weights of all models.
    pub weights: u64,
    /// Gradients.
    pub gradients: u64,
    /// Moments, master weights, and temporaries of the optimiser's step.
    pub optimizer: u64,
    /// Activations.
    pub activations: u64,
}

impl TrainingMemory {
    /// Returns the sum.
    pub fn total(&self) -> u64 {
        self.weights + self.gradients + self.optimizer + self.activations
    }
}

/// Memory that comes and goes within an update.
#[derive(Debug, Clone, Copy, Default)]
struct Phase {
    gradients: u64,
    activations: u64,
    /// Temporaries of the optimiser.
    update: u64,
}

impl Phase {
    fn total(&self) -> u64 {
        self.gradients + self.activations + self.update
    }
}

impl TrainingCase {
    /// Computes the memory at the peak of an update.
    pub fn memory(&self) -> TrainingMemory {
        let phases = self.phases();
        let highest = phases.iter().max_by_key(|p| p.total()).copied().unwrap_or_default();
        TrainingMemory {
            weights: self.weights(),
            gradients: highest.gradients,
            optimizer: self.optimizer_state() + highest.update,
            activations: highest.activations,
        }
    }

    /// Returns the number of parameters that are trained in place, of all models.
    fn whole_values(&self) -> u64 {
        self.whole.total() + self.critic
    }

    /// Returns the number of trained parameters of all models.
    fn trained(&self) -> u64 {
        self.whole_values() + self.adapters.total()
    }

    fn adapter_bytes(&self) -> u64 {
        self.adapters.total() * FP32.max(self.numerics.activation)
    }

    /// Returns the bytes of all trained parameters, and of their gradients.
    fn trained_bytes(&self) -> u64 {
        self.whole_values() * self.numerics.weight + self.adapter_bytes()
    }

    /// Returns the bytes of fp32 state per value; fp64 models have fp64 state.
    fn state_bytes(&self) -> u64 {
        FP32.max(self.numerics.weight)
    }

    fn is_narrow(&self) -> bool {
        self.whole_values() > 0 && self.numerics.weight < FP32
    }

    fn has_master(&self) -> bool {
        self.sharding.shards_optimizer() || self.is_narrow()
    }

    /// Returns the bytes of moments and master weights.
    fn optimizer_state(&self) -> u64 {
        let copies = if self.has_master() { 3 } else { 2 };
        self.sharding.part(1, copies * self.state_bytes() * self.trained())
    }

    /// Returns the bytes of the weights that are present during an update.
    fn weights(&self) -> u64 {
        let bytes = self.numerics.weight;
        // Modules that are trained beside adapters keep their original values.
        let originals = if self.adapters.total() > 0 { self.whole.total() * bytes } else { 0 };
        let added = self.adapter_bytes() + originals;
        let models = 1 + u64::from(self.reference) + u64::from(self.critic > 0);
        if self.sharding.zero < 3 || self.sharding.shards <= 1 {
            return models * self.parameters.total() * bytes + added;
        }
        // Trained weights are gathered from the master weights; the others have shards in their own dtype. Of one model at a time,
        // everything outside the layers is present, with two layers and the buffers that two more are gathered into.
        let frozen = (models * self.parameters.total()).saturating_sub(self.whole_values());
        let layer = self.parameters.layers / self.layers.max(1);
        let present = self.parameters.total() - self.parameters.layers + layer * self.layers.min(4);
        self.sharding.part(3, frozen * bytes) + present * bytes + added
    }

    fn phases(&self) -> Vec<Phase> {
        let a = &self.activations;
        let trained = self.trained();
        let leaf = self.trained_bytes();
        let state = self.state_bytes() * trained;
        let multiple = self.sharding.ranks > 1;
        // Gradients of all layers once the backward pass is over. A single rank leaves them in the parameters; several ranks reduce them
        // layer by layer to fp32 sums, of which a rank owns a part, unless they add up over several passes first.
        let added_up = multiple && self.sharding.zero == 1 && self.micro_batches > 1;
        let owned = self.sharding.part(1, state);
        let collected = match multiple {
            false => leaf,
            true if added_up => state,
            true => owned,
        };
        let in_flight = if multiple { 2 * state / self.layers.max(1) } else { 0 };
        let of_tower = (self.whole.vision + self.adapters.vision) as f64 / trained.max(1) as f64;
        let after_decoder = (collected as f64 * (1.0 - of_tower)) as u64 + in_flight;
        // Several ranks join the sums of layers; a single rank joins the parameters' own gradients, converted to fp32 before.
        let joined = match multiple {
            true => owned,
            false if self.is_narrow() => collected + state,
            false => collected,
        };
        let written_back =
            if self.has_master() && self.sharding.zero < 3 { leaf + self.sharding.part(1, leaf) } else { 0 };
        vec![
            Phase { activations: a.peak(), ..Phase::default() },
            Phase { gradients: after_decoder, activations: a.vision + a.layer, update: 0 },
            Phase { gradients: collected + in_flight, activations: a.block, update: 0 },
            Phase { gradients: joined + owned, ..Phase::default() },
            // The denominator and the change of all weights.
            Phase { gradients: owned, update: 2 * owned, activations: 0 },
            Phase { gradients: owned, update: written_back, activations: 0 },
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FP32_CPU: Numerics = Numerics { weight: 4, activation: 4, operand: 4, cache: 4, keeps_normalised: true };
    const BF16: Numerics = Numerics { weight: 2, activation: 4, operand: 4, cache: 4, keeps_normalised: false };

    fn case(numerics: Numerics) -> TrainingCase {
        TrainingCase {
            parameters: Counts { vision: 100, layers: 800, outside: 100 },
            layers: 8,
            whole: Counts { vision: 100, layers: 800, outside: 100 },
            adapters: Counts::default(),
            critic: 0,
            reference: false,
            numerics,
            sharding: Sharding::SOLO,
            micro_batches: 1,
            activations: Activations::default(),
        }
    }

    #[test]
    fn optimizer_step_is_the_peak_without_activations() {
        // Weights, two moments, then a flat gradient, a denominator and an update.
        assert_eq!(
            case(FP32_CPU).memory(),
            TrainingMemory { weights: 4000, gradients: 4000, optimizer: 16_000, activations: 0 }
        );
        // Master weights in addition; gradients in bf16, each in fp32, and joined are 10 bytes per value, less than the 12 of the step.
        assert_eq!(
            case(BF16).memory(),
            TrainingMemory { weights: 2000, gradients: 4000, optimizer: 20_000, activations: 0 }
        );
    }

    #[test]
    fn large_activations_are_the_peak() {
        let activations = Activations { decoder: 90_000, vision: 5000, head: 4000, layer: 700, block: 600 };
        let memory = TrainingCase { activations, ..case(FP32_CPU) }.memory();
        assert_eq!(memory, TrainingMemory { weights: 4000, gradients: 0, optimizer: 8000, activations: 99_000 });
        // Gradients of everything meet the activations of the tower at the end of the backward pass.
        let activations = Activations { decoder: 1000, vision: 12_000, head: 400, layer: 700, block: 600 };
        let memory = TrainingCase { activations, ..case(FP32_CPU) }.memory();
        assert_eq!((memory.gradients, memory.activations), (3600, 12_700));
    }

    #[test]
    fn adapters_have_little_state() {
        let adapters = Counts { vision: 0, layers: 10, outside: 0 };
        let memory = TrainingCase { whole: Counts::default(), adapters, ..case(BF16) }.memory();
        assert_eq!(memory, TrainingMemory { weights: 2040, gradients: 40, optimizer: 160, activations: 0 });
    }

    #[test]
    fn modules_beside_adapters_have_their_own_state() {
        let adapters = Counts { vision: 0, layers: 10, outside: 0 };
        let whole = Counts { vision: 0, layers: 0, outside: 100 };
        let memory = TrainingCase { whole, adapters, ..case(BF16) }.memory();
        // The module's original values; master weights, moments and temporaries of both.
        assert_eq!((memory.weights, memory.optimizer), (2000 + 40 + 200, 110 * (12 + 8)));
    }

    #[test]
    fn each_zero_stage_shards_more() {
        let at = |zero: u8| {
            let sharding = Sharding { ranks: 4, shards: 4, zero };
            TrainingCase { sharding, micro_batches: 3, ..case(BF16) }.memory()
        };
        let totals: Vec<u64> = (0..4).map(|zero| at(zero).total()).collect();
        assert!(totals.windows(2).all(|w| w[1] < w[0]), "{totals:?}");
        assert_eq!(at(3).weights, 2 * (200 + 4 * 100));
        assert_eq!(case(BF16).sharding.part(3, 10), 10);
        assert_eq!(Sharding { ranks: 4, shards: 4, zero: 2 }.part(1, 10), 3);
    }

    #[test]
    fn further_models_count() {
        let reference = TrainingCase { reference: true, ..case(BF16) }.memory();
        assert_eq!((reference.weights, reference.optimizer), (4000, 20_000));
        let critic = TrainingCase { critic: 1000, ..case(BF16) }.memory();
        assert_eq!((critic.weights, critic.optimizer), (4000, 40_000));
    }
}
