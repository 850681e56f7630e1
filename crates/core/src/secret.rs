//! Texts that must not show in logs, errors, events or reports: keys and tokens. Every secret that this process has seen is known
//! here, so that [`redact`] can take it out of whatever a peer or a library made of it.

use std::borrow::Cow;
use std::sync::{PoisonError, RwLock};

use crate::locator::redact_urls;

/// Secrets that were seen. Shorter ones than [`LEAST`] bytes are not remembered: they would stand in many words.
static SEEN: RwLock<Vec<String>> = RwLock::new(Vec::new());

/// Bytes from which on a secret is looked for.
const LEAST: usize = 8;

/// What stands in a text where a secret was.
const HIDDEN: &str = "***";

/// Holds a key or token; its debug form hides it, and it has no display form and no serialised form.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Takes `text` without the white space around it (files end with a line feed).
    pub fn new(text: &str) -> Self {
        let text = text.trim();
        let mut seen = SEEN.write().unwrap_or_else(PoisonError::into_inner);
        if text.len() >= LEAST && !seen.iter().any(|s| s == text) {
            // A secret that holds another one is looked for first.
            let at = seen.partition_point(|s| s.len() >= text.len());
            seen.insert(at, text.to_owned());
        }
        Self(text.to_owned())
    }

    /// The text itself: for the wire only.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// `text` with every occurrence of the secret replaced: peers echo keys in their error messages.
    pub fn scrub(&self, text: &str) -> String {
        if self.0.is_empty() { text.to_owned() } else { text.replace(&self.0, HIDDEN) }
    }
}

/// `text` with every secret that this process has seen replaced, also where it stands as JSON writes it, and with the credentials in
/// URLs replaced whether they were seen or not. For everything that leaves a process in words: log lines, errors, events, reports.
pub fn redact(text: &str) -> Cow<'_, str> {
    let seen = SEEN.read().unwrap_or_else(PoisonError::into_inner);
    let mut out = redact_urls(text);
    for secret in seen.iter() {
        for form in [Some(secret.clone()), quoted(secret)].into_iter().flatten() {
            if out.contains(&form) {
                out = Cow::Owned(out.replace(&form, HIDDEN));
            }
        }
    }
    out
}

/// How JSON writes the secret, where that differs.
fn quoted(secret: &str) -> Option<String> {
    secret.contains(['"', '\\']).then(|| secret.replace('\\', "\\\\").replace('"', "\\\""))
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(***)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_does_not_show() {
        let s = Secret::new(" sk-123\n");
        assert_eq!(s.reveal(), "sk-123");
        assert_eq!(format!("{s:?}"), "Secret(***)");
        assert_eq!(s.scrub("key sk-123 is wrong"), "key *** is wrong");
        assert_eq!(Secret::new("").scrub("abc"), "abc");
    }

    #[test]
    fn what_was_seen_is_redacted_wherever_it_stands() {
        let text = "token of-a-run-long and of-a-run, \"with \\\"q\\\"uote\"";
        assert_eq!(redact(text), text, "nothing is known yet");
        let _seen = ["of-a-run", "of-a-run-long", "with \"q\"uote", "run"].map(Secret::new);
        assert_eq!(redact(text), "token *** and ***, \"***\"");
        assert!(matches!(redact("nothing here"), Cow::Borrowed(_)));
        assert_eq!(redact("of-a-run at https://h/?sig=never-seen"), "*** at https://h/?sig=***");
        assert_eq!(redact("a short secret is in many words: run"), "a short secret is in many words: run");
    }
}
