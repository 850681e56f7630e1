//! Code shared by both binaries: configuration arguments, exit codes, the runtime of a role. Must not contain the logic of any crate.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use unveil_config::schema::LogFormat;
use unveil_config::{Config, ConfigError, Loaded};
use unveil_core::{redact, stderr_line};
use unveil_service::{CancellationToken, ServiceError, TraceOptions, Tracing, init_tracing};

/// Configuration files and overrides.
#[derive(Debug, Clone, Args)]
pub struct ConfigArgs {
    /// Configuration file (TOML); repeatable, later files override earlier ones. Without one, the defaults apply.
    #[arg(long, value_name = "FILE")]
    pub config: Vec<PathBuf>,
    /// Overrides a key, e.g. `--set run.seed=1`; repeatable.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub sets: Vec<String>,
}

impl ConfigArgs {
    /// Loads and checks the configuration.
    ///
    /// # Errors
    /// Returns a [`ConfigError`] with all problems of one kind.
    pub fn load(&self) -> Result<Config, ConfigError> {
        self.load_with_origins().map(|loaded| loaded.config)
    }

    /// Loads and checks the configuration, with the origins of its values.
    ///
    /// # Errors
    /// Returns a [`ConfigError`] with all problems of one kind.
    pub fn load_with_origins(&self) -> Result<Loaded, ConfigError> {
        Loaded::new(&self.config, unveil_config::environment().into_iter(), &self.sets)
    }
}

/// Sets up logs and traces of this process as configured. `level` filters log lines; keep the result until the role has ended.
///
/// # Errors
/// Returns a [`ServiceError`] if the address of the collector is invalid.
pub fn init_telemetry(config: &Config, role: &str, level: &str) -> Result<Tracing, ServiceError> {
    let json = config.telemetry.log == LogFormat::Json;
    init_tracing(&TraceOptions { role, level, json, run: &config.run.dir, collector: &config.telemetry.otlp_endpoint })
}

/// Arguments of a role process.
#[derive(Debug, Clone, Args)]
pub struct RoleArgs {
    /// Configuration.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Exits when standard input ends (set by `unveil train`, whose death must end its roles).
    #[arg(long, hide = true)]
    pub supervised: bool,
}

/// A requested stop (exit code 130) rather than a failure (1); written files are complete.
#[derive(Debug)]
pub enum Stop {
    /// Stopped by a signal.
    Interrupted,
    /// Stopped by the supervisor, which reports it to the user itself.
    Supervised,
}

impl Stop {
    /// Returns the kind of stop of a role.
    pub fn for_role(supervised: bool) -> Self {
        if supervised { Self::Supervised } else { Self::Interrupted }
    }
}

impl std::fmt::Display for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Stop {}

/// Prints an error as one line and returns the exit code: 0 success, 1 failure, 2 wrong configuration, 130 interrupted.
pub fn exit(result: anyhow::Result<()>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    let message = match error.downcast_ref::<Stop>() {
        Some(Stop::Supervised) => None,
        Some(Stop::Interrupted) => Some(error.to_string()),
        None => Some(redact(&one_line(&error)).to_string()),
    };
    if let Some(message) = message
        && !stderr_line(&format!("error: {message}"))
    {
        // If the log cannot be written, for example on a full disk, the supervisor still gets the error through stdout.
        let _closed = writeln!(std::io::stdout(), "{}", serde_json::json!({ "error": message }));
    }
    if error.downcast_ref::<ConfigError>().is_some() {
        ExitCode::from(2)
    } else if error.downcast_ref::<Stop>().is_some() {
        ExitCode::from(130)
    } else {
        ExitCode::FAILURE
    }
}

/// Formats the error with its causes; causes whose text is already included are left out.
fn one_line(error: &anyhow::Error) -> String {
    error
        .chain()
        .map(ToString::to_string)
        .reduce(|line, cause| if line.contains(&cause) { line } else { format!("{line}: {cause}") })
        .unwrap_or_default()
}

/// Runs an async role on a runtime with `threads` worker threads. Its token is cancelled by SIGINT, SIGTERM and, if `supervised`, by the end
/// of standard input.
///
/// # Errors
/// Returns the error of the role, or of setting up the runtime and the signal handlers.
pub fn run_role<F, T>(supervised: bool, threads: usize, role: impl FnOnce(CancellationToken) -> F) -> anyhow::Result<T>
where
    F: Future<Output = anyhow::Result<T>>,
{
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads.max(1)).enable_all().build()?;
    let result = runtime.block_on(async {
        let token = unveil_service::cancel_on_signal()?;
        if supervised {
            let parent = token.clone();
            on_stdin_end(move || parent.cancel());
        }
        role(token).await
    });
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    result
}

/// Exits the process when standard input ends; for supervised commands without a stop token.
#[expect(clippy::disallowed_methods, reason = "such a command has nothing to finish, and no other way to stop it")]
pub fn exit_with_supervisor() {
    on_stdin_end(|| std::process::exit(130));
}

/// Calls `action` on a separate thread when standard input ends.
fn on_stdin_end(action: impl FnOnce() + Send + 'static) {
    std::thread::spawn(move || {
        let _end_of_input = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        action();
    });
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    #[test]
    fn causes_are_printed_once() {
        let cause = || std::io::Error::other("disk on fire");
        let e = Err::<(), _>(cause()).context("cannot write x: disk on fire").unwrap_err();
        assert_eq!(super::one_line(&e), "cannot write x: disk on fire");
        let e = Err::<(), _>(cause()).context("cannot write x").unwrap_err();
        assert_eq!(super::one_line(&e), "cannot write x: disk on fire");
    }
}
