//! A run configuration as values of the Helm chart in `cluster/helm/unveil`, and the calls of helm that use them.
//!
//! Pods share no disk: checkpoints lie in an object store, and every path of the configuration is one inside the containers. Must not
//! know: what the chart makes of the values.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use unveil_config::Config;
use unveil_config::schema::DataKind;

/// Schemes of object stores that a checkpoint URL may have.
const STORES: [&str; 5] = ["s3://", "s3a://", "gs://", "az://", "azure://"];

/// Why a run cannot be handed to Kubernetes.
#[derive(Debug, thiserror::Error)]
pub enum KubernetesError {
    /// The configuration is one for a single machine; all faults at once.
    #[error("the configuration cannot run on Kubernetes:\n  {}", .0.join("\n  "))]
    Config(Vec<String>),
    /// The configuration cannot be written as TOML.
    #[error("configuration: {0}")]
    Toml(#[from] toml::ser::Error),
    /// The values cannot be written.
    #[error("cannot write {path}: {source}; name another file with --write")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// helm is there and cannot be run.
    #[error("cannot run {program}: {source}")]
    Helm {
        /// What was called.
        program: String,
        /// Why.
        source: std::io::Error,
    },
    /// helm refused.
    #[error("`{command}` ended with {status}; what helm says is above")]
    Refused {
        /// The call, as a shell would take it.
        command: String,
        /// How it ended.
        status: String,
    },
}

/// What the values are applied to.
#[derive(Debug, Clone)]
pub struct Release {
    /// Name of the release.
    pub name: String,
    /// Namespace; none = that of the current context.
    pub namespace: Option<String>,
    /// Chart: a directory, or a reference that helm understands.
    pub chart: String,
    /// Values files of the user's own; they win over the generated ones, and the last one wins.
    pub values: Vec<PathBuf>,
    /// The program, `helm` unless a test says otherwise.
    pub helm: OsString,
}

impl Release {
    /// `helm upgrade --install` with the generated values in `file`.
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

    /// The manifests that the values make (`helm template`); none where helm is not installed.
    ///
    /// # Errors
    /// helm cannot be run, or refuses the values.
    pub fn manifests(&self, values: &str) -> Result<Option<String>, KubernetesError> {
        let args = self.args(&["template"], Path::new("-"));
        let spawned = Command::new(&self.helm).args(&args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let Some(mut child) = self.found(spawned)? else { return Ok(None) };
        let fail = |source| KubernetesError::Helm { program: self.helm.display().to_string(), source };
        // helm may refuse a flag before it reads: its own message is the better one.
        let fed = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(values.as_bytes()));
        let out = child.wait_with_output().map_err(fail)?;
        if !out.status.success() {
            return Err(self.refused(&args, &out.status.to_string()));
        }
        fed.map_err(fail)?;
        Ok(Some(String::from_utf8_lossy(&out.stdout).into_owned()))
    }

    /// Writes the values to `file` and installs or upgrades the release; false where helm is not installed.
    ///
    /// # Errors
    /// The file cannot be written; helm cannot be run, or refuses.
    pub fn install(&self, values: &str, file: &Path) -> Result<bool, KubernetesError> {
        let fail = |source| KubernetesError::Write { path: file.to_owned(), source };
        unveil_core::write_atomic(file, values.as_bytes()).map_err(fail)?;
        let args = self.install_args(file);
        // What helm says is for the person; stdout is for results.
        let ran = Command::new(&self.helm).args(&args).stdin(Stdio::null()).stdout(std::io::stderr()).status();
        match self.found(ran)? {
            None => Ok(false),
            Some(status) if status.success() => Ok(true),
            Some(status) => Err(self.refused(&args, &status.to_string())),
        }
    }

    fn found<T>(&self, outcome: std::io::Result<T>) -> Result<Option<T>, KubernetesError> {
        match outcome {
            Ok(there) => Ok(Some(there)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(KubernetesError::Helm { program: self.helm.display().to_string(), source }),
        }
    }

    fn refused(&self, args: &[OsString], status: &str) -> KubernetesError {
        KubernetesError::Refused { command: shell(&self.helm, args), status: status.to_owned() }
    }
}

/// A call as a shell takes it: what is not plain stands in single quotes.
pub fn shell(program: &OsString, args: &[OsString]) -> String {
    let quoted = |word: &OsString| {
        let word = word.display().to_string();
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:@=+,".contains(c);
        if !word.is_empty() && word.chars().all(plain) { word } else { format!("'{}'", word.replace('\'', r"'\''")) }
    };
    std::iter::once(program).chain(args).map(quoted).collect::<Vec<_>>().join(" ")
}

/// The values that a configuration stands for, as YAML.
///
/// # Errors
/// [`KubernetesError::Config`] names every key that only makes sense where roles share a disk.
pub fn values(config: &Config) -> Result<String, KubernetesError> {
    let faults = faults(config);
    if !faults.is_empty() {
        return Err(KubernetesError::Config(faults));
    }
    let mut inside = config.clone();
    // Its heads are in the configuration already.
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
        out.push_str("# reward.address names a service that runs already.\nreward:\n  enabled: false\n");
    }
    Ok(out)
}

fn faults(c: &Config) -> Vec<String> {
    let mut out = Vec::new();
    let url = &c.checkpoint.url;
    if !STORES.iter().any(|scheme| url.starts_with(scheme)) {
        out.push(format!(
            "checkpoint.url is `{url}`: pods share no disk, so name an object store (--set checkpoint.url=s3://bucket/prefix)"
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
            "{key} is `{path}`: it is a path inside the containers, so make it absolute and mount what it names \
             (`inputs` in the values)"
        ));
    }
    out
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn config() -> Config {
        let mut c = Config::default();
        c.checkpoint.url = "s3://bucket/runs/a".into();
        (c.learner.parallel.ranks, c.rollout.workers) = (4, 3);
        c
    }

    /// What stands under `config: |`.
    fn inner(values: &str) -> Config {
        let lines = values.lines().skip_while(|l| *l != "config: |").skip(1);
        let lines = lines.take_while(|l| l.is_empty() || l.starts_with("  ")).map(|l| l.get(2..).unwrap_or_default());
        toml::from_str(&lines.collect::<Vec<_>>().join("\n")).unwrap()
    }

    #[test]
    fn a_configuration_becomes_values() {
        let mut c = config();
        c.data.question = "What is abnormal?\nSay \"where\": #1\ttoo".into();
        let text = values(&c).unwrap();
        for line in ["  url: \"s3://bucket/runs/a\"", "  ranks: 4", "  replicas: 3", "  enabled: true"] {
            assert!(text.lines().any(|l| l == line), "{line}: {text}");
        }
        assert!(!text.contains("\nreward:"), "{text}");
        if text.contains("config: |\n") {
            assert_eq!(inner(&text), c);
        } else {
            let line = text.lines().find_map(|l| l.strip_prefix("config: ")).unwrap();
            let toml: String = serde_json::from_str(line).unwrap();
            assert_eq!(toml::from_str::<Config>(&toml).unwrap(), c);
        }
        assert_eq!(inner(&values(&config()).unwrap()), config(), "as a block of lines where that is possible");
        c.reward.address = "https://scores.example:7071".into();
        c.sft.steps = 0;
        let text = values(&c).unwrap();
        assert!(
            text.contains("stage1:\n  enabled: false\n") && text.contains("\nreward:\n  enabled: false\n"),
            "{text}"
        );
    }

    #[test]
    fn what_needs_a_shared_disk_is_refused() {
        let mut c = config();
        c.checkpoint.url = "runs/a".into();
        c.learner.steps = 0;
        (c.model.dir, c.reward.symbolic.table) = ("models/x".into(), "/inputs/table.json".into());
        (c.data.kind, c.data.root) = (DataKind::Jsonl, "records.jsonl".into());
        let e = values(&c).unwrap_err().to_string();
        for word in ["checkpoint.url is `runs/a`", "s3://", "learner.steps is 0", "data.root", "model.dir", "`inputs`"]
        {
            assert!(e.contains(word), "{word}: {e}");
        }
        assert!(!e.contains("symbolic"), "{e}");
    }

    /// A stand-in for helm that writes down how it was called, and what it got on stdin.
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
    fn helm_gets_the_values() {
        let dir = folder("install");
        let (release, file) = (helm(&dir, "cat"), dir.join("demo.values.yaml"));
        assert!(release.install("a: 1\n", &file).unwrap());
        let args = std::fs::read_to_string(dir.join("args")).unwrap();
        let generated = file.display().to_string();
        let wanted = ["upgrade", "--install", "demo", "cluster/helm/unveil", "--namespace", "med", "--values"];
        assert_eq!(
            args.lines().collect::<Vec<_>>(),
            [&wanted[..], &[&generated, "--values", "my values.yaml"]].concat()
        );
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "a: 1\n");
        assert_eq!(release.manifests("a: 1\n").unwrap().as_deref(), Some("a: 1\n"), "values come in by stdin");
        let command = shell(&release.helm, &release.install_args(&file));
        assert!(command.ends_with("--values 'my values.yaml'"), "{command}");
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn helm_refuses_or_is_not_there() {
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
