//! Paths of the workspace, the built programs, Python and test data.

use std::path::{Path, PathBuf};

/// Returns the root of the workspace.
pub fn workspace() -> PathBuf {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_dir.ancestors().nth(2).unwrap_or(crate_dir).to_owned()
}

/// Returns the path of a built program, next to the directory of the running test (`target/debug/deps/x` -> `target/debug/NAME`).
///
/// # Panics
/// Panics if it is not built.
#[track_caller]
pub fn binary(name: &str) -> PathBuf {
    let path = profile_folder().join(name);
    assert!(path.is_file(), "{} is missing: build it with `cargo build --workspace --bins`", path.display());
    path
}

/// Returns the path of a built example, next to the directory of the running test (`target/debug/deps/x` -> `target/debug/examples/NAME`).
///
/// # Panics
/// Panics if it is not built.
#[track_caller]
pub fn example(name: &str) -> PathBuf {
    let path = profile_folder().join("examples").join(name);
    assert!(path.is_file(), "{} is missing: build it with `cargo build --workspace --examples`", path.display());
    path
}

/// Returns `target/PROFILE`.
fn profile_folder() -> PathBuf {
    let test = std::env::current_exe().expect("the running test has a path");
    test.ancestors().nth(2).expect("the running test is in target/PROFILE/deps").to_owned()
}

/// Returns the directory of the BCCD data set: `UNVEIL_BCCD`, or else `shared/data/bccd` next to the workspace.
///
/// # Panics
/// Panics if it does not exist.
#[track_caller]
pub fn bccd() -> PathBuf {
    let path = std::env::var_os("UNVEIL_BCCD").map_or_else(|| workspace().join("../shared/data/bccd"), PathBuf::from);
    assert!(path.join("Annotations").is_dir(), "BCCD is not at {}: set UNVEIL_BCCD to its directory", path.display());
    path
}

/// Returns a Python interpreter with the reference implementations: `UNVEIL_PYTHON`, or else `.venv` in the workspace.
///
/// # Panics
/// Panics if it does not exist.
#[track_caller]
pub fn python() -> PathBuf {
    let path = std::env::var_os("UNVEIL_PYTHON").map_or_else(|| workspace().join(".venv/bin/python"), PathBuf::from);
    assert!(path.exists(), "{} is missing: run `make setup`, or set UNVEIL_PYTHON", path.display());
    path
}
