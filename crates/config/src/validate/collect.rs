//! Faults of the section `[collect]`.

use crate::schema::Config;

/// Adds every fault to `out`. An empty section is none: only one command needs it.
pub(super) fn faults(c: &Config, out: &mut Vec<String>) {
    let mut need = |ok: bool, what: String| {
        if !ok {
            out.push(what);
        }
    };
    let s = &c.collect;
    need(s.base_url.is_empty() || !s.model.is_empty(), "collect.base_url is set but collect.model is not".into());
    need((64..=8192).contains(&s.max_side), format!("collect.max_side is {}: use 64 to 8192 pixels", s.max_side));
    need(s.max_tokens > 0, "collect.max_tokens is 0".into());
    for (name, n) in [("tries", s.tries as usize), ("concurrency", s.concurrency), ("page_size", s.page_size)] {
        need(n > 0, format!("collect.{name} is 0: use 1 or more"));
    }
    for (name, v) in [("deadline_s", s.deadline_s), ("attempt_s", s.attempt_s)] {
        need(v > 0.0 && v <= 1e6, format!("collect.{name} is {v}: use seconds above 0"));
    }
    let amounts = [
        ("temperature", s.temperature),
        ("per_minute", s.per_minute),
        ("price_prompt", s.price_prompt),
        ("price_answer", s.price_answer),
        ("budget", s.budget),
    ];
    for (name, v) in amounts {
        need(v >= 0.0 && v.is_finite(), format!("collect.{name} is {v}: use 0 or more"));
    }
    need(
        s.budget == 0.0 || s.price_prompt > 0.0 || s.price_answer > 0.0,
        "collect.budget needs collect.price_prompt or collect.price_answer: without a price nothing costs".into(),
    );
}
