//! Checks of the section `[reward]`.

use std::collections::BTreeSet;

use unveil_core::redact;

use super::is_duration;
use crate::schema::{Config, RelevanceKind};

/// Names of built-in components, which a custom scorer cannot have.
const RESERVED_NAMES: [&str; 10] = [
    "localization",
    "vision_relevance",
    "format",
    "category",
    "relevance",
    "length",
    "overlong",
    "repetition",
    "abstention",
    "symbolic",
];

/// Adds a message to `out` for every problem.
pub(super) fn check(c: &Config, out: &mut Vec<String>) {
    let mut require = |ok: bool, message: String| {
        if !ok {
            out.push(message);
        }
    };
    let r = &c.reward;
    let fixed = [
        ("localization", r.localization.weight),
        ("vision_relevance", r.vision_relevance.weight),
        ("format", r.format.weight),
        ("category", r.category.weight),
        ("relevance", r.relevance.weight),
        ("length", r.length.weight),
        ("repetition", r.repetition.weight),
        ("abstention", r.abstention.weight),
        ("symbolic", r.symbolic.weight),
    ];
    let weights: Vec<(&str, f64)> =
        fixed.into_iter().chain(r.custom.iter().map(|c| (c.name.as_str(), c.weight))).collect();
    for (name, w) in &weights {
        require(*w >= 0.0 && w.is_finite(), format!("reward.{name}.weight is {w}: use 0 or more"));
    }
    require(
        c.learner.steps == 0 || weights.iter().any(|(_, w)| *w > 0.0),
        "all reward weights are 0: set at least one".into(),
    );
    require(r.max_eps >= 0.0 && r.max_eps.is_finite(), format!("reward.max_eps is {}: use 0 or more", r.max_eps));
    require(r.deadline_s > 0.0, "reward.deadline_s must be above 0".into());
    let v = &r.vision_relevance;
    require(v.gradient >= 0.0, "reward.vision_relevance.gradient must be 0 or more".into());
    require(
        v.sink == 0.0 || (v.sink > 1.0 && v.sink.is_finite()),
        format!("reward.vision_relevance.sink is {}: use 0 (none) or a factor above 1", v.sink),
    );
    let steps = &r.localization.curriculum;
    require(
        steps.windows(2).all(|w| w[0].0 < w[1].0) && steps.iter().all(|(_, t)| (0.0..=1.0).contains(t)),
        format!("reward.localization.curriculum is {steps:?}: versions must increase and thresholds be in 0 to 1"),
    );
    check_relevance(c, &mut require);
    let l = &r.length;
    require(
        l.min_chars <= l.max_chars,
        format!("reward.length.min_chars ({}) is above max_chars ({})", l.min_chars, l.max_chars),
    );
    let punishment = &r.overlong;
    require(
        punishment.weight >= 0.0 && punishment.weight.is_finite(),
        format!("reward.overlong.weight is {}: use 0 or more", punishment.weight),
    );
    let interval = punishment.interval_tokens;
    let limit = c.rollout.max_new_tokens;
    require(
        interval > 0 && (punishment.weight == 0.0 || interval <= limit),
        format!("reward.overlong.interval_tokens is {interval}: use 1 to rollout.max_new_tokens ({limit})"),
    );
    require(r.repetition.ngram > 0, "reward.repetition.ngram is 0".into());
    require(
        r.symbolic.weight == 0.0 || !r.symbolic.table.is_empty(),
        "reward.symbolic has a weight but no table: name the rule table (reward.symbolic.table)".into(),
    );
    check_custom_and_gates(c, &mut require);
    check_service(c, &mut require);
}

fn check_relevance(c: &Config, require: &mut impl FnMut(bool, String)) {
    let r = &c.reward.relevance;
    let j = &c.reward.judge;
    require(r.max_chars > 0, "reward.relevance.max_chars is 0".into());
    if r.weight > 0.0 && r.kind == RelevanceKind::Embedding {
        require(
            !r.embedding_dir.is_empty(),
            "reward.relevance.kind = \"embedding\" needs reward.relevance.embedding_dir".into(),
        );
    }
    if r.weight > 0.0 && r.kind == RelevanceKind::Judge {
        require(
            !j.base_url.is_empty() && !j.model.is_empty(),
            "reward.relevance has a weight and uses a judge: set reward.judge.base_url and reward.judge.model, or choose \
             another reward.relevance.kind"
                .into(),
        );
    }
    let [low, high] = j.scale;
    require(
        low < high && low.is_finite() && high.is_finite(),
        format!("reward.judge.scale is {:?}: give the lowest and the highest score", j.scale),
    );
    super::endpoint::check(j.endpoint(), require);
    require((0.0..1.0).contains(&j.hedge), format!("reward.judge.hedge is {}: use 0 (never) up to below 1", j.hedge));
}

fn check_custom_and_gates(c: &Config, require: &mut impl FnMut(bool, String)) {
    let r = &c.reward;
    let mut names = BTreeSet::new();
    for s in &r.custom {
        let plain = !s.name.is_empty() && s.name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        require(plain, format!("reward.custom: the name `{}` may contain only letters, digits and _", s.name));
        let free = !RESERVED_NAMES.contains(&s.name.as_str()) && names.insert(s.name.as_str());
        require(free, format!("reward.custom: the name `{}` is taken", s.name));
        let known = ["grpc://", "grpcs://", "http://", "https://"].iter().any(|p| s.address.starts_with(p));
        require(
            known,
            format!(
                "reward.custom `{}`: address `{}` must begin with grpc://, grpcs://, http:// or https://",
                s.name,
                redact(&s.address)
            ),
        );
        require(is_duration(s.deadline_s), format!("reward.custom `{}`: deadline_s must be above 0", s.name));
        let [low, high] = s.range;
        require(
            low < high && low.is_finite() && high.is_finite(),
            format!("reward.custom `{}`: range is {:?}: give the lowest and the highest value", s.name, s.range),
        );
    }
    let computed: Vec<&str> = r.components().iter().map(|(name, ..)| *name).collect();
    for g in &r.gates {
        for name in [&g.component, &g.needs] {
            require(
                computed.contains(&name.as_str()),
                format!("reward.gates: `{name}` is not computed; available are {}", computed.join(", ")),
            );
        }
        require(g.component != g.needs, format!("reward.gates: `{}` cannot gate itself", g.component));
        require(g.at_least.is_finite(), format!("reward.gates: at_least of `{}` is {}", g.component, g.at_least));
    }
}

fn check_service(c: &Config, require: &mut impl FnMut(bool, String)) {
    let s = &c.reward.service;
    require(s.max_in_flight > 0, "reward.service.max_in_flight is 0".into());
    require(
        (1..=1024).contains(&s.max_message_mib),
        format!("reward.service.max_message_mib is {}: use 1 to 1024", s.max_message_mib),
    );
    require(is_duration(s.call_s), format!("reward.service.call_s is {}: use seconds above 0", s.call_s));
    require(
        s.drain_s >= 0.0 && s.drain_s < 1e6,
        format!("reward.service.drain_s is {}: use 0 or more seconds", s.drain_s),
    );
}
