//! The model's side of an update: passes over packed groups and the loss of one, and the gradients that it leaves. Knows no
//! optimiser and no schedule.

use tch::{Kind, Tensor, no_grad};
use unveil_algo::{Correction, Counts, LossParts, Objective, TokenBatch, policy_loss};
use unveil_config::schema::RatioBase;
use unveil_model::{CaptureSpec, Mode, PackedBatch, PackedGroup, Tape, ValueHead, Var, Vlm, logprobs_entropy};

use crate::batch::{GroupInput, Member, Numbers, flat, mentions, parts, pixels};
use crate::error::Result;
use crate::settings::StepSettings;
use crate::targets::layout;

/// Rows of logits that exist at a time where activations are computed again.
const HEAD_ROWS: i64 = 1024;

/// The trained model, what it is compared with, and what enters its loss.
pub(crate) struct Policy {
    pub vlm: Vlm,
    pub value_head: Option<ValueHead>,
    pub reference: Option<Vlm>,
    pub settings: StepSettings,
}

/// Results of a pass over some members, flat; a loss is computed from them.
pub(crate) struct Forward<'a> {
    pub logprobs: Tensor,
    entropy: Tensor,
    pub values: Option<Tensor>,
    attention: Option<Tensor>,
    tape: Tape<'a>,
}

impl Forward<'_> {
    /// Takes the gradients of `loss`, which was computed from this pass, to the parameters.
    pub fn backward(self, loss: &Tensor) -> Result<()> {
        loss.f_backward()?;
        self.tape.backward();
        Ok(())
    }
}

impl Policy {
    /// The pass over `members` for `objective`, with gradients.
    pub fn forward(&self, members: &[&Member<'_>], objective: &Objective) -> Result<Forward<'_>> {
        self.pass(members, objective, if self.settings.recompute { Mode::Recompute } else { Mode::Graph })
    }

    fn pass(&self, members: &[&Member<'_>], objective: &Objective, mode: Mode) -> Result<Forward<'_>> {
        let capture = (objective.attention_coef > 0.0)
            .then(|| CaptureSpec { set: self.settings.attention.clone(), differentiable: true });
        let mut tape = Tape::new(mode);
        let groups: Vec<_> = members.iter().map(|m| m.packed.clone()).collect();
        let inputs = members.iter().map(|m| &*m.group.input);
        let (hidden, attention, targets) = on_tape(&self.vlm, &mut tape, &groups, inputs, capture)?;
        let s = &self.settings;
        let rows = hidden.tensor.size()[0];
        let chunk = if mode == Mode::Recompute { HEAD_ROWS.min(rows) } else { rows };
        let split = tape.call(&[&hidden], move |t| t[0].split(chunk, 0));
        let (mut logprobs, mut entropy) = (Vec::new(), Vec::new());
        for (part, targets) in split.iter().zip(targets.split(chunk, 0)) {
            let made = tape.call(&[part], move |t| {
                let (lp, ent) = logprobs_entropy(&self.vlm.lm_head(&t[0]), &targets, s.temperature, &s.banned);
                vec![lp, ent]
            });
            logprobs.push(tape.leaf(&made[0]));
            entropy.push(tape.leaf(&made[1]));
        }
        let entropy = Tensor::f_cat(&entropy, 0)?;
        let values = self.value_head.as_ref().map(|h| tape.call1(&[&hidden], move |t| h.forward(&t[0])));
        Ok(Forward {
            logprobs: Tensor::f_cat(&logprobs, 0)?,
            entropy: if objective.entropy_coef == 0.0 { entropy.detach() } else { entropy },
            values: values.map(|v| tape.leaf(&v)),
            attention: attention.map(|v| tape.leaf(&v)),
            tape,
        })
    }

    /// Log-probabilities and values of `members`, no gradients.
    pub fn forward_detached(&self, members: &[&Member<'_>]) -> Result<(Vec<f64>, Option<Vec<f64>>)> {
        no_grad(|| {
            let plain = Objective { attention_coef: 0.0, ..self.settings.objective };
            let (mut logprobs, mut values) = (Vec::new(), None);
            for part in parts(members, self.settings.token_budget) {
                let (lp, v) = detached(&[self.pass(&part, &plain, Mode::Graph)?])?;
                logprobs.extend(lp);
                if let Some(v) = v {
                    values.get_or_insert_with(Vec::new).extend(v);
                }
            }
            Ok((logprobs, values))
        })
    }

    /// Log-probabilities of `members` under the reference: the model that was given, or this one without its adapters; none where KL
    /// has no weight.
    pub fn reference_logprobs(&self, members: &[&Member<'_>]) -> Result<Option<Vec<f64>>> {
        if self.settings.objective.kl_coef == 0.0 {
            return Ok(None);
        }
        match (&self.reference, self.vlm.adapters()) {
            (Some(reference), _) => self.plain_logprobs(reference, members).map(Some),
            (None, Some(_)) => self.vlm.without_adapters(|vlm| self.plain_logprobs(vlm, members)).map(Some),
            (None, None) => Ok(None),
        }
    }

    fn plain_logprobs(&self, reference: &Vlm, members: &[&Member<'_>]) -> Result<Vec<f64>> {
        no_grad(|| {
            let mut out = Vec::new();
            for part in parts(members, self.settings.token_budget) {
                let groups: Vec<_> = part.iter().map(|m| m.packed.clone()).collect();
                let inputs = part.iter().map(|m| &*m.group.input);
                let (hidden, targets) = forward_groups(reference, &groups, inputs)?;
                let (s, logits) = (&self.settings, reference.lm_head(&hidden));
                out.extend(host(&unveil_model::logprobs(&logits, &targets, s.temperature, &s.banned))?);
            }
            Ok(out)
        })
    }

    /// The loss of `part` from its pass; `counts` are those of the whole mini-batch.
    pub fn loss(
        &self,
        part: &[&Member<'_>],
        forward: &Forward<'_>,
        counts: &Counts,
        objective: &Objective,
    ) -> Result<LossParts> {
        let (device, mut objective) = (self.vlm.device(), *objective);
        let flat = |of: Numbers| flat(part, of, forward.logprobs.kind(), device);
        let given = |wanted: bool, of: Numbers| wanted.then(|| flat(of)).transpose();
        let old = match self.settings.ratio_to {
            RatioBase::Rollout => flat(|m| &m.old)?,
            RatioBase::Learner => flat(|m| &m.proximal)?,
        };
        let behaviour = given(objective.correction != Correction::None, |m| &m.old)?;
        let advantages = flat(|m| &m.advantages)?;
        let old_values = given(objective.value_coef > 0.0, |m| &m.old_values)?;
        let targets = given(objective.value_coef > 0.0, |m| &m.targets)?;
        let reference = given(self.settings.objective.kl_coef > 0.0, |m| &m.reference)?;
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
}

/// Hidden states that predict each token, attention rows, and the tokens, for groups and their inputs.
fn on_tape<'a, 'i>(
    vlm: &'a Vlm,
    tape: &mut Tape<'a>,
    groups: &[PackedGroup],
    inputs: impl Iterator<Item = &'i GroupInput>,
    capture: Option<CaptureSpec>,
) -> Result<(Var, Option<Var>, Tensor)> {
    let batch = PackedBatch::build(groups, vlm.config(), vlm.device())?;
    let images = pixels(inputs, vlm.config().vision.patch_len(), vlm.device())?;
    let images = images.as_ref().map(|(pixels, grids)| (pixels, grids.as_slice()));
    let (hidden, attention) = vlm.train_packed(tape, &batch, images, capture)?;
    Ok((hidden, attention, batch.targets))
}

/// Hidden states that predict each token, and the tokens, in one graph.
pub(crate) fn forward_groups<'i>(
    vlm: &Vlm,
    groups: &[PackedGroup],
    inputs: impl Iterator<Item = &'i GroupInput>,
) -> Result<(Tensor, Tensor)> {
    let (hidden, _, targets) = on_tape(vlm, &mut Tape::new(Mode::Graph), groups, inputs, None)?;
    Ok((hidden.tensor, targets))
}

/// Log-probabilities and values of passes, one behind the other.
pub(crate) fn detached(passes: &[Forward<'_>]) -> Result<(Vec<f64>, Option<Vec<f64>>)> {
    let (mut logprobs, mut values) = (Vec::new(), Vec::new());
    for f in passes {
        logprobs.extend(host(&f.logprobs)?);
        values.extend(f.values.as_ref().map(host).transpose()?.into_iter().flatten());
    }
    let with_values = passes.iter().any(|f| f.values.is_some());
    Ok((logprobs, with_values.then_some(values)))
}

/// A tensor's numbers.
fn host(t: &Tensor) -> Result<Vec<f64>> {
    Ok(Vec::<f64>::try_from(t.f_detach()?.f_to_kind(Kind::Double)?.f_contiguous()?.f_view([-1])?)?)
}
