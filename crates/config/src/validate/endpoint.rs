//! Checks of a chat endpoint, shared by its sections.

use super::is_duration;
use crate::schema::ChatEndpoint;

/// Reports every problem through `require`.
pub(super) fn check(e: ChatEndpoint<'_>, require: &mut impl FnMut(bool, String)) {
    let s = e.section;
    require(e.base_url.is_empty() || !e.model.is_empty(), format!("{s}.base_url is set but {s}.model is not"));
    for (name, n) in
        [("max_tokens", e.max_tokens as usize), ("tries", e.tries as usize), ("concurrency", e.concurrency)]
    {
        require(n > 0, format!("{s}.{name} is 0: use 1 or more"));
    }
    for (name, v) in [("deadline_s", e.deadline_s), ("attempt_s", e.attempt_s)] {
        require(is_duration(v), format!("{s}.{name} is {v}: use seconds above 0"));
    }
    require((0.0..=2.0).contains(&e.temperature), format!("{s}.temperature is {}: use 0 to 2", e.temperature));
    require(
        e.per_minute >= 0.0 && e.per_minute.is_finite(),
        format!("{s}.per_minute is {}: use 0 (no limit) or more", e.per_minute),
    );
}
