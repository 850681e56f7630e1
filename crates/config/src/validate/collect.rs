//! Checks of the section `[collect]`.

use crate::schema::Config;

/// Adds a message to `out` for every problem. An empty section is valid: only one command needs it.
pub(super) fn check(c: &Config, out: &mut Vec<String>) {
    let mut require = |ok: bool, message: String| {
        if !ok {
            out.push(message);
        }
    };
    let s = &c.collect;
    super::endpoint::check(s.endpoint(), &mut require);
    require((64..=8192).contains(&s.max_side), format!("collect.max_side is {}: use 64 to 8192 pixels", s.max_side));
    require(s.page_size > 0, "collect.page_size is 0: use 1 or more".into());
    for (name, v) in [("price_prompt", s.price_prompt), ("price_answer", s.price_answer), ("budget", s.budget)] {
        require(v >= 0.0 && v.is_finite(), format!("collect.{name} is {v}: use 0 or more"));
    }
    require(
        s.budget == 0.0 || s.price_prompt > 0.0 || s.price_answer > 0.0,
        "collect.budget needs collect.price_prompt or collect.price_answer: without prices the cost is always 0".into(),
    );
}
