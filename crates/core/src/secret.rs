//! Keys and tokens, which must not appear in logs, errors, events or reports. This module remembers every secret that the process has
//! read, so that [`redact`] can remove it from messages of peers and libraries.

use std::borrow::Cow;
use std::sync::{PoisonError, RwLock};

use crate::url_credentials::redact_urls;

/// Secrets read so far, longest first. Those below [`MIN_REDACTED_BYTES`] are not kept: they would match ordinary words.
static SEEN: RwLock<Vec<String>> = RwLock::new(Vec::new());

/// Minimum length in bytes of a secret that [`redact`] looks for.
const MIN_REDACTED_BYTES: usize = 8;

/// Replacement for a secret.
const HIDDEN: &str = "***";

/// A key or token. `Debug` hides it; there is no `Display` and no serialisation.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps `text` without surrounding white space (files end with a line feed).
    pub fn new(text: &str) -> Self {
        let text = text.trim();
        let mut seen = SEEN.write().unwrap_or_else(PoisonError::into_inner);
        if text.len() >= MIN_REDACTED_BYTES && !seen.iter().any(|s| s == text) {
            // Longest first: a secret that contains another one is replaced whole.
            let index = seen.partition_point(|s| s.len() >= text.len());
            seen.insert(index, text.to_owned());
        }
        Self(text.to_owned())
    }

    /// Returns the secret in plain text; for sending only.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Returns `text` with every occurrence of this secret replaced: peers echo keys in their error messages.
    pub fn scrub(&self, text: &str) -> String {
        if self.0.is_empty() { text.to_owned() } else { text.replace(&self.0, HIDDEN) }
    }
}

/// Returns `text` with every secret that this process has read replaced, raw or JSON-escaped, and with all credentials in URLs replaced.
/// Applied to every text that leaves the process: log lines, errors, events, reports.
pub fn redact(text: &str) -> Cow<'_, str> {
    let seen = SEEN.read().unwrap_or_else(PoisonError::into_inner);
    let mut out = redact_urls(text);
    for secret in seen.iter() {
        for form in [Some(secret.clone()), json_escaped(secret)].into_iter().flatten() {
            if out.contains(&form) {
                out = Cow::Owned(out.replace(&form, HIDDEN));
            }
        }
    }
    out
}

/// Returns the secret as JSON writes it; `None` if that does not differ.
fn json_escaped(secret: &str) -> Option<String> {
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
    fn debug_hides_the_secret() {
        let s = Secret::new(" sk-123\n");
        assert_eq!(s.reveal(), "sk-123");
        assert_eq!(format!("{s:?}"), "Secret(***)");
        assert_eq!(s.scrub("key sk-123 is wrong"), "key *** is wrong");
        assert_eq!(Secret::new("").scrub("abc"), "abc");
    }

    #[test]
    fn redaction_covers_seen_secrets_and_url_credentials() {
        let text = "token of-a-run-long and of-a-run, \"with \\\"q\\\"uote\"";
        assert_eq!(redact(text), text, "no secret has been read yet");
        let _seen = ["of-a-run", "of-a-run-long", "with \"q\"uote", "run"].map(Secret::new);
        assert_eq!(redact(text), "token *** and ***, \"***\"");
        assert!(matches!(redact("nothing here"), Cow::Borrowed(_)));
        assert_eq!(redact("of-a-run at https://h/?sig=never-seen"), "*** at https://h/?sig=***");
        assert_eq!(redact("a short secret is in many words: run"), "a short secret is in many words: run");
    }
}
