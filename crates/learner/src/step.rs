//! One policy update from a batch of groups: advantages, packed forward pass, loss, gradients, AdamW. A function of the batch
//! and the learner's state alone. Must not know: tonic, tokio, where groups come from.

use std::collections::HashMap;
use std::rc::Rc;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use tch::Tensor;
use unveil_algo::{AlgoError, BatchStats, Correction, Counts, KlController, Layout, Objective, check_batch};
use unveil_core::GroupId;
use unveil_model::{ValueHead, Vlm};

use crate::batch::{Member, TrainGroup};
use crate::error::{LearnerError, Result};
use crate::measure::{Agreement, UpdateReport, agreement, describe};
use crate::memory::guarded;
use crate::optim::{AdamW, lr_at};
use crate::policy::{Forward, Policy, detached};
use crate::settings::StepSettings;
use crate::setup::CRITIC;
use crate::shard::Ranks;
use crate::share::{Share, Work};
use crate::sums::Sums;
use crate::targets::{Before, counts, fill};

/// Skipped steps in a row after which a stage stops.
pub const SKIP_LIMIT: u64 = 5;

/// The policy with its optimiser.
pub struct Learner {
    pub(crate) policy: Policy,
    pub(crate) optimizer: AdamW,
    pub(crate) ranks: Rc<Ranks>,
    pub(crate) kl: KlController,
    /// Updates so far, skipped ones among them.
    pub(crate) step: u64,
    pub(crate) skipped: u64,
    pub(crate) skipped_in_a_row: u64,
    /// Gradients of the last optimiser step, where they are asked for.
    pub(crate) trace: Option<Vec<(String, Tensor)>>,
}

/// Tensors by name.
pub type Named = Vec<(String, Tensor)>;

/// Values before an update, by group and response; empty for responses that do not count.
pub(crate) type Values = HashMap<GroupId, Vec<Vec<f64>>>;

/// Why a batch cannot be used; the step is skipped.
struct Unusable(String);

impl Learner {
    /// The policy.
    pub fn vlm(&self) -> &Vlm {
        &self.policy.vlm
    }

    /// The policy, for evaluation.
    pub fn vlm_mut(&mut self) -> &mut Vlm {
        &mut self.policy.vlm
    }

    /// The value head, where the algorithm has one.
    pub fn value_head(&self) -> Option<&ValueHead> {
        self.policy.value_head.as_ref()
    }

    /// Updates so far; also the version of the present weights.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// What enters an update.
    pub fn settings(&self) -> &StepSettings {
        &self.policy.settings
    }

    /// One update. The present weights are version [`Learner::step`]; after it they are one more, also when the step had to be
    /// skipped (a value that is not finite, nothing to learn from), which leaves them as they were.
    ///
    /// # Errors
    /// [`LearnerError::Agreement`], [`LearnerError::Skipped`] after [`SKIP_LIMIT`] skipped steps in a row, or inputs that do not
    /// fit the model.
    pub fn update(&mut self, groups: &[TrainGroup]) -> Result<UpdateReport> {
        self.update_with(groups, &Values::new())
    }

    /// [`Learner::update`] with values from before where they are `given`, in place of those of the present value head.
    pub(crate) fn update_with(&mut self, groups: &[TrainGroup], given: &Values) -> Result<UpdateReport> {
        self.divide()?;
        let (freezing, step) = (&self.policy.settings.freezing, self.step);
        if freezing.changes() {
            self.optimizer.train(|name| freezing.at(name.strip_prefix(CRITIC).unwrap_or(name), step));
        }
        if let Some(gathered) = &self.policy.course.gathered {
            gathered.part_all()?;
        }
        let mut report = describe(groups, self.step);
        report.lr = lr_at(&self.policy.settings.optimizer, self.step, self.policy.settings.total_steps);
        let outcome = match usable(groups) {
            Err(unusable) => Err(unusable),
            Ok(stats) => {
                report.flat_groups = stats.flat_groups;
                match guarded(|| self.apply(groups, given, &mut report)) {
                    Ok(done) => done?,
                    Err(cause) => {
                        let plan = Box::new(self.memory_plan(groups));
                        return Err(LearnerError::OutOfMemory { cause, plan });
                    }
                }
            }
        };
        self.optimizer.zero_grad()?;
        let sums = self.optimizer.take_sums_time();
        report.reduce_ms = sums.under_way.as_secs_f64() * 1e3;
        report.reduce_wait_ms = sums.waited.as_secs_f64() * 1e3;
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
                    return Err(LearnerError::Skipped { step: self.step, in_a_row: self.skipped_in_a_row, why });
                }
            }
        }
        report.skipped_total = self.skipped;
        Ok(report)
    }

    fn apply(
        &mut self,
        groups: &[TrainGroup],
        given: &Values,
        report: &mut UpdateReport,
    ) -> Result<Result<(), Unusable>> {
        let mut members = members(groups);
        if members.is_empty() {
            return Ok(Err(Unusable("every reward of the batch is masked".into())));
        }
        report.tokens = members.iter().map(Member::tokens).sum();

        // Log-probabilities and values before the update: from the first passes where all of them fit at a time, else from passes of
        // their own.
        let (policy, objective) = (&self.policy, self.objective());
        let settings = &policy.settings;
        let share = Share::new(&members, self.ranks.clone(), settings.token_budget, policy.vlm.device());
        let all: Vec<usize> = (0..members.len()).collect();
        report.padding = share.padding(&members);
        let work = share.work(&members, &all);
        let mut first = Vec::new();
        if settings.minibatches <= 1 && work.positions <= settings.token_budget {
            first = work.passes().map(|part| policy.forward(part, &objective)).collect::<Result<Vec<_>>>()?;
        }
        let (logprobs, values) = if first.is_empty() { policy.forward_detached(&work)? } else { detached(&first)? };
        let reference = policy.reference_logprobs(&work)?;
        let mut before = Before {
            logprobs: share.join(&logprobs)?,
            values: policy.value_head.as_ref().map(|_| share.join(&values)).transpose()?,
            reference: reference.map(|r| share.join(&r)).transpose()?,
        };
        let refs: Vec<&Member> = members.iter().collect();
        let found = agreement(&refs, &before.logprobs, self.step);
        self.judge(&found)?;
        report.take_agreement(&found);
        if let Some(values) = &mut before.values {
            take_given(&refs, given, values)?;
        }
        drop((refs, work));
        report.kl_coef = before.reference.is_some().then(|| self.kl.coef());
        let kl = match fill(&mut members, &before, settings, self.kl.coef()) {
            Ok(kl) => kl,
            Err(e @ AlgoError::NotFinite(_)) => {
                let index = |m: &Member<'_>, row: usize| m.group.responses[m.rows[row].response].index;
                return Ok(Err(unusable(e, |g, r| (&members[g].group.id.record, index(&members[g], r)))));
            }
            Err(e) => return Err(e.into()),
        };

        let mut sums = Sums::default();
        for epoch in 0..settings.inner_epochs {
            for chunk in minibatches(settings, self.step, members.len(), epoch) {
                let chosen: Vec<&Member> = chunk.iter().map(|i| &members[*i]).collect();
                let counts = counts(&chosen);
                let work = share.work(&members, &chunk);
                let total = gradients(policy, &work, std::mem::take(&mut first), &counts, &objective)?;
                let gradient = self.optimizer.gradient()?;
                let weighted = objective.correction != Correction::None;
                let total = Sums::of(&self.ranks.sum(total.list(weighted), policy.vlm.device())?);
                if !total.loss().is_finite() {
                    return Ok(Err(Unusable("the loss is not finite".into())));
                }
                if !gradient.norm.is_finite() {
                    return Ok(Err(Unusable("a gradient is not finite".into())));
                }
                sums.take(total, gradient.norm);
                if let Some(trace) = &mut self.trace {
                    *trace = self.optimizer.by_name(&gradient)?;
                }
                self.optimizer.step(gradient, report.lr)?;
                if let Some(gathered) = &policy.course.gathered {
                    gathered.part_all()?;
                }
            }
        }
        sums.report(report);
        if let Some(kl) = kl {
            self.kl.observe(kl);
        }
        Ok(Ok(()))
    }

    /// The objective of the present update.
    fn objective(&self) -> Objective {
        self.policy.settings.objective_at(self.step, self.kl.coef())
    }

    fn judge(&self, found: &Agreement) -> Result<()> {
        let limit = self.policy.settings.agreement_limit;
        // One worker that drifts is not to hide among others that do not.
        let mut above: Vec<(&String, f64)> =
            found.workers.iter().map(|(name, mean)| (name, *mean)).filter(|(_, mean)| *mean > limit).collect();
        above.sort_by(|a, b| b.1.total_cmp(&a.1));
        let Some(mean) = found.mean.filter(|mean| *mean > limit).or(above.first().map(|(_, mean)| *mean)) else {
            return Ok(());
        };
        let named: Vec<String> = above.iter().map(|(name, mean)| format!("worker `{name}` ({mean:.2e})")).collect();
        let workers = named.join(", ");
        Err(LearnerError::Agreement { step: self.step + 1, mean, limit, workers, worst: found.worst.join(", ") })
    }

    /// The groups of a batch that this rank computes; it needs the pixels of these alone.
    pub(crate) fn own_groups(&self, groups: &[TrainGroup]) -> Vec<usize> {
        let members = members(groups);
        let policy = &self.policy;
        let share = Share::new(&members, self.ranks.clone(), policy.settings.token_budget, policy.vlm.device());
        let own: Vec<&GroupId> = share.own().map(|i| &members[i].group.id).collect();
        (0..groups.len()).filter(|i| own.contains(&&groups[*i].id)).collect()
    }

    /// Whether sums over ranks begin while a backward pass goes on (they do), or all after it. For measuring what that is worth;
    /// divided parameters always come layer by layer.
    pub fn overlap(&mut self, on: bool) {
        self.policy.course.by_layer = self.ranks.size() > 1 && (on || self.policy.course.gathered.is_some());
    }

    /// Everything that is trained, to its last digit, and the optimiser's moments, by name. All ranks call it.
    ///
    /// # Errors
    /// A rank is gone.
    pub fn state(&self) -> Result<(Named, Named)> {
        Ok((self.optimizer.weights()?, self.optimizer.state()?))
    }

    /// Values of the present value head for every response that counts. All ranks call it.
    pub(crate) fn values(&self, groups: &[TrainGroup]) -> Result<Values> {
        let members = members(groups);
        if self.policy.value_head.is_none() || members.is_empty() {
            return Ok(Values::new());
        }
        let policy = &self.policy;
        let share = Share::new(&members, self.ranks.clone(), policy.settings.token_budget, policy.vlm.device());
        let all: Vec<usize> = (0..members.len()).collect();
        let values = share.join(&policy.forward_detached(&share.work(&members, &all))?.1)?;
        let mut rest = values.as_slice();
        let mut out = Values::new();
        for m in &members {
            let own = out.entry(m.group.id.clone()).or_insert_with(|| vec![Vec::new(); m.group.responses.len()]);
            for (row, range) in m.rows.iter().zip(m.ranges()) {
                let (head, tail) = rest.split_at(range.len());
                own[row.response] = head.to_vec();
                rest = tail;
            }
        }
        Ok(out)
    }

    /// Keeps the gradients of optimiser steps from here on.
    pub(crate) fn trace(&mut self) {
        self.trace = Some(Vec::new());
    }

    /// The gradients of the last optimiser step, before clipping, by parameter.
    pub(crate) fn take_trace(&mut self) -> Vec<(String, Tensor)> {
        self.trace.take().unwrap_or_default()
    }

    /// Sets the counters, as at the start of a step.
    pub(crate) fn stand_at(&mut self, at: Counters) {
        (self.step, self.skipped, self.skipped_in_a_row) = (at.step, at.skipped, at.skipped_in_a_row);
    }

    /// Takes counters and the weight of KL over.
    pub(crate) fn restore(&mut self, at: Counters, kl: Option<&KlController>) {
        self.stand_at(at);
        if let Some(saved) = kl {
            self.kl.resume(saved);
        }
    }

    /// The weight of KL to the reference and how it changes.
    pub(crate) fn kl_controller(&self) -> KlController {
        self.kl
    }

    /// Where the learner stands.
    pub(crate) fn counters(&self) -> Counters {
        let (step, skipped, skipped_in_a_row) = (self.step, self.skipped, self.skipped_in_a_row);
        Counters { step, skipped, skipped_in_a_row, updates: self.optimizer.updates() }
    }
}

/// Counters that a checkpoint holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub(crate) struct Counters {
    /// Steps, skipped ones among them.
    pub step: u64,
    /// Optimiser updates.
    pub updates: u64,
    /// Steps skipped.
    pub skipped: u64,
    /// Steps skipped since the last good one.
    pub skipped_in_a_row: u64,
}

/// Indices of each mini-batch: in order where there is one, else shuffled as a function of (seed, step, epoch).
fn minibatches(s: &StepSettings, step: u64, groups: usize, epoch: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..groups).collect();
    if s.minibatches > 1 {
        let mixed = s.seed ^ step.rotate_left(24) ^ (epoch as u64).rotate_left(48);
        order.shuffle(&mut ChaCha8Rng::seed_from_u64(mixed));
    }
    let size = groups.div_ceil(s.minibatches.max(1)).max(1);
    order.chunks(size).map(<[usize]>::to_vec).collect()
}

/// The members of a batch; neighbours are of like width.
pub(crate) fn members(groups: &[TrainGroup]) -> Vec<Member<'_>> {
    let mut members: Vec<Member> = groups.iter().filter_map(Member::new).collect();
    members.sort_by_key(Member::width);
    members
}

/// Loss parts of this rank's share of a mini-batch with these `counts`, whose gradients are taken up by the course; `ready` are
/// passes over exactly its parts, or none.
fn gradients(
    policy: &Policy,
    work: &Work<'_, '_>,
    ready: Vec<Forward<'_>>,
    counts: &Counts,
    objective: &Objective,
) -> Result<Sums> {
    let mut total = Sums::default();
    let mut ready = ready.into_iter();
    let mut passes = work.passes().peekable();
    while let Some(part) = passes.next() {
        let forward = match ready.next() {
            Some(f) => f,
            None => policy.forward(part, objective)?,
        };
        let loss = forward.made.as_ref().map(|made| policy.loss(part, made, counts, objective)).transpose()?;
        if let Some(loss) = &loss {
            total.add(loss)?;
        }
        forward.backward(loss.as_ref().map(|l| &l.loss), passes.peek().is_none())?;
    }
    Ok(total)
}

/// Puts values that are given in place of `values`, those of all members' tokens.
fn take_given(members: &[&Member<'_>], given: &Values, values: &mut [f64]) -> Result<()> {
    let mut begin = 0;
    for m in members {
        for (row, range) in m.rows.iter().zip(m.ranges()) {
            let own = &mut values[begin + range.start..begin + range.end];
            if let Some(list) = given.get(&m.group.id).and_then(|g| g.get(row.response)).filter(|v| !v.is_empty()) {
                if list.len() != own.len() {
                    let (found, need) = (list.len(), own.len());
                    return Err(LearnerError::Setting(format!("{found} values are given for {need} tokens")));
                }
                own.copy_from_slice(list);
            }
        }
        begin += m.tokens();
    }
    Ok(())
}

/// Refuses batches with numbers that are not finite, naming the first; counts what says nothing.
fn usable(groups: &[TrainGroup]) -> Result<BatchStats, Unusable> {
    let rewards: Vec<Vec<Option<f64>>> = groups.iter().map(TrainGroup::totals).collect();
    let lengths = |g: &TrainGroup| g.responses.iter().map(|r| r.tokens.len()).collect();
    let layout = Layout::new(groups.iter().map(lengths).collect());
    let logprobs: Vec<f32> =
        groups.iter().flat_map(|g| &g.responses).flat_map(|r| r.logprobs.iter().copied()).collect();
    check_batch(&rewards, &layout, &[("log-probability", &logprobs)])
        .map_err(|e| unusable(e, |g, r| (&groups[g].id.record, groups[g].responses[r].index)))
}

/// Why a batch cannot be used, with the record and the response by the names that they have outside; `name` knows them by
/// positions.
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
