//! Quotes command lines and settings for a POSIX shell.

use std::ffi::{OsStr, OsString};

/// A text that no word of a shell script can hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuoteError {
    /// The text is not UTF-8; scripts and messages are.
    #[error("{0:?} is not UTF-8: rename it")]
    NotUtf8(OsString),
    /// The text contains a NUL byte, which ends every argument of a program.
    #[error("{0:?} contains a NUL byte: remove it")]
    Nul(String),
}

/// Returns `text` as one word in shell syntax, quoted if necessary.
pub(super) fn shell_word(text: impl AsRef<OsStr>) -> Result<String, QuoteError> {
    let text = text.as_ref();
    let text = text.to_str().ok_or_else(|| QuoteError::NotUtf8(text.to_owned()))?;
    // A NUL byte is all that shlex rejects.
    shlex::try_quote(text).map(Into::into).map_err(|_| QuoteError::Nul(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn words_survive_a_shell() {
        for text in
            ["", "plain", "a b", "it's", "$HOME `id` \"x\" \\", "~", "a=b,c", "é;&|<>*?[x]", "line\nbreak", "!!^"]
        {
            let script = format!("printf %s {}", shell_word(text).unwrap());
            let shell = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
            assert_eq!(String::from_utf8(shell.stdout).unwrap(), text, "{script}");
        }
        assert_eq!(shell_word("s3://bucket/run-1").unwrap(), "s3://bucket/run-1", "plain words stay readable");
    }

    #[test]
    fn texts_beyond_a_shell_are_named() {
        let e = shell_word(OsStr::from_bytes(b"/data/\xff")).unwrap_err().to_string();
        assert!(e.contains("/data/\\xFF") && e.contains("UTF-8"), "{e}");
        let e = shell_word("a\0b").unwrap_err().to_string();
        assert!(e.contains("a\\0b") && e.contains("NUL"), "{e}");
    }
}
