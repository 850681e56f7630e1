//! The model's side of an update: passes over packed groups and the loss of one, and the gradients that it leaves. Knows no
//! optimiser and no schedule.

use std::rc::Rc;

use tch::{Kind, Tensor, no_grad};
use unveil_algo::{Correction, Counts, LossParts, Objective, TokenBatch, policy_loss};
use unveil_config::schema::RatioBase;
use unveil_model::{CaptureSpec, Mode, PackedBatch, PackedGroup, Tape, ValueHead, Var, Vlm, logprobs_entropy};

use crate::batch::{GroupInput, Member, Numbers, flat, mentions, pixels};
use crate::error::Result;
use crate::settings::StepSettings;
use crate::shard::{Course, Pass};
use crate::share::Work;
use crate::targets::layout;

/// Rows of logits that exist at a time where activations are computed again.
const HEAD_ROWS: i64 = 1024;

/// The trained model, what it is compared with, and what enters its loss.
pub(crate) struct Policy {
    pub vlm: Vlm,
    pub value_head: Option<ValueHead>,
    /// What the value head sits on; none = the policy itself.
    pub critic: Option<Vlm>,
    pub reference: Option<Reference>,
    pub settings: StepSettings,
    /// What goes along with passes of the model.
    pub course: Course,
}

/// What KL is to.
pub(crate) struct Reference {
    pub vlm: Vlm,
    /// What goes along with its passes.
    pub course: Course,
}

/// Results of a pass over some members, flat; a loss is computed from them. Where a rank has no members it computes nothing, but
/// takes part in what all ranks do.
pub(crate) struct Forward<'a> {
    pass: Rc<Pass>,
    pub made: Option<Made>,
    tape: Tape<'a>,
}

/// Numbers by token.
pub(crate) struct Made {
    pub logprobs: Tensor,
    entropy: Tensor,
    pub values: Option<Tensor>,
    attention: Option<Tensor>,
}

impl Forward<'_> {
    /// Takes the gradients of `loss`, which was computed from this pass, to the parameters and from there to their sum; `last`
    /// says that no other pass of the mini-batch follows.
    pub fn backward(self, loss: Option<&Tensor>, last: bool) -> Result<()> {
        self.pass.turn(last);
        if let Some(loss) = loss {
            loss.f_backward()?;
            self.tape.backward();
        }
        self.pass.finish()
    }
}

impl Policy {
    /// The pass over `members` for `objective`, with gradients.
    pub fn forward(&self, members: &[&Member<'_>], objective: &Objective) -> Result<Forward<'_>> {
        let mode = match (self.settings.recompute, self.course.by_layer) {
            (true, _) => Mode::Recompute,
            (false, true) => Mode::Segments,
            (false, false) => Mode::Graph,
        };
        self.pass(members, objective, mode)
    }

    fn pass(&self, members: &[&Member<'_>], objective: &Objective, mode: Mode) -> Result<Forward<'_>> {
        let pass = self.course.begin()?;
        let mut tape = Tape::new(mode);
        tape.escort(pass.escort());
        let made = if members.is_empty() { None } else { Some(self.compute(&mut tape, members, objective, mode)?) };
        pass.arrive()?;
        Ok(Forward { pass, made, tape })
    }

    fn compute<'a>(
        &'a self,
        tape: &mut Tape<'a>,
        members: &[&Member<'_>],
        objective: &Objective,
        mode: Mode,
    ) -> Result<Made> {
        let capture = (objective.attention_coef > 0.0)
            .then(|| CaptureSpec { set: self.settings.attention.clone(), differentiable: true });
        let groups: Vec<_> = members.iter().map(|m| m.packed.clone()).collect();
        let inputs = members.iter().map(|m| &*m.group.input);
        let (hidden, attention, targets) = on_tape(&self.vlm, tape, &groups, inputs.clone(), capture)?;
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
        let own = match &self.critic {
            Some(critic) => {
                // Its parameters are taken and brought with those that belong to no layer.
                tape.escort(None);
                Some(on_tape(critic, tape, &groups, inputs, None)?.0)
            }
            None => None,
        };
        let hidden = own.as_ref().unwrap_or(&hidden);
        let values = self.value_head.as_ref().map(|h| tape.call1(&[hidden], move |t| h.forward(&t[0])));
        Ok(Made {
            logprobs: Tensor::f_cat(&logprobs, 0)?,
            entropy: if objective.entropy_coef == 0.0 { entropy.detach() } else { entropy },
            values: values.map(|v| tape.leaf(&v)),
            attention: attention.map(|v| tape.leaf(&v)),
        })
    }

    /// Log-probabilities and values of this rank's parts, no gradients.
    pub fn forward_detached(&self, work: &Work<'_, '_>) -> Result<(Vec<f64>, Vec<f64>)> {
        no_grad(|| {
            let plain = Objective { attention_coef: 0.0, ..self.settings.objective };
            let (mut logprobs, mut values) = (Vec::new(), Vec::new());
            for part in work.passes() {
                let (lp, v) = detached(&[self.pass(part, &plain, Mode::Graph)?])?;
                logprobs.extend(lp);
                values.extend(v);
            }
            Ok((logprobs, values))
        })
    }

    /// Log-probabilities of this rank's parts under the reference: the model that was given, or this one without its adapters; none
    /// where KL has no weight.
    pub fn reference_logprobs(&self, work: &Work<'_, '_>) -> Result<Option<Vec<f64>>> {
        if self.settings.objective.kl_coef == 0.0 {
            return Ok(None);
        }
        match (&self.reference, self.vlm.adapters()) {
            (Some(Reference { vlm, course }), _) => self.plain_logprobs(vlm, course, work).map(Some),
            (None, Some(_)) => self.vlm.without_adapters(|vlm| self.plain_logprobs(vlm, &self.course, work)).map(Some),
            (None, None) => Ok(None),
        }
    }

    fn plain_logprobs(&self, vlm: &Vlm, course: &Course, work: &Work<'_, '_>) -> Result<Vec<f64>> {
        no_grad(|| {
            let mut out = Vec::new();
            for part in work.passes() {
                let pass = course.begin()?;
                if !part.is_empty() {
                    let mut tape = Tape::new(Mode::Graph);
                    tape.escort(pass.escort());
                    let groups: Vec<_> = part.iter().map(|m| m.packed.clone()).collect();
                    let inputs = part.iter().map(|m| &*m.group.input);
                    let (hidden, _, targets) = on_tape(vlm, &mut tape, &groups, inputs, None)?;
                    let (s, logits) = (&self.settings, vlm.lm_head(&hidden.tensor));
                    out.extend(host(&unveil_model::logprobs(&logits, &targets, s.temperature, &s.banned))?);
                }
                pass.arrive()?;
            }
            Ok(out)
        })
    }

    /// The loss of `part` from its pass; `counts` are those of the whole mini-batch.
    pub fn loss(&self, part: &[&Member<'_>], made: &Made, counts: &Counts, objective: &Objective) -> Result<LossParts> {
        let (device, mut objective) = (self.vlm.device(), *objective);
        let flat = |of: Numbers| flat(part, of, made.logprobs.kind(), device);
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
        let rows = made.attention.as_ref();
        let mention = rows.and_then(|rows| mentions(part, &self.settings.scoring, rows.size()[1], device));
        if mention.is_none() {
            objective.attention_coef = 0.0;
        }
        let batch = TokenBatch {
            logprobs: Some(&made.logprobs),
            old_logprobs: Some(&old),
            behaviour: behaviour.as_ref(),
            advantages: Some(&advantages),
            entropy: Some(&made.entropy),
            values: made.values.as_ref(),
            old_values: old_values.as_ref(),
            targets: targets.as_ref(),
            reference: reference.as_ref(),
            attention: made.attention.as_ref().zip(mention.as_ref()),
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
pub(crate) fn detached(passes: &[Forward<'_>]) -> Result<(Vec<f64>, Vec<f64>)> {
    let (mut logprobs, mut values) = (Vec::new(), Vec::new());
    for made in passes.iter().filter_map(|f| f.made.as_ref()) {
        logprobs.extend(host(&made.logprobs)?);
        values.extend(made.values.as_ref().map(host).transpose()?.into_iter().flatten());
    }
    Ok((logprobs, values))
}

/// A tensor's numbers.
fn host(t: &Tensor) -> Result<Vec<f64>> {
    Ok(Vec::<f64>::try_from(t.f_detach()?.f_to_kind(Kind::Double)?.f_contiguous()?.f_view([-1])?)?)
}
