//! Advice: changes of the configuration, each with the memory that it would leave.

use unveil_config::Config;
use unveil_config::schema::Freeze;
use unveil_core::{Compute, Dtype};

use crate::roles::{Draft, PlanInput, RolePlan};

/// Smallest relative gain of a change that is worth a line.
const LEAST_GAIN: f64 = 0.03;

/// A change of the configuration.
struct Change {
    /// The keys and values as they are written.
    text: String,
    edit: Box<dyn Fn(&mut Config)>,
}

impl Change {
    fn new(text: impl Into<String>, edit: impl Fn(&mut Config) + 'static) -> Self {
        Self { text: text.into(), edit: Box::new(edit) }
    }
}

/// Returns changes that lower the memory of a role, the least harmful first.
fn changes(role: &str, config: &Config) -> Vec<Change> {
    let mut out = Vec::new();
    if config.run.dtype == Dtype::Float32 {
        out.push(Change::new("run.dtype = \"bfloat16\"", |c| c.run.dtype = Dtype::Bfloat16));
    }
    if config.run.compute == Compute::Exact && config.run.dtype == Dtype::Bfloat16 {
        out.push(Change::new("run.compute = \"fast\"", |c| c.run.compute = Compute::Fast));
    }
    match role {
        "learner" => {
            let l = &config.learner;
            if !l.recompute {
                out.push(Change::new("learner.recompute = true", |c| c.learner.recompute = true));
            }
            if l.token_budget > 8192 {
                out.push(Change::new("learner.token_budget = 8192", |c| c.learner.token_budget = 8192));
            }
            if l.parallel.ranks > 1 && l.parallel.zero < 3 {
                out.push(Change::new("learner.parallel.zero = 3", |c| c.learner.parallel.zero = 3));
            }
            let ranks = (2 * l.parallel.ranks).max(8);
            out.push(Change::new(format!("learner.parallel.ranks = {ranks} with .zero = 3, on more GPUs"), move |c| {
                c.learner.parallel.ranks = ranks;
                c.learner.parallel.zero = 3;
                c.learner.parallel.shards = 0;
            }));
            if l.lora.rank == 0 {
                out.push(Change::new("learner.lora.rank = 16", |c| {
                    c.learner.lora.rank = 16;
                    c.learner.frozen.clear();
                    c.learner.freeze = Vec::<Freeze>::new();
                }));
            }
        }
        "rollout" => {
            if config.rollout.max_rows > config.rollout.n {
                let n = config.rollout.n;
                out.push(Change::new(format!("rollout.max_rows = {n}"), move |c| c.rollout.max_rows = n));
            }
        }
        _ => {
            let s = &config.sft;
            if !s.recompute {
                out.push(Change::new("sft.recompute = true", |c| c.sft.recompute = true));
            }
            if s.token_budget > 8192 {
                out.push(Change::new("sft.token_budget = 8192", |c| c.sft.token_budget = 8192));
            }
            let ranks = (2 * s.parallel.ranks).max(8);
            out.push(Change::new(format!("sft.parallel.ranks = {ranks} with .zero = 3, on more GPUs"), move |c| {
                c.sft.parallel.ranks = ranks;
                c.sft.parallel.zero = 3;
                c.sft.parallel.shards = 0;
            }));
        }
    }
    if config.model.max_pixels > 401_408 {
        out.push(Change::new("model.max_pixels = 401408", |c| c.model.max_pixels = 401_408));
    }
    out
}

/// Returns the memory of a role under another configuration.
fn total_of(input: &PlanInput<'_>, role: &str, config: &Config) -> Option<RolePlan> {
    // Further ranks get further GPUs.
    let draft = Draft::of(&PlanInput { config, ..*input })
        .or_else(|_| Draft::of(&PlanInput { config, gpus: None, ..*input }))
        .ok()?;
    draft.roles.into_iter().find(|r| r.role == role)
}

/// Returns advice for what does not fit, and notes on assumptions.
pub(crate) fn advise(input: &PlanInput<'_>, roles: &[RolePlan], assumed: bool) -> Vec<String> {
    let mut out = Vec::new();
    for lacking in roles.iter().filter(|r| !r.fits) {
        let mut lines = Vec::new();
        for change in changes(lacking.role, input.config) {
            let mut config = input.config.clone();
            (change.edit)(&mut config);
            let Some(other) = total_of(input, lacking.role, &config) else { continue };
            if other.total_gib < lacking.total_gib * (1.0 - LEAST_GAIN) {
                let fits = if other.fits { ", which fits" } else { "" };
                lines.push(format!("{}: set {} ({:.1} GiB{fits})", lacking.role, change.text, other.total_gib));
            }
        }
        if input.config.launch.share_gpus && lacking.count > 0 {
            lines.push(format!("{}: give every process its own GPU (launch.share_gpus = false)", lacking.role));
        }
        if lines.is_empty() {
            lines.push(format!("{}: use a device with more memory, or a smaller model", lacking.role));
        }
        out.extend(lines);
    }
    if assumed {
        let tokens = crate::workload::ASSUMED_IMAGE_TOKENS;
        out.push(format!("images are assumed to have {tokens} tokens: set model.max_pixels to bound them"));
    }
    if input.config.launch.share_gpus && input.config.rollout.memory_gib == 0.0 && !input.device.is_cpu() {
        out.push(
            "workers that share a GPU use what is free when they start: set rollout.memory_gib so that the learner finds its memory"
                .into(),
        );
    }
    out
}
