//! Faults of the section `[reward]`.

use std::collections::BTreeSet;

use unveil_core::redact;

use super::seconds;
use crate::schema::{Config, RelevanceKind};

/// Names that a user's scorer cannot have.
const TAKEN: [&str; 9] = [
    "localization",
    "vision_relevance",
    "format",
    "category",
    "relevance",
    "length",
    "repetition",
    "abstention",
    "symbolic",
];

/// Adds every fault to `out`.
pub(super) fn faults(c: &Config, out: &mut Vec<String>) {
    let mut need = |ok: bool, what: String| {
        if !ok {
            out.push(what);
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
        need(*w >= 0.0 && w.is_finite(), format!("reward.{name}.weight is {w}: use 0 or more"));
    }
    need(
        c.learner.steps == 0 || weights.iter().any(|(_, w)| *w > 0.0),
        "every reward weight is 0: there is nothing to learn from".into(),
    );
    need(r.max_eps >= 0.0 && r.max_eps.is_finite(), format!("reward.max_eps is {}: use 0 or more", r.max_eps));
    need(r.deadline_s > 0.0, "reward.deadline_s must be above 0".into());
    let v = &r.vision_relevance;
    need(v.gradient >= 0.0, "reward.vision_relevance.gradient must be 0 or more".into());
    need(
        v.sink == 0.0 || (v.sink > 1.0 && v.sink.is_finite()),
        format!("reward.vision_relevance.sink is {}: use 0 (none) or a factor above 1", v.sink),
    );
    let steps = &r.localization.curriculum;
    need(
        steps.windows(2).all(|w| w[0].0 < w[1].0) && steps.iter().all(|(_, t)| (0.0..=1.0).contains(t)),
        format!("reward.localization.curriculum is {steps:?}: versions must rise and thresholds lie in 0 to 1"),
    );
    relevance(c, &mut need);
    let l = &r.length;
    need(
        l.min_chars <= l.max_chars,
        format!("reward.length.min_chars ({}) is above max_chars ({})", l.min_chars, l.max_chars),
    );
    need(r.repetition.ngram > 0, "reward.repetition.ngram is 0".into());
    need(
        r.symbolic.weight == 0.0 || !r.symbolic.table.is_empty(),
        "reward.symbolic has a weight but no table: name the rule table (reward.symbolic.table)".into(),
    );
    custom_and_gates(c, &mut need);
    service(c, &mut need);
}

fn relevance(c: &Config, need: &mut impl FnMut(bool, String)) {
    let (r, j) = (&c.reward.relevance, &c.reward.judge);
    need(r.max_chars > 0, "reward.relevance.max_chars is 0".into());
    if r.weight > 0.0 && r.kind == RelevanceKind::Embedding {
        need(
            !r.embedding_dir.is_empty(),
            "reward.relevance.kind = \"embedding\" needs reward.relevance.embedding_dir".into(),
        );
    }
    if r.weight > 0.0 && r.kind == RelevanceKind::Judge {
        need(
            !j.base_url.is_empty() && !j.model.is_empty(),
            "reward.relevance has a weight and asks a judge: set reward.judge.base_url and reward.judge.model, or another \
             reward.relevance.kind"
                .into(),
        );
    }
    let [low, high] = j.scale;
    need(
        low < high && low.is_finite() && high.is_finite(),
        format!("reward.judge.scale is {:?}: give the lowest and the highest score", j.scale),
    );
    super::endpoint::faults(j.endpoint(), need);
    need((0.0..1.0).contains(&j.hedge), format!("reward.judge.hedge is {}: use 0 (never) up to below 1", j.hedge));
}

fn custom_and_gates(c: &Config, need: &mut impl FnMut(bool, String)) {
    let r = &c.reward;
    let mut names = BTreeSet::new();
    for s in &r.custom {
        let plain = !s.name.is_empty() && s.name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        need(plain, format!("reward.custom: the name `{}` is not made of letters, digits and _", s.name));
        let free = !TAKEN.contains(&s.name.as_str()) && names.insert(s.name.as_str());
        need(free, format!("reward.custom: the name `{}` is taken", s.name));
        let known = ["grpc://", "grpcs://", "http://", "https://"].iter().any(|p| s.address.starts_with(p));
        need(
            known,
            format!(
                "reward.custom `{}`: address `{}` must begin with grpc://, grpcs://, http:// or https://",
                s.name,
                redact(&s.address)
            ),
        );
        need(seconds(s.deadline_s), format!("reward.custom `{}`: deadline_s must be above 0", s.name));
        let [low, high] = s.range;
        need(
            low < high && low.is_finite() && high.is_finite(),
            format!("reward.custom `{}`: range is {:?}: give the lowest and the highest value", s.name, s.range),
        );
    }
    let computed: Vec<&str> = r.components().iter().map(|(name, ..)| *name).collect();
    for g in &r.gates {
        for name in [&g.component, &g.needs] {
            need(
                computed.contains(&name.as_str()),
                format!("reward.gates: `{name}` is not computed here; there are {}", computed.join(", ")),
            );
        }
        need(g.component != g.needs, format!("reward.gates: `{}` cannot gate itself", g.component));
        need(g.at_least.is_finite(), format!("reward.gates: at_least of `{}` is {}", g.component, g.at_least));
    }
}

fn service(c: &Config, need: &mut impl FnMut(bool, String)) {
    let s = &c.reward.service;
    need(s.max_in_flight > 0, "reward.service.max_in_flight is 0".into());
    need(
        (1..=1024).contains(&s.max_message_mib),
        format!("reward.service.max_message_mib is {}: use 1 to 1024", s.max_message_mib),
    );
    need(seconds(s.call_s), format!("reward.service.call_s is {}: use seconds above 0", s.call_s));
    need(
        s.drain_s >= 0.0 && s.drain_s < 1e6,
        format!("reward.service.drain_s is {}: use 0 or more seconds", s.drain_s),
    );
}
