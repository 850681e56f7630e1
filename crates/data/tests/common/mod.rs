//! Helpers to run the Python references of this crate's tests.

use std::path::Path;
use std::process::Command;

use unveil_testkit::python;

/// Runs a script of `tests/` on `dir` and returns the JSON that it writes to `dir/out.json`.
pub fn run(script: &str, dir: &Path) -> serde_json::Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(script);
    let run = Command::new(python()).arg(path).arg(dir).env("OMP_NUM_THREADS", "1").output().unwrap();
    assert!(run.status.success(), "{script} failed: {}", String::from_utf8_lossy(&run.stderr));
    serde_json::from_slice(&std::fs::read(dir.join("out.json")).unwrap()).unwrap()
}

/// Returns the seed of random input; `UNVEIL_SEED` sets another.
pub fn seed() -> u64 {
    std::env::var("UNVEIL_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(7)
}
