//! What a configuration names on the disk of this machine: whether it is there, before work begins.

use std::path::Path;

use crate::load::{ConfigError, Loaded};
use crate::schema::{Config, DataKind, RelevanceKind};

/// What is wrong with a directory that must be there; none where nothing is. `name` is what it is called: a key, a flag.
pub fn directory_fault(name: &str, dir: &Path) -> Option<String> {
    fault(name, dir, Kind::Directory)
}

/// What is wrong with a model directory as far as its names tell; none where nothing is. `name` is what it is called.
pub fn model_fault(name: &str, dir: &Path) -> Option<String> {
    let shown = dir.display().to_string();
    let plain = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    if let Some(said) = directory_fault(name, dir) {
        // `organisation/name`
        let hub = !dir.exists() && shown.split_once('/').is_some_and(|(owner, model)| plain(owner) && plain(model));
        let more = if hub { "; names of the Hugging Face Hub are not looked up: download it first" } else { "" };
        return Some(format!("{said}{more}"));
    }
    let config = dir.join("config.json");
    (!config.is_file()).then(|| {
        format!("{name} is `{shown}`: there is no config.json in it; name a model directory in Hugging Face layout")
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    File,
    Directory,
}

fn fault(name: &str, path: &Path, kind: Kind) -> Option<String> {
    let (word, other, right) = match kind {
        Kind::File => ("file", "a directory, not a file", path.is_file()),
        Kind::Directory => ("directory", "a file, not a directory", path.is_dir()),
    };
    if right {
        return None;
    }
    let here = match std::env::current_dir() {
        Ok(cwd) if path.is_relative() => format!(" (from {})", cwd.display()),
        _ => String::new(),
    };
    let what = match std::fs::metadata(path) {
        Ok(found) if found.is_dir() || found.is_file() => format!("that is {other}"),
        // Pipes and devices can be read.
        Ok(_) if kind == Kind::File => return None,
        Ok(_) => format!("that is no {word}"),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => format!("there is no such {word}{here}"),
        Err(e) => format!("{e}{here}"),
    };
    Some(format!("{name} is `{}`: {what}", path.display()))
}

impl Loaded {
    /// Checks that the model, the data and the files of the reward service that are named are there.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with everything that is missing.
    pub fn places(&self) -> Result<(), ConfigError> {
        let c = &self.config;
        let mut faults = Vec::new();
        if !c.model.dir.is_empty() {
            faults.extend(model_fault("model.dir", Path::new(&c.model.dir)));
        }
        faults.extend(data_fault(c));
        if c.reward.address.is_empty() {
            faults.extend(reward_faults(c));
        }
        if faults.is_empty() { Ok(()) } else { Err(self.refuse(faults)) }
    }
}

/// What is wrong with `data.root`; none where nothing is.
fn data_fault(c: &Config) -> Option<String> {
    match c.data.kind {
        DataKind::Synth => None,
        DataKind::Jsonl => fault("data.root", Path::new(&c.data.root), Kind::File),
        // What was imported once is not imported again.
        DataKind::Voc if c.records().exists() => None,
        DataKind::Voc => directory_fault("data.root", Path::new(&c.data.root)),
    }
}

/// Files that the reward service reads, which is started beside the run.
fn reward_faults(c: &Config) -> Vec<String> {
    let r = &c.reward;
    let relevance = |kind| r.relevance.weight > 0.0 && r.relevance.kind == kind;
    let judge = relevance(RelevanceKind::Judge);
    let mut wanted = vec![
        (
            "reward.relevance.embedding_dir",
            &r.relevance.embedding_dir,
            Kind::Directory,
            relevance(RelevanceKind::Embedding),
        ),
        ("reward.judge.prompt", &r.judge.prompt, Kind::File, judge),
        ("reward.judge.ca", &r.judge.ca, Kind::File, judge),
        ("reward.symbolic.table", &r.symbolic.table, Kind::File, r.symbolic.weight > 0.0),
    ];
    wanted.extend(r.custom.iter().map(|custom| ("reward.custom.ca", &custom.ca, Kind::File, true)));
    let used = wanted.into_iter().filter(|(_, path, _, used)| *used && !path.is_empty());
    used.filter_map(|(key, path, kind, _)| fault(key, Path::new(path), kind)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(sets: &[&str]) -> String {
        let sets: Vec<String> = sets.iter().map(|s| (*s).to_owned()).collect();
        let loaded = Loaded::new(None, std::iter::empty(), &sets).unwrap();
        loaded.places().map_or_else(|e| e.to_string(), |()| String::new())
    }

    #[test]
    fn what_is_missing_is_said_at_once_and_by_its_key() {
        assert_eq!(said(&[]), "");
        let both = said(&["model.dir=/no/such", "data.kind=jsonl", "data.root=/no/such.jsonl"]);
        assert!(both.contains("model.dir is `/no/such`: there is no such directory (in --set)"), "{both}");
        assert!(both.contains("data.root is `/no/such.jsonl`: there is no such file"), "{both}");
        let voc = said(&["data.kind=voc", "data.class=a", "data.root=/no/voc"]);
        assert!(voc.contains("data.root is `/no/voc`: there is no such directory"), "{voc}");
        let relative = said(&["data.kind=jsonl", "data.root=no-such.jsonl"]);
        let here = std::env::current_dir().unwrap();
        assert!(relative.contains(&format!("there is no such file (from {})", here.display())), "{relative}");
        let hub = said(&["model.dir=Qwen/Qwen2.5-VL-7B-Instruct"]);
        assert!(hub.contains("Hugging Face Hub") && hub.contains("download"), "{hub}");
        assert!(!said(&["model.dir=./a/b"]).contains("Hub"));
    }

    #[test]
    fn what_is_something_else_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let (file, folder) = (dir.path().join("file"), dir.path().display().to_string());
        std::fs::write(&file, "").unwrap();
        let file = file.display().to_string();
        assert!(said(&[&format!("model.dir={file}")]).contains("a file, not a directory"));
        assert!(said(&[&format!("model.dir={folder}")]).contains("no config.json in it"));
        assert!(said(&["data.kind=jsonl", &format!("data.root={folder}")]).contains("a directory, not a file"));
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        assert_eq!(said(&[&format!("model.dir={folder}"), "data.kind=jsonl", &format!("data.root={file}")]), "");
    }

    #[test]
    fn files_of_the_reward_service_are_looked_for_where_it_runs_here() {
        let sets =
            ["reward.symbolic.weight=1", "reward.symbolic.table=/no/table.toml", "reward.judge.prompt=/no/prompt"];
        let here = said(&sets);
        assert!(
            here.contains("reward.symbolic.table is `/no/table.toml`") && !here.contains("reward.judge.prompt"),
            "{here}"
        );
        assert_eq!(said(&[&sets[..], &["reward.address=http://127.0.0.1:1"]].concat()), "");
    }
}
