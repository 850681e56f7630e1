//! `.ci/apt`, by which `make setup` installs packages, beside another apt: with a stand-in for `apt-get` that finds a lock taken.

use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

use unveil_testkit::workspace;

/// Runs `.ci/apt`; `apt-get` fails with `message` as long as `busy` holds.
fn apt(busy: &str, message: &str, limit: &str) -> (Output, String) {
    let dir = tempfile::tempdir().unwrap();
    let (program, calls) = (dir.path().join("apt-get"), dir.path().join("calls"));
    let script = format!(
        "#!/bin/sh\necho \"$*\" >> {0}\nif [ $(wc -l < {0}) -{busy} ]; then echo '{message}' >&2; exit 100; fi\n",
        calls.display()
    );
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
    let done = Command::new(workspace().join(".ci/apt"))
        .args(["g++", "libgloo-dev"])
        .envs([("PATH", path.as_str()), ("APT_WAIT", limit)])
        .output()
        .unwrap();
    let calls = std::fs::read_to_string(calls).unwrap();
    (done, calls)
}

const LISTS: &str = "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 1 (apt-get)";

#[test]
fn a_lock_that_another_apt_holds_is_waited_for() {
    let (done, calls) = apt("le 2", LISTS, "60");
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success() && said.contains("another apt is running") && !said.contains("E:"), "{said}");
    let verbs: Vec<bool> = calls.lines().map(|l| l.contains(" install ")).collect();
    assert_eq!(verbs, [false, false, false, true], "{calls}");
    assert!(calls.lines().last().unwrap().ends_with("g++ libgloo-dev") && calls.contains("DPkg::Lock::Timeout="));
}

#[test]
fn what_is_no_lock_fails_at_once_and_a_lock_that_stays_fails_in_time() {
    let (done, calls) = apt("ge 1", "E: Unable to locate package g++", "60");
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(!done.status.success() && said.contains("Unable to locate") && calls.lines().count() == 1, "{said}");
    let (done, calls) = apt("ge 1", LISTS, "2");
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(!done.status.success() && said.contains("APT_WAIT") && calls.lines().count() >= 2, "{said}");
}
