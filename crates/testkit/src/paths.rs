//! Where the built programs, the workspace and Python are.

use std::path::{Path, PathBuf};

/// The root of the workspace.
pub fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_owned()
}

/// A built program: beside the folder of the running test (`target/debug/deps/x` -> `target/debug/NAME`).
///
/// # Panics
/// It is not built.
#[track_caller]
pub fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("the running test has a path");
    let folder = test.ancestors().nth(2).expect("the running test lies in target/PROFILE/deps");
    let path = folder.join(name);
    assert!(path.is_file(), "{} is missing: build it with `cargo build --workspace --bins`", path.display());
    path
}

/// The BCCD data set: `UNVEIL_BCCD`, else `shared/data/bccd` beside the workspace.
///
/// # Panics
/// It is not there.
#[track_caller]
pub fn bccd() -> PathBuf {
    let path = std::env::var_os("UNVEIL_BCCD").map_or_else(|| workspace().join("../shared/data/bccd"), PathBuf::from);
    assert!(path.join("Annotations").is_dir(), "BCCD is not at {}: set UNVEIL_BCCD to its folder", path.display());
    path
}

/// A Python with the reference implementations: `UNVEIL_PYTHON`, else `.venv` of the workspace.
///
/// # Panics
/// There is none.
#[track_caller]
pub fn python() -> PathBuf {
    let path = std::env::var_os("UNVEIL_PYTHON").map_or_else(|| workspace().join(".venv/bin/python"), PathBuf::from);
    assert!(path.exists(), "{} is missing: run `make setup`, or set UNVEIL_PYTHON", path.display());
    path
}
