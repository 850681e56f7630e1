//! The Python side of the tests of this crate.

use std::path::{Path, PathBuf};
use std::process::Command;

/// `UNVEIL_PYTHON`, else `.venv/bin/python` of the workspace; a missing one is a failure.
fn python() -> PathBuf {
    let path = std::env::var_os("UNVEIL_PYTHON")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.venv/bin/python"), PathBuf::from);
    assert!(path.exists(), "{} is missing: run `make setup`, or set UNVEIL_PYTHON", path.display());
    path
}

/// Runs a script of this folder on `dir` and returns the JSON that it leaves in `dir/out.json`.
pub fn run(script: &str, dir: &Path) -> serde_json::Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(script);
    let run = Command::new(python()).arg(path).arg(dir).env("OMP_NUM_THREADS", "1").output().unwrap();
    assert!(run.status.success(), "{script} failed: {}", String::from_utf8_lossy(&run.stderr));
    serde_json::from_slice(&std::fs::read(dir.join("out.json")).unwrap()).unwrap()
}

/// Seed of random input; `UNVEIL_SEED` chooses another.
pub fn seed() -> u64 {
    std::env::var("UNVEIL_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(7)
}
