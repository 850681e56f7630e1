//! Checks before a run that the files and directories named by a configuration exist on this machine.

use std::path::Path;

use crate::error::ConfigError;
use crate::load::Loaded;
use crate::schema::{Config, DataKind, RelevanceKind};

/// Returns why `dir` is not an existing directory; `None` if it is. `name` is the key or flag to name in the message.
pub fn directory_problem(name: &str, dir: &Path) -> Option<String> {
    path_problem(name, dir, PathKind::Directory)
}

/// Returns why `dir` is not a model directory, judging by the files in it; `None` if it is one. `name` is the key or flag to name in the
/// message.
pub fn model_dir_problem(name: &str, dir: &Path) -> Option<String> {
    let shown = dir.display().to_string();
    let is_hub_name = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    if let Some(message) = directory_problem(name, dir) {
        // `organisation/name`
        let hub = !dir.exists()
            && shown.split_once('/').is_some_and(|(owner, model)| is_hub_name(owner) && is_hub_name(model));
        let advice = if hub {
            "; models of the Hugging Face Hub are not downloaded automatically: download it first"
        } else {
            ""
        };
        return Some(format!("{message}{advice}"));
    }
    let config = dir.join("config.json");
    (!config.is_file()).then(|| {
        format!("{name} is `{shown}`: it contains no config.json; give a model directory in Hugging Face layout")
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PathKind {
    File,
    Directory,
}

/// Returns why `path` is not an existing file or directory.
fn path_problem(name: &str, path: &Path, kind: PathKind) -> Option<String> {
    let (noun, opposite, exists) = match kind {
        PathKind::File => ("file", "a directory, not a file", path.is_file()),
        PathKind::Directory => ("directory", "a file, not a directory", path.is_dir()),
    };
    if exists {
        return None;
    }
    let base = match std::env::current_dir() {
        Ok(cwd) if path.is_relative() => format!(" (from {})", cwd.display()),
        _ => String::new(),
    };
    let problem = match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() || metadata.is_file() => format!("that is {opposite}"),
        // Pipes and devices can be read like files.
        Ok(_) if kind == PathKind::File => return None,
        Ok(_) => format!("that is not a {noun}"),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => format!("there is no such {noun}{base}"),
        Err(e) => format!("{e}{base}"),
    };
    Some(format!("{name} is `{}`: {problem}", path.display()))
}

impl Loaded {
    /// Checks that the configured model, data and files of the reward service exist.
    ///
    /// # Errors
    /// Returns [`ConfigError::Invalid`] with everything that is missing.
    pub fn check_paths(&self) -> Result<(), ConfigError> {
        let c = &self.config;
        let mut problems = Vec::new();
        if !c.model.dir.is_empty() {
            problems.extend(model_dir_problem("model.dir", Path::new(&c.model.dir)));
        }
        problems.extend(data_problem(c));
        if c.reward.address.is_empty() {
            problems.extend(reward_problems(c));
        }
        if problems.is_empty() { Ok(()) } else { Err(self.invalid(problems)) }
    }
}

/// Returns why `data.root` cannot be used; `None` if it can.
fn data_problem(c: &Config) -> Option<String> {
    match c.data.kind {
        DataKind::Synth => None,
        DataKind::Jsonl => path_problem("data.root", Path::new(&c.data.root), PathKind::File),
        // Already imported records are not imported again.
        DataKind::Voc if c.records().exists() => None,
        DataKind::Voc => directory_problem("data.root", Path::new(&c.data.root)),
    }
}

/// Returns the problems of the files read by a reward service that is started with the run.
fn reward_problems(c: &Config) -> Vec<String> {
    let r = &c.reward;
    let relevance = |kind| r.relevance.weight > 0.0 && r.relevance.kind == kind;
    let judge = relevance(RelevanceKind::Judge);
    let mut inputs = vec![
        (
            "reward.relevance.embedding_dir",
            &r.relevance.embedding_dir,
            PathKind::Directory,
            relevance(RelevanceKind::Embedding),
        ),
        ("reward.judge.prompt", &r.judge.prompt, PathKind::File, judge),
        ("reward.judge.ca", &r.judge.ca, PathKind::File, judge),
        ("reward.symbolic.table", &r.symbolic.table, PathKind::File, r.symbolic.weight > 0.0),
    ];
    inputs.extend(r.custom.iter().map(|custom| ("reward.custom.ca", &custom.ca, PathKind::File, true)));
    let used = inputs.into_iter().filter(|(_, path, _, used)| *used && !path.is_empty());
    used.filter_map(|(key, path, kind, _)| path_problem(key, Path::new(path), kind)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(sets: &[&str]) -> String {
        let sets: Vec<String> = sets.iter().map(|s| (*s).to_owned()).collect();
        let loaded = Loaded::new(&[], std::iter::empty(), &sets).unwrap();
        loaded.check_paths().map_or_else(|e| e.to_string(), |()| String::new())
    }

    #[test]
    fn missing_paths_are_reported_together_by_key() {
        assert_eq!(message(&[]), "");
        let both = message(&["model.dir=/no/such", "data.kind=jsonl", "data.root=/no/such.jsonl"]);
        assert!(both.contains("model.dir is `/no/such`: there is no such directory (in --set)"), "{both}");
        assert!(both.contains("data.root is `/no/such.jsonl`: there is no such file"), "{both}");
        let voc = message(&["data.kind=voc", "data.class=a", "data.root=/no/voc"]);
        assert!(voc.contains("data.root is `/no/voc`: there is no such directory"), "{voc}");
        let relative = message(&["data.kind=jsonl", "data.root=no-such.jsonl"]);
        let here = std::env::current_dir().unwrap();
        assert!(relative.contains(&format!("there is no such file (from {})", here.display())), "{relative}");
        let hub = message(&["model.dir=Qwen/Qwen2.5-VL-7B-Instruct"]);
        assert!(hub.contains("Hugging Face Hub") && hub.contains("download"), "{hub}");
        assert!(!message(&["model.dir=./a/b"]).contains("Hub"));
    }

    #[test]
    fn paths_of_the_wrong_kind_are_reported() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        let folder = dir.path().display().to_string();
        std::fs::write(&file, "").unwrap();
        let file = file.display().to_string();
        assert!(message(&[&format!("model.dir={file}")]).contains("a file, not a directory"));
        assert!(message(&[&format!("model.dir={folder}")]).contains("contains no config.json"));
        assert!(message(&["data.kind=jsonl", &format!("data.root={folder}")]).contains("a directory, not a file"));
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        assert_eq!(message(&[&format!("model.dir={folder}"), "data.kind=jsonl", &format!("data.root={file}")]), "");
    }

    #[test]
    fn reward_files_are_checked_for_a_local_service_only() {
        let sets =
            ["reward.symbolic.weight=1", "reward.symbolic.table=/no/table.toml", "reward.judge.prompt=/no/prompt"];
        let here = message(&sets);
        assert!(
            here.contains("reward.symbolic.table is `/no/table.toml`") && !here.contains("reward.judge.prompt"),
            "{here}"
        );
        assert_eq!(message(&[&sets[..], &["reward.address=http://127.0.0.1:1"]].concat()), "");
    }
}
