//! One role as a child process: with its own process group, a log, a stdin pipe whose end of file tells it that the supervisor has ended,
//! and a line on stdout that announces its address.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use unveil_core::stderr_line;

use crate::gpus::Gpu;
use crate::{LaunchError, io};

/// How a role is started.
pub(crate) struct RoleCommand<'a> {
    pub name: &'a str,
    pub program: &'a Path,
    pub args: Vec<String>,
    pub log: &'a Path,
    /// Whether its stderr goes to the terminal (it draws the progress line) instead of the log.
    pub shown: bool,
    /// Its GPU; `None`: all that the run sees.
    pub gpu: Option<&'a Gpu>,
}

/// A running role. The process is ended on drop.
pub(crate) struct RoleProcess {
    pub name: String,
    /// Path of the log; `None` if stderr goes to the terminal.
    log: Option<PathBuf>,
    child: Child,
    lines: mpsc::Receiver<String>,
    _stdin: Option<ChildStdin>,
}

impl RoleProcess {
    /// Starts the process.
    pub(crate) fn start(command: RoleCommand<'_>) -> Result<Self, LaunchError> {
        let RoleCommand { name, program, args, log, shown, gpu } = command;
        let stderr = if shown {
            Stdio::inherit()
        } else {
            File::options().create(true).append(true).open(log).map_err(io("cannot write", log))?.into()
        };
        let mut child = Command::new(program)
            .args(args)
            .args(gpu.and_then(Gpu::config_override).into_iter().flat_map(|set| ["--set", set]))
            .envs(gpu.map(Gpu::env_variable))
            // Roles share the cores, so waiting threads must not spin.
            .env("OMP_WAIT_POLICY", "PASSIVE")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .process_group(0)
            .spawn()
            .map_err(io("cannot start", program))?;
        let (tx, lines) = mpsc::channel();
        if let Some(out) = child.stdout.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(out).lines().map_while(Result::ok) {
                    if tx.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        let stdin = child.stdin.take();
        Ok(Self { name: name.to_owned(), log: (!shown).then(|| log.to_owned()), child, lines, _stdin: stdin })
    }

    /// Waits for the role's ready line and returns the address in it. An error of `check`, which is called meanwhile, ends the wait.
    pub(crate) fn wait_for_address(
        &mut self,
        timeout: Duration,
        check: &mut dyn FnMut() -> Result<(), LaunchError>,
    ) -> Result<String, LaunchError> {
        let deadline = Instant::now() + timeout;
        while Instant::now() < deadline {
            check()?;
            if let Ok(line) = self.lines.recv_timeout(Duration::from_millis(100)) {
                let value: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
                if let Some(address) = value["address"].as_str() {
                    return Ok(address.to_owned());
                }
            } else if let Some(status) = self.exit_status() {
                return Err(self.failure(status));
            }
        }
        Err(LaunchError::NotReady { role: self.name.clone(), seconds: timeout.as_secs(), place: self.log_hint() })
    }

    /// Returns the lines that the role printed on stdout since the last call.
    pub(crate) fn output(&self) -> Vec<String> {
        let mut all: Vec<String> = self.lines.try_iter().collect();
        while let Ok(line) = self.lines.recv_timeout(Duration::from_millis(200)) {
            all.push(line);
        }
        all
    }

    /// Returns the exit status if the process has ended.
    pub(crate) fn exit_status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Returns the error for a role that ended by itself, including what it could not write to its log, and prints the end of the log.
    pub(crate) fn failure(&self, status: ExitStatus) -> LaunchError {
        let text = self.log.as_ref().and_then(|l| std::fs::read_to_string(l).ok()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        for line in &lines[lines.len().saturating_sub(8)..] {
            stderr_line(&format!("  {}: {line}", self.name));
        }
        let unwritten = self.output().iter().find_map(|line| {
            let value: serde_json::Value = serde_json::from_str(line).ok()?;
            Some(format!("{status} ({})", value["error"].as_str()?))
        });
        let status = unwritten.unwrap_or_else(|| status.to_string());
        LaunchError::Role { role: self.name.clone(), status, place: self.log_hint() }
    }

    /// Returns where the role's messages can be read.
    fn log_hint(&self) -> String {
        self.log.as_ref().map_or_else(|| "above".to_owned(), |l| format!("above and in {}", l.display()))
    }

    /// Sends SIGTERM.
    pub(crate) fn terminate(&self) {
        let _may_have_ended = kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM);
    }

    /// Waits until `deadline` for the process to end, then kills its process group.
    pub(crate) fn reap(&mut self, deadline: Instant) -> Option<ExitStatus> {
        loop {
            if let Some(status) = self.exit_status() {
                return Some(status);
            }
            if Instant::now() >= deadline {
                let _may_have_ended = kill(Pid::from_raw(-self.child.id().cast_signed()), Signal::SIGKILL);
                return self.child.wait().ok();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for RoleProcess {
    fn drop(&mut self) {
        self.terminate();
        self.reap(Instant::now() + Duration::from_secs(2));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_includes_what_could_not_be_logged() {
        let dir = tempfile::tempdir().unwrap();
        let args = ["-c", r#"echo '{"error":"cannot write x: No space left on device"}'; exit 1"#].map(str::to_owned);
        let program = Path::new("sh");
        let log = dir.path().join("eval.log");
        let command = RoleCommand { name: "eval", program, args: args.to_vec(), log: &log, shown: false, gpu: None };
        let mut role = RoleProcess::start(command).unwrap();
        let status = role.reap(Instant::now() + Duration::from_secs(60)).unwrap();
        let message = role.failure(status).to_string();
        assert!(
            message.contains("eval ended with exit status: 1 (cannot write x: No space left on device)"),
            "{message}"
        );
    }
}
