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
    super::endpoint::faults(s.endpoint(), &mut need);
    need((64..=8192).contains(&s.max_side), format!("collect.max_side is {}: use 64 to 8192 pixels", s.max_side));
    need(s.page_size > 0, "collect.page_size is 0: use 1 or more".into());
    for (name, v) in [("price_prompt", s.price_prompt), ("price_answer", s.price_answer), ("budget", s.budget)] {
        need(v >= 0.0 && v.is_finite(), format!("collect.{name} is {v}: use 0 or more"));
    }
    need(
        s.budget == 0.0 || s.price_prompt > 0.0 || s.price_answer > 0.0,
        "collect.budget needs collect.price_prompt or collect.price_answer: without a price nothing costs".into(),
    );
}
