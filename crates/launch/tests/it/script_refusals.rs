//! Rejected options and their messages.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;

use unveil_launch::submit::slurm::{SlurmJob, SubmitContext};

use crate::{config, job, options};

/// Asserts that the options are rejected with a message that contains all `words`.
#[track_caller]
fn refused(flags: &[&str], sets: &[&str], words: &[&str]) {
    let e = job("/home/me", flags, sets).expect_err("the options are rejected").to_string();
    for word in words {
        assert!(e.contains(word), "{flags:?} {sets:?}: \"{word}\" is not in: {e}");
    }
}

#[test]
fn conflicting_options_are_named() {
    let ranks = ["learner.parallel.ranks=3"];
    refused(&["--learner-nodes", "2"], &ranks, &["learner.parallel.ranks is 3", "--learner-nodes 2"]);
    refused(&["--learner-nodes", "0"], &[], &["--learner-nodes is 0"]);
    refused(&["--rollout-nodes", "2"], &[], &["rollout.workers is 1", "2 nodes"]);
    refused(
        &["--rollout-nodes", "0", "--learner-nodes", "2"],
        &["learner.parallel.ranks=2"],
        &["rollout.workers is 1"],
    );
    refused(&["--cpus", "0"], &[], &["--cpus"]);
    refused(&["--reward-tasks", "0"], &[], &["--reward-tasks is 0", "reward.address"]);
    refused(&["--reward-tasks", "15"], &[], &["--reward-tasks is 15", "14"]);
    refused(&["--reward-tasks", "1"], &["reward.address=http://h:1"], &["reward.address is http://h:1"]);
    refused(&[], &["learner.steps=0", "rollout.max_staleness=0"], &["learner.steps is 0", "unveil train"]);
    refused(&[], &["run.resume=never"], &["run.resume is `never`", "auto"]);
    refused(&[], &["run.resume=7"], &["run.resume is `7`"]);
    refused(&[], &["run.device=cuda:1"], &["run.device is cuda:1", "use cuda"]);
    let both = ["--seeds", "0-3", "--heterogeneous"];
    refused(&both, &[], &["--seeds and --heterogeneous", "a job per seed"]);
    refused(&["--heterogeneous", "--rollout-nodes", "0"], &[], &["--heterogeneous needs --rollout-nodes"]);
    refused(&["--rollout-sbatch", "partition=b"], &[], &["--rollout-sbatch needs --heterogeneous"]);
    // All problems are reported together.
    refused(&both, &["learner.steps=0", "run.resume=never"], &["--seeds", "learner.steps", "run.resume"]);
}

#[test]
fn seeds_are_numbers_and_ranges() {
    for seeds in ["", "a", "1-", "-3", "0-3%", "1;2", "0 1", "0:2", "1,,2", "0-3%x", "0-9:"] {
        refused(&[&format!("--seeds={seeds}")], &[], &["--seeds is", seeds]);
    }
    for seeds in ["0", "0-3", "1,5,9", "0-3,8", "0-8:2", "0-31%4"] {
        job("/home/me", &["--seeds", seeds], &[]).unwrap_or_else(|e| panic!("{seeds}: {e}"));
    }
}

#[test]
fn reserved_sbatch_options_are_rejected() {
    for reserved in ["nodes=3", "array=1-2", "output=/tmp/x", "signal=USR1@1", "wrap=ls", "no-requeue", "hetjob"] {
        refused(&["--sbatch", reserved], &[], &["--sbatch", reserved, "the script sets"]);
    }
    for malformed in
        ["--partition=a", "-p=a", "P=a", "=a", "a b=c", "partition=a\nrm -rf x", "comment=\"it's\"", "comment=a\\b"]
    {
        refused(&[&format!("--sbatch={malformed}")], &[], &["--sbatch"]);
    }
    refused(&["--heterogeneous", "--rollout-sbatch", "nodes=3"], &[], &["nodes"]);
}

#[test]
fn unsupported_paths_are_rejected() {
    for dir in ["/a\\b", "/a\nb", "/both ' and \"", "/bell\u{7}"] {
        refused(&[], &[&format!("run.dir={dir}")], &["run directory"]);
    }
    let container = ["--container", "image"];
    refused(&[&container[..], &["--mount", "/a,b"]].concat(), &[], &["/a,b", "comma"]);
    refused(&[&container[..], &["--mount", "/a:b"]].concat(), &[], &["/a:b", "colon"]);
}

#[test]
fn texts_beyond_a_shell_are_rejected() {
    refused(&[], &["checkpoint.url=s3://bucket/a\u{0}b"], &["CHECKPOINTS", "SETS", "a\\0b", "NUL byte"]);
    let latin1 = |path: &[u8]| OsStr::from_bytes(path).into();
    let context = SubmitContext {
        directory: latin1(b"/data/\xe9"),
        config: latin1(b"/configs/\xfc.toml"),
        sets: Vec::new(),
        program: "unveil".into(),
    };
    let e = SlurmJob::new(&config(&[]), &options(&[]), &context).expect_err("the paths are rejected").to_string();
    for word in
        ["working directory", "run directory", "CONFIG", "/configs/\\xFC.toml", "RUN_DIR", "not UTF-8: rename it"]
    {
        assert!(e.contains(word), "\"{word}\" is not in: {e}");
    }
}

#[test]
fn readable_secrets_are_rejected() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("secrets");
    let shown = file.to_string_lossy().into_owned();
    refused(&["--secrets", &shown], &[], &["--secrets", &shown]);
    std::fs::write(&file, "AWS_SECRET_ACCESS_KEY=very-secret\n").unwrap();
    for (mode, accepted) in [(0o644, false), (0o640, false), (0o604, false), (0o600, true), (0o400, true)] {
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        match job("/home/me", &["--secrets", &shown], &[]) {
            Ok(job) => {
                assert!(accepted, "{mode:o}");
                assert!(job.script.contains(&format!("SECRETS={shown}\n")) && !job.script.contains("very-secret"));
            }
            Err(e) => assert!(!accepted && e.to_string().contains("chmod 600"), "{mode:o}: {e}"),
        }
    }
}
