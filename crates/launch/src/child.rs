//! One role as a child process: its own process group, a stdin pipe whose end-of-file tells it that the supervisor is gone,
//! its log, and the line by which it announces its address.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use unveil_core::tell;

use crate::gpus::Gpu;
use crate::{LaunchError, io};

/// What a role is started with.
pub(crate) struct Start<'a> {
    pub name: &'a str,
    pub program: &'a Path,
    pub args: Vec<String>,
    pub log: &'a Path,
    /// The terminal shows what it says on stderr (it draws the progress line), not the log.
    pub shown: bool,
    /// Its GPU, where there are some; none = what the run sees.
    pub gpu: Option<&'a Gpu>,
}

/// A running role. Dropping it ends the process.
pub(crate) struct Role {
    pub name: String,
    /// Absent when the terminal shows what the role says.
    log: Option<PathBuf>,
    child: Child,
    lines: mpsc::Receiver<String>,
    _stdin: Option<ChildStdin>,
}

impl Role {
    /// Starts it.
    pub fn start(start: Start<'_>) -> Result<Self, LaunchError> {
        let Start { name, program, args, log, shown, gpu } = start;
        let stderr = if shown {
            Stdio::inherit()
        } else {
            File::options().create(true).append(true).open(log).map_err(io("cannot write", log))?.into()
        };
        let mut child = Command::new(program)
            .args(args)
            .args(gpu.and_then(Gpu::set).into_iter().flat_map(|set| ["--set", set]))
            .envs(gpu.map(Gpu::variable))
            // Roles share the cores: a thread that waits must not spin.
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

    /// Waits for the role's ready line and returns the address in it; `look` is asked meanwhile whether there is any use in waiting.
    pub fn address(
        &mut self,
        within: Duration,
        look: &mut dyn FnMut() -> Result<(), LaunchError>,
    ) -> Result<String, LaunchError> {
        let deadline = Instant::now() + within;
        while Instant::now() < deadline {
            look()?;
            if let Ok(line) = self.lines.recv_timeout(Duration::from_millis(100)) {
                let value: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
                if let Some(address) = value["address"].as_str() {
                    return Ok(address.to_owned());
                }
            } else if let Some(status) = self.exited() {
                return Err(self.failed(status));
            }
        }
        Err(LaunchError::NotReady { role: self.name.clone(), seconds: within.as_secs(), place: self.place() })
    }

    /// What the role printed on stdout since the last call.
    pub fn output(&self) -> Vec<String> {
        let mut all: Vec<String> = self.lines.try_iter().collect();
        while let Ok(line) = self.lines.recv_timeout(Duration::from_millis(200)) {
            all.push(line);
        }
        all
    }

    /// Exit status, when it has ended.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// The error of a role that ended by itself; shows the end of its log, and holds what the role could not write there.
    pub fn failed(&self, status: ExitStatus) -> LaunchError {
        let text = self.log.as_ref().and_then(|l| std::fs::read_to_string(l).ok()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        for line in &lines[lines.len().saturating_sub(8)..] {
            tell(&format!("  {}: {line}", self.name));
        }
        let unwritten = self.output().iter().find_map(|line| {
            let value: serde_json::Value = serde_json::from_str(line).ok()?;
            Some(format!("{status} ({})", value["error"].as_str()?))
        });
        let status = unwritten.unwrap_or_else(|| status.to_string());
        LaunchError::Role { role: self.name.clone(), status, place: self.place() }
    }

    /// Where to read what the role said.
    fn place(&self) -> String {
        self.log.as_ref().map_or_else(|| "above".to_owned(), |l| format!("above and in {}", l.display()))
    }

    /// Asks the role to end.
    pub fn terminate(&self) {
        let _gone = kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM);
    }

    /// Waits for the end until `deadline`, then kills it with its process group.
    pub fn reap(&mut self, deadline: Instant) -> Option<ExitStatus> {
        loop {
            if let Some(status) = self.exited() {
                return Some(status);
            }
            if Instant::now() >= deadline {
                let _gone = kill(Pid::from_raw(-self.child.id().cast_signed()), Signal::SIGKILL);
                return self.child.wait().ok();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        self.terminate();
        self.reap(Instant::now() + Duration::from_secs(2));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_of_a_role_whose_log_cannot_be_written_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let args = ["-c", r#"echo '{"error":"cannot write x: No space left on device"}'; exit 1"#].map(str::to_owned);
        let (program, log) = (Path::new("sh"), dir.path().join("eval.log"));
        let start = Start { name: "eval", program, args: args.to_vec(), log: &log, shown: false, gpu: None };
        let mut role = Role::start(start).unwrap();
        let status = role.reap(Instant::now() + Duration::from_secs(60)).unwrap();
        let said = role.failed(status).to_string();
        assert!(said.contains("eval ended with exit status: 1 (cannot write x: No space left on device)"), "{said}");
    }
}
