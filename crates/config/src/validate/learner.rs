//! Checks of the section `[learner]`. Each message names the key, its value and the allowed range.

use unveil_core::{Algorithm, Importance, KlGradient, Surrogate};

use crate::schema::{Config, Critic, KlPlacement, RatioBase, Whiten};

/// Upper bound of `learner.max_replaced`, far beyond what a batch can wait for.
const MAX_REPLACED: usize = 1_000_000;

/// Returns an enum value as written in a configuration file.
fn toml_name(choice: impl serde::Serialize) -> String {
    toml::Value::try_from(choice).map_or_else(|e| e.to_string(), |v| v.to_string())
}

/// Adds a message to `out` for every problem.
pub(super) fn check(c: &Config, out: &mut Vec<String>) {
    let l = &c.learner;
    let mut require = |ok: bool, message: String| {
        if !ok {
            out.push(message);
        }
    };
    let algorithm = toml_name(l.algorithm);
    let ppo = l.algorithm == Algorithm::Ppo;
    require(
        !l.algorithm.compares_responses() || c.rollout.n > 1,
        format!(
            "learner.algorithm = {algorithm} needs rollout.n of 2 or more: with one response there is no group to compare with"
        ),
    );
    require(l.groups > 0, "learner.groups is 0".into());
    require(l.token_budget > 0, "learner.token_budget is 0: use 1 or more".into());
    for (i, f) in l.freeze.iter().enumerate() {
        require(!f.parameters.is_empty(), format!("learner.freeze, entry {i}: parameters is empty: name some"));
        require(
            f.from < f.until,
            format!(
                "learner.freeze, entry {i}: from = {} and until = {}: until must be larger; parameters that are never trained belong in learner.frozen",
                f.from, f.until
            ),
        );
    }
    require(l.inner_epochs > 0, "learner.inner_epochs is 0".into());
    require(
        l.minibatches > 0 && l.groups.is_multiple_of(l.minibatches.max(1)),
        format!("learner.minibatches ({}) must divide learner.groups ({})", l.minibatches, l.groups),
    );
    let positive =
        [("policy_coef", l.policy_coef), ("clip_low", l.clip_low), ("clip_high", l.clip_high), ("kl_gain", l.kl_gain)];
    for (name, v) in positive {
        require(v > 0.0 && v.is_finite(), format!("learner.{name} is {v}: use a number above 0"));
    }
    let not_negative = [
        ("value_coef", l.value_coef),
        ("value_clip", l.value_clip),
        ("kl_coef", l.kl_coef),
        ("kl_target", l.kl_target),
        ("agreement_limit", l.agreement_limit),
    ];
    for (name, v) in not_negative {
        require(v >= 0.0 && v.is_finite(), format!("learner.{name} is {v}: use 0 or more"));
    }
    require(l.entropy_coef.is_finite(), format!("learner.entropy_coef is {}: use a finite number", l.entropy_coef));
    for (name, v) in [("gamma", l.gamma), ("lambda", l.lambda)] {
        require((0.0..=1.0).contains(&v), format!("learner.{name} is {v}: use 0 to 1"));
    }
    let masked = l.max_masked;
    require(
        (0.0..=1.0).contains(&masked),
        format!("learner.max_masked is {masked}: use a fraction from 0 (none may be masked) to 1 (all may be)"),
    );
    let replaced = l.max_replaced;
    require(
        replaced <= MAX_REPLACED,
        format!("learner.max_replaced is {replaced}: use 0 (no groups are replaced) to {MAX_REPLACED}"),
    );
    require(
        replaced == 0 || l.algorithm.compares_responses(),
        format!(
            "learner.max_replaced is {replaced} and learner.algorithm {algorithm}, which learns from groups of equal rewards, too; use 0"
        ),
    );
    let dual = l.clip_dual;
    require(
        dual == 0.0 || (dual > 1.0 && dual.is_finite()),
        format!("learner.clip_dual is {dual}: use 0 (off) or a number above 1"),
    );
    require(
        dual == 0.0 || l.surrogate == Surrogate::Clip,
        format!(
            "learner.clip_dual is {dual} and learner.surrogate \"cispo\": its weights are bounded by learner.clip_high; use 0"
        ),
    );
    require(
        l.importance_cap > 1.0 && l.importance_cap.is_finite(),
        format!("learner.importance_cap is {}: use a number above 1", l.importance_cap),
    );
    require(
        l.importance == Importance::None || l.ratio_to == RatioBase::Learner,
        format!(
            "learner.importance = {} needs learner.ratio_to = \"learner\": the ratio to the rollout's own log-probabilities already is the importance weight; use \"none\" with \"rollout\"",
            toml_name(l.importance)
        ),
    );
    require(
        !(l.whiten == Whiten::Never && l.algorithm.whitens_by_default() && !ppo),
        format!(
            "learner.whiten = \"never\" with learner.algorithm = {algorithm}: it takes its scale from the batch; use \"auto\" or \"always\""
        ),
    );
    require(
        l.critic == Critic::Shared || ppo,
        format!(
            "learner.critic = \"separate\" needs learner.algorithm = \"ppo\" (now {algorithm}): no other algorithm has values"
        ),
    );
    require(
        l.critic_warmup == 0 || (ppo && l.value_coef > 0.0),
        format!(
            "learner.critic_warmup is {}: it trains the value head alone, so it needs learner.algorithm = \"ppo\" (now {algorithm}) and learner.value_coef above 0 (now {}); use 0 otherwise",
            l.critic_warmup, l.value_coef
        ),
    );
    require(
        l.kl_target == 0.0 || l.kl_coef > 0.0,
        format!(
            "learner.kl_target is {} but learner.kl_coef is 0: the weight to steer must start above 0",
            l.kl_target
        ),
    );
    require(
        l.kl_gradient == KlGradient::Own || l.kl_in == KlPlacement::Loss,
        "learner.kl_gradient = \"reverse\" needs learner.kl_in = \"loss\": KL in the reward has no gradient; use \"own\"".into(),
    );
    require(
        !(l.overlong_filter
            && l.kl_coef > 0.0
            && l.kl_in == KlPlacement::Reward
            && matches!(l.algorithm, Algorithm::Grpo | Algorithm::Rloo)),
        format!(
            "learner.overlong_filter with learner.kl_in = \"reward\" and learner.algorithm = {algorithm}: the KL of a response left out of the loss is not computed, so that its reward cannot be compared with the others; use learner.kl_in = \"loss\""
        ),
    );
    let lora = &l.lora;
    require(
        lora.alpha > 0.0 && lora.alpha.is_finite(),
        format!("learner.lora.alpha is {}: use a number above 0", lora.alpha),
    );
    require(
        !lora.targets.is_empty() && lora.targets.iter().all(|t| !t.is_empty()),
        "learner.lora.targets must name linear layers, such as \"q_proj\"; use learner.lora.rank = 0 for no adapters"
            .into(),
    );
    require(
        lora.rank == 0 || (l.frozen.is_empty() && l.freeze.is_empty()),
        format!(
            "learner.frozen or learner.freeze is set and learner.lora.rank is {}: with adapters all weights are frozen; name the layers in learner.lora.targets",
            lora.rank
        ),
    );
}
