//! One started program with captured output, and processes found by looking at `/proc`.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const POLL: Duration = Duration::from_millis(10);

/// A running program; its output goes to files. Dropping it kills it.
pub struct Process {
    child: Child,
    shown: String,
    stdout: PathBuf,
    stderr: PathBuf,
}

/// A program that has ended.
#[derive(Debug, Clone)]
pub struct Finished {
    /// The command line.
    pub shown: String,
    /// How it ended.
    pub status: ExitStatus,
    /// All of its standard output.
    pub stdout: String,
    /// All of its standard error.
    pub stderr: String,
    /// From the start of the wait to the end of the process.
    pub waited: Duration,
}

impl Process {
    /// Starts `command`; `stem` names its output files (`STEM.out`, `STEM.err`).
    #[track_caller]
    pub(crate) fn start(command: &mut Command, stem: &Path) -> Self {
        let (stdout, stderr) = (stem.with_extension("out"), stem.with_extension("err"));
        let file = |path: &Path| File::create(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let shown = format!("{command:?}");
        let child = command
            .stdin(Stdio::null())
            .stdout(file(&stdout))
            .stderr(file(&stderr))
            .spawn()
            .unwrap_or_else(|e| panic!("cannot start {shown}: {e}"));
        Self { child, shown, stdout, stderr }
    }

    /// Process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// True until it has ended.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// The file that holds its standard output.
    pub(crate) fn stdout_path(&self) -> &Path {
        &self.stdout
    }

    /// What it wrote on standard output so far.
    pub fn stdout(&self) -> String {
        text(&self.stdout)
    }

    /// What it wrote on standard error so far.
    pub fn stderr(&self) -> String {
        text(&self.stderr)
    }

    /// Sends a signal to it alone.
    pub fn signal(&self, signal: Signal) {
        let _gone = kill(Pid::from_raw(self.child.id().cast_signed()), signal);
    }

    /// Sends SIGINT, as Ctrl-C does.
    pub fn interrupt(&self) {
        self.signal(Signal::SIGINT);
    }

    /// Sends SIGKILL to it alone.
    pub fn kill(&self) {
        self.signal(Signal::SIGKILL);
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// It did not end in time; the message has its output.
    #[track_caller]
    pub fn wait(mut self, within: Duration) -> Finished {
        let start = Instant::now();
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if start.elapsed() < within => std::thread::sleep(POLL),
                Ok(None) => panic!("{} still runs after {within:?}\n{}", self.shown, self.output()),
                Err(e) => panic!("{}: {e}", self.shown),
            }
        };
        let waited = start.elapsed();
        Finished { shown: self.shown.clone(), status, stdout: self.stdout(), stderr: self.stderr(), waited }
    }

    /// Waits until `ready` gives something.
    ///
    /// # Panics
    /// The program ended or the time passed before that; the message has its output.
    #[track_caller]
    pub fn until<T>(&mut self, what: &str, within: Duration, mut ready: impl FnMut() -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            let running = self.is_running();
            if let Some(found) = ready() {
                return found;
            }
            assert!(running, "{} ended before {what}\n{}", self.shown, self.output());
            assert!(start.elapsed() < within, "{}: no {what} within {within:?}\n{}", self.shown, self.output());
            std::thread::sleep(POLL);
        }
    }

    /// Waits for the first whole line on its standard output.
    ///
    /// # Panics
    /// As [`Process::until`].
    #[track_caller]
    pub fn first_line(&mut self, within: Duration) -> String {
        let path = self.stdout.clone();
        self.until("first line", within, || text(&path).split_once('\n').map(|(line, _)| line.to_owned()))
    }

    fn output(&self) -> String {
        format!("--- stdout\n{}--- stderr\n{}", self.stdout(), self.stderr())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn text(path: &Path) -> String {
    std::fs::read(path).map_or_else(|_| String::new(), |b| String::from_utf8_lossy(&b).into_owned())
}

impl Finished {
    /// Exit code; none when a signal ended it.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Requires exit code 0.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.exits(0)
    }

    /// Requires an exit code.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(
            self.code(),
            Some(code),
            "{} ended with {}\n--- stdout\n{}--- stderr\n{}",
            self.shown,
            self.status,
            self.stdout,
            self.stderr
        );
        self
    }

    /// Requires exit code `code` and exactly one `error:` line, which holds each of `parts`. Returns that line.
    #[track_caller]
    pub fn says(self, code: i32, parts: &[&str]) -> String {
        let this = self.exits(code);
        let lines: Vec<&str> = this.stderr.lines().filter(|l| l.starts_with("error:")).collect();
        assert_eq!(lines.len(), 1, "{}: one error line is wanted\n{}", this.shown, this.stderr);
        for part in parts {
            assert!(lines[0].contains(part), "{}: \"{part}\" is not in: {}", this.shown, lines[0]);
        }
        assert!(!this.stderr.contains("panicked"), "{}: {}", this.shown, this.stderr);
        lines[0].to_owned()
    }

    /// Standard output as JSON lines.
    #[track_caller]
    pub fn json(&self) -> Vec<serde_json::Value> {
        crate::json_lines(&self.stdout)
    }
}

/// A process found in `/proc`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Process id.
    pub pid: u32,
    /// Command line.
    pub args: Vec<String>,
}

impl Found {
    /// The command of our programs (`learner`, `rollout`, `serve`…), which comes first.
    pub fn command(&self) -> &str {
        self.args.get(1).map_or("", String::as_str)
    }

    /// Sends SIGKILL to it.
    pub fn kill(&self) {
        self.signal(Signal::SIGKILL);
    }

    /// Stops it where it is, until [`Found::go_on`].
    pub fn pause(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Lets it run again.
    pub fn go_on(&self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&self, signal: Signal) {
        let _gone = kill(Pid::from_raw(self.pid.cast_signed()), signal);
    }
}

/// Every living process with `NAME=VALUE` in the environment that it was started with.
pub(crate) fn with_variable(name: &str, value: &str) -> Vec<Found> {
    let wanted = format!("{name}={value}").into_bytes();
    let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok())
        .filter_map(|pid| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
            environment.split(|b| *b == 0).any(|v| v == wanted).then_some(())?;
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let args: Vec<String> = line
                .split(|b| *b == 0)
                .filter(|a| !a.is_empty())
                .map(|a| String::from_utf8_lossy(a).into_owned())
                .collect();
            Some(Found { pid, args })
        })
        .collect()
}

/// Every living process whose working directory is `dir` or below it.
pub(crate) fn in_directory(dir: &Path) -> Vec<Found> {
    let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(dir)))
        .map(|pid| Found { pid, args: Vec::new() })
        .collect()
}
