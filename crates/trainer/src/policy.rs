//! The model's side of an update: forward and backward passes over packed groups, and the loss.

use tch::{Kind, Tensor, no_grad};
use unveil_algo::{Counts, LossParts, Objective, TokenBatch, policy_loss};
use unveil_config::schema::RatioBase;
use unveil_core::Importance;
use unveil_model::{CaptureSpec, Tape, TapeMode, ValueHead, Vlm, logprobs_entropy};

use crate::batch::{TokenField, TrainableGroup, flat_tensors, mention_batch};
use crate::error::Result;
use crate::forward_pass::{ForwardPass, PassOptions, head_rows, record_forward, tape_mode};
use crate::micro_batch::Division;
use crate::partition::MicroBatches;
use crate::settings::StepSettings;
use crate::shard::PassHooks;
use crate::targets::layout;

/// How groups are divided into micro-batches.
pub(crate) const DIVISION: Division = Division::LittlePadding;

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

/// Outputs per response token, flat over the micro-batch.
pub(crate) struct TokenOutputs {
    pub logprobs: Tensor,
    entropy: Tensor,
    pub values: Option<Tensor>,
    attention: Option<Tensor>,
}

/// A pass of the policy.
pub(crate) type PolicyPass<'a> = ForwardPass<'a, TokenOutputs>;

impl Policy {
    /// Runs the forward pass over one micro-batch with gradients.
    pub(crate) fn forward(&self, micro_batch: &[&TrainableGroup<'_>], objective: &Objective) -> Result<PolicyPass<'_>> {
        self.run_forward(micro_batch, objective, tape_mode(self.settings.recompute, &self.hooks))
    }

    fn run_forward(
        &self,
        micro_batch: &[&TrainableGroup<'_>],
        objective: &Objective,
        mode: TapeMode,
    ) -> Result<PolicyPass<'_>> {
        ForwardPass::run(&self.hooks, mode, |tape| {
            if micro_batch.is_empty() { Ok(None) } else { self.compute(tape, micro_batch, objective, mode).map(Some) }
        })
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
        let options = PassOptions { capture, dropout: None };
        let (hidden, attention, targets) = record_forward(&self.vlm, tape, micro_batch, DIVISION, options)?;
        let s = &self.settings;
        let chunk = head_rows(mode, &hidden);
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
                Some(record_forward(critic, tape, micro_batch, DIVISION, PassOptions::default())?.0)
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
    pub(crate) fn forward_detached(
        &self,
        micro_batches: &MicroBatches<'_, TrainableGroup<'_>>,
    ) -> Result<(Vec<f64>, Vec<f64>)> {
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
    pub(crate) fn reference_logprobs(
        &self,
        micro_batches: &MicroBatches<'_, TrainableGroup<'_>>,
    ) -> Result<Option<Vec<f64>>> {
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

    fn logprobs_under(
        &self,
        vlm: &Vlm,
        hooks: &PassHooks,
        micro_batches: &MicroBatches<'_, TrainableGroup<'_>>,
    ) -> Result<Vec<f64>> {
        no_grad(|| {
            let mut out = Vec::new();
            for micro_batch in micro_batches.iter() {
                let pass = hooks.begin()?;
                if !micro_batch.is_empty() {
                    let mut tape = Tape::new(TapeMode::Graph);
                    tape.set_layer_hook(pass.layer_hook());
                    let (hidden, _, targets) =
                        record_forward(vlm, &mut tape, micro_batch, DIVISION, PassOptions::default())?;
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
        let with_values = objective.value_coef > 0.0;
        let field = |needed: bool, field: TokenField| needed.then_some(field);
        let fields = [
            match self.settings.ratio_to {
                RatioBase::Rollout => field(true, |g| &g.rollout_logprobs),
                RatioBase::Learner => field(true, |g| &g.proximal_logprobs),
            },
            field(true, |g| &g.advantages),
            field(objective.importance != Importance::None, |g| &g.rollout_logprobs),
            field(with_values, |g| &g.old_values),
            field(with_values, |g| &g.value_targets),
            field(self.settings.objective.kl_coef > 0.0, |g| &g.reference_logprobs),
        ];
        let [old, advantages, behaviour, old_values, targets, reference] =
            flat_tensors(micro_batch, fields, outputs.logprobs.kind(), device)?;
        let rows = outputs.attention.as_ref();
        let mention = rows.and_then(|rows| mention_batch(micro_batch, &self.settings.mentions, rows.size()[1], device));
        if mention.is_none() {
            objective.attention_coef = 0.0;
        }
        let batch = TokenBatch {
            logprobs: Some(&outputs.logprobs),
            old_logprobs: old.as_ref(),
            behaviour: behaviour.as_ref(),
            advantages: advantages.as_ref(),
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

/// Returns log-probabilities and values of several passes, concatenated, without their graphs.
pub(crate) fn detached_outputs(passes: &[PolicyPass<'_>]) -> Result<(Vec<f64>, Vec<f64>)> {
    let mut logprobs = Vec::new();
    let mut values = Vec::new();
    for outputs in passes.iter().filter_map(|f| f.outputs.as_ref()) {
        logprobs.extend(to_host(&outputs.logprobs)?);
        values.extend(outputs.values.as_ref().map(to_host).transpose()?.into_iter().flatten());
    }
    Ok((logprobs, values))
}

/// Copies the log-probabilities of several passes to host memory at once.
pub(crate) fn logprobs_to_host(passes: &[Tensor]) -> Result<Vec<f64>> {
    if passes.is_empty() { Ok(Vec::new()) } else { to_host(&Tensor::f_cat(passes, 0)?) }
}

/// Copies the values of a tensor to host memory, flat.
fn to_host(t: &Tensor) -> Result<Vec<f64>> {
    Ok(Vec::<f64>::try_from(t.f_detach()?.f_to_kind(Kind::Double)?.f_contiguous()?.f_view([-1])?)?)
}
