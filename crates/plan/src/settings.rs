//! The settings of an update that memory and time depend on, read from the configuration: the one place that knows its keys.

use unveil_config::Config;
use unveil_config::schema::{Critic, Parallel, SftPhase, WeightSync};
use unveil_core::{Compute, Dtype, selects_parameter};

use crate::activations::{Activations, Numerics, PassSize, TrainedParts};
use crate::gpu::Device;
use crate::shape::{Counts, ModelShape};
use crate::training::{Sharding, TrainingCase};
use crate::workload::Workload;

/// Bytes of an activation.
const ACTIVATION: u64 = 4;
/// Bytes of an operand and of a key or value in the cache with `run.compute = "fast"`.
const NARROW: u64 = 2;

/// Settings of the updates of one stage.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct UpdateSettings {
    pub numerics: Numerics,
    pub sharding: Sharding,
    pub recompute: bool,
    /// Maximum of padded positions per pass.
    pub token_budget: u64,
    /// Samples or groups per optimiser step.
    pub batch: u64,
    /// Responses per prompt.
    pub responses: u64,
    /// Passes over the batch.
    pub epochs: u64,
    pub minibatches: u64,
    /// Parameters that are trained in place.
    pub whole: Counts,
    pub adapters: Counts,
    /// Trained parameters of a separate critic; 0 without.
    pub critic: u64,
    pub parts: TrainedParts,
    pub reference: bool,
    pub optimizer_steps: u64,
    /// Whether the entropy is computed.
    pub entropy: bool,
}

impl Numerics {
    /// Returns the bytes per value of a run on `device`.
    pub fn of(config: &Config, device: &Device) -> Self {
        let weight = match config.run.dtype {
            Dtype::Float32 => 4,
            Dtype::Bfloat16 => 2,
        };
        let cache = if config.run.compute == Compute::Fast { NARROW } else { ACTIVATION };
        // On the CPU, rounded operands stay fp32 tensors.
        let operand = if device.is_cpu() { ACTIVATION } else { cache };
        Self { weight, activation: ACTIVATION, operand, cache, keeps_normalised: device.is_cpu() }
    }
}

/// Parameters that a stage trains.
struct Trained {
    whole: Counts,
    adapters: Counts,
    parts: TrainedParts,
}

impl Trained {
    /// Returns all parameters that none of `frozen` selects.
    fn unfrozen(shape: &ModelShape, frozen: &[String]) -> Self {
        Self::whole(shape, |name| !frozen.iter().any(|selector| selects_parameter(selector, name)))
    }

    fn whole(shape: &ModelShape, filter: impl Fn(&str) -> bool) -> Self {
        let whole = shape.count(&filter);
        let parts = TrainedParts {
            decoder: whole.layers + whole.outside > 0,
            vision: shape.count(|name| filter(name) && selects_parameter("vision_tower", name)).total() > 0,
            adapter_rank: 0,
        };
        Self { whole, adapters: Counts::default(), parts }
    }

    /// Returns adapters of rank `rank` on the layers that `targets` select, and the modules that are trained beside them, by name or the
    /// last parts of it.
    fn adapters(shape: &ModelShape, rank: u64, targets: &[String], modules: &[String]) -> Self {
        let is_module = |name: &str| modules.iter().any(|module| contains_parts(name, module));
        let Self { whole, parts, .. } = Self::whole(shape, is_module);
        let (adapters, _) = shape.count_adapters(targets, rank);
        let parts = TrainedParts { vision: parts.vision || adapters.vision > 0, adapter_rank: rank, ..parts };
        Self { whole, adapters, parts }
    }
}

/// Returns whether `module` is a run of dot-separated parts of the parameter's name.
fn contains_parts(name: &str, module: &str) -> bool {
    !module.is_empty() && format!(".{name}").contains(&format!(".{module}."))
}

impl UpdateSettings {
    /// Reads the settings of a phase of stage 1.
    pub(crate) fn sft(config: &Config, phase: &SftPhase, shape: &ModelShape, device: &Device) -> Self {
        let s = &config.sft;
        let lora = &phase.lora;
        let trained = match lora.rank as u64 {
            0 => Trained::unfrozen(shape, &phase.frozen),
            rank => Trained::adapters(shape, rank, &lora.targets, &lora.modules_to_save),
        };
        Self {
            numerics: Numerics::of(config, device),
            sharding: sharding(&s.parallel),
            recompute: s.recompute,
            token_budget: s.token_budget as u64,
            batch: config.sft.batch as u64,
            responses: 1,
            epochs: 1,
            minibatches: 1,
            whole: trained.whole,
            adapters: trained.adapters,
            critic: 0,
            parts: trained.parts,
            reference: false,
            optimizer_steps: 1,
            entropy: false,
        }
    }

    /// Reads the settings of stage 2.
    pub(crate) fn learner(config: &Config, shape: &ModelShape, device: &Device) -> Self {
        let l = &config.learner;
        let unfrozen = Trained::unfrozen(shape, &l.frozen);
        let critic = if l.critic == Critic::Separate { unfrozen.whole.total() } else { 0 };
        let trained = match l.lora.rank as u64 {
            0 => unfrozen,
            rank => Trained::adapters(shape, rank, &l.lora.targets, &[]),
        };
        Self {
            numerics: Numerics::of(config, device),
            sharding: sharding(&l.parallel),
            recompute: l.recompute,
            token_budget: l.token_budget as u64,
            batch: l.groups as u64,
            responses: config.rollout.n as u64,
            epochs: l.inner_epochs as u64,
            minibatches: l.minibatches.max(1) as u64,
            whole: trained.whole,
            adapters: trained.adapters,
            critic,
            parts: trained.parts,
            reference: l.kl_coef > 0.0,
            optimizer_steps: (l.inner_epochs * l.minibatches.max(1)) as u64,
            entropy: true,
        }
    }

    /// Returns the number of trained parameters of all models.
    pub(crate) fn trained(&self) -> u64 {
        self.whole.total() + self.adapters.total() + self.critic
    }

    /// Returns whether adapters are trained.
    pub(crate) fn has_adapters(&self) -> bool {
        self.parts.adapter_rank > 0
    }

    /// Returns the samples or groups in one pass, and the passes of a mini-batch on one rank.
    pub(crate) fn passes(&self, workload: &Workload) -> (u64, u64) {
        let length = workload.positions(self.responses);
        let on_rank = self.batch.div_ceil(self.minibatches).div_ceil(self.sharding.ranks).max(1);
        let in_budget = (self.token_budget / length.max(1)).max(1);
        let in_pass = on_rank.min(in_budget);
        (in_pass, on_rank.div_ceil(in_pass))
    }

    /// Returns what a rank trains and keeps.
    pub(crate) fn case(&self, shape: &ModelShape, workload: &Workload) -> TrainingCase {
        let (in_pass, micro_batches) = self.passes(workload);
        let size = &workload.size;
        let pass = PassSize {
            entropy: self.entropy,
            ..PassSize::of_groups(in_pass, size.prompt, (self.responses, size.response), workload.patches)
        };
        TrainingCase {
            parameters: shape.count(|_| true),
            layers: shape.layers,
            whole: self.whole,
            adapters: self.adapters,
            critic: self.critic,
            // With adapters the reference is the model without them.
            reference: self.reference && !self.has_adapters(),
            numerics: self.numerics,
            sharding: self.sharding,
            micro_batches: micro_batches * self.minibatches,
            activations: Activations::of(shape, &pass, &self.numerics, &self.parts, self.recompute),
        }
    }
}

fn sharding(p: &Parallel) -> Sharding {
    let ranks = p.ranks.max(1) as u64;
    let shards = if p.shards == 0 { ranks } else { p.shards as u64 };
    Sharding { ranks, shards, zero: p.zero }
}

/// Returns the bytes of a worker's weights: the model, the original matrices of merged adapters, and the second copy of a broadcast.
pub(crate) fn worker_weights(config: &Config, shape: &ModelShape, numerics: &Numerics) -> u64 {
    let lora = &config.learner.lora;
    let (adapters, adapted) = match lora.rank {
        0 => Default::default(),
        rank => shape.count_adapters(&lora.targets, rank as u64),
    };
    let model = shape.count(|_| true).total();
    let sent = if lora.rank > 0 { adapters.total() * ACTIVATION } else { model * numerics.weight };
    let received = if config.rollout.weight_sync == WeightSync::Broadcast { sent } else { 0 };
    (model + adapted.total()) * numerics.weight + received
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::shape_7b;

    fn workload() -> Workload {
        let mut config = Config::default();
        config.rollout.max_new_tokens = 256;
        config.model.max_pixels = 602_112;
        config.data.kind = unveil_config::schema::DataKind::Jsonl;
        Workload::of(&config, &shape_7b(), None)
    }

    #[test]
    fn budget_limits_the_groups_of_a_pass() {
        let device = Device::gpu("H100").unwrap();
        let shape = shape_7b();
        let workload = workload();
        let passes = |edit: fn(&mut Config)| {
            let mut config = Config::default();
            config.learner.groups = 16;
            edit(&mut config);
            UpdateSettings::learner(&config, &shape, &device).passes(&workload)
        };
        // A group has 832 + 8 x 256 positions.
        assert_eq!(workload.positions(8), 2880);
        assert_eq!(passes(|_| ()), (16, 1));
        assert_eq!(passes(|c| c.learner.token_budget = 3 * 2880), (3, 6));
        assert_eq!(passes(|c| c.learner.token_budget = 1), (1, 16));
        assert_eq!(passes(|c| c.learner.parallel.ranks = 4), (4, 1));
        assert_eq!(passes(|c| c.learner.minibatches = 4), (4, 1));
    }

    #[test]
    fn trained_parts_follow_adapters_and_freezing() {
        let device = Device::gpu("H100").unwrap();
        let shape = shape_7b();
        let parts = |edit: fn(&mut Config)| {
            let mut config = Config::default();
            edit(&mut config);
            UpdateSettings::learner(&config, &shape, &device).parts
        };
        assert_eq!(parts(|_| ()), TrainedParts { decoder: true, vision: true, adapter_rank: 0 });
        assert_eq!(parts(|c| c.learner.lora.rank = 8), TrainedParts { decoder: false, vision: false, adapter_rank: 8 });
        let frozen = parts(|c| c.learner.frozen = vec!["vision_tower".into(), "merger".into()]);
        assert_eq!(frozen, TrainedParts { decoder: true, vision: false, adapter_rank: 0 });
        let visual = parts(|c| {
            c.learner.lora.rank = 8;
            c.learner.lora.targets.push("visual.*.qkv".into());
        });
        assert!(visual.vision);
        // The merger follows the tower's blocks, so that these keep nothing.
        let merger = parts(|c| c.learner.frozen = vec!["vision_tower".into(), "language_model".into()]);
        assert_eq!(merger, TrainedParts { decoder: false, vision: false, adapter_rank: 0 });
    }

    #[test]
    fn modules_beside_adapters_are_trained_whole() {
        let device = Device::gpu("H100").unwrap();
        let shape = shape_7b();
        let mut config = Config::default();
        config.sft.lora.rank = 8;
        assert_eq!(UpdateSettings::sft(&config, &config.sft_phases()[0], &shape, &device).whole.total(), 0);
        config.sft.lora.modules_to_save = vec!["merger".into(), "lm_head".into()];
        let sft = UpdateSettings::sft(&config, &config.sft_phases()[0], &shape, &device);
        assert_eq!((sft.whole.outside, sft.whole.layers), (152_064 * 3584, 0));
        // A norm of 1280, and layers of 5120 to 5120 and to 3584 with biases.
        assert_eq!(sft.whole.vision, 1280 + 5120 * 5121 + 3584 * 5121);
        assert_eq!(sft.parts, TrainedParts { decoder: true, vision: false, adapter_rank: 8 });
    }

    #[test]
    fn workers_keep_original_matrices_and_sent_copies() {
        let shape = shape_7b();
        let mut config = Config::default();
        config.run.dtype = Dtype::Bfloat16;
        let numerics = Numerics::of(&config, &Device::gpu("H100").unwrap());
        let model = 8_292_166_656 * 2;
        assert_eq!(worker_weights(&config, &shape, &numerics), model);
        config.rollout.weight_sync = WeightSync::Broadcast;
        assert_eq!(worker_weights(&config, &shape, &numerics), 2 * model);
        config.learner.lora.rank = 16;
        let merged = worker_weights(&config, &shape, &numerics);
        assert!(model < merged && merged < 2 * model, "{merged}");
    }
}
