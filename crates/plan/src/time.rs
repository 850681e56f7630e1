//! Time of a step by the roofline: products at a share of the device's rate, decoding at a share of its bandwidth, and transfers.

use unveil_config::Config;
use unveil_config::schema::WeightSync;
use unveil_core::{Compute, Dtype};

use crate::activations::Numerics;
use crate::gpu::Device;
use crate::settings::UpdateSettings;
use crate::shape::ModelShape;
use crate::workload::Workload;

/// Share of a device's rate that the matrix products of whole sequences reach.
const PRODUCT_SHARE: f64 = 0.45;
/// Share of a device's bandwidth that decoding reaches.
const BANDWIDTH_SHARE: f64 = 0.5;
/// Bandwidth between nodes, in bytes per second and node: one link of 400 Gbit/s.
const NETWORK: f64 = 50e9;
/// Bandwidth of a worker's gRPC stream of weights, in bytes per second.
const STREAM: f64 = 1e9;
/// Bytes that an optimiser's step moves per trained parameter.
const UPDATE_BYTES: f64 = 56.0;

/// Devices of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Cluster {
    pub device: Device,
    pub per_node: u64,
    pub nodes: u64,
}

/// Seconds of a step by what limits it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct StepTime {
    pub update_compute: f64,
    pub update_transfer: f64,
    pub decode: f64,
    pub prefill: f64,
    pub publish: f64,
    /// FLOPs of the step that are needed without recomputation and passes that only repeat others.
    pub useful_flops: f64,
}

impl StepTime {
    /// Returns the seconds of an update.
    pub(crate) fn update(&self) -> f64 {
        self.update_compute.max(self.update_transfer)
    }

    /// Returns the seconds of the rollout of a batch.
    pub(crate) fn rollout(&self) -> f64 {
        self.decode + self.prefill
    }

    /// Returns the seconds of a step: the sum on-policy, else the slowest of what overlaps.
    pub(crate) fn step(&self, overlaps: bool) -> f64 {
        if overlaps {
            self.update().max(self.rollout()).max(self.publish)
        } else {
            self.update() + self.rollout() + self.publish
        }
    }

    /// Names what takes the most time.
    pub(crate) fn bound_by(&self) -> &'static str {
        let parts = [
            ("update: compute", self.update_compute),
            (
                "update: transfers between ranks",
                if self.update_transfer > self.update_compute { self.update_transfer } else { 0.0 },
            ),
            ("rollout: memory bandwidth of decoding", self.decode),
            ("rollout: compute of prefill", self.prefill),
            ("publication of weights", self.publish),
        ];
        parts.iter().max_by(|a, b| a.1.total_cmp(&b.1)).map_or("", |p| p.0)
    }
}

/// FLOPs of one forward pass over a packed group, decoder and vision tower apart.
fn forward_flops(shape: &ModelShape, workload: &Workload, responses: u64) -> (f64, f64) {
    let counts = shape.count(|_| true);
    let size = &workload.size;
    let prompt = size.prompt as f64;
    let response = size.response as f64;
    let n = responses as f64;
    let positions = prompt + n * response;
    let products = 2.0 * counts.layers as f64 * positions + 2.0 * (shape.vocab * shape.hidden) as f64 * n * response;
    let attended = prompt * prompt / 2.0 + n * response * (prompt + response / 2.0);
    let attention = 4.0 * (shape.layers * shape.heads * shape.head_dim) as f64 * attended;
    (products + attention, 2.0 * counts.vision as f64 * workload.patches as f64)
}

/// Returns the rate of matrix products in FLOP/s.
fn product_rate(config: &Config, device: &Device, trains: bool) -> f64 {
    let peak = match config.run.compute {
        Compute::Fast => device.bf16,
        // Half of the rate of bf16, as on all GPUs that have both.
        Compute::Tf32 => device.bf16 / 2.0,
        // In generation, inputs are split in two terms of bf16; where gradients are recorded, products are fp32.
        Compute::Exact if config.run.dtype == Dtype::Bfloat16 && !trains => device.bf16 / 2.0,
        Compute::Exact => device.fp32,
    };
    peak * PRODUCT_SHARE
}

/// Returns the rate that efficiency refers to: the dense rate of the run's dtype, in FLOP/s.
pub(crate) fn peak_rate(config: &Config, device: &Device) -> f64 {
    if config.run.dtype == Dtype::Bfloat16 { device.bf16 } else { device.fp32 }
}

/// Computes the time of an update.
pub(crate) fn update_time(
    config: &Config,
    shape: &ModelShape,
    workload: &Workload,
    settings: &UpdateSettings,
    cluster: &Cluster,
) -> StepTime {
    let (decoder, vision) = forward_flops(shape, workload, settings.responses);
    let forward = decoder + vision;
    let parts = &settings.parts;
    // A backward pass computes the gradients of inputs and, if they are trained, of weights.
    let decoder_backward = if parts.decoder { 2.0 } else { 1.0 };
    let vision_backward = if parts.vision { 2.0 } else { 0.0 };
    let useful = forward + decoder_backward * decoder + vision_backward * vision;
    let (_, micro_batches) = settings.passes(workload);
    // Log-probabilities before the update need separate passes if not all activations of a batch are kept.
    let separate =
        if settings.responses > 1 && (settings.minibatches > 1 || micro_batches > 1) { forward } else { 0.0 };
    let recomputed = if settings.recompute { forward } else { 0.0 };
    let reference = if settings.reference { forward } else { 0.0 };
    let policies = if settings.critic > 0 { 2.0 } else { 1.0 };
    let per_group = settings.epochs as f64 * policies * (useful + recomputed) + separate + reference;
    let ranks = settings.sharding.ranks as f64;
    let groups = settings.batch as f64;
    let rate = product_rate(config, &cluster.device, true);
    let trained = settings.trained();
    let steps = settings.optimizer_steps as f64;
    let update = steps * UPDATE_BYTES * settings.sharding.part(1, trained) as f64 / cluster.device.bandwidth;
    let passes = steps * micro_batches as f64;
    StepTime {
        update_compute: groups * per_group / ranks / rate + update,
        update_transfer: transfer_seconds(shape, settings, cluster, passes, steps),
        useful_flops: groups * (policies * useful),
        ..StepTime::default()
    }
}

/// Returns the seconds of the collective calls of an update: gradients once per step (per pass from ZeRO stage 2), weights once per step,
/// with ZeRO stage 3 twice per pass.
fn transfer_seconds(shape: &ModelShape, settings: &UpdateSettings, cluster: &Cluster, passes: f64, steps: f64) -> f64 {
    let s = &settings.sharding;
    if s.ranks <= 1 {
        return 0.0;
    }
    let gradients = settings.trained() as f64 * 4.0;
    let weights = shape.count(|_| true).total() as f64 * settings.numerics.weight as f64;
    let sharded = s.zero >= 1 && s.shards > 1;
    let bytes = match s.zero {
        3 if sharded => passes * (2.0 * weights + gradients),
        2 if sharded => passes * gradients + steps * weights,
        1 if sharded => steps * (gradients + weights),
        _ => steps * 2.0 * gradients,
    };
    let within =
        if s.shards <= cluster.per_node || !sharded { cluster.device.link } else { NETWORK.min(cluster.device.link) };
    let replicas = if sharded { s.ranks / s.shards.max(1) } else { s.ranks };
    let across = s.ranks > cluster.per_node && replicas > 1;
    // A ring passes all but one part of the sum through the link of a node, once to reduce and once to gather.
    let ring = 2.0 * (1.0 - 1.0 / replicas.max(1) as f64);
    let between = if across { steps * ring * gradients / NETWORK } else { 0.0 };
    if across && !sharded { between } else { bytes / within + between }
}

/// Adds the time of the rollout of a batch, with `slots` groups at a time per worker.
pub(crate) fn add_rollout(
    time: &mut StepTime,
    config: &Config,
    shape: &ModelShape,
    workload: &Workload,
    run: (&Cluster, u64),
) {
    let (cluster, slots) = run;
    let device = &cluster.device;
    let weight_bytes = if config.run.dtype == Dtype::Bfloat16 { 2 } else { 4 };
    let counts = shape.count(|_| true);
    let workers = config.rollout.workers.max(1) as f64;
    let groups = config.learner.groups as f64;
    let at_a_time = (slots.max(1) as f64).min((groups / workers).ceil());
    let waves = (groups / workers / at_a_time).ceil();
    let size = &workload.size;
    // Each step reads the decoder and, on average, half of the responses' keys and values and all of the prompts'.
    let read = (counts.layers + shape.vocab * shape.hidden) * weight_bytes;
    let cache_bytes = Numerics::of(config, device).cache as f64;
    let cached = at_a_time
        * shape.kv_values() as f64
        * cache_bytes
        * (size.prompt as f64 + (size.n * size.response) as f64 / 2.0);
    let rate = product_rate(config, device, false);
    let step = (read as f64 + cached) / (device.bandwidth * BANDWIDTH_SHARE);
    let (packed, vision) = forward_flops(shape, workload, size.n);
    let (prompt, _) = forward_flops(shape, workload, 0);
    time.decode =
        waves * size.response as f64 * step.max(at_a_time * (packed - prompt) / size.response.max(1) as f64 / rate);
    time.prefill = groups * (prompt + vision) / workers / rate;
    time.useful_flops += groups * (packed + vision);
    let adapters = config.learner.lora.rank > 0;
    let sent = match adapters {
        true => shape.count_adapters(&config.learner.lora.targets, config.learner.lora.rank as u64).0.total() * 4,
        false => counts.total() * weight_bytes,
    };
    let bandwidth = match config.rollout.weight_sync {
        WeightSync::Grpc => STREAM,
        WeightSync::Broadcast if cluster.nodes > 1 => NETWORK.min(device.link),
        WeightSync::Broadcast => device.link,
    };
    time.publish = sent as f64 / bandwidth;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{shape_3b, shape_7b};

    fn cluster(nodes: u64) -> Cluster {
        Cluster { device: Device::gpu("H100").unwrap(), per_node: 8, nodes }
    }

    fn config() -> Config {
        let mut config = Config::default();
        config.run.dtype = Dtype::Bfloat16;
        config.run.compute = Compute::Fast;
        config.data.kind = unveil_config::schema::DataKind::Jsonl;
        config.model.max_pixels = 602_112;
        config.rollout.max_new_tokens = 256;
        config
    }

    fn update(config: &Config, shape: &ModelShape, nodes: u64) -> StepTime {
        let workload = Workload::of(config, shape, None);
        let settings = UpdateSettings::learner(config, shape, &cluster(nodes).device);
        update_time(config, shape, &workload, &settings, &cluster(nodes))
    }

    /// Six FLOPs per parameter and position are the known rule for training, two for inference.
    #[test]
    fn flops_are_six_per_parameter_and_position() {
        let shape = shape_3b();
        let workload = Workload::of(&config(), &shape, None);
        let time = update(&config(), &shape, 1);
        let positions = 16.0 * workload.positions(8) as f64;
        let rule = 6.0 * shape.count(|_| true).layers as f64 * positions;
        let ratio = time.useful_flops / rule;
        assert!((1.0..1.6).contains(&ratio), "the tower, the head and attention come on top: {ratio}");
    }

    #[test]
    fn more_ranks_and_fewer_trained_weights_are_faster() {
        let shape = shape_7b();
        let base = update(&config(), &shape, 1);
        let mut ranks = config();
        ranks.learner.parallel.ranks = 4;
        ranks.learner.parallel.zero = 3;
        let four = update(&ranks, &shape, 1);
        assert!(
            four.update_compute < base.update_compute / 3.0
                && four.update_transfer > 0.0
                && base.update_transfer == 0.0
        );
        let mut adapters = config();
        adapters.learner.lora.rank = 16;
        assert!(update(&adapters, &shape, 1).update_compute < base.update_compute);
        let mut recompute = config();
        recompute.learner.recompute = true;
        let recomputed = update(&recompute, &shape, 1);
        assert!(recomputed.update_compute > base.update_compute && recomputed.useful_flops == base.useful_flops);
    }

    #[test]
    fn links_between_nodes_are_slower() {
        let shape = shape_7b();
        let mut c = config();
        c.learner.parallel.ranks = 16;
        c.learner.parallel.zero = 3;
        let whole = update(&c, &shape, 2).update_transfer;
        c.learner.parallel.shards = 8;
        let by_node = update(&c, &shape, 2).update_transfer;
        assert!(by_node < whole, "{by_node} {whole}");
    }

    #[test]
    fn decoding_reads_the_weights_for_every_token() {
        let shape = shape_7b();
        let mut c = config();
        let workload = Workload::of(&c, &shape, None);
        let mut time = StepTime::default();
        add_rollout(&mut time, &c, &shape, &workload, (&cluster(1), 16));
        // 7.07 G parameters in bf16 at half of 3.35 TB/s, 256 times.
        let least = 256.0 * 7.07e9 * 2.0 / (3.35e12 * 0.5);
        assert!(time.decode > least && time.decode < 3.0 * least, "{} {least}", time.decode);
        // One stream per worker takes longer than that; a broadcast does not.
        assert_eq!((time.publish, time.bound_by()), (8_292_166_656.0 * 2.0 / 1e9, "publication of weights"));
        c.rollout.weight_sync = WeightSync::Broadcast;
        add_rollout(&mut time, &c, &shape, &workload, (&cluster(1), 16));
        assert_eq!(time.bound_by(), "rollout: memory bandwidth of decoding");
    }

    #[test]
    fn overlapping_parts_take_the_longest() {
        let time = StepTime {
            update_compute: 3.0,
            update_transfer: 4.0,
            decode: 2.0,
            prefill: 1.0,
            publish: 0.5,
            useful_flops: 0.0,
        };
        assert_eq!((time.step(true), time.step(false)), (4.0, 7.5));
        assert_eq!(time.bound_by(), "update: transfers between ranks");
    }
}
