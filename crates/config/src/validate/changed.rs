//! Runs one check on a changed default configuration, for unit tests.

use crate::schema::Config;

/// Returns the messages that `check` adds for the default configuration after `change`.
pub(super) fn problems_after(check: fn(&Config, &mut Vec<String>), change: impl FnOnce(&mut Config)) -> Vec<String> {
    let mut c = Config::default();
    change(&mut c);
    let mut out = Vec::new();
    check(&c, &mut out);
    out
}
