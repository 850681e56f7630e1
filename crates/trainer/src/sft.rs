//! The update of stage 1, instruction tuning: cross-entropy on the answers.

use std::sync::Arc;

use tch::{Kind, Tensor};
use unveil_config::schema::Optimizer;
use unveil_core::GroupInput;
use unveil_model::{PackedGroup, Vlm};

use crate::error::{Result, TrainerError};
use crate::optim::{AdamW, lr_at};
use crate::policy::forward_groups;
use crate::state::{LocalState, TrainerProgress, state_slices};
use crate::step::{Counters, SKIP_LIMIT};

/// Images with their target answers.
#[derive(Debug, Clone, Default)]
pub struct SftBatch {
    /// Prompt and image of each sample.
    pub inputs: Vec<Arc<GroupInput>>,
    /// Answer tokens of each sample, end token included.
    pub targets: Vec<Vec<u32>>,
    /// Pass of the first sample.
    pub pass: u64,
}

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
    /// Reason for skipping the update, if it was skipped.
    pub skipped: Option<String>,
}

/// The trainer of stage 1: a model and its optimiser.
#[derive(Debug)]
pub struct SftTrainer {
    vlm: Vlm,
    optimizer: AdamW,
    options: Optimizer,
    total: u64,
    counters: Counters,
}

impl SftTrainer {
    /// Creates a trainer of all parameters of `vlm`; `total` updates define the learning-rate schedule.
    ///
    /// # Errors
    /// See [`AdamW::new`].
    pub fn new(vlm: Vlm, options: &Optimizer, total: u64) -> Result<Self> {
        vlm.set_trainable(|_| true);
        let optimizer = AdamW::new(options, vlm.named_parameters())?;
        Ok(Self { vlm, optimizer, options: options.clone(), total, counters: Counters::default() })
    }

    /// Returns the model.
    pub fn vlm(&self) -> &Vlm {
        &self.vlm
    }

    /// Returns the model mutably, for evaluation.
    pub fn vlm_mut(&mut self) -> &mut Vlm {
        &mut self.vlm
    }

    /// Returns the number of skipped updates so far.
    pub fn skipped(&self) -> u64 {
        self.counters.skipped
    }

    /// Returns the number of updates so far, including skipped ones.
    pub fn step(&self) -> u64 {
        self.counters.step
    }

    /// Performs one update on the mean cross-entropy over all answer tokens of the batch. It is skipped if the loss or
    /// the gradient is not finite.
    ///
    /// # Errors
    /// Returns [`TrainerError::Skipped`] after [`SKIP_LIMIT`] skipped updates in a row, and other errors if the inputs
    /// do not fit the model.
    pub fn update(&mut self, batch: &SftBatch) -> Result<SftReport> {
        let mut report = SftReport { lr: lr_at(&self.options, self.counters.step, self.total), ..Default::default() };
        report.tokens = batch.targets.iter().map(Vec::len).sum();
        self.optimizer.zero_grad()?;
        let loss = self.loss(batch)?;
        report.loss = loss.f_double_value(&[])?;
        let mut why = None;
        if report.loss.is_finite() {
            loss.f_backward()?;
            let gradient = self.optimizer.collect_gradient()?;
            report.grad_norm = gradient.norm;
            if gradient.norm.is_finite() {
                self.optimizer.step(gradient, report.lr)?;
            } else {
                why = Some("a gradient is not finite");
            }
        } else {
            why = Some("the loss is not finite");
        }
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

    fn loss(&self, batch: &SftBatch) -> Result<Tensor> {
        let groups: Vec<PackedGroup> = batch
            .inputs
            .iter()
            .zip(&batch.targets)
            .map(|(i, t)| PackedGroup { prompt: i.prompt.clone(), responses: vec![t.clone()] })
            .collect();
        let (hidden, targets) = forward_groups(&self.vlm, &groups, batch.inputs.iter().map(|i| &**i))?;
        let logprobs = unveil_model::logprobs(&self.vlm.lm_head(&hidden), &targets, 1.0, &[]);
        Ok(-logprobs.f_mean(Kind::Float)?)
    }

    /// Returns the state that checkpoints hold, for saving it and for overwriting it from one.
    ///
    /// # Errors
    /// Returns [`TrainerError::Torch`] if a parameter is not contiguous.
    pub fn local_state(&self) -> Result<LocalState<'_>> {
        let slices = state_slices(&self.optimizer, (0, 1), Vec::new())?;
        Ok(LocalState { vlm: &self.vlm, kind: self.optimizer.kind(), rank: 0, slices })
    }

    /// Returns the state that is not a tensor.
    pub fn progress(&self) -> TrainerProgress {
        TrainerProgress { counters: self.counters, counts: self.optimizer.counts(), kl: None }
    }

    /// Resumes from the state that was loaded into [`SftTrainer::local_state`].
    ///
    /// # Errors
    /// Returns [`TrainerError::Torch`] if a weight cannot be copied.
    pub fn resume_from(&mut self, progress: &TrainerProgress) -> Result<()> {
        self.optimizer.resume(progress.counters.updates, &progress.counts)?;
        self.counters = progress.counters;
        Ok(())
    }
}
