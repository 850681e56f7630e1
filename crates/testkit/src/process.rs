//! Started programs with captured output, and processes found in `/proc`.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// A running program that writes its output to files. It is killed on drop.
#[derive(Debug)]
pub struct Process {
    child: Child,
    command_line: String,
    stdout: PathBuf,
    stderr: PathBuf,
}

/// A program that has exited.
#[derive(Debug, Clone)]
pub struct Finished {
    /// Command line.
    pub command_line: String,
    /// Exit status.
    pub status: ExitStatus,
    /// Complete standard output.
    pub stdout: String,
    /// Complete standard error.
    pub stderr: String,
    /// Time from the start of the wait to the end of the process.
    pub waited: Duration,
}

impl Process {
    /// Starts `command`; `stem` names its output files (`STEM.out`, `STEM.err`).
    #[track_caller]
    pub(crate) fn start(command: &mut Command, stem: &Path) -> Self {
        let stdout = stem.with_extension("out");
        let stderr = stem.with_extension("err");
        let file = |path: &Path| File::create(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let command_line = format!("{command:?}");
        let child = command
            .stdin(Stdio::null())
            .stdout(file(&stdout))
            .stderr(file(&stderr))
            .spawn()
            .unwrap_or_else(|e| panic!("cannot start {command_line}: {e}"));
        Self { child, command_line, stdout, stderr }
    }

    /// Returns the process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Returns whether it is still running.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Returns the file of its standard output.
    pub(crate) fn stdout_path(&self) -> &Path {
        &self.stdout
    }

    /// Returns its standard output so far.
    pub fn stdout(&self) -> String {
        read_text(&self.stdout)
    }

    /// Returns its standard error so far.
    pub fn stderr(&self) -> String {
        read_text(&self.stderr)
    }

    /// Sends a signal to this process only.
    pub fn signal(&self, signal: Signal) {
        let _already_exited = kill(Pid::from_raw(self.child.id().cast_signed()), signal);
    }

    /// Sends SIGINT, as Ctrl-C does.
    pub fn interrupt(&self) {
        self.signal(Signal::SIGINT);
    }

    /// Sends SIGKILL to this process only.
    pub fn kill(&self) {
        self.signal(Signal::SIGKILL);
    }

    /// Waits until the program exits.
    ///
    /// # Panics
    /// Panics with its output if it does not exit in time.
    #[track_caller]
    pub fn wait(mut self, within: Duration) -> Finished {
        let start = Instant::now();
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if start.elapsed() < within => std::thread::sleep(POLL_INTERVAL),
                Ok(None) => panic!("{} still runs after {within:?}\n{}", self.command_line, self.output()),
                Err(e) => panic!("{}: {e}", self.command_line),
            }
        };
        let waited = start.elapsed();
        Finished {
            command_line: self.command_line.clone(),
            status,
            stdout: self.stdout(),
            stderr: self.stderr(),
            waited,
        }
    }

    /// Waits until `ready` returns a value; `what` names it in messages.
    ///
    /// # Panics
    /// Panics with the program's output if it exits first or the time is up.
    #[track_caller]
    pub fn until<T>(&mut self, what: &str, within: Duration, mut ready: impl FnMut() -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            let running = self.is_running();
            if let Some(value) = ready() {
                return value;
            }
            assert!(running, "{} ended before {what}\n{}", self.command_line, self.output());
            assert!(start.elapsed() < within, "{}: no {what} within {within:?}\n{}", self.command_line, self.output());
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// Waits for the first complete line on its standard output.
    ///
    /// # Panics
    /// Panics like [`Process::until`].
    #[track_caller]
    pub fn first_line(&mut self, within: Duration) -> String {
        let path = self.stdout.clone();
        self.until("first line", within, || read_text(&path).split_once('\n').map(|(line, _)| line.to_owned()))
    }

    fn output(&self) -> String {
        format!("--- stdout\n{}--- stderr\n{}", self.stdout(), self.stderr())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _already_exited = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn read_text(path: &Path) -> String {
    std::fs::read(path).map_or_else(|_| String::new(), |b| String::from_utf8_lossy(&b).into_owned())
}

impl Finished {
    /// Returns the exit code; `None` if a signal ended the process.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Asserts exit code 0.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.exits(0)
    }

    /// Asserts an exit code.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(
            self.code(),
            Some(code),
            "{} ended with {}\n--- stdout\n{}--- stderr\n{}",
            self.command_line,
            self.status,
            self.stdout,
            self.stderr
        );
        self
    }

    /// Asserts exit code `code` and exactly one `error:` line, which contains each of `parts`. Returns that line.
    #[track_caller]
    pub fn fails_with(self, code: i32, parts: &[&str]) -> String {
        let finished = self.exits(code);
        let lines: Vec<&str> = finished.stderr.lines().filter(|l| l.starts_with("error:")).collect();
        assert_eq!(lines.len(), 1, "{}: expected one error line\n{}", finished.command_line, finished.stderr);
        for part in parts {
            assert!(lines[0].contains(part), "{}: \"{part}\" is not in: {}", finished.command_line, lines[0]);
        }
        assert!(!finished.stderr.contains("panicked"), "{}: {}", finished.command_line, finished.stderr);
        lines[0].to_owned()
    }

    /// Parses standard output as JSON lines.
    #[track_caller]
    pub fn json(&self) -> Vec<serde_json::Value> {
        crate::json_lines(&self.stdout)
    }
}

/// A process found in `/proc`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundProcess {
    /// Process id.
    pub pid: u32,
    /// Command line.
    pub args: Vec<String>,
}

impl FoundProcess {
    /// Returns the subcommand (`learner`, `rollout`, `serve`…), the first argument of our programs.
    pub fn command(&self) -> &str {
        self.args.get(1).map_or("", String::as_str)
    }

    /// Sends SIGKILL.
    pub fn kill(&self) {
        self.signal(Signal::SIGKILL);
    }

    /// Sends SIGSTOP: the process stands still until [`FoundProcess::resume`].
    pub fn pause(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Sends SIGCONT.
    pub fn resume(&self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&self, signal: Signal) {
        let _already_exited = kill(Pid::from_raw(self.pid.cast_signed()), signal);
    }
}

/// Returns all running processes that were started with `NAME=VALUE` in their environment.
pub(crate) fn with_variable(name: &str, value: &str) -> Vec<FoundProcess> {
    let variable = format!("{name}={value}").into_bytes();
    let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok())
        .filter_map(|pid| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
            environment.split(|b| *b == 0).any(|v| v == variable).then_some(())?;
            let command_line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let args: Vec<String> = command_line
                .split(|b| *b == 0)
                .filter(|a| !a.is_empty())
                .map(|a| String::from_utf8_lossy(a).into_owned())
                .collect();
            Some(FoundProcess { pid, args })
        })
        .collect()
}

/// Returns all running processes whose working directory is `dir` or below it.
pub(crate) fn in_directory(dir: &Path) -> Vec<FoundProcess> {
    let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(dir)))
        .map(|pid| FoundProcess { pid, args: Vec::new() })
        .collect()
}
