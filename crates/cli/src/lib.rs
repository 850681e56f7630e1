//! What both binaries share: configuration arguments, exit codes, the runtime of a role. Must not hold any logic of a room.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use unveil_config::schema::LogForm;
use unveil_config::{Config, ConfigError, Loaded};
use unveil_core::{redact, tell};
use unveil_service::{CancellationToken, ServiceError, TraceOptions, Tracing, init_tracing};

/// Configuration file and overrides.
#[derive(Debug, Clone, Args)]
pub struct ConfigArgs {
    /// Configuration file (TOML); defaults alone without it.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Overrides one key, e.g. `--set run.seed=1`; may be repeated.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub sets: Vec<String>,
}

impl ConfigArgs {
    /// Loads and checks the configuration.
    pub fn load(&self) -> Result<Config, ConfigError> {
        self.loaded().map(|loaded| loaded.config)
    }

    /// The same, with where each value comes from.
    pub fn loaded(&self) -> Result<Loaded, ConfigError> {
        Loaded::new(self.config.as_deref(), unveil_config::environment().into_iter(), &self.sets)
    }
}

/// Logs and spans of this process as the configuration has them. `level` is a filter of log lines; keep the result until the role
/// has ended.
///
/// # Errors
/// The collector's address cannot be used.
pub fn telemetry(config: &Config, role: &str, level: &str) -> Result<Tracing, ServiceError> {
    let json = config.telemetry.log == LogForm::Json;
    init_tracing(&TraceOptions { role, level, json, run: &config.run.dir, collector: &config.telemetry.otlp_endpoint })
}

/// What a role process needs besides its configuration.
#[derive(Debug, Clone, Args)]
pub struct RoleArgs {
    /// Configuration.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Ends when standard input ends (set by `unveil train`, whose death must end its roles).
    #[arg(long, hide = true)]
    pub supervised: bool,
}

/// A stop that was asked for (exit code 130) rather than a failure (1); what is written is whole.
#[derive(Debug)]
pub enum Stop {
    /// By a signal.
    Interrupted,
    /// By the supervisor, which tells the person itself.
    Supervised,
}

impl Stop {
    /// The stop of a role.
    pub fn of_role(supervised: bool) -> Self {
        if supervised { Self::Supervised } else { Self::Interrupted }
    }
}

impl std::fmt::Display for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Stop {}

/// Prints an error as one line and gives the exit code: 0 done, 1 failed, 2 wrong configuration, 130 interrupted.
pub fn exit(result: anyhow::Result<()>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    let said = match error.downcast_ref::<Stop>() {
        Some(Stop::Supervised) => None,
        Some(Stop::Interrupted) => Some(error.to_string()),
        None => Some(redact(&one_line(&error)).to_string()),
    };
    if let Some(said) = said
        && !tell(&format!("error: {said}"))
    {
        // Where the log cannot be written, the disk being full, a supervisor hears of it all the same.
        let _nobody_listens = writeln!(std::io::stdout(), "{}", serde_json::json!({ "error": said }));
    }
    if error.downcast_ref::<ConfigError>().is_some() {
        ExitCode::from(2)
    } else if error.downcast_ref::<Stop>().is_some() {
        ExitCode::from(130)
    } else {
        ExitCode::FAILURE
    }
}

/// The error with its causes; one whose text an earlier message already holds is not said again.
fn one_line(error: &anyhow::Error) -> String {
    error
        .chain()
        .map(ToString::to_string)
        .reduce(|said, cause| if said.contains(&cause) { said } else { format!("{said}: {cause}") })
        .unwrap_or_default()
}

/// Runs an async role: a runtime of `threads` worker threads, a token that is cancelled by SIGINT, SIGTERM, or the end of
/// standard input when `supervised`.
pub fn run_role<F, T>(supervised: bool, threads: usize, role: impl FnOnce(CancellationToken) -> F) -> anyhow::Result<T>
where
    F: Future<Output = anyhow::Result<T>>,
{
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads.max(1)).enable_all().build()?;
    let result = runtime.block_on(async {
        let token = unveil_service::cancel_on_signal()?;
        if supervised {
            let parent = token.clone();
            when_input_ends(move || parent.cancel());
        }
        role(token).await
    });
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    result
}

/// For supervised commands that have no stop token: the process ends when standard input does.
pub fn end_with_supervisor() {
    when_input_ends(|| std::process::exit(130));
}

fn when_input_ends(act: impl FnOnce() + Send + 'static) {
    std::thread::spawn(move || {
        let _end_of_input = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        act();
    });
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    #[test]
    fn a_cause_is_said_once() {
        let cause = || std::io::Error::other("disk on fire");
        let e = Err::<(), _>(cause()).context("cannot write x: disk on fire").unwrap_err();
        assert_eq!(super::one_line(&e), "cannot write x: disk on fire");
        let e = Err::<(), _>(cause()).context("cannot write x").unwrap_err();
        assert_eq!(super::one_line(&e), "cannot write x: disk on fire");
    }
}
