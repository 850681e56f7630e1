//! A text that must not show in logs, errors or dumps: keys and tokens.

/// Holds a key or token; its debug form hides it, and it has no display form and no serialised form.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Takes `text` without the white space around it (files end with a line feed).
    pub fn new(text: &str) -> Self {
        Self(text.trim().to_owned())
    }

    /// The text itself: for the wire only.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// `text` with every occurrence of the secret replaced: peers echo keys in their error messages.
    pub fn scrub(&self, text: &str) -> String {
        if self.0.is_empty() { text.to_owned() } else { text.replace(&self.0, "***") }
    }
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
}
