//! One policy update from a batch of groups: advantages, packed forward passes, loss, gradients, AdamW. It depends on nothing but the
//! batch and the state of the trainer.

mod agreement;
mod memory;
mod setup;

use std::collections::HashMap;
use std::rc::Rc;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use tch::Tensor;
use unveil_algo::{AlgoError, BatchStats, Counts, KlController, Objective, TokenLayout, check_batch};
use unveil_core::{GroupId, Importance, TrainGroup};
use unveil_model::{ValueHead, Vlm};

use crate::batch::TrainableGroup;
use crate::error::{Result, TrainerError};
use crate::freeze::CRITIC_PREFIX;
use crate::learning_rate::lr_at;
use crate::loss_accumulator::LossAccumulator;
use crate::micro_batch::BatchItem;
use crate::optim::AdamW;
use crate::out_of_memory::catch_out_of_memory;
use crate::partition::{MicroBatches, Partition};
use crate::policy::{DIVISION, Policy, PolicyPass, detached_outputs, logprobs_to_host};
use crate::settings::StepSettings;
use crate::shard::Ranks;
use crate::targets::{PreUpdate, counts, fill_targets, kl_to_reference};
use crate::update_report::{UpdateReport, filtered_responses, summarize_batch};

pub use setup::Models;

/// Number of skipped steps in a row after which a stage stops.
pub const SKIP_LIMIT: u64 = 5;

/// The policy and its optimiser.
#[derive(Debug)]
pub struct PolicyTrainer {
    pub(crate) policy: Policy,
    pub(crate) optimizer: AdamW,
    pub(crate) ranks: Rc<Ranks>,
    pub(crate) kl: KlController,
    /// Updates so far, skipped ones included.
    pub(crate) step: u64,
    pub(crate) skipped: u64,
    pub(crate) skipped_in_a_row: u64,
    /// Gradients of the last optimiser step; `None` if they are not recorded.
    pub(crate) recorded_gradients: Option<Vec<(String, Tensor)>>,
}

/// Tensors by name.
pub type NamedTensors = Vec<(String, Tensor)>;

/// Values before an update, by group and response; empty for responses that are not trained on.
pub type ValuesByGroup = HashMap<GroupId, Vec<Vec<f64>>>;

/// Why a batch cannot be used; its step is skipped.
struct Unusable(String);

impl PolicyTrainer {
    /// Returns the policy.
    pub fn vlm(&self) -> &Vlm {
        &self.policy.vlm
    }

    /// Returns the policy mutably, for evaluation.
    pub fn vlm_mut(&mut self) -> &mut Vlm {
        &mut self.policy.vlm
    }

    /// Returns the value head, if the algorithm has one.
    pub fn value_head(&self) -> Option<&ValueHead> {
        self.policy.value_head.as_ref()
    }

    /// Returns the number of updates so far, which is also the version of the weights.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Returns the settings of an update.
    pub fn settings(&self) -> &StepSettings {
        &self.policy.settings
    }

    /// Runs one update. The weights before it have version [`PolicyTrainer::step`], those after it one more, even if the step is
    /// skipped (a value is not finite, or there is nothing to learn from) and leaves the weights unchanged.
    ///
    /// # Errors
    /// Returns [`TrainerError::Agreement`] if rollout and learner disagree, [`TrainerError::Skipped`] after [`SKIP_LIMIT`] skipped steps
    /// in a row, [`TrainerError::OutOfMemory`], or an error of the model if the inputs do not fit it.
    pub fn update(&mut self, groups: &[TrainGroup]) -> Result<UpdateReport> {
        self.update_with_values(groups, &ValuesByGroup::new())
    }

    /// Runs [`PolicyTrainer::update`] with the `given` values in place of those of the present value head.
    pub(crate) fn update_with_values(&mut self, groups: &[TrainGroup], given: &ValuesByGroup) -> Result<UpdateReport> {
        self.shard_parameters()?;
        let freezing = &self.policy.settings.freezing;
        let step = self.step;
        if freezing.has_schedule() {
            self.optimizer.set_trained(|name| {
                let name = name.strip_prefix(CRITIC_PREFIX).unwrap_or(name);
                freezing.is_trained_at(name, step)
            });
        }
        if let Some(sharded) = &self.policy.hooks.sharded {
            sharded.release_all()?;
        }
        let mut report = summarize_batch(groups, self.step);
        report.filtered_responses = filtered_responses(groups, self.policy.settings.overlong_filter);
        report.lr = lr_at(&self.policy.settings.optimizer, self.step, self.policy.settings.total_steps);
        let outcome = match check_usable(groups) {
            Err(unusable) => Err(unusable),
            Ok(stats) => {
                report.flat_groups = stats.flat_groups;
                match catch_out_of_memory(|| self.apply(groups, given, &mut report)) {
                    Ok(applied) => applied?,
                    Err(cause) => {
                        let plan = Box::new(self.memory_plan(groups));
                        return Err(TrainerError::OutOfMemory { cause, plan });
                    }
                }
            }
        };
        self.optimizer.zero_grad()?;
        let reductions = self.optimizer.take_reduce_timing();
        report.reduce_ms = reductions.in_flight.as_secs_f64() * 1e3;
        report.reduce_wait_ms = reductions.waited.as_secs_f64() * 1e3;
        self.step += 1;
        report.version = self.step;
        report.step = self.step;
        match outcome {
            Ok(()) => self.skipped_in_a_row = 0,
            Err(Unusable(why)) => {
                self.skipped += 1;
                self.skipped_in_a_row += 1;
                tracing::warn!(step = self.step, %why, "step skipped");
                report.skipped = Some(why.clone());
                if self.skipped_in_a_row >= SKIP_LIMIT {
                    return Err(TrainerError::Skipped { step: self.step, in_a_row: self.skipped_in_a_row, why });
                }
            }
        }
        report.skipped_total = self.skipped;
        Ok(report)
    }

    fn apply(
        &mut self,
        groups: &[TrainGroup],
        given: &ValuesByGroup,
        report: &mut UpdateReport,
    ) -> Result<Result<(), Unusable>> {
        let mut trainable = self.trainable_groups(groups);
        if trainable.is_empty() && report.filtered_responses > 0 {
            let why = "every rewarded response of the batch was cut at rollout.max_new_tokens, and learner.overlong_filter leaves these out";
            return Ok(Err(Unusable(why.into())));
        }
        if trainable.is_empty() {
            return Ok(Err(Unusable("every reward of the batch is masked".into())));
        }
        report.tokens = trainable.iter().map(TrainableGroup::token_count).sum();

        // Log-probabilities and values before the update come from the first forward passes if all of these fit into memory
        // together, and from separate passes if they do not.
        let policy = &self.policy;
        let settings = &policy.settings;
        let objective = self.objective();
        let partition = self.partition(&trainable);
        let all: Vec<usize> = (0..trainable.len()).collect();
        report.padding = partition.padding_share(&trainable);
        let micro_batches = partition.micro_batches(&trainable, &all);
        let mut first_passes = Vec::new();
        if settings.minibatches <= 1 && micro_batches.positions <= settings.token_budget {
            first_passes = micro_batches
                .iter()
                .map(|micro_batch| policy.forward(micro_batch, &objective))
                .collect::<Result<Vec<_>>>()?;
        }
        // If they are needed for nothing but the comparison with the rollout, the training passes yield them.
        let deferred = first_passes.is_empty() && self.training_passes_yield_logprobs();
        let outputs = match (deferred, first_passes.is_empty()) {
            (true, _) => None,
            (false, true) => Some(policy.forward_detached(&micro_batches)?),
            (false, false) => Some(detached_outputs(&first_passes)?),
        };
        let reference = policy.reference_logprobs(&micro_batches)?;
        let mut before = PreUpdate {
            logprobs: outputs.as_ref().map(|(logprobs, _)| partition.all_gather_tokens(logprobs)).transpose()?,
            values: match &outputs {
                Some((_, values)) if policy.value_head.is_some() => Some(partition.all_gather_tokens(values)?),
                _ => None,
            },
            reference: reference.map(|r| partition.all_gather_tokens(&r)).transpose()?,
        };
        let refs: Vec<&TrainableGroup> = trainable.iter().collect();
        if let Some(logprobs) = &before.logprobs {
            self.compare_with_rollout(&refs, logprobs, report)?;
        }
        if let Some(values) = &mut before.values {
            override_values(&refs, given, values)?;
        }
        drop((refs, micro_batches));
        report.kl_coef = before.reference.is_some().then(|| self.kl.coef());
        let mut kl = match fill_targets(&mut trainable, &before, settings, self.kl.coef()) {
            Ok(kl) => kl,
            Err(e @ AlgoError::NotFinite(_)) => {
                return Ok(Err(unusable_token(e, &trainable.iter().collect::<Vec<_>>())));
            }
            Err(e) => return Err(e.into()),
        };

        let mut losses = LossAccumulator::default();
        for epoch in 0..settings.inner_epochs {
            for indices in mini_batches(settings, self.step, trainable.len(), epoch) {
                let chosen: Vec<&TrainableGroup> = indices.iter().map(|i| &trainable[*i]).collect();
                let counts = counts(&chosen);
                let micro_batches = partition.micro_batches(&trainable, &indices);
                let ready = std::mem::take(&mut first_passes);
                let (local, logprobs) = accumulate_gradients(policy, &micro_batches, ready, &counts, &objective)?;
                let gradient = self.optimizer.gradient()?;
                if deferred {
                    let logprobs = partition.all_gather_tokens(&logprobs_to_host(&logprobs)?)?;
                    self.compare_with_rollout(&chosen, &logprobs, report)?;
                    match kl_to_reference(&chosen, &logprobs, before.reference.as_deref(), settings) {
                        Ok(mean) => kl = mean,
                        Err(e @ AlgoError::NotFinite(_)) => return Ok(Err(unusable_token(e, &chosen))),
                        Err(e) => return Err(e.into()),
                    }
                }
                let weighted = objective.importance != Importance::None;
                let summed = self.ranks.all_reduce_sum(local.into_list(weighted)?, policy.vlm.device())?;
                let total = LossAccumulator::from_list(&summed);
                if !total.loss().is_finite() {
                    return Ok(Err(Unusable("the loss is not finite".into())));
                }
                if !gradient.norm.is_finite() {
                    return Ok(Err(Unusable("a gradient is not finite".into())));
                }
                losses.add_mini_batch(total, gradient.norm);
                if let Some(recorded) = &mut self.recorded_gradients {
                    *recorded = self.optimizer.gradient_by_name(&gradient)?;
                }
                self.optimizer.step(gradient, report.lr)?;
                if let Some(sharded) = &policy.hooks.sharded {
                    sharded.release_all()?;
                }
            }
        }
        losses.write_to(report);
        if let Some(kl) = kl {
            self.kl.observe(kl);
        }
        Ok(Ok(()))
    }

    /// Returns the objective of the present update.
    fn objective(&self) -> Objective {
        self.policy.settings.objective_at(self.step, self.kl.coef())
    }

    fn partition(&self, trainable: &[TrainableGroup<'_>]) -> Partition {
        let policy = &self.policy;
        let division = (DIVISION, policy.settings.token_budget);
        Partition::new(trainable, self.ranks.clone(), division, policy.vlm.device())
    }

    /// Returns the groups of a batch that can be trained on, sorted by packed length.
    pub(crate) fn trainable_groups<'g>(&self, groups: &'g [TrainGroup]) -> Vec<TrainableGroup<'g>> {
        let overlong_filter = self.policy.settings.overlong_filter;
        let mut trainable: Vec<TrainableGroup<'g>> =
            groups.iter().filter_map(|g| TrainableGroup::new(g, overlong_filter)).collect();
        trainable.sort_by_key(TrainableGroup::packed_len);
        trainable
    }

    /// Returns the indices of the groups that this rank computes, the only ones whose pixels it needs.
    pub fn local_groups(&self, groups: &[TrainGroup]) -> Vec<usize> {
        let trainable = self.trainable_groups(groups);
        let partition = self.partition(&trainable);
        let local: Vec<&GroupId> = partition.local_indices().map(|i| &trainable[i].group.id).collect();
        (0..groups.len()).filter(|i| local.contains(&&groups[*i].id)).collect()
    }

    /// Sets whether gradients are reduced during the backward pass (the default) or after it, to measure what the overlap gains.
    /// Sharded parameters are always gathered layer by layer.
    pub fn set_overlap(&mut self, on: bool) {
        self.policy.hooks.by_layer = self.ranks.size() > 1 && (on || self.policy.hooks.sharded.is_some());
    }

    /// Returns all trained weights in full precision and the optimiser's moments, by name. All ranks call it.
    ///
    /// # Errors
    /// Returns [`TrainerError::Ranks`] if another rank has failed or timed out.
    pub fn state(&self) -> Result<(NamedTensors, NamedTensors)> {
        Ok((self.optimizer.weights()?, self.optimizer.state()?))
    }

    /// Computes the values of the present value head for every response that is trained on. All ranks call it.
    ///
    /// # Errors
    /// Returns [`TrainerError::Ranks`] if another rank has failed or timed out, or an error of the model if the inputs do not fit it.
    pub fn compute_values(&self, groups: &[TrainGroup]) -> Result<ValuesByGroup> {
        let trainable = self.trainable_groups(groups);
        if self.policy.value_head.is_none() || trainable.is_empty() {
            return Ok(ValuesByGroup::new());
        }
        let partition = self.partition(&trainable);
        let all: Vec<usize> = (0..trainable.len()).collect();
        let (_, local) = self.policy.forward_detached(&partition.micro_batches(&trainable, &all))?;
        let values = partition.all_gather_tokens(&local)?;
        let mut rest = values.as_slice();
        let mut out = ValuesByGroup::new();
        for g in &trainable {
            let by_response =
                out.entry(g.group.id.clone()).or_insert_with(|| vec![Vec::new(); g.group.responses.len()]);
            for (r, range) in g.responses.iter().zip(g.response_ranges()) {
                let (head, tail) = rest.split_at(range.len());
                by_response[r.response] = head.to_vec();
                rest = tail;
            }
        }
        Ok(out)
    }

    /// Records the gradients of optimiser steps from now on.
    pub(crate) fn record_gradients(&mut self) {
        self.recorded_gradients = Some(Vec::new());
    }

    /// Returns the gradients of the last optimiser step before clipping, by parameter, and stops recording.
    pub(crate) fn take_recorded_gradients(&mut self) -> Vec<(String, Tensor)> {
        self.recorded_gradients.take().unwrap_or_default()
    }

    /// Sets the counters.
    pub(crate) fn set_counters(&mut self, counters: Counters) {
        self.step = counters.step;
        self.skipped = counters.skipped;
        self.skipped_in_a_row = counters.skipped_in_a_row;
    }

    /// Restores the counters and, if given, the KL coefficient.
    pub(crate) fn restore_counters(&mut self, counters: Counters, kl: Option<&KlController>) {
        self.set_counters(counters);
        if let Some(saved) = kl {
            self.kl.resume(saved);
        }
    }

    /// Returns the controller of the KL coefficient.
    pub(crate) fn kl_controller(&self) -> KlController {
        self.kl
    }

    /// Returns the counters.
    pub fn counters(&self) -> Counters {
        Counters {
            step: self.step,
            updates: self.optimizer.updates(),
            skipped: self.skipped,
            skipped_in_a_row: self.skipped_in_a_row,
        }
    }
}

/// Counters of a trainer, as checkpoints store them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Counters {
    /// Steps, skipped ones included.
    pub step: u64,
    /// Optimiser updates.
    pub updates: u64,
    /// Skipped steps.
    pub skipped: u64,
    /// Steps skipped since the last good one.
    pub skipped_in_a_row: u64,
}

/// Returns the group indices of each mini-batch: in order if there is only one, else shuffled as a function of (seed, step, epoch).
fn mini_batches(s: &StepSettings, step: u64, groups: usize, epoch: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..groups).collect();
    if s.minibatches > 1 {
        let mixed = s.seed ^ step.rotate_left(24) ^ (epoch as u64).rotate_left(48);
        order.shuffle(&mut ChaCha8Rng::seed_from_u64(mixed));
    }
    let size = groups.div_ceil(s.minibatches.max(1)).max(1);
    order.chunks(size).map(<[usize]>::to_vec).collect()
}

/// Runs forward and backward over this rank's micro-batches of a mini-batch, and returns the sum of their loss parts, and their
/// log-probabilities on the device. `counts` are those of the whole mini-batch; `ready` are forward passes over exactly these
/// micro-batches, or empty.
fn accumulate_gradients(
    policy: &Policy,
    micro_batches: &MicroBatches<'_, TrainableGroup<'_>>,
    ready: Vec<PolicyPass<'_>>,
    counts: &Counts,
    objective: &Objective,
) -> Result<(LossAccumulator, Vec<Tensor>)> {
    let mut total = LossAccumulator::default();
    let mut logprobs = Vec::new();
    let mut ready = ready.into_iter();
    let mut micro_batches = micro_batches.iter().peekable();
    while let Some(micro_batch) = micro_batches.next() {
        let forward = match ready.next() {
            Some(f) => f,
            None => policy.forward(micro_batch, objective)?,
        };
        let outputs = forward.outputs.as_ref();
        logprobs.extend(outputs.map(|outputs| outputs.logprobs.detach()));
        let loss = outputs.map(|outputs| policy.loss(micro_batch, outputs, counts, objective)).transpose()?;
        if let Some(loss) = &loss {
            total.add(loss)?;
        }
        forward.backward(loss.as_ref().map(|l| &l.loss), micro_batches.peek().is_none())?;
    }
    Ok((total, logprobs))
}

/// Overwrites `values`, flat over all groups, with those that are `given`.
fn override_values(groups: &[&TrainableGroup<'_>], given: &ValuesByGroup, values: &mut [f64]) -> Result<()> {
    let mut begin = 0;
    for g in groups {
        for (r, range) in g.responses.iter().zip(g.response_ranges()) {
            let target = &mut values[begin + range.start..begin + range.end];
            if let Some(list) = given.get(&g.group.id).and_then(|v| v.get(r.response)).filter(|v| !v.is_empty()) {
                if list.len() != target.len() {
                    return Err(TrainerError::Setting(format!(
                        "{} values are given for {} tokens",
                        list.len(),
                        target.len()
                    )));
                }
                target.copy_from_slice(list);
            }
        }
        begin += g.token_count();
    }
    Ok(())
}

/// Counts groups without a learning signal, and rejects batches with values that are not finite, naming the first one.
fn check_usable(groups: &[TrainGroup]) -> Result<BatchStats, Unusable> {
    let rewards: Vec<Vec<Option<f64>>> = groups.iter().map(TrainGroup::totals).collect();
    let lengths = |g: &TrainGroup| g.responses.iter().map(|r| r.tokens.len()).collect();
    let layout = TokenLayout::new(groups.iter().map(lengths).collect());
    let logprobs: Vec<f32> =
        groups.iter().flat_map(|g| &g.responses).flat_map(|r| r.logprobs.iter().copied()).collect();
    check_batch(&rewards, &layout, &[("log-probability", &logprobs)])
        .map_err(|e| unusable(e, |g, r| (&groups[g].id.record, groups[g].responses[r].index)))
}

/// Describes why trainable groups cannot be used.
fn unusable_token(e: AlgoError, groups: &[&TrainableGroup<'_>]) -> Unusable {
    let index = |g: &TrainableGroup<'_>, r: usize| g.group.responses[g.responses[r].response].index;
    unusable(e, |g, r| (&groups[g].group.id.record, index(groups[g], r)))
}

/// Describes why a batch cannot be used; `name` returns the record and response index of positions in the batch.
fn unusable<'a>(e: AlgoError, name: impl Fn(usize, usize) -> (&'a String, usize)) -> Unusable {
    match e {
        AlgoError::NotFinite(n) => {
            let (id, response) = name(n.group, n.response);
            let token = n.token.map_or_else(String::new, |t| format!("token {t} of "));
            Unusable(format!("the {} of {token}response {response} of record `{id}` is {}", n.what, n.value))
        }
        other => Unusable(other.to_string()),
    }
}
