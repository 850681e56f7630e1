//! Faults of the section `[learner]`. Each message names the key, its value and what is allowed.

use crate::schema::{Algorithm, Config, Critic, Importance, KlGradient, KlPlace, RatioBase, Whiten};

/// The name of a choice as it is written in a file.
fn word(choice: impl serde::Serialize) -> String {
    toml::Value::try_from(choice).map_or_else(|e| e.to_string(), |v| v.to_string())
}

/// Adds every fault of the section to `out`.
pub(super) fn faults(c: &Config, out: &mut Vec<String>) {
    let l = &c.learner;
    let mut need = |ok: bool, what: String| {
        if !ok {
            out.push(what);
        }
    };
    let algorithm = word(l.algorithm);
    let ppo = l.algorithm == Algorithm::Ppo;
    need(
        !l.algorithm.compares() || c.rollout.n > 1,
        format!(
            "learner.algorithm = {algorithm} needs rollout.n of 2 or more: with one response there is no group to compare with"
        ),
    );
    need(l.groups > 0, "learner.groups is 0".into());
    need(l.token_budget > 0, "learner.token_budget is 0: a pass has positions".into());
    for (i, f) in l.freeze.iter().enumerate() {
        need(!f.parameters.is_empty(), format!("learner.freeze, entry {i}: parameters is empty: name some"));
        need(
            f.from < f.until,
            format!(
                "learner.freeze, entry {i}: from = {} and until = {}: until must be larger; what is never trained belongs to learner.frozen",
                f.from, f.until
            ),
        );
    }
    need(l.inner_epochs > 0, "learner.inner_epochs is 0".into());
    need(
        l.minibatches > 0 && l.groups.is_multiple_of(l.minibatches.max(1)),
        format!("learner.minibatches ({}) must divide learner.groups ({})", l.minibatches, l.groups),
    );
    let positive =
        [("policy_coef", l.policy_coef), ("clip_low", l.clip_low), ("clip_high", l.clip_high), ("kl_gain", l.kl_gain)];
    for (name, v) in positive {
        need(v > 0.0 && v.is_finite(), format!("learner.{name} is {v}: use a number above 0"));
    }
    let not_negative = [
        ("value_coef", l.value_coef),
        ("value_clip", l.value_clip),
        ("kl_coef", l.kl_coef),
        ("kl_target", l.kl_target),
        ("agreement_limit", l.agreement_limit),
    ];
    for (name, v) in not_negative {
        need(v >= 0.0 && v.is_finite(), format!("learner.{name} is {v}: use 0 or more"));
    }
    need(l.entropy_coef.is_finite(), format!("learner.entropy_coef is {}: use a finite number", l.entropy_coef));
    for (name, v) in [("gamma", l.gamma), ("lambda", l.lambda)] {
        need((0.0..=1.0).contains(&v), format!("learner.{name} is {v}: use 0 to 1"));
    }
    let masked = l.max_masked;
    need(
        (0.0..=1.0).contains(&masked),
        format!("learner.max_masked is {masked}: use a share from 0 (none may be) to 1 (all may be)"),
    );
    let dual = l.clip_dual;
    need(
        dual == 0.0 || (dual > 1.0 && dual.is_finite()),
        format!("learner.clip_dual is {dual}: use 0 (off) or a number above 1"),
    );
    need(
        l.importance_cap > 1.0 && l.importance_cap.is_finite(),
        format!("learner.importance_cap is {}: use a number above 1", l.importance_cap),
    );
    need(
        l.importance == Importance::None || l.ratio_to == RatioBase::Learner,
        format!(
            "learner.importance = {} needs learner.ratio_to = \"learner\": the ratio to the rollout's own log-probabilities is the importance weight already; use \"none\" with \"rollout\"",
            word(l.importance)
        ),
    );
    need(
        !(l.whiten == Whiten::Never && l.algorithm.whitens() && !ppo),
        format!(
            "learner.whiten = \"never\" with learner.algorithm = {algorithm}: its scale is that of the batch; use \"auto\" or \"always\""
        ),
    );
    need(
        l.critic == Critic::Shared || ppo,
        format!(
            "learner.critic = \"separate\" needs learner.algorithm = \"ppo\" (now {algorithm}): no other has values"
        ),
    );
    need(
        l.critic_warmup == 0 || (ppo && l.value_coef > 0.0),
        format!(
            "learner.critic_warmup is {}: it trains the value head alone, so it needs learner.algorithm = \"ppo\" (now {algorithm}) and learner.value_coef above 0 (now {}); use 0 otherwise",
            l.critic_warmup, l.value_coef
        ),
    );
    need(
        l.kl_target == 0.0 || l.kl_coef > 0.0,
        format!(
            "learner.kl_target is {} but learner.kl_coef is 0: the weight to steer must start above 0",
            l.kl_target
        ),
    );
    need(
        l.kl_gradient == KlGradient::Own || l.kl_in == KlPlace::Loss,
        "learner.kl_gradient = \"reverse\" needs learner.kl_in = \"loss\": in the reward KL has no gradient; use \"own\"".into(),
    );
    let lora = &l.lora;
    need(
        lora.alpha > 0.0 && lora.alpha.is_finite(),
        format!("learner.lora.alpha is {}: use a number above 0", lora.alpha),
    );
    need(
        !lora.targets.is_empty() && lora.targets.iter().all(|t| !t.is_empty()),
        "learner.lora.targets must name linear layers, such as \"q_proj\"; use learner.lora.rank = 0 for no adapters"
            .into(),
    );
    need(
        lora.rank == 0 || (l.frozen.is_empty() && l.freeze.is_empty()),
        format!(
            "learner.frozen or learner.freeze is set and learner.lora.rank is {}: with adapters all weights are frozen; name the layers in learner.lora.targets",
            lora.rank
        ),
    );
}
