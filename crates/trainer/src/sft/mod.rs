//! The trainer of stage 1, instruction tuning: cross-entropy on the answers. Ranks, sharding, recomputation and micro-batches are those of
//! stage 2.

mod sample;
mod settings;
mod state;

use std::rc::Rc;

use tch::{Kind, Tensor};
use unveil_config::schema::Optimizer;
use unveil_model::{Tape, TapeMode, Vlm};

use crate::error::{Result, TrainerError};
use crate::forward_pass::{Dropout, ForwardPass, PassOptions, head_rows, record_forward, tape_mode};
use crate::freeze::Freezing;
use crate::learning_rate::lr_at;
use crate::loss_accumulator::rows_to_host;
use crate::memory_estimate::{LargestPass, MemoryInputs};
use crate::memory_plan::MemoryPlan;
use crate::micro_batch::BatchItem;
use crate::optim::AdamW;
use crate::out_of_memory::catch_out_of_memory;
use crate::partition::{MicroBatches, Partition};
use crate::shard::{PassHooks, Ranks};
use crate::sharded_model::shard_trained;
use crate::step::{Counters, SKIP_LIMIT};

use sample::Sample;

pub use sample::SftBatch;
pub use settings::SftSettings;

/// Report of one update.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SftReport {
    /// Mean cross-entropy per answer token in nats; not finite if the update was skipped for that reason.
    pub loss: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Number of answer tokens.
    pub tokens: usize,
    /// Share of the positions of all passes that is padding.
    pub padding: f64,
    /// Reason for skipping the update, if it was skipped.
    pub skipped: Option<String>,
}

/// The trainer of stage 1 on one rank: a model and its optimiser.
#[derive(Debug)]
pub struct SftTrainer {
    vlm: Vlm,
    optimizer: AdamW,
    ranks: Rc<Ranks>,
    hooks: PassHooks,
    settings: SftSettings,
    counters: Counters,
    /// Gradients of the last update; `None` if they are not recorded.
    recorded_gradients: Option<Vec<(String, Tensor)>>,
}

/// Marks the parameters that are trained and returns them: those of the adapters and of the modules beside them if there are adapters,
/// else all that are not frozen.
fn trained_parameters(vlm: &Vlm, freezing: &Freezing) -> Vec<(String, Tensor)> {
    let copy = |(n, t): &(String, Tensor)| (n.clone(), t.shallow_clone());
    let Some(adapters) = vlm.adapters() else {
        vlm.set_trainable(|name| freezing.is_ever_trained(name));
        return vlm.named_parameters().iter().filter(|(_, t)| t.requires_grad()).map(copy).collect();
    };
    let modules = adapters.module_parameters();
    vlm.set_trainable(|name| modules.iter().any(|(n, _)| n == name));
    adapters.set_trainable(true);
    adapters.saved_tensors().map(copy).collect()
}

impl SftTrainer {
    /// Creates a trainer of all parameters of `vlm` on a single rank; `total` updates define the learning-rate schedule.
    ///
    /// # Errors
    /// See [`SftTrainer::distributed`].
    pub fn new(vlm: Vlm, options: &Optimizer, total: u64) -> Result<Self> {
        Self::distributed(Ranks::solo(), vlm, SftSettings::new(options.clone(), total))
    }

    /// Creates this rank's part of a trainer. If the model has adapters, only they and the modules beside them are trained. Model and settings must be the same on all ranks.
    ///
    /// # Errors
    /// Returns [`TrainerError::Setting`] if a frozen prefix matches no parameter, nothing is trained, or a weight cannot be trained.
    pub fn distributed(ranks: Rc<Ranks>, vlm: Vlm, settings: SftSettings) -> Result<Self> {
        settings
            .freezing
            .check(vlm.named_parameters().iter().map(|(n, _)| n.as_str()))
            .map_err(TrainerError::Setting)?;
        let is_visual = |(name, _): &(String, Tensor)| name.starts_with("visual.");
        if settings.dropout > 0.0 && vlm.adapters().is_none_or(|a| a.named_parameters().iter().any(is_visual)) {
            return Err(TrainerError::Setting(
                "sft.lora.dropout is above 0, but it needs adapters (sft.lora.rank) of the decoder alone (sft.lora.targets)".into(),
            ));
        }
        let trained = trained_parameters(&vlm, &settings.freezing);
        let optimizer = AdamW::sharded(&settings.optimizer, &trained, ranks.clone())?;
        let hooks = optimizer.hooks(None);
        let counters = Counters { step: settings.first_step, ..Counters::default() };
        Ok(Self { vlm, optimizer, ranks, hooks, settings, counters, recorded_gradients: None })
    }

    /// Returns the model.
    pub fn vlm(&self) -> &Vlm {
        &self.vlm
    }

    /// Returns the model mutably, for evaluation.
    pub fn vlm_mut(&mut self) -> &mut Vlm {
        &mut self.vlm
    }

    /// Returns the settings.
    pub fn settings(&self) -> &SftSettings {
        &self.settings
    }

    /// Returns the number of skipped updates so far.
    pub fn skipped(&self) -> u64 {
        self.counters.skipped
    }

    /// Returns the number of updates so far, including skipped ones.
    pub fn step(&self) -> u64 {
        self.counters.step
    }

    /// Performs one update on the mean cross-entropy over all answer tokens of the batch; all ranks call it with the same batch, in which
    /// only the samples of [`SftTrainer::local_samples`] need pixels. It is skipped if the loss or the gradient is not finite.
    ///
    /// # Errors
    /// Returns [`TrainerError::Skipped`] after [`SKIP_LIMIT`] skipped updates in a row, [`TrainerError::OutOfMemory`],
    /// [`TrainerError::Ranks`] if another rank has failed or timed out, and other errors if the inputs do not fit the model.
    pub fn update(&mut self, batch: &SftBatch) -> Result<SftReport> {
        if self.hooks.sharded.is_none()
            && let Some(sharded) = shard_trained(&self.vlm, &self.optimizer, &self.ranks)?
        {
            self.hooks = self.optimizer.hooks(Some(sharded));
        }
        if let Some(sharded) = &self.hooks.sharded {
            sharded.release_all()?;
        }
        let step = self.counters.step.saturating_sub(self.settings.first_step);
        let lr = lr_at(&self.settings.optimizer, step, self.settings.total_steps);
        let mut report = SftReport { lr, ..Default::default() };
        let samples = batch.samples()?;
        let why = match catch_out_of_memory(|| self.apply(&samples, &mut report)) {
            Ok(applied) => applied?,
            Err(cause) => {
                let plan = Box::new(self.memory_plan(&samples));
                return Err(TrainerError::OutOfMemory { cause, plan });
            }
        };
        self.optimizer.zero_grad()?;
        self.counters.step += 1;
        self.counters.updates = self.optimizer.updates();
        let Some(why) = why else {
            self.counters.skipped_in_a_row = 0;
            return Ok(report);
        };
        self.counters.skipped += 1;
        self.counters.skipped_in_a_row += 1;
        tracing::warn!(step = self.counters.step, why, "update skipped");
        if self.counters.skipped_in_a_row >= SKIP_LIMIT {
            let step = self.counters.step;
            let in_a_row = self.counters.skipped_in_a_row;
            return Err(TrainerError::Skipped { step, in_a_row, why: why.to_owned() });
        }
        report.skipped = Some(why.to_owned());
        Ok(report)
    }

    /// Computes the gradient and takes an optimiser step. Returns why it took none.
    fn apply(&mut self, samples: &[Sample], report: &mut SftReport) -> Result<Option<&'static str>> {
        let partition = self.partition(samples);
        let all: Vec<usize> = (0..samples.len()).collect();
        report.tokens = samples.iter().map(Sample::token_count).sum();
        report.padding = partition.padding_share(samples);
        let local = self.accumulate_gradients(&partition.micro_batches(samples, &all), report.tokens)?;
        let gradient = self.optimizer.gradient()?;
        report.loss = self.ranks.all_reduce_sum(vec![local], self.vlm.device())?.iter().sum();
        if !report.loss.is_finite() {
            return Ok(Some("the loss is not finite"));
        }
        report.grad_norm = gradient.norm;
        if !gradient.norm.is_finite() {
            return Ok(Some("a gradient is not finite"));
        }
        if let Some(recorded) = &mut self.recorded_gradients {
            *recorded = self.optimizer.gradient_by_name(&gradient)?;
        }
        self.optimizer.step(gradient, report.lr)?;
        if let Some(sharded) = &self.hooks.sharded {
            sharded.release_all()?;
        }
        Ok(None)
    }

    /// Runs forward and backward over this rank's micro-batches; returns its share of the mean over `tokens` tokens.
    fn accumulate_gradients(&self, micro_batches: &MicroBatches<'_, Sample>, tokens: usize) -> Result<f64> {
        let mut losses = Vec::new();
        let mut micro_batches = micro_batches.iter().peekable();
        while let Some(micro_batch) = micro_batches.next() {
            let pass = self.forward(micro_batch)?;
            let mean = |logprobs: &Tensor| -> Result<Tensor> {
                Ok(-logprobs.f_sum(logprobs.kind())?.f_div_scalar(tokens.max(1) as i64)?)
            };
            let loss = pass.outputs.as_ref().map(mean).transpose()?;
            if let Some(loss) = &loss {
                losses.push(loss.f_detach()?.f_to_kind(Kind::Double)?.f_view([1])?);
            }
            pass.backward(loss.as_ref(), micro_batches.peek().is_none())?;
        }
        if let Some(adapters) = self.vlm.adapters() {
            adapters.set_dropout(None)?;
        }
        Ok(rows_to_host(&losses)?.iter().flatten().sum())
    }

    /// Runs the forward pass over one micro-batch; its outputs are the log-probabilities of the answer tokens.
    fn forward(&self, micro_batch: &[&Sample]) -> Result<ForwardPass<'_, Tensor>> {
        let mode = tape_mode(self.settings.recompute, &self.hooks);
        ForwardPass::run(&self.hooks, mode, |tape| {
            if micro_batch.is_empty() { Ok(None) } else { self.logprobs(tape, micro_batch, mode).map(Some) }
        })
    }

    fn logprobs<'a>(&'a self, tape: &mut Tape<'a>, micro_batch: &[&Sample], mode: TapeMode) -> Result<Tensor> {
        let rate = self.settings.dropout;
        let keys = || micro_batch.iter().map(|s| s.key(self.settings.seed, self.counters.step)).collect();
        let options = PassOptions { capture: None, dropout: (rate > 0.0).then(|| Dropout { rate, keys: keys() }) };
        let (hidden, _, targets) = record_forward(&self.vlm, tape, micro_batch, self.settings.division(), options)?;
        let chunk = head_rows(mode, &hidden);
        let chunks = tape.call(&[&hidden], move |t| t[0].split(chunk, 0));
        let mut parts = Vec::with_capacity(chunks.len());
        for (hidden, targets) in chunks.iter().zip(targets.split(chunk, 0)) {
            let logprobs =
                tape.call1(&[hidden], move |t| unveil_model::logprobs(&self.vlm.lm_head(&t[0]), &targets, 1.0, &[]));
            parts.push(tape.leaf(&logprobs));
        }
        Ok(Tensor::f_cat(&parts, 0)?)
    }

    fn partition(&self, samples: &[Sample]) -> Partition {
        let division = (self.settings.division(), self.settings.token_budget);
        Partition::new(samples, self.ranks.clone(), division, self.vlm.device())
    }

    /// Returns the indices of the samples that this rank computes, the only ones whose pixels it needs.
    ///
    /// # Errors
    /// Returns [`TrainerError::Setting`] if a sample has no answer.
    pub fn local_samples(&self, batch: &SftBatch) -> Result<Vec<usize>> {
        Ok(self.partition(&batch.samples()?).local_indices().collect())
    }

    /// Estimates the memory that an update needs on this rank.
    fn memory_plan(&self, samples: &[Sample]) -> MemoryPlan {
        let settings = &self.settings;
        let all: Vec<usize> = (0..samples.len()).collect();
        let micro_batches = self.partition(samples).micro_batches(samples, &all);
        let longest = samples.iter().map(Sample::packed_len).max().unwrap_or(0);
        let mut advice =
            vec![format!("lower sft.token_budget (now {}; the longest sample has {longest})", settings.token_budget)];
        if !settings.recompute {
            advice.push("set sft.recompute = true".into());
        }
        if self.vlm.adapters().is_none() {
            advice.push("train adapters only (sft.lora.rank)".into());
        }
        MemoryInputs {
            models: vec![&self.vlm],
            optimizer: &self.optimizer,
            ranks: &self.ranks,
            largest: LargestPass::of(settings.division(), &micro_batches),
            recompute: settings.recompute,
            advice,
        }
        .plan()
    }

    /// Records the gradients of updates from now on, before clipping.
    pub fn record_gradients(&mut self) {
        self.recorded_gradients = Some(Vec::new());
    }

    /// Returns the gradients of the last update, by parameter; empty unless they are recorded.
    pub fn recorded_gradients(&self) -> &[(String, Tensor)] {
        self.recorded_gradients.as_deref().unwrap_or_default()
    }
}
