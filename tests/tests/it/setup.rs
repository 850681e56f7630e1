//! `.ci/apt`, with which `make setup` installs packages, while another apt holds the lock; with a fake `apt-get`.

use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

use unveil_testkit::workspace;

/// Runs `.ci/apt`; `apt-get` fails with `message` while the condition `busy` on the number of calls is true.
fn apt(busy: &str, message: &str, limit: &str) -> (Output, String) {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("apt-get");
    let calls = dir.path().join("calls");
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
fn locks_of_another_apt_are_waited_for() {
    let (done, calls) = apt("le 2", LISTS, "60");
    let stderr = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success() && stderr.contains("another apt is running") && !stderr.contains("E:"), "{stderr}");
    let verbs: Vec<bool> = calls.lines().map(|l| l.contains(" install ")).collect();
    assert_eq!(verbs, [false, false, false, true], "{calls}");
    assert!(calls.lines().last().unwrap().ends_with("g++ libgloo-dev") && calls.contains("DPkg::Lock::Timeout="));
}

#[test]
fn other_errors_and_permanent_locks_fail() {
    let (done, calls) = apt("ge 1", "E: Unable to locate package g++", "60");
    let stderr = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(!done.status.success() && stderr.contains("Unable to locate") && calls.lines().count() == 1, "{stderr}");
    let (done, calls) = apt("ge 1", LISTS, "2");
    let stderr = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(!done.status.success() && stderr.contains("APT_WAIT") && calls.lines().count() >= 2, "{stderr}");
}
