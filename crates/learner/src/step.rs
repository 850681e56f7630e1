//! One policy update from a batch of groups: advantages, packed forward pass, loss, gradients, AdamW. A function of the batch
//! and the learner's state alone. Must not know: tonic, tokio, where groups come from.

use std::collections::{BTreeMap, HashMap};

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use tch::Tensor;
use unveil_algo::{AlgoError, BatchStats, KlController, Layout, LossParts, Objective, check_batch};
use unveil_core::GroupId;
use unveil_model::{ValueHead, Vlm};

use crate::batch::{Member, TrainGroup, padding, parts};
use crate::error::{LearnerError, Result};
use crate::measure::{Agreement, UpdateReport, agreement, describe};
use crate::optim::{AdamW, lr_at};
use crate::policy::{Forward, Policy, detached};
use crate::settings::StepSettings;
use crate::targets::{Before, counts, fill};

/// Skipped steps in a row after which a stage stops.
pub const SKIP_LIMIT: u64 = 5;

/// The policy with its optimiser.
pub struct Learner {
    pub(crate) policy: Policy,
    pub(crate) optimizer: AdamW,
    kl: KlController,
    /// Updates so far, skipped ones among them.
    pub(crate) step: u64,
    pub(crate) skipped: u64,
    pub(crate) skipped_in_a_row: u64,
    /// Gradients of the last optimiser step, where they are asked for.
    trace: Option<Vec<(String, Tensor)>>,
}

/// Values before an update, by group and response; empty for responses that do not count.
pub(crate) type Values = HashMap<GroupId, Vec<Vec<f64>>>;

/// Why a batch cannot be used; the step is skipped.
struct Unusable(String);

impl Learner {
    /// A learner around `vlm`, which trains its adapters alone where it has some. `reference` is needed when the KL term has a weight;
    /// without one it is the model without its adapters. PPO adds a value head of zeros.
    ///
    /// # Errors
    /// A frozen prefix that no parameter has, a layer that the model does not have, weights that are not fp32.
    pub fn new(vlm: Vlm, reference: Option<Vlm>, settings: StepSettings) -> Result<Self> {
        let fault = |what: String| Err(LearnerError::Setting(what));
        for prefix in &settings.frozen {
            if !vlm.named_parameters().iter().any(|(n, _)| n.starts_with(prefix.as_str())) {
                return fault(format!("learner.frozen has `{prefix}`, but no parameter's name starts so"));
            }
        }
        if let Err(e) = settings.attention.check(&vlm.config().text) {
            return fault(format!("reward.vision_relevance.layers and .heads (0-based): {e}"));
        }
        if settings.objective.kl_coef > 0.0 && reference.is_none() && vlm.adapters().is_none() {
            return fault("learner.kl_coef is above 0, but there is no reference model".into());
        }
        let frozen = |name: &str| settings.frozen.iter().any(|p| name.starts_with(p.as_str()));
        vlm.set_trainable(|name| vlm.adapters().is_none() && !frozen(name));
        let value_head = settings
            .estimator
            .needs_values()
            .then(|| ValueHead::new(vlm.config().text.hidden_size, (vlm.kind(), vlm.device())));
        let mut trained: Vec<(String, Tensor)> = Vec::new();
        trained.extend(
            vlm.named_parameters()
                .iter()
                .filter(|(_, t)| t.requires_grad())
                .map(|(n, t)| (n.clone(), t.shallow_clone())),
        );
        if let Some(adapters) = vlm.adapters() {
            adapters.set_trainable(true);
            trained.extend(adapters.named_parameters().iter().map(|(n, t)| (n.clone(), t.shallow_clone())));
        }
        if let Some(head) = &value_head {
            head.set_trainable(true);
            trained.extend(head.named_parameters().iter().map(|(n, t)| (n.clone(), t.shallow_clone())));
        }
        let optimizer = AdamW::new(&settings.optimizer, &trained)?;
        let kl = settings.kl_controller();
        let policy = Policy { vlm, value_head, reference, settings };
        Ok(Self { policy, optimizer, kl, step: 0, skipped: 0, skipped_in_a_row: 0, trace: None })
    }

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
        let mut report = describe(groups, self.step);
        report.lr = lr_at(&self.policy.settings.optimizer, self.step, self.policy.settings.total_steps);
        let outcome = match usable(groups) {
            Err(unusable) => Err(unusable),
            Ok(stats) => {
                report.flat_groups = stats.flat_groups;
                self.apply(groups, given, &mut report)?
            }
        };
        self.optimizer.zero_grad();
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
        let mut members: Vec<Member> = groups.iter().filter_map(Member::new).collect();
        // Neighbours of like width share a padded part.
        members.sort_by_key(Member::width);
        report.dropped_groups = groups.len() - members.len();
        if members.is_empty() {
            return Ok(Err(Unusable("every reward of the batch is masked".into())));
        }
        report.tokens = members.iter().map(Member::tokens).sum();

        // Log-probabilities and values before the update: from the first passes where all of them fit at a time, else from passes of
        // their own.
        let (policy, objective) = (&self.policy, self.objective());
        let settings = &policy.settings;
        let all: Vec<&Member> = members.iter().collect();
        let split = parts(&all, settings.token_budget);
        let (positions, unused) = padding(&split);
        report.padding = unused as f64 / positions.max(1) as f64;
        let mut first = Vec::new();
        if settings.minibatches <= 1 && positions <= settings.token_budget {
            first = split.iter().map(|part| policy.forward(part, &objective)).collect::<Result<Vec<_>>>()?;
        }
        let (logprobs, mut values) = if first.is_empty() { policy.forward_detached(&all)? } else { detached(&first)? };
        let found = agreement(&all, &logprobs, self.step);
        self.judge(&found)?;
        report.take_agreement(&found);
        let reference = policy.reference_logprobs(&all)?;
        if let Some(values) = &mut values {
            take_given(&all, given, values)?;
        }
        drop(all);
        report.kl_coef = reference.is_some().then(|| self.kl.coef());
        let before = Before { logprobs, values, reference };
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
                let mut chosen: Vec<&Member> = chunk.iter().map(|i| &members[*i]).collect();
                chosen.sort_by_key(|m| m.width());
                self.optimizer.zero_grad();
                let total = match gradients(policy, &chosen, std::mem::take(&mut first), &objective)? {
                    Ok(total) => total,
                    Err(unusable) => return Ok(Err(unusable)),
                };
                let gradient = self.optimizer.gradient()?;
                if !gradient.norm.is_finite() {
                    return Ok(Err(Unusable("a gradient is not finite".into())));
                }
                sums.take(total, gradient.norm);
                if let Some(trace) = &mut self.trace {
                    *trace = self.optimizer.by_name(&gradient)?;
                }
                self.optimizer.step(gradient, report.lr)?;
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
        match found.mean {
            Some(mean) if mean > self.policy.settings.agreement_limit => Err(LearnerError::Agreement {
                step: self.step + 1,
                mean,
                limit: self.policy.settings.agreement_limit,
                worst: found.worst.join(", "),
            }),
            _ => Ok(()),
        }
    }

    /// Values of the present value head for every response that counts.
    pub(crate) fn values(&self, groups: &[TrainGroup]) -> Result<Values> {
        let members: Vec<Member> = groups.iter().filter_map(Member::new).collect();
        if self.policy.value_head.is_none() || members.is_empty() {
            return Ok(Values::new());
        }
        let (_, values) = self.policy.forward_detached(&members.iter().collect::<Vec<_>>())?;
        let mut rest = values.as_deref().unwrap_or_default();
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

    /// Moments, value head, counters and the weight of KL are taken over; the weights are loaded apart.
    pub(crate) fn restore(
        &mut self,
        moments: &[(String, Tensor)],
        head: Option<&[(String, Tensor)]>,
        at: Counters,
        kl: Option<&KlController>,
    ) -> Result<()> {
        if let (Some(own), Some(named)) = (&mut self.policy.value_head, head) {
            own.load_state(named)?;
        }
        self.optimizer.load_state(moments, at.updates)?;
        self.stand_at(at);
        if let Some(saved) = kl {
            self.kl.resume(saved);
        }
        Ok(())
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

/// Loss and gradients over `chosen`, which stay in the parameters; `ready` are passes over exactly its parts, or none.
fn gradients(
    policy: &Policy,
    chosen: &[&Member<'_>],
    ready: Vec<Forward<'_>>,
    objective: &Objective,
) -> Result<Result<Sums, Unusable>> {
    let counts = counts(chosen);
    let mut total = Sums::default();
    let mut ready = ready.into_iter();
    for part in parts(chosen, policy.settings.token_budget) {
        let forward = match ready.next() {
            Some(f) => f,
            None => policy.forward(&part, objective)?,
        };
        let loss = policy.loss(&part, &forward, &counts, objective)?;
        if !loss.loss.f_double_value(&[])?.is_finite() {
            return Ok(Err(Unusable("the loss is not finite".into())));
        }
        forward.backward(&loss.loss)?;
        total.add_part(&loss)?;
    }
    Ok(Ok(total))
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

/// Loss parts over micro-batches (added) and mini-batches (averaged).
#[derive(Default)]
struct Sums {
    parts: BTreeMap<&'static str, f64>,
    norm: f64,
    count: u64,
}

impl Sums {
    fn add_part(&mut self, loss: &LossParts) -> Result<()> {
        let means = &loss.means;
        let mut all = vec![
            ("loss", &loss.loss),
            ("policy", &loss.policy),
            ("value", &loss.value),
            ("attention", &loss.attention),
            ("entropy", &means.entropy),
            ("kl_reference", &means.kl),
            ("clip_fraction", &means.clip_fraction),
            ("kl", &means.approx_kl),
        ];
        if let Some((mean, bounded)) = &means.importance {
            all.extend([("importance", mean), ("importance_bounded", bounded)]);
        }
        for (name, t) in all {
            *self.parts.entry(name).or_default() += t.f_double_value(&[])?;
        }
        Ok(())
    }

    fn take(&mut self, other: Sums, norm: f64) {
        for (name, v) in other.parts {
            *self.parts.entry(name).or_default() += v;
        }
        self.norm += norm;
        self.count += 1;
    }

    fn report(&self, report: &mut UpdateReport) {
        let n = self.count.max(1) as f64;
        let own = ["loss", "policy", "value", "attention"];
        let found = |k: &str| self.parts.get(k).map(|v| v / n);
        let of = |k: &str| found(k).unwrap_or(0.0);
        (report.clip_fraction, report.kl, report.kl_reference) = (of("clip_fraction"), of("kl"), of("kl_reference"));
        (report.importance, report.importance_bounded) = (found("importance"), found("importance_bounded"));
        report.entropy = of("entropy");
        report.grad_norm = self.norm / n;
        report.loss = self.parts.keys().filter(|k| own.contains(k)).map(|k| ((*k).to_owned(), of(k))).collect();
    }
}
