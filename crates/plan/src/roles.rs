//! Memory of each role on its devices, and the time of a step, without advice.

use serde::Serialize;
use unveil_config::Config;

use crate::activations::Numerics;
use crate::error::PlanError;
use crate::generation::{GenerationMemory, USABLE_FRACTION};
use crate::gpu::{Device, GIB};
use crate::settings::{UpdateSettings, worker_weights};
use crate::shape::ModelShape;
use crate::time::{Cluster, StepTime, add_rollout, update_time};
use crate::training::TrainingMemory;
use crate::workload::Workload;

/// Tokens that an engine prefills in one pass.
const PREFILL_TOKENS: u64 = 8192;
/// Layers whose attention a worker reads if none are configured.
const CAPTURED_LAYERS: u64 = 1;
/// Memory of the context, the kernels and the workspaces of a process on a GPU.
const GPU_CONTEXT: u64 = 700 << 20;
/// Buffers of the collective calls of several ranks on GPUs.
const COLLECTIVE_BUFFERS: u64 = 500 << 20;
/// Share of the other memory that an allocator loses to fragments.
const FRAGMENTS: f64 = 0.05;
/// Highest share of a role's memory that is not accounted for by use.
const MAX_OTHER: f64 = 0.1;

/// The run to plan.
#[derive(Debug, Clone, Copy)]
pub struct PlanInput<'a> {
    /// Its configuration.
    pub config: &'a Config,
    /// Its model.
    pub shape: &'a ModelShape,
    /// Device of each process.
    pub device: Device,
    /// GPUs of a node; `None`: as many as the processes of stage 2 need, spread evenly over the nodes.
    pub gpus: Option<u64>,
    /// Nodes.
    pub nodes: u64,
    /// Bound of an image's pixels in the model directory, if it has one.
    pub max_pixels: Option<u64>,
}

/// Memory of one process of a role at its peak, in GiB.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RolePlan {
    /// `sft`, `learner` or `rollout`.
    pub role: &'static str,
    /// Processes.
    pub count: u64,
    /// Weights of all models.
    pub weights_gib: f64,
    /// Gradients.
    pub gradients_gib: f64,
    /// Moments, master weights, and temporaries of an optimiser step.
    pub optimizer_gib: f64,
    /// Activations, logits included.
    pub activations_gib: f64,
    /// KV cache.
    pub kv_gib: f64,
    /// Context of the device and fragments of its allocator.
    pub other_gib: f64,
    /// Sum.
    pub total_gib: f64,
    /// Memory that the process may use: that of its device less what other processes on it need.
    pub capacity_gib: f64,
    /// Whether the sum is within the capacity.
    pub fits: bool,
}

/// Bytes of one process by use.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct RoleMemory {
    training: TrainingMemory,
    kv: u64,
    other: u64,
}

impl RoleMemory {
    pub(crate) fn total(&self) -> u64 {
        self.training.total() + self.kv + self.other
    }

    /// Adds the memory that is not accounted for by use.
    fn with_other(self, fixed: u64) -> Self {
        let used = self.training.total() + self.kv;
        let wanted = fixed as f64 + used as f64 * FRAGMENTS;
        // A share of the sum of both.
        let most = used as f64 * MAX_OTHER / (1.0 - MAX_OTHER);
        Self { other: wanted.min(most) as u64, ..self }
    }

    fn plan(&self, role: &'static str, count: u64, capacity: u64) -> RolePlan {
        let gib = |bytes: u64| bytes as f64 / GIB;
        RolePlan {
            role,
            count,
            weights_gib: gib(self.training.weights),
            gradients_gib: gib(self.training.gradients),
            optimizer_gib: gib(self.training.optimizer),
            activations_gib: gib(self.training.activations),
            kv_gib: gib(self.kv),
            other_gib: gib(self.other),
            total_gib: gib(self.total()),
            capacity_gib: gib(capacity),
            fits: self.total() <= capacity,
        }
    }
}

/// Processes of stage 2 and the devices that they share.
#[derive(Debug, Clone, Copy)]
struct Placement {
    ranks: u64,
    workers: u64,
    devices: u64,
}

impl Placement {
    fn of(input: &PlanInput<'_>) -> Result<Self, PlanError> {
        let config = input.config;
        let ranks = config.learner.parallel.ranks.max(1) as u64;
        let workers = config.rollout.workers.max(1) as u64;
        let needed = ranks + workers;
        let nodes = input.nodes.max(1);
        let devices = if input.device.is_cpu() { nodes } else { input.gpus.map_or(needed, |g| g * nodes) };
        if devices == 0 {
            return Err(PlanError::NoGpus);
        }
        if devices < needed && !config.launch.share_gpus && !input.device.is_cpu() && config.learner.steps > 0 {
            return Err(PlanError::TooFewGpus { ranks, workers, gpus: devices });
        }
        Ok(Self { ranks, workers, devices })
    }

    /// Returns the learner ranks and the workers on the device that has the most of them beside a rank (`learner`) or a worker: the
    /// processes are dealt out in turn, ranks first.
    fn most_on_a_device(&self, with_learner: bool) -> (u64, u64) {
        let on = |device: u64, first: u64, count: u64| {
            (first..first + count).filter(|process| process % self.devices == device).count() as u64
        };
        let all = (0..self.devices).map(|d| (on(d, 0, self.ranks), on(d, self.ranks, self.workers)));
        let hosts = all.filter(|(ranks, workers)| if with_learner { *ranks > 0 } else { *workers > 0 });
        hosts.max_by_key(|(ranks, workers)| ranks + workers).unwrap_or((self.ranks, self.workers))
    }
}

/// A plan without advice.
pub(crate) struct Draft {
    pub roles: Vec<RolePlan>,
    pub time: StepTime,
    /// Response tokens of a step.
    pub tokens: u64,
    /// Devices of a step.
    pub devices: u64,
    /// Whether the number of image tokens is an assumption.
    pub assumed: bool,
}

impl Draft {
    pub(crate) fn of(input: &PlanInput<'_>) -> Result<Self, PlanError> {
        let config = input.config;
        let shape = input.shape;
        let device = &input.device;
        let placement = Placement::of(input)?;
        let workload = Workload::of(config, shape, input.max_pixels);
        let nodes = input.nodes.max(1);
        let cluster = Cluster { device: *device, per_node: placement.devices.div_ceil(nodes), nodes };
        let mut draft =
            Self { roles: Vec::new(), time: StepTime::default(), tokens: 0, devices: 1, assumed: workload.assumed };
        // The phase of stage 1 that needs the most memory is in the plan.
        let phases = config.sft_phases().into_iter().map(|phase| {
            let settings = UpdateSettings::sft(config, &phase, shape, device);
            let memory = training_memory(&settings, shape, &workload, device);
            (settings, memory)
        });
        if let Some((settings, memory)) = phases.max_by_key(|(_, m)| m.total()).filter(|_| config.sft.steps > 0) {
            let count = settings.sharding.ranks;
            // On a CPU, all ranks share the memory of their node.
            let others = if device.is_cpu() { count.div_ceil(nodes) - 1 } else { 0 };
            let capacity = device.memory.saturating_sub(others * memory.total());
            draft.roles.push(memory.plan("sft", count, capacity));
            draft.time = update_time(config, shape, &workload, &settings, &cluster);
            draft.tokens = settings.batch * workload.size.response;
            draft.devices = count;
        }
        if config.learner.steps > 0 {
            let settings = UpdateSettings::learner(config, shape, device);
            let learner = training_memory(&settings, shape, &workload, device);
            let worker = WorkerMemory::of(config, shape, &workload, device);
            let (ranks, workers) = placement.most_on_a_device(false);
            let left = device.memory.saturating_sub(ranks * learner.total()) / workers.max(1);
            let slots = worker.slots(left, config);
            let (ranks, workers) = placement.most_on_a_device(true);
            let least = worker.with_slots(if workers > 0 { slots.max(1) } else { 0 }).total();
            let rank_capacity =
                device.memory.saturating_sub((ranks.max(1) - 1) * learner.total()).saturating_sub(workers * least);
            draft.roles.push(learner.plan("learner", placement.ranks, rank_capacity));
            draft.roles.push(worker.with_slots(slots.max(1)).plan("rollout", placement.workers, left));
            draft.time = update_time(config, shape, &workload, &settings, &cluster);
            add_rollout(&mut draft.time, config, shape, &workload, (&cluster, slots));
            draft.tokens = settings.batch * settings.responses * workload.size.response;
            draft.devices = placement.devices.min(placement.ranks + placement.workers);
        }
        Ok(draft)
    }
}

fn training_memory(settings: &UpdateSettings, shape: &ModelShape, workload: &Workload, device: &Device) -> RoleMemory {
    let training = settings.case(shape, workload).memory();
    let fixed = match device.is_cpu() {
        true => 0,
        false if settings.sharding.ranks > 1 => GPU_CONTEXT + COLLECTIVE_BUFFERS,
        false => GPU_CONTEXT,
    };
    RoleMemory { training, ..RoleMemory::default() }.with_other(fixed)
}

/// Memory of a rollout worker.
struct WorkerMemory {
    weights: u64,
    generation: GenerationMemory,
    fixed: u64,
    n: u64,
}

impl WorkerMemory {
    fn of(config: &Config, shape: &ModelShape, workload: &Workload, device: &Device) -> Self {
        let numerics = Numerics::of(config, device);
        let layers = config.reward.vision_relevance.layers.len() as u64;
        let captured = if layers == 0 { CAPTURED_LAYERS } else { layers };
        Self {
            weights: worker_weights(config, shape, &numerics),
            generation: GenerationMemory::of(shape, &workload.size, &numerics, captured, PREFILL_TOKENS),
            fixed: if device.is_cpu() { 0 } else { GPU_CONTEXT },
            n: workload.size.n,
        }
    }

    /// Returns how many groups run at a time in `memory` bytes of a device.
    fn slots(&self, memory: u64, config: &Config) -> u64 {
        let limit = (config.rollout.memory_gib * GIB) as u64;
        let free = memory.saturating_sub(self.weights + self.fixed);
        let usable = (free as f64 * USABLE_FRACTION) as u64;
        let available = if limit > 0 { limit.min(usable) } else { usable };
        let groups = config.rollout.groups_per_lease.max(1) as u64;
        let slots = self.generation.slots(available, config.rollout.max_rows as u64, self.n).min(groups);
        // Fragments grow with what is used.
        (1..=slots).rev().find(|slots| self.with_slots(*slots).total() <= memory).unwrap_or(0)
    }

    fn with_slots(&self, slots: u64) -> RoleMemory {
        let g = &self.generation;
        let training = TrainingMemory {
            weights: self.weights,
            activations: g.total(slots) - slots * g.kv_per_group,
            ..TrainingMemory::default()
        };
        RoleMemory { training, kv: slots * g.kv_per_group, other: 0 }.with_other(self.fixed)
    }
}
