//! Construction of a trainer: its models, the parameters that are trained, the optimiser, and sharding over ranks.

use std::rc::Rc;

use tch::Tensor;
use unveil_config::schema::Critic;
use unveil_model::{ValueHead, Vlm, activation_kind};

use crate::error::{Result, TrainerError};
use crate::freeze::CRITIC_PREFIX;
use crate::optim::AdamW;
use crate::policy::{Policy, ReferenceModel};
use crate::settings::StepSettings;
use crate::shard::{PassHooks, Ranks};
use crate::sharded_model::{ParameterReader, shard_trained, shard_untrained, visit_parameters};

use super::PolicyTrainer;

/// The models of a trainer, all with the same architecture.
#[derive(Debug)]
pub struct Models {
    /// The policy.
    pub vlm: Vlm,
    /// Reference model of the KL term; `None`: the policy without its adapters.
    pub reference: Option<Vlm>,
    /// Backbone of the value head; `None`: the policy itself.
    pub critic: Option<Vlm>,
}

impl PolicyTrainer {
    /// Returns a trainer on a single rank, whose value head (if the algorithm has one) uses the policy as its backbone.
    ///
    /// # Errors
    /// See [`PolicyTrainer::distributed`].
    pub fn new(vlm: Vlm, reference: Option<Vlm>, settings: StepSettings) -> Result<Self> {
        Self::distributed(Ranks::solo(), Models { vlm, reference, critic: None }, settings)
    }

    /// Returns this rank's part of a trainer. If the policy has adapters, only they are trained. PPO adds a value head of zeros. Models
    /// and settings must be the same on all ranks.
    ///
    /// # Errors
    /// Returns [`TrainerError::Setting`] if a model is missing, a frozen prefix matches no parameter, the model lacks a configured
    /// layer, or a weight cannot be trained.
    pub fn distributed(ranks: Rc<Ranks>, models: Models, settings: StepSettings) -> Result<Self> {
        let Models { vlm, reference, critic } = models;
        let invalid = |what: String| Err(TrainerError::Setting(what));
        settings
            .freezing
            .check(vlm.named_parameters().iter().map(|(n, _)| n.as_str()))
            .map_err(TrainerError::Setting)?;
        if let Err(e) = settings.attention.check(&vlm.config().text) {
            return invalid(format!("reward.vision_relevance.layers and .heads (0-based): {e}"));
        }
        if settings.objective.kl_coef > 0.0 && reference.is_none() && vlm.adapters().is_none() {
            return invalid("learner.kl_coef is above 0, but there is no reference model".into());
        }
        if (settings.critic == Critic::Separate) != critic.is_some() {
            return invalid(
                "learner.critic = \"separate\" needs a second model, and no other critic may have one".into(),
            );
        }
        vlm.set_trainable(|name| vlm.adapters().is_none() && settings.freezing.is_ever_trained(name));
        let value_head = settings
            .estimator
            .algorithm
            .needs_values()
            .then(|| ValueHead::new(vlm.config().text.hidden_size, (activation_kind(vlm.kind()), vlm.device())));
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
        if let Some(critic) = &critic {
            critic.set_trainable(|name| settings.freezing.is_ever_trained(name));
            let critic_trained = critic.named_parameters().iter().filter(|(_, t)| t.requires_grad());
            trained.extend(critic_trained.map(|(n, t)| (format!("{CRITIC_PREFIX}{n}"), t.shallow_clone())));
        }
        if let Some(head) = &value_head {
            head.set_trainable(true);
            trained.extend(head.named_parameters().iter().map(|(n, t)| (n.clone(), t.shallow_clone())));
        }
        let optimizer = AdamW::sharded(&settings.optimizer, &trained, ranks.clone())?;
        let kl = settings.kl_controller();
        let hooks = optimizer.hooks(None);
        let reference = reference.map(|vlm| ReferenceModel { vlm, hooks: PassHooks::default() });
        let policy = Policy { vlm, value_head, critic, reference, settings, hooks };
        Ok(Self { policy, optimizer, ranks, kl, step: 0, skipped: 0, skipped_in_a_row: 0, recorded_gradients: None })
    }

    /// Shards the parameters over the ranks, if the ZeRO stage asks for it and it has not been done. All weights must be gathered.
    pub(crate) fn shard_parameters(&mut self) -> Result<()> {
        if self.policy.hooks.sharded.is_some() {
            return Ok(());
        }
        let Some(sharded) = shard_trained(&self.policy.vlm, &self.optimizer, &self.ranks)? else { return Ok(()) };
        if let Some(reference) = &mut self.policy.reference {
            reference.hooks = shard_untrained(&reference.vlm, &self.ranks)?;
        }
        self.policy.hooks = self.optimizer.hooks(Some(sharded));
        Ok(())
    }

    /// Gathers all sharded parameters on all ranks, until the next update releases them. All ranks call it.
    ///
    /// # Errors
    /// Returns [`TrainerError::Ranks`] if another rank has failed or timed out.
    pub fn gather_parameters(&self) -> Result<()> {
        self.policy.hooks.sharded.as_ref().map_or(Ok(()), |sharded| sharded.gather_all())
    }

    /// Gathers all sharded parameters on rank 0, until the next update releases them; the other ranks hold one layer at a time. All ranks
    /// call it.
    ///
    /// # Errors
    /// Returns [`TrainerError::Ranks`] if another rank has failed or timed out.
    pub fn gather_on_rank_0(&self) -> Result<()> {
        self.policy.hooks.sharded.as_ref().map_or(Ok(()), |sharded| sharded.gather_if(self.ranks.rank() == 0))
    }

    /// Passes all parameters of the model and of its adapters to `read` on rank 0. If they are sharded, they are gathered part by part, and
    /// each part is released after `read`. All ranks call it.
    ///
    /// # Errors
    /// Returns the error of `read`, and [`TrainerError::Ranks`] if another rank has failed or timed out.
    pub fn visit_parameters<E: From<TrainerError>>(&self, read: &mut ParameterReader<'_, E>) -> Result<(), E> {
        visit_parameters(&self.policy.vlm, (self.policy.hooks.sharded.as_deref(), &self.ranks), read)
    }

    /// Broadcasts the weights of rank 0, and sets the master weights from `weights`, given on rank 0 in full precision. All ranks call it
    /// before the first update.
    ///
    /// # Errors
    /// Returns [`TrainerError::Ranks`] if another rank has failed or timed out; see also [`AdamW::load_weights`].
    pub fn broadcast_from_rank_0(&mut self, weights: &[(String, Tensor)]) -> Result<()> {
        let policy = &self.policy;
        let named = policy.vlm.named_parameters().iter();
        let named = named.chain(policy.vlm.adapters().into_iter().flat_map(|a| a.named_parameters()));
        let named = named.chain(policy.critic.iter().flat_map(|c| c.named_parameters()));
        for (_, tensor) in named.chain(policy.value_head.iter().flat_map(|h| h.named_parameters())) {
            self.ranks.broadcast_from_rank_0(tensor)?;
        }
        self.optimizer.load_weights(weights)
    }
}
