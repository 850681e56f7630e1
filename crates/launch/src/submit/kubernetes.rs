//! Converts a run configuration to values of the Helm chart in `cluster/helm/unveil`, and calls helm with them.
//!
//! Pods share no disk: checkpoints are in an object store, and every path of the configuration is a path inside the containers.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use unveil_config::Config;
use unveil_config::schema::DataKind;

use super::quote::{QuoteError, shell_word};

/// URL schemes of object stores.
const STORE_SCHEMES: [&str; 5] = ["s3://", "s3a://", "gs://", "az://", "azure://"];

/// Errors of a submission to Kubernetes.
#[derive(Debug, thiserror::Error)]
pub enum KubernetesError {
    /// The configuration is for a single machine; holds one message per problem.
    #[error("the configuration cannot run on Kubernetes:\n  {}", .0.join("\n  "))]
    Config(Vec<String>),
    /// The configuration cannot be written as TOML.
    #[error("configuration: {0}")]
    Toml(#[from] toml::ser::Error),
    /// The values cannot be written.
    #[error("cannot write {path}: {source}; name another file with --write")]
    Write {
        /// Path of the file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The command line of helm cannot be written for a shell.
    #[error("command line of helm: {0}")]
    CommandLine(#[from] QuoteError),
    /// helm exists but cannot be run.
    #[error("cannot run {program}: {source}")]
    Helm {
        /// The program.
        program: String,
        /// The cause.
        source: std::io::Error,
    },
    /// helm failed.
    #[error("`{command}` ended with {status}; see helm's messages above")]
    Refused {
        /// The command line, quoted for a shell.
        command: String,
        /// The exit status.
        status: String,
    },
}

/// A Helm release and the chart it installs.
#[derive(Debug, Clone)]
pub struct Release {
    /// Name of the release.
    pub name: String,
    /// Namespace; `None`: that of the current context.
    pub namespace: Option<String>,
    /// Chart: a directory, or a reference that helm understands.
    pub chart: String,
    /// The user's values files; they override the generated values, later files override earlier ones.
    pub values: Vec<PathBuf>,
    /// The program to run, normally `helm`.
    pub helm: OsString,
}

impl Release {
    /// Returns the arguments of `helm upgrade --install` with the generated values in `file`.
    pub fn install_args(&self, file: &Path) -> Vec<OsString> {
        self.args(&["upgrade", "--install"], file)
    }

    fn args(&self, verb: &[&str], file: &Path) -> Vec<OsString> {
        let mut out: Vec<OsString> = verb.iter().map(Into::into).collect();
        out.extend([(&self.name).into(), (&self.chart).into()]);
        out.extend(self.namespace.iter().flat_map(|n| ["--namespace".into(), OsString::from(n)]));
        for file in std::iter::once(file).chain(self.values.iter().map(PathBuf::as_path)) {
            out.extend(["--values".into(), file.into()]);
        }
        out
    }

    /// Renders the manifests for the values (`helm template`); returns `None` if helm is not installed.
    ///
    /// # Errors
    /// Returns [`KubernetesError::CommandLine`] if a shell could not repeat the call, [`KubernetesError::Helm`] if helm cannot be run, and
    /// [`KubernetesError::Refused`] if it rejects the values.
    pub fn manifests(&self, values: &str) -> Result<Option<String>, KubernetesError> {
        let args = self.args(&["template"], Path::new("-"));
        let command = shell_command(&self.helm, &args)?;
        let spawned = Command::new(&self.helm).args(&args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let Some(mut child) = self.if_installed(spawned)? else { return Ok(None) };
        let fail = |source| KubernetesError::Helm { program: self.helm.display().to_string(), source };
        // helm may reject a flag before it reads stdin; its own message is then the better one.
        let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(values.as_bytes()));
        let out = child.wait_with_output().map_err(fail)?;
        if !out.status.success() {
            return Err(KubernetesError::Refused { command, status: out.status.to_string() });
        }
        written.map_err(fail)?;
        Ok(Some(String::from_utf8_lossy(&out.stdout).into_owned()))
    }

    /// Writes the values to `file` and installs or upgrades the release; returns false if helm is not installed.
    ///
    /// # Errors
    /// Returns [`KubernetesError::CommandLine`] if a shell could not repeat the call, [`KubernetesError::Write`] if the file cannot be
    /// written, [`KubernetesError::Helm`] if helm cannot be run, and [`KubernetesError::Refused`] if it fails.
    pub fn install(&self, values: &str, file: &Path) -> Result<bool, KubernetesError> {
        let args = self.install_args(file);
        let command = shell_command(&self.helm, &args)?;
        let fail = |source| KubernetesError::Write { path: file.to_owned(), source };
        unveil_core::write_atomic(file, values.as_bytes()).map_err(fail)?;
        // helm's messages are for the user; stdout is reserved for results.
        let outcome = Command::new(&self.helm).args(&args).stdin(Stdio::null()).stdout(std::io::stderr()).status();
        match self.if_installed(outcome)? {
            None => Ok(false),
            Some(status) if status.success() => Ok(true),
            Some(status) => Err(KubernetesError::Refused { command, status: status.to_string() }),
        }
    }

    /// Returns `None` if the program does not exist.
    fn if_installed<T>(&self, outcome: std::io::Result<T>) -> Result<Option<T>, KubernetesError> {
        match outcome {
            Ok(value) => Ok(Some(value)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(KubernetesError::Helm { program: self.helm.display().to_string(), source }),
        }
    }
}

/// Returns a command line for a shell, with quotes around words that need them.
///
/// # Errors
/// Returns [`KubernetesError::CommandLine`] if a word is not UTF-8 or contains a NUL byte.
pub fn shell_command(program: &OsStr, args: &[OsString]) -> Result<String, KubernetesError> {
    let words = std::iter::once(program).chain(args.iter().map(OsString::as_os_str));
    Ok(words.map(shell_word).collect::<Result<Vec<_>, _>>()?.join(" "))
}

/// Returns the chart values for a configuration, as YAML.
///
/// # Errors
/// Returns [`KubernetesError::Config`] naming every key that needs a shared disk, and [`KubernetesError::Toml`].
pub fn helm_values(config: &Config) -> Result<String, KubernetesError> {
    let problems = problems(config);
    if !problems.is_empty() {
        return Err(KubernetesError::Config(problems));
    }
    let mut inside = config.clone();
    // The heads in this file have been read into the configuration.
    inside.reward.vision_relevance.heads_file.clear();
    let mut out = String::from("# Values of the Helm chart, written by `unveil submit kubernetes`.\n");
    let text = inside.to_toml()?;
    if text.chars().all(|c| c == '\n' || !c.is_control()) {
        out.push_str("config: |\n");
        for line in text.lines() {
            out.push_str(if line.is_empty() { "" } else { "  " });
            out.push_str(line);
            out.push('\n');
        }
    } else {
        out.push_str(&format!("config: {}\n", serde_json::Value::from(text)));
    }
    out.push_str(&format!("objectStore:\n  url: {}\n", serde_json::Value::from(config.checkpoint.url.as_str())));
    out.push_str(&format!("learner:\n  ranks: {}\n", config.learner.parallel.ranks));
    out.push_str(&format!("rollout:\n  replicas: {}\n", config.rollout.workers));
    out.push_str(&format!("stage1:\n  enabled: {}\n", config.sft.steps > 0));
    if !config.reward.address.is_empty() {
        out.push_str("# reward.address names a running service.\nreward:\n  enabled: false\n");
    }
    Ok(out)
}

/// Returns one message per key that cannot work on Kubernetes.
fn problems(c: &Config) -> Vec<String> {
    let mut out = Vec::new();
    let url = &c.checkpoint.url;
    if !STORE_SCHEMES.iter().any(|scheme| url.starts_with(scheme)) {
        out.push(format!(
            "checkpoint.url is `{url}`: pods share no disk, so use an object store (--set checkpoint.url=s3://bucket/prefix)"
        ));
    }
    if c.learner.steps == 0 {
        out.push("learner.steps is 0: the chart runs stage 2".into());
    }
    let r = &c.reward;
    let root = if c.data.kind == DataKind::Synth { "" } else { c.data.root.as_str() };
    let paths = [
        ("data.root", root),
        ("model.dir", &c.model.dir),
        ("run.dump_batch", &c.run.dump_batch),
        ("reward.judge.ca", &r.judge.ca),
        ("reward.judge.prompt", &r.judge.prompt),
        ("reward.relevance.embedding_dir", &r.relevance.embedding_dir),
        ("reward.symbolic.table", &r.symbolic.table),
        ("auth.token_file", &c.auth.token_file),
        ("tls.dir", &c.tls.dir),
    ];
    for (key, path) in paths.into_iter().filter(|(_, path)| !path.is_empty() && !Path::new(path).is_absolute()) {
        out.push(format!(
            "{key} is `{path}`: it is a path inside the containers, so make it absolute and mount the file or directory there \
             (`inputs` in the values)"
        ));
    }
    out
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn config() -> Config {
        let mut c = Config::default();
        c.checkpoint.url = "s3://bucket/runs/a".into();
        c.learner.parallel.ranks = 4;
        c.rollout.workers = 3;
        c
    }

    /// Parses the configuration under `config: |`.
    fn embedded_config(values: &str) -> Config {
        let lines = values.lines().skip_while(|l| *l != "config: |").skip(1);
        let lines = lines.take_while(|l| l.is_empty() || l.starts_with("  ")).map(|l| l.get(2..).unwrap_or_default());
        toml::from_str(&lines.collect::<Vec<_>>().join("\n")).unwrap()
    }

    #[test]
    fn configuration_becomes_values() {
        let mut c = config();
        c.data.question = "What is abnormal?\nSay \"where\": #1\ttoo".into();
        let text = helm_values(&c).unwrap();
        for line in ["  url: \"s3://bucket/runs/a\"", "  ranks: 4", "  replicas: 3", "  enabled: true"] {
            assert!(text.lines().any(|l| l == line), "{line}: {text}");
        }
        assert!(!text.contains("\nreward:"), "{text}");
        if text.contains("config: |\n") {
            assert_eq!(embedded_config(&text), c);
        } else {
            let line = text.lines().find_map(|l| l.strip_prefix("config: ")).unwrap();
            let toml: String = serde_json::from_str(line).unwrap();
            assert_eq!(toml::from_str::<Config>(&toml).unwrap(), c);
        }
        assert_eq!(embedded_config(&helm_values(&config()).unwrap()), config(), "a block of lines if possible");
        c.reward.address = "https://scores.example:7071".into();
        c.sft.steps = 0;
        let text = helm_values(&c).unwrap();
        assert!(
            text.contains("stage1:\n  enabled: false\n") && text.contains("\nreward:\n  enabled: false\n"),
            "{text}"
        );
    }

    #[test]
    fn keys_that_need_a_shared_disk_are_rejected() {
        let mut c = config();
        c.checkpoint.url = "runs/a".into();
        c.learner.steps = 0;
        c.model.dir = "models/x".into();
        c.reward.symbolic.table = "/inputs/table.json".into();
        c.data.kind = DataKind::Jsonl;
        c.data.root = "records.jsonl".into();
        let e = helm_values(&c).unwrap_err().to_string();
        for word in ["checkpoint.url is `runs/a`", "s3://", "learner.steps is 0", "data.root", "model.dir", "`inputs`"]
        {
            assert!(e.contains(word), "{word}: {e}");
        }
        assert!(!e.contains("symbolic"), "{e}");
    }

    /// Returns a release whose helm is a script that records its arguments.
    fn helm(dir: &Path, script: &str) -> Release {
        let program = dir.join("helm");
        std::fs::write(&program, format!("#!/bin/sh\nprintf '%s\\n' \"$@\" > {}/args\n{script}\n", dir.display()))
            .unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        Release {
            name: "demo".into(),
            namespace: Some("med".into()),
            chart: "cluster/helm/unveil".into(),
            values: vec!["my values.yaml".into()],
            helm: program.into(),
        }
    }

    fn folder(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("unveil-submit-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn helm_receives_the_values() {
        let dir = folder("install");
        let release = helm(&dir, "cat");
        let file = dir.join("demo.values.yaml");
        assert!(release.install("a: 1\n", &file).unwrap());
        let args = std::fs::read_to_string(dir.join("args")).unwrap();
        let generated = file.display().to_string();
        let wanted = ["upgrade", "--install", "demo", "cluster/helm/unveil", "--namespace", "med", "--values"];
        assert_eq!(
            args.lines().collect::<Vec<_>>(),
            [&wanted[..], &[&generated, "--values", "my values.yaml"]].concat()
        );
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "a: 1\n");
        assert_eq!(release.manifests("a: 1\n").unwrap().as_deref(), Some("a: 1\n"), "values are passed on stdin");
        let command = shell_command(&release.helm, &release.install_args(&file)).unwrap();
        assert!(command.ends_with("--values 'my values.yaml'"), "{command}");
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn command_line_that_is_not_utf8_is_rejected_before_helm_runs() {
        let dir = folder("bytes");
        let mut release = helm(&dir, "cat");
        release.values = vec![OsStr::from_bytes(b"my \xff.yaml").into()];
        let file = dir.join("v.yaml");
        for e in [release.install("a: 1\n", &file).unwrap_err(), release.manifests("a: 1\n").unwrap_err()] {
            assert!(matches!(e, KubernetesError::CommandLine(QuoteError::NotUtf8(_))), "{e}");
            assert!(e.to_string().contains("my \\xFF.yaml"), "{e}");
        }
        assert!(!file.exists() && !dir.join("args").exists(), "helm ran");
        let nul = shell_command(OsStr::new("helm"), &["a\0".into()]);
        assert!(matches!(nul, Err(KubernetesError::CommandLine(QuoteError::Nul(_)))));
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn failing_and_missing_helm_are_reported() {
        let dir = folder("refuse");
        let mut release = helm(&dir, "exit 3");
        let e = release.install("a: 1\n", &dir.join("v.yaml")).unwrap_err().to_string();
        assert!(e.contains("upgrade --install demo") && e.contains('3'), "{e}");
        assert!(matches!(release.manifests("a: 1\n"), Err(KubernetesError::Refused { .. })));
        std::fs::write(dir.join("none"), "no folder").unwrap();
        let e = release.install("a: 1\n", &dir.join("none/v.yaml")).unwrap_err().to_string();
        assert!(e.contains("none/v.yaml") && e.contains("--write"), "{e}");
        release.helm = dir.join("no-helm").into();
        assert!(!release.install("a: 1\n", &dir.join("v.yaml")).unwrap());
        assert_eq!(release.manifests("a: 1\n").unwrap(), None);
        std::fs::remove_dir_all(dir).unwrap();
    }
}
