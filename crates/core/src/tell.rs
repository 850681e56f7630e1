//! Lines for the person who watches, on stderr.

use std::io::Write;

/// Writes one line to stderr; false when it could not be written.
///
/// A stderr that is gone (a closed pipe) or that is a file on a full disk must not end a run, as `eprintln!` would.
pub fn tell(line: &str) -> bool {
    // One write, so that lines of several processes do not mix.
    std::io::stderr().write_all(format!("{line}\n").as_bytes()).is_ok()
}
