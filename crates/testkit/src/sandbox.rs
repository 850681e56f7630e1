//! A temporary directory, the programs started in it, and the certainty that they end with it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::process::{Finished, Found, Process, with_variable};
use crate::{binary, python};

/// Marks every process of a sandbox, also those that a program of it started and left behind.
const MARK: &str = "TESTKIT_SANDBOX";

/// Longest time for a command that should just do its work.
const PATIENCE: Duration = Duration::from_secs(180);

/// Where a test's programs run. Dropping it kills all of them and deletes the directory.
pub struct Sandbox {
    dir: TempDir,
    started: AtomicUsize,
}

impl Default for Sandbox {
    fn default() -> Self {
        Self::new()
    }
}

impl Sandbox {
    /// A fresh one.
    #[track_caller]
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("unveil-test-").tempdir().expect("a temporary directory");
        std::fs::create_dir(dir.path().join(".output")).expect("a folder in it");
        Self { dir, started: AtomicUsize::new(0) }
    }

    /// A path in it.
    pub fn path(&self, relative: &str) -> PathBuf {
        self.dir.path().join(relative)
    }

    /// Writes a file in it.
    #[track_caller]
    pub fn write(&self, relative: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(relative);
        std::fs::write(&path, content).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        path
    }

    /// Prepares a program to run in it: one thread for tensors, no configuration from the environment.
    pub fn command(&self, program: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(args).current_dir(self.dir.path()).env(MARK, self.mark()).env("OMP_NUM_THREADS", "1");
        for (name, _) in std::env::vars_os().filter(|(n, _)| n.to_string_lossy().starts_with("UNVEIL__")) {
            command.env_remove(name);
        }
        command
    }

    /// Starts a prepared command.
    #[track_caller]
    pub fn start(&self, command: &mut Command) -> Process {
        let number = self.started.fetch_add(1, Ordering::Relaxed);
        Process::start(command, &self.path(".output").join(number.to_string()))
    }

    /// Starts `unveil`.
    #[track_caller]
    pub fn spawn(&self, args: &[&str]) -> Process {
        self.start(&mut self.command(&binary("unveil"), args))
    }

    /// Runs `unveil` to its end.
    #[track_caller]
    pub fn unveil(&self, args: &[&str]) -> Finished {
        self.spawn(args).wait(PATIENCE)
    }

    /// Runs a Python program to its end.
    #[track_caller]
    pub fn python(&self, code: &str, args: &[&str]) -> Finished {
        let mut command = self.command(&python(), &["-c", code]);
        self.start(command.args(args)).wait(PATIENCE)
    }

    /// All living processes that were started in it, directly or not.
    pub fn processes(&self) -> Vec<Found> {
        with_variable(MARK, &self.mark())
    }

    /// Those of them with `NAME=VALUE` in the environment that they were started with.
    pub fn processes_with(&self, name: &str, value: &str) -> Vec<Found> {
        let own = self.processes();
        with_variable(name, value).into_iter().filter(|p| own.contains(p)).collect()
    }

    /// The living process of a command such as `learner` or `rollout`.
    pub fn role(&self, command: &str) -> Option<Found> {
        self.processes().into_iter().find(|p| p.command() == command)
    }

    /// Requires that every process of it ends in time.
    #[track_caller]
    pub fn all_gone(&self, within: Duration) {
        let start = Instant::now();
        loop {
            let left = self.processes();
            if left.is_empty() {
                return;
            }
            assert!(start.elapsed() < within, "still running after {within:?}: {left:#?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Writes `micro.toml`: the whole main job in seconds, with run directory `run`. Stage 1 learns the form of the answers, so
    /// that rewards differ; stage 2 goes once and a half over eight records in six updates, with a checkpoint after each
    /// second one.
    pub fn micro_config(&self) -> PathBuf {
        self.write("micro.toml", micro(&self.path("run")))
    }

    /// Runs `unveil data synth --n N --seed S` and returns the record file in `folder`.
    #[track_caller]
    pub fn synth(&self, folder: &str, n: usize, seed: u64) -> PathBuf {
        let out = self.path(folder);
        let (n, seed) = (n.to_string(), seed.to_string());
        self.unveil(&["data", "synth", "--n", &n, "--seed", &seed, "--size", "64", "--out", &out.to_string_lossy()])
            .ok();
        out.join("records.jsonl")
    }

    /// Runs `unveil model init` and returns the directory.
    #[track_caller]
    pub fn tiny_model(&self, folder: &str, seed: u64) -> PathBuf {
        self.tiny_model_of("qwen2_5_vl", folder, seed)
    }

    /// The same of another family.
    pub fn tiny_model_of(&self, family: &str, folder: &str, seed: u64) -> PathBuf {
        let out = self.path(folder);
        let (seed, dir) = (seed.to_string(), out.to_string_lossy());
        self.unveil(&["model", "init", "--family", family, "--seed", &seed, "--out", &dir]).ok();
        out
    }

    fn mark(&self) -> String {
        self.dir.path().to_string_lossy().into_owned()
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // A process may start another one while it is being killed: look until none is left.
        for _ in 0..100 {
            let left = self.processes();
            if left.is_empty() {
                break;
            }
            left.iter().for_each(Found::kill);
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn micro(run: &Path) -> String {
    format!(
        r#"[run]
dir = "{}"
seed = 3
threads = 1
device = "cpu"

[data]
kind = "synth"
[data.synth]
train = 8
val = 4
test = 8
size = 64

[sft]
steps = 40
batch = 4
[sft.optimizer]
lr = 3e-3
warmup = 5

[rollout]
n = 4
max_new_tokens = 24
groups_per_lease = 2
threads = 1
lease_s = 60.0

[learner]
steps = 6
groups = 2
checkpoint_every = 2
entropy_coef = 0.01

[eval]
batch = 8
report_images = 2
"#,
        run.display()
    )
}
