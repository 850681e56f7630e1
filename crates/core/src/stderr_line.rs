//! Status lines for the user, on stderr.

use std::io::Write;

/// Writes one line to stderr and returns whether that succeeded.
///
/// Unlike `eprintln!` it does not panic when stderr is a closed pipe or a file on a full disk: neither may end a run.
pub fn stderr_line(line: &str) -> bool {
    // A single write keeps the lines of several processes apart.
    std::io::stderr().write_all(format!("{line}\n").as_bytes()).is_ok()
}
