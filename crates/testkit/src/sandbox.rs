//! A temporary directory for the programs of a test, which end with it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::process::{Finished, FoundProcess, Process, with_variable};
use crate::{binary, python};

/// Environment variable that marks all processes of a sandbox, including orphans.
const MARKER_VARIABLE: &str = "TESTKIT_SANDBOX";

/// Timeout of an ordinary command.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(180);

/// Directory in which the programs of a test run. On drop it kills all of them and deletes the directory.
#[derive(Debug)]
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
    /// Creates an empty sandbox.
    #[track_caller]
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("unveil-test-").tempdir().expect("a temporary directory");
        std::fs::create_dir(dir.path().join(".output")).expect("a directory in it");
        Self { dir, started: AtomicUsize::new(0) }
    }

    /// Returns a path in the sandbox.
    pub fn path(&self, relative: &str) -> PathBuf {
        self.dir.path().join(relative)
    }

    /// Writes a file in the sandbox.
    #[track_caller]
    pub fn write(&self, relative: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(relative);
        std::fs::write(&path, content).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        path
    }

    /// Prepares a command in the sandbox: one tensor thread, no configuration from the environment.
    pub fn command(&self, program: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(args).current_dir(self.dir.path()).env(MARKER_VARIABLE, self.marker()).env("OMP_NUM_THREADS", "1");
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

    /// Runs `unveil` until it exits.
    #[track_caller]
    pub fn unveil(&self, args: &[&str]) -> Finished {
        self.spawn(args).wait(COMMAND_TIMEOUT)
    }

    /// Runs a Python program until it exits.
    #[track_caller]
    pub fn python(&self, code: &str, args: &[&str]) -> Finished {
        let mut command = self.command(&python(), &["-c", code]);
        self.start(command.args(args)).wait(COMMAND_TIMEOUT)
    }

    /// Returns all running processes that were started in the sandbox, directly or indirectly.
    pub fn processes(&self) -> Vec<FoundProcess> {
        with_variable(MARKER_VARIABLE, &self.marker())
    }

    /// Returns the processes of the sandbox that were started with `NAME=VALUE` in their environment.
    pub fn processes_with(&self, name: &str, value: &str) -> Vec<FoundProcess> {
        let processes = self.processes();
        with_variable(name, value).into_iter().filter(|p| processes.contains(p)).collect()
    }

    /// Returns the running process of a subcommand such as `learner` or `rollout`.
    pub fn find_role(&self, command: &str) -> Option<FoundProcess> {
        self.processes().into_iter().find(|p| p.command() == command)
    }

    /// Asserts that all processes of the sandbox exit in time.
    #[track_caller]
    pub fn assert_all_exit(&self, within: Duration) {
        let start = Instant::now();
        loop {
            let running = self.processes();
            if running.is_empty() {
                return;
            }
            assert!(start.elapsed() < within, "still running after {within:?}: {running:#?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Writes `micro.toml`, a complete run of a few seconds with run directory `run`, and returns its path. Stage 1 learns the form of
    /// answers, so that rewards differ; stage 2 makes one and a half passes over eight records in six updates, with a checkpoint after
    /// every second one.
    pub fn micro_config(&self) -> String {
        self.write("micro.toml", micro_config(&self.path("run"))).to_string_lossy().into_owned()
    }

    /// Starts a subcommand such as `train` with the configuration of [`Sandbox::micro_config`] and settings (`KEY=VALUE`).
    #[track_caller]
    pub fn start_micro(&self, command: &str, sets: &[&str]) -> Process {
        self.spawn(&run_args(command, &self.micro_config(), sets))
    }

    /// Runs a subcommand as [`Sandbox::start_micro`] starts it until it exits.
    #[track_caller]
    pub fn run_micro(&self, command: &str, sets: &[&str]) -> Finished {
        self.start_micro(command, sets).wait(COMMAND_TIMEOUT)
    }

    /// Runs `unveil data synth --n N --seed S` and returns the record file in `dir`.
    #[track_caller]
    pub fn synth(&self, dir: &str, n: usize, seed: u64) -> PathBuf {
        let out = self.path(dir);
        let n = n.to_string();
        let seed = seed.to_string();
        self.unveil(&["data", "synth", "--n", &n, "--seed", &seed, "--size", "64", "--out", &out.to_string_lossy()])
            .ok();
        out.join("records.jsonl")
    }

    /// Runs `unveil model init` for a tiny model and returns its directory.
    #[track_caller]
    pub fn tiny_model(&self, dir: &str, seed: u64) -> PathBuf {
        self.tiny_model_of_family("qwen2_5_vl", dir, seed)
    }

    /// Runs `unveil model init` for a tiny model of the given family and returns its directory.
    pub fn tiny_model_of_family(&self, family: &str, dir: &str, seed: u64) -> PathBuf {
        let out = self.path(dir);
        let seed = seed.to_string();
        self.unveil(&["model", "init", "--family", family, "--seed", &seed, "--out", &out.to_string_lossy()]).ok();
        out
    }

    fn marker(&self) -> String {
        self.dir.path().to_string_lossy().into_owned()
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // A process may start another one while it is being killed, so repeat until none is left.
        for _ in 0..100 {
            let running = self.processes();
            if running.is_empty() {
                break;
            }
            running.iter().for_each(FoundProcess::kill);
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Returns the arguments of a subcommand that reads a configuration file and settings (`KEY=VALUE`).
pub fn run_args<'a>(command: &'a str, config: &'a str, sets: &[&'a str]) -> Vec<&'a str> {
    let sets = sets.iter().flat_map(|set| ["--set", *set]);
    [command, "--config", config].into_iter().chain(sets).collect()
}

fn micro_config(run: &Path) -> String {
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
