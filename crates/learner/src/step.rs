//! One policy update from a batch of groups: advantages, packed forward pass, loss, gradients, AdamW. A function of the batch
//! and the learner's state alone. Must not know: tonic, tokio, where groups come from.

use std::collections::BTreeMap;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use tch::{Kind, Tensor, no_grad};
use unveil_algo::{
    AlgoError, BatchStats, Correction, Counts, KlController, Layout, LossParts, Objective, TokenBatch, check_batch,
    policy_loss,
};
use unveil_config::schema::RatioBase;
use unveil_model::{CaptureSpec, PackedBatch, ValueHead, Vlm, logprobs_entropy};

use crate::batch::{GroupInput, Member, TrainGroup, flat, mentions, parts, pixels};
use crate::error::{LearnerError, Result};
use crate::measure::{Agreement, UpdateReport, agreement, describe};
use crate::optim::{AdamW, lr_at};
use crate::settings::StepSettings;
use crate::targets::{Before, counts, fill, layout};

/// Skipped steps in a row after which a stage stops.
pub const SKIP_LIMIT: u64 = 5;

/// The policy with its optimiser.
pub struct Learner {
    pub(crate) vlm: Vlm,
    pub(crate) value_head: Option<ValueHead>,
    pub(crate) optimizer: AdamW,
    reference: Option<Vlm>,
    settings: StepSettings,
    kl: KlController,
    /// Updates so far, skipped ones among them.
    pub(crate) step: u64,
    pub(crate) skipped: u64,
    pub(crate) skipped_in_a_row: u64,
}

/// Results of a forward pass over some members, flat.
struct Forward {
    logprobs: Tensor,
    entropy: Tensor,
    values: Option<Tensor>,
    attention: Option<Tensor>,
}

/// Why a batch cannot be used; the step is skipped.
struct Unusable(String);

impl Learner {
    /// A learner around `vlm`. `reference` is needed when the KL term has a weight; PPO adds a value head of zeros.
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
        if settings.objective.kl_coef > 0.0 && reference.is_none() {
            return fault("learner.kl_coef is above 0, but there is no reference model".into());
        }
        vlm.set_trainable(|name| !settings.frozen.iter().any(|p| name.starts_with(p.as_str())));
        let value_head =
            settings.estimator.needs_values().then(|| ValueHead::new(vlm.config().text.hidden_size, vlm.device()));
        let mut trained: Vec<(String, Tensor)> = Vec::new();
        trained.extend(
            vlm.named_parameters()
                .iter()
                .filter(|(_, t)| t.requires_grad())
                .map(|(n, t)| (n.clone(), t.shallow_clone())),
        );
        if let Some(head) = &value_head {
            head.set_trainable(true);
            trained.extend(head.named_parameters().iter().map(|(n, t)| (n.clone(), t.shallow_clone())));
        }
        let optimizer = AdamW::new(&settings.optimizer, &trained)?;
        let kl = settings.kl_controller();
        Ok(Self { vlm, value_head, optimizer, reference, settings, kl, step: 0, skipped: 0, skipped_in_a_row: 0 })
    }

    /// The policy.
    pub fn vlm(&self) -> &Vlm {
        &self.vlm
    }

    /// The policy, for evaluation.
    pub fn vlm_mut(&mut self) -> &mut Vlm {
        &mut self.vlm
    }

    /// Updates so far; also the version of the present weights.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// What enters an update.
    pub fn settings(&self) -> &StepSettings {
        &self.settings
    }

    /// One update. The present weights are version [`Learner::step`]; after it they are one more, also when the step had to be
    /// skipped (a value that is not finite, nothing to learn from), which leaves them as they were.
    ///
    /// # Errors
    /// [`LearnerError::Agreement`], [`LearnerError::Skipped`] after [`SKIP_LIMIT`] skipped steps in a row, or inputs that do not
    /// fit the model.
    pub fn update(&mut self, groups: &[TrainGroup]) -> Result<UpdateReport> {
        let mut report = describe(groups, self.step);
        report.lr = lr_at(&self.settings.optimizer, self.step, self.settings.total_steps);
        let outcome = match usable(groups) {
            Err(unusable) => Err(unusable),
            Ok(stats) => {
                report.flat_groups = stats.flat_groups;
                self.apply(groups, &mut report)?
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

    fn apply(&mut self, groups: &[TrainGroup], report: &mut UpdateReport) -> Result<Result<(), Unusable>> {
        let mut members: Vec<Member> = groups.iter().filter_map(Member::new).collect();
        report.dropped_groups = groups.len() - members.len();
        if members.is_empty() {
            return Ok(Err(Unusable("every reward of the batch is masked".into())));
        }
        report.tokens = members.iter().map(Member::tokens).sum();

        // Log-probabilities and values before the update: from the first pass where it covers the whole batch, else from one of their own.
        let all: Vec<&Member> = members.iter().collect();
        let whole = self.settings.minibatches <= 1 && parts(&all, self.settings.token_budget).len() == 1;
        let first = if whole { Some(self.forward(&all)?) } else { None };
        let (logprobs, values) = match &first {
            Some(f) => (host(&f.logprobs)?, f.values.as_ref().map(host).transpose()?),
            None => self.forward_detached(&all)?,
        };
        let found = agreement(&all, &logprobs, self.step);
        self.judge(&found)?;
        report.take_agreement(&found);
        let reference = match &self.reference {
            Some(r) if self.settings.objective.kl_coef > 0.0 => Some(self.reference_logprobs(r, &all)?),
            _ => None,
        };
        drop(all);
        report.kl_coef = reference.is_some().then(|| self.kl.coef());
        let before = Before { logprobs, values, reference };
        let kl = match fill(&mut members, &before, &self.settings, self.kl.coef()) {
            Ok(kl) => kl,
            Err(e @ AlgoError::NotFinite(_)) => {
                let index = |m: &Member<'_>, row: usize| m.group.responses[m.rows[row].response].index;
                return Ok(Err(unusable(e, |g, r| (&members[g].group.id.record, index(&members[g], r)))));
            }
            Err(e) => return Err(e.into()),
        };

        let mut first = first;
        let mut sums = Sums::default();
        for epoch in 0..self.settings.inner_epochs {
            for chunk in self.minibatches(members.len(), epoch) {
                let chosen: Vec<&Member> = chunk.iter().map(|i| &members[*i]).collect();
                if let Err(unusable) = self.minibatch(&chosen, first.take(), report.lr, &mut sums)? {
                    return Ok(Err(unusable));
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
        self.settings.objective_at(self.step, self.kl.coef())
    }

    /// Indices of each mini-batch: in order where there is one, else shuffled as a function of (seed, step, epoch).
    fn minibatches(&self, groups: usize, epoch: usize) -> Vec<Vec<usize>> {
        let mut order: Vec<usize> = (0..groups).collect();
        if self.settings.minibatches > 1 {
            let mixed = self.settings.seed ^ self.step.rotate_left(24) ^ (epoch as u64).rotate_left(48);
            order.shuffle(&mut ChaCha8Rng::seed_from_u64(mixed));
        }
        let size = groups.div_ceil(self.settings.minibatches.max(1)).max(1);
        order.chunks(size).map(<[usize]>::to_vec).collect()
    }

    /// Loss, gradients and one optimiser step over `chosen`; `ready` is a forward pass over exactly these.
    fn minibatch(
        &mut self,
        chosen: &[&Member<'_>],
        ready: Option<Forward>,
        lr: f64,
        sums: &mut Sums,
    ) -> Result<Result<(), Unusable>> {
        let counts = counts(chosen);
        self.optimizer.zero_grad();
        let mut ready = ready;
        let mut total = Sums::default();
        for part in parts(chosen, self.settings.token_budget) {
            let forward = match ready.take() {
                Some(f) => f,
                None => self.forward(&part)?,
            };
            let loss = self.loss(&part, &forward, &counts)?;
            if !loss.loss.f_double_value(&[])?.is_finite() {
                return Ok(Err(Unusable("the loss is not finite".into())));
            }
            loss.loss.f_backward()?;
            total.add_part(&loss)?;
        }
        let gradient = self.optimizer.gradient()?;
        if !gradient.norm.is_finite() {
            return Ok(Err(Unusable("a gradient is not finite".into())));
        }
        sums.take(total, gradient.norm);
        self.optimizer.step(gradient, lr)?;
        Ok(Ok(()))
    }

    fn loss(&self, part: &[&Member<'_>], forward: &Forward, counts: &Counts) -> Result<LossParts> {
        let device = self.vlm.device();
        let mut objective = self.objective();
        let given = |wanted: bool, of: fn(&Member<'_>) -> Vec<f32>| wanted.then(|| flat(part, of, device)).transpose();
        let old = match self.settings.ratio_to {
            RatioBase::Rollout => flat(part, |m| m.old.clone(), device)?,
            RatioBase::Learner => flat(part, |m| m.proximal.clone(), device)?,
        };
        let behaviour = given(objective.correction != Correction::None, |m| m.old.clone())?;
        let advantages = flat(part, |m| m.advantages.clone(), device)?;
        let old_values = given(objective.value_coef > 0.0, |m| m.old_values.clone())?;
        let targets = given(objective.value_coef > 0.0, |m| m.targets.clone())?;
        let reference = given(self.settings.objective.kl_coef > 0.0, |m| m.reference.clone())?;
        let mention = forward.attention.as_ref().and_then(|rows| {
            let names = |category: &str| self.settings.scoring.names(category);
            mentions(part, &names, rows.size()[1], device)
        });
        if mention.is_none() {
            objective.attention_coef = 0.0;
        }
        let batch = TokenBatch {
            logprobs: Some(&forward.logprobs),
            old_logprobs: Some(&old),
            behaviour: behaviour.as_ref(),
            advantages: Some(&advantages),
            entropy: Some(&forward.entropy),
            values: forward.values.as_ref(),
            old_values: old_values.as_ref(),
            targets: targets.as_ref(),
            reference: reference.as_ref(),
            attention: forward.attention.as_ref().zip(mention.as_ref()),
        };
        Ok(policy_loss(&objective, &batch, &layout(part), counts)?)
    }

    /// The policy's pass over `members`, differentiable unless gradients are off.
    fn forward(&self, members: &[&Member<'_>]) -> Result<Forward> {
        let o = &self.objective();
        let capture = (o.attention_coef > 0.0)
            .then(|| CaptureSpec { set: self.settings.attention.clone(), differentiable: true });
        let (hidden, attention, targets) = packed(&self.vlm, members, capture)?;
        let s = &self.settings;
        let (logprobs, entropy) = logprobs_entropy(&self.vlm.lm_head(&hidden), &targets, s.temperature, &s.banned);
        let entropy = if o.entropy_coef == 0.0 { entropy.detach() } else { entropy };
        let values = self.value_head.as_ref().map(|h| h.forward(&hidden));
        Ok(Forward { logprobs, entropy, values, attention })
    }

    fn forward_detached(&self, members: &[&Member<'_>]) -> Result<(Vec<f32>, Option<Vec<f32>>)> {
        no_grad(|| {
            let (mut logprobs, mut values) = (Vec::new(), self.value_head.is_some().then(Vec::new));
            for part in parts(members, self.settings.token_budget) {
                let f = self.forward(&part)?;
                logprobs.extend(host(&f.logprobs)?);
                if let (Some(all), Some(v)) = (&mut values, &f.values) {
                    all.extend(host(v)?);
                }
            }
            Ok((logprobs, values))
        })
    }

    fn reference_logprobs(&self, reference: &Vlm, members: &[&Member<'_>]) -> Result<Vec<f32>> {
        no_grad(|| {
            let mut out = Vec::new();
            for part in parts(members, self.settings.token_budget) {
                let (hidden, _, targets) = packed(reference, &part, None)?;
                let s = &self.settings;
                out.extend(host(&unveil_model::logprobs(
                    &reference.lm_head(&hidden),
                    &targets,
                    s.temperature,
                    &s.banned,
                ))?);
            }
            Ok(out)
        })
    }

    fn judge(&self, found: &Agreement) -> Result<()> {
        match found.mean {
            Some(mean) if mean > self.settings.agreement_limit => Err(LearnerError::Agreement {
                step: self.step + 1,
                mean,
                limit: self.settings.agreement_limit,
                worst: found.worst.join(", "),
            }),
            _ => Ok(()),
        }
    }

    /// Moments, value head, counters and the weight of KL are taken over; the weights are loaded apart.
    pub(crate) fn restore(
        &mut self,
        moments: &[(String, Tensor)],
        head: Option<&[(String, Tensor)]>,
        at: Counters,
        kl: Option<&KlController>,
    ) -> Result<()> {
        if let (Some(own), Some(named)) = (&mut self.value_head, head) {
            own.load_state(named)?;
        }
        self.optimizer.load_state(moments, at.updates)?;
        (self.step, self.skipped, self.skipped_in_a_row) = (at.step, at.skipped, at.skipped_in_a_row);
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

/// Hidden states that predict each token, attention rows, target tokens.
pub(crate) fn packed(
    vlm: &Vlm,
    members: &[&Member<'_>],
    capture: Option<CaptureSpec>,
) -> Result<(Tensor, Option<Tensor>, Tensor)> {
    let groups: Vec<_> = members.iter().map(|m| m.packed.clone()).collect();
    let inputs = members.iter().map(|m| &*m.group.input);
    forward_groups(vlm, &groups, inputs, capture)
}

/// [`packed`] for groups and inputs given apart.
pub(crate) fn forward_groups<'a>(
    vlm: &Vlm,
    groups: &[unveil_model::PackedGroup],
    inputs: impl Iterator<Item = &'a GroupInput>,
    capture: Option<CaptureSpec>,
) -> Result<(Tensor, Option<Tensor>, Tensor)> {
    let batch = PackedBatch::build(groups, vlm.config(), vlm.device())?;
    let features = match pixels(inputs, vlm.config().vision.patch_len(), vlm.device())? {
        Some((pixels, grids)) => Some(vlm.encode_images(&pixels, &grids)?),
        None => None,
    };
    let out = vlm.forward_packed(&batch, features.as_ref(), capture)?;
    Ok((out.hidden, out.attention, batch.targets))
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

fn host(t: &Tensor) -> Result<Vec<f32>> {
    Ok(Vec::<f32>::try_from(t.f_detach()?.f_to_kind(Kind::Float)?.f_contiguous()?.f_view([-1])?)?)
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
