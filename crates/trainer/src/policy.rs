//! The model's side of an update: forward and backward passes over packed groups, and the loss.

use std::rc::Rc;

use tch::{Kind, Tensor, no_grad};
use unveil_algo::{Counts, LossParts, Objective, TokenBatch, policy_loss};
use unveil_config::schema::RatioBase;
use unveil_core::{GroupInput, Importance};
use unveil_model::{CaptureSpec, PackedBatch, PackedGroup, Tape, TapeMode, ValueHead, Var, Vlm, logprobs_entropy};

use crate::batch::{TokenField, TrainableGroup, flat_tensor, mention_batch, pixel_batch};
use crate::error::Result;
use crate::partition::MicroBatches;
use crate::settings::StepSettings;
use crate::shard::{HookedPass, PassHooks};
use crate::targets::layout;

/// Rows of logits computed at a time under recomputation.
const HEAD_ROWS: i64 = 1024;

/// The trained model, the models it is compared with, and the settings of its loss.
#[derive(Debug)]
pub(crate) struct Policy {
    pub vlm: Vlm,
    pub value_head: Option<ValueHead>,
    /// Backbone of the value head; `None`: the policy itself.
    pub critic: Option<Vlm>,
    pub reference: Option<ReferenceModel>,
    pub settings: StepSettings,
    /// Hooks of the policy's passes.
    pub hooks: PassHooks,
}

/// The model to which KL is computed.
#[derive(Debug)]
pub(crate) struct ReferenceModel {
    pub vlm: Vlm,
    /// Hooks of its passes.
    pub hooks: PassHooks,
}

/// A forward pass over one micro-batch, from whose outputs a loss is computed. A rank without a micro-batch computes nothing, but
/// takes part in the collective calls.
pub(crate) struct ForwardPass<'a> {
    pass: Rc<HookedPass>,
    pub outputs: Option<TokenOutputs>,
    tape: Tape<'a>,
}

/// Outputs per response token, flat over the micro-batch.
pub(crate) struct TokenOutputs {
    pub logprobs: Tensor,
    entropy: Tensor,
    pub values: Option<Tensor>,
    attention: Option<Tensor>,
}

impl ForwardPass<'_> {
    /// Backpropagates `loss`, which was computed from this pass, and adds the gradients to the reducer; `last` marks the last pass of
    /// the mini-batch.
    pub(crate) fn backward(self, loss: Option<&Tensor>, last: bool) -> Result<()> {
        self.pass.begin_backward(last);
        if let Some(loss) = loss {
            loss.f_backward()?;
            self.tape.backward();
        }
        self.pass.end_backward()
    }
}

impl Policy {
    /// Runs the forward pass over one micro-batch with gradients.
    pub(crate) fn forward(
        &self,
        micro_batch: &[&TrainableGroup<'_>],
        objective: &Objective,
    ) -> Result<ForwardPass<'_>> {
        let mode = match (self.settings.recompute, self.hooks.by_layer) {
            (true, _) => TapeMode::Recompute,
            (false, true) => TapeMode::Segments,
            (false, false) => TapeMode::Graph,
        };
        self.run_forward(micro_batch, objective, mode)
    }

    fn run_forward(
        &self,
        micro_batch: &[&TrainableGroup<'_>],
        objective: &Objective,
        mode: TapeMode,
    ) -> Result<ForwardPass<'_>> {
        let pass = self.hooks.begin()?;
        let mut tape = Tape::new(mode);
        tape.set_layer_hook(pass.layer_hook());
        let outputs =
            if micro_batch.is_empty() { None } else { Some(self.compute(&mut tape, micro_batch, objective, mode)?) };
        pass.end_forward()?;
        Ok(ForwardPass { pass, outputs, tape })
    }

    fn compute<'a>(
        &'a self,
        tape: &mut Tape<'a>,
        micro_batch: &[&TrainableGroup<'_>],
        objective: &Objective,
        mode: TapeMode,
    ) -> Result<TokenOutputs> {
        let capture = (objective.attention_coef > 0.0)
            .then(|| CaptureSpec { set: self.settings.attention.clone(), differentiable: true });
        let groups: Vec<_> = micro_batch.iter().map(|g| g.packed.clone()).collect();
        let inputs = micro_batch.iter().map(|g| &*g.group.input);
        let (hidden, attention, targets) = record_forward(&self.vlm, tape, &groups, inputs.clone(), capture)?;
        let s = &self.settings;
        let rows = hidden.tensor.size()[0];
        let chunk = if mode == TapeMode::Recompute { HEAD_ROWS.min(rows) } else { rows };
        let chunks = tape.call(&[&hidden], move |t| t[0].split(chunk, 0));
        let mut logprobs = Vec::new();
        let mut entropy = Vec::new();
        for (hidden, targets) in chunks.iter().zip(targets.split(chunk, 0)) {
            let outputs = tape.call(&[hidden], move |t| {
                let (lp, ent) = logprobs_entropy(&self.vlm.lm_head(&t[0]), &targets, s.temperature, &s.banned);
                vec![lp, ent]
            });
            logprobs.push(tape.leaf(&outputs[0]));
            entropy.push(tape.leaf(&outputs[1]));
        }
        let entropy = Tensor::f_cat(&entropy, 0)?;
        let critic_hidden = match &self.critic {
            Some(critic) => {
                // The critic's parameters are in the bucket of everything outside the policy's layers.
                tape.set_layer_hook(None);
                Some(record_forward(critic, tape, &groups, inputs, None)?.0)
            }
            None => None,
        };
        let hidden = critic_hidden.as_ref().unwrap_or(&hidden);
        let values = self.value_head.as_ref().map(|h| tape.call1(&[hidden], move |t| h.forward(&t[0])));
        Ok(TokenOutputs {
            logprobs: Tensor::f_cat(&logprobs, 0)?,
            entropy: if objective.entropy_coef == 0.0 { entropy.detach() } else { entropy },
            values: values.map(|v| tape.leaf(&v)),
            attention: attention.map(|v| tape.leaf(&v)),
        })
    }

    /// Returns log-probabilities and values of this rank's micro-batches, computed without gradients.
    pub(crate) fn forward_detached(&self, micro_batches: &MicroBatches<'_, '_>) -> Result<(Vec<f64>, Vec<f64>)> {
        no_grad(|| {
            let objective = Objective { attention_coef: 0.0, ..self.settings.objective };
            let mut logprobs = Vec::new();
            let mut values = Vec::new();
            for micro_batch in micro_batches.iter() {
                let (lp, v) = detached_outputs(&[self.run_forward(micro_batch, &objective, TapeMode::Graph)?])?;
                logprobs.extend(lp);
                values.extend(v);
            }
            Ok((logprobs, values))
        })
    }

    /// Returns log-probabilities of this rank's micro-batches under the reference: the model given as such, or the policy without its
    /// adapters. `None` if the KL coefficient is 0.
    pub(crate) fn reference_logprobs(&self, micro_batches: &MicroBatches<'_, '_>) -> Result<Option<Vec<f64>>> {
        if self.settings.objective.kl_coef == 0.0 {
            return Ok(None);
        }
        match (&self.reference, self.vlm.adapters()) {
            (Some(ReferenceModel { vlm, hooks }), _) => self.logprobs_under(vlm, hooks, micro_batches).map(Some),
            (None, Some(_)) => {
                self.vlm.without_adapters(|vlm| self.logprobs_under(vlm, &self.hooks, micro_batches)).map(Some)
            }
            (None, None) => Ok(None),
        }
    }

    fn logprobs_under(&self, vlm: &Vlm, hooks: &PassHooks, micro_batches: &MicroBatches<'_, '_>) -> Result<Vec<f64>> {
        no_grad(|| {
            let mut out = Vec::new();
            for micro_batch in micro_batches.iter() {
                let pass = hooks.begin()?;
                if !micro_batch.is_empty() {
                    let mut tape = Tape::new(TapeMode::Graph);
                    tape.set_layer_hook(pass.layer_hook());
                    let groups: Vec<_> = micro_batch.iter().map(|g| g.packed.clone()).collect();
                    let inputs = micro_batch.iter().map(|g| &*g.group.input);
                    let (hidden, _, targets) = record_forward(vlm, &mut tape, &groups, inputs, None)?;
                    let s = &self.settings;
                    let logits = vlm.lm_head(&hidden.tensor);
                    out.extend(to_host(&unveil_model::logprobs(&logits, &targets, s.temperature, &s.banned))?);
                }
                pass.end_forward()?;
            }
            Ok(out)
        })
    }

    /// Computes the loss of one micro-batch from the outputs of its pass; `counts` are those of the whole mini-batch.
    pub(crate) fn loss(
        &self,
        micro_batch: &[&TrainableGroup<'_>],
        outputs: &TokenOutputs,
        counts: &Counts,
        objective: &Objective,
    ) -> Result<LossParts> {
        let device = self.vlm.device();
        let mut objective = *objective;
        let flat = |field: TokenField| flat_tensor(micro_batch, field, outputs.logprobs.kind(), device);
        let flat_if = |needed: bool, field: TokenField| needed.then(|| flat(field)).transpose();
        let old = match self.settings.ratio_to {
            RatioBase::Rollout => flat(|g| &g.rollout_logprobs)?,
            RatioBase::Learner => flat(|g| &g.proximal_logprobs)?,
        };
        let behaviour = flat_if(objective.importance != Importance::None, |g| &g.rollout_logprobs)?;
        let advantages = flat(|g| &g.advantages)?;
        let old_values = flat_if(objective.value_coef > 0.0, |g| &g.old_values)?;
        let targets = flat_if(objective.value_coef > 0.0, |g| &g.value_targets)?;
        let reference = flat_if(self.settings.objective.kl_coef > 0.0, |g| &g.reference_logprobs)?;
        let rows = outputs.attention.as_ref();
        let mention = rows.and_then(|rows| mention_batch(micro_batch, &self.settings.mentions, rows.size()[1], device));
        if mention.is_none() {
            objective.attention_coef = 0.0;
        }
        let batch = TokenBatch {
            logprobs: Some(&outputs.logprobs),
            old_logprobs: Some(&old),
            behaviour: behaviour.as_ref(),
            advantages: Some(&advantages),
            entropy: Some(&outputs.entropy),
            values: outputs.values.as_ref(),
            old_values: old_values.as_ref(),
            targets: targets.as_ref(),
            reference: reference.as_ref(),
            attention: outputs.attention.as_ref().zip(mention.as_ref()),
        };
        Ok(policy_loss(&objective, &batch, &layout(micro_batch), counts)?)
    }
}

/// Records the forward pass of groups on `tape`. Returns the hidden states that predict each response token, the attention rows if
/// they are captured, and the tokens.
fn record_forward<'a, 'i>(
    vlm: &'a Vlm,
    tape: &mut Tape<'a>,
    groups: &[PackedGroup],
    inputs: impl Iterator<Item = &'i GroupInput>,
    capture: Option<CaptureSpec>,
) -> Result<(Var, Option<Var>, Tensor)> {
    let batch = PackedBatch::build(groups, vlm.config(), vlm.device())?;
    let images = pixel_batch(inputs, vlm.config().vision.patch_len(), vlm.device())?;
    let images = images.as_ref().map(|(pixels, grids)| (pixels, grids.as_slice()));
    let (hidden, attention) = vlm.train_packed(tape, &batch, images, capture)?;
    Ok((hidden, attention, batch.targets))
}

/// Runs the forward pass of groups in one autograd graph. Returns the hidden states that predict each response token, and the tokens.
pub(crate) fn forward_groups<'i>(
    vlm: &Vlm,
    groups: &[PackedGroup],
    inputs: impl Iterator<Item = &'i GroupInput>,
) -> Result<(Tensor, Tensor)> {
    let (hidden, _, targets) = record_forward(vlm, &mut Tape::new(TapeMode::Graph), groups, inputs, None)?;
    Ok((hidden.tensor, targets))
}

/// Returns log-probabilities and values of several passes, concatenated, without their graphs.
pub(crate) fn detached_outputs(passes: &[ForwardPass<'_>]) -> Result<(Vec<f64>, Vec<f64>)> {
    let mut logprobs = Vec::new();
    let mut values = Vec::new();
    for outputs in passes.iter().filter_map(|f| f.outputs.as_ref()) {
        logprobs.extend(to_host(&outputs.logprobs)?);
        values.extend(outputs.values.as_ref().map(to_host).transpose()?.into_iter().flatten());
    }
    Ok((logprobs, values))
}

/// Copies the values of a tensor to host memory, flat.
fn to_host(t: &Tensor) -> Result<Vec<f64>> {
    Ok(Vec::<f64>::try_from(t.f_detach()?.f_to_kind(Kind::Double)?.f_contiguous()?.f_view([-1])?)?)
}
