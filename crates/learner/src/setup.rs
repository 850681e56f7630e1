//! A learner is made: its models, what of them is trained, the optimiser, and how state is divided and made equal over ranks.

use std::rc::Rc;

use tch::Tensor;
use unveil_config::schema::Critic;
use unveil_model::{ValueHead, Vlm, wide};

use crate::error::{LearnerError, Result};
use crate::optim::AdamW;
use crate::policy::{Policy, Reference};
use crate::settings::StepSettings;
use crate::shard::{Course, Gathered, Plan, Ranks, Zero};
use crate::step::Learner;

/// The models of a learner, all of one shape.
pub struct Models {
    /// The policy.
    pub vlm: Vlm,
    /// What KL is to where it has a weight; none = the policy without its adapters.
    pub reference: Option<Vlm>,
    /// What values are computed from where that is not the policy itself.
    pub critic: Option<Vlm>,
}

/// What the names of the critic's parameters begin with, among others.
pub(crate) const CRITIC: &str = "critic.";

impl Learner {
    /// A learner of one rank whose value head, where it has one, sits on the policy.
    ///
    /// # Errors
    /// As [`Learner::on`].
    pub fn new(vlm: Vlm, reference: Option<Vlm>, settings: StepSettings) -> Result<Self> {
        Self::on(Ranks::solo(), Models { vlm, reference, critic: None }, settings)
    }

    /// This rank's part of a learner, which trains the policy's adapters alone where it has some. PPO adds a value head of zeros.
    /// Models and settings are the same on all ranks.
    ///
    /// # Errors
    /// A model is missing, a frozen prefix that no parameter has, a layer that the model does not have, weights that cannot be
    /// trained.
    pub fn on(ranks: Rc<Ranks>, models: Models, settings: StepSettings) -> Result<Self> {
        let Models { vlm, reference, critic } = models;
        let fault = |what: String| Err(LearnerError::Setting(what));
        settings
            .freezing
            .check(vlm.named_parameters().iter().map(|(n, _)| n.as_str()))
            .map_err(LearnerError::Setting)?;
        if let Err(e) = settings.attention.check(&vlm.config().text) {
            return fault(format!("reward.vision_relevance.layers and .heads (0-based): {e}"));
        }
        if settings.objective.kl_coef > 0.0 && reference.is_none() && vlm.adapters().is_none() {
            return fault("learner.kl_coef is above 0, but there is no reference model".into());
        }
        if (settings.critic == Critic::Separate) != critic.is_some() {
            return fault("learner.critic = \"separate\" and a second model belong together".into());
        }
        vlm.set_trainable(|name| vlm.adapters().is_none() && settings.freezing.ever(name));
        let value_head = settings
            .estimator
            .needs_values()
            .then(|| ValueHead::new(vlm.config().text.hidden_size, (wide(vlm.kind()), vlm.device())));
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
            critic.set_trainable(|name| settings.freezing.ever(name));
            let own = critic.named_parameters().iter().filter(|(_, t)| t.requires_grad());
            trained.extend(own.map(|(n, t)| (format!("{CRITIC}{n}"), t.shallow_clone())));
        }
        if let Some(head) = &value_head {
            head.set_trainable(true);
            trained.extend(head.named_parameters().iter().map(|(n, t)| (n.clone(), t.shallow_clone())));
        }
        let optimizer = AdamW::divided(&settings.optimizer, &trained, ranks.clone())?;
        let kl = settings.kl_controller();
        let course = optimizer.course(None);
        let reference = reference.map(|vlm| Reference { vlm, course: Course::default() });
        let policy = Policy { vlm, value_head, critic, reference, settings, course };
        Ok(Self { policy, optimizer, ranks, kl, step: 0, skipped: 0, skipped_in_a_row: 0, trace: None })
    }

    /// Divides parameters over the ranks, where that is wanted and not done yet. All weights must be there.
    pub(crate) fn divide(&mut self) -> Result<()> {
        let Some((plan, master)) = self.optimizer.source().filter(|_| self.ranks.zero() == Zero::Parameters) else {
            return Ok(());
        };
        if self.policy.course.gathered.is_some() {
            return Ok(());
        }
        let rest = |vlm: &Vlm, trained: Option<&Plan>| -> Result<Option<(Rc<Plan>, Tensor)>> {
            let other = |name: &str| trained.is_none_or(|p| p.slots().all(|s| s.name != *name));
            let named = vlm.named_parameters().iter().filter(|(n, _)| other(n));
            let named: Vec<_> = named.map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
            if named.is_empty() {
                return Ok(None);
            }
            let plan = Plan::new(&named, true, self.ranks.shard())?;
            let own = plan.owned(vlm.kind(), |s| Ok(s.tensor.shallow_clone()))?;
            Ok(Some((Rc::new(plan), own)))
        };
        let frozen = rest(&self.policy.vlm, Some(&plan))?;
        let sources = std::iter::once((plan, master)).chain(frozen).collect();
        let gathered = Rc::new(Gathered::new(self.ranks.clone(), sources)?);
        gathered.part_all()?;
        if let Some(reference) = &mut self.policy.reference {
            let sources = rest(&reference.vlm, None)?.into_iter().collect();
            let own = Gathered::new(self.ranks.clone(), sources)?;
            own.part_all()?;
            reference.course = Course { gathered: Some(Rc::new(own)), by_layer: true, ..Course::default() };
        }
        self.policy.course = self.optimizer.course(Some(gathered));
        Ok(())
    }

    /// Makes all weights whole on all ranks, for what needs them all; the next update divides them again. All ranks call it.
    ///
    /// # Errors
    /// A rank is gone.
    pub fn bring(&self) -> Result<()> {
        self.policy.course.gathered.as_ref().map_or(Ok(()), |g| g.bring_all())
    }

    /// Gives all ranks what rank 0 has: the weights, `weights` to their last digit. All ranks call it, before the first update.
    ///
    /// # Errors
    /// A rank is gone.
    pub(crate) fn align(&mut self, weights: &[(String, Tensor)]) -> Result<()> {
        let policy = &self.policy;
        let named = policy.vlm.named_parameters().iter();
        let named = named.chain(policy.vlm.adapters().into_iter().flat_map(|a| a.named_parameters()));
        let named = named.chain(policy.critic.iter().flat_map(|c| c.named_parameters()));
        for (_, tensor) in named.chain(policy.value_head.iter().flat_map(|h| h.named_parameters())) {
            self.ranks.align(tensor)?;
        }
        self.optimizer.load_weights(weights)
    }
}
