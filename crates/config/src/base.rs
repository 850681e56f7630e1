//! Files that a configuration file is based on: `base = ["other.toml"]` at its top, relative to the file.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use crate::error::ConfigError;
use crate::layer::Layer;

/// Name of the key, which is not a key of the configuration itself.
pub(crate) const BASE_KEY: &str = "base";
/// Description of the key for the schema and the reference page.
pub(crate) const BASE_MEANING: &str = "Configuration files, relative to this one, whose values this file overrides; of several, the later ones \
     override the earlier ones. A base may have bases. Tables are merged, lists are replaced.";

/// Maximum number of files that one file may lead to.
const MAX_FILES: usize = 100;

/// Reads a file and everything that it is based on, in the order in which later layers override earlier ones.
///
/// # Errors
/// Returns [`ConfigError::Read`] for a file that cannot be read, [`ConfigError::Syntax`] for one that is not TOML, and
/// [`ConfigError::Keys`] for a `base` that is not a list of files or leads back to the file itself.
pub(crate) fn read_with_bases(path: &Path, known: &Table) -> Result<Vec<Layer>, ConfigError> {
    let mut layers = Vec::new();
    Reader { known, chain: Vec::new(), layers: &mut layers }.read(path, None)?;
    Ok(layers)
}

struct Reader<'a> {
    known: &'a Table,
    /// Files from the first one to the one that is being read: canonical path, and path in messages.
    chain: Vec<(PathBuf, String)>,
    layers: &'a mut Vec<Layer>,
}

impl Reader<'_> {
    /// Reads a file after its bases; `named_in` is the origin of the key that names it.
    fn read(&mut self, path: &Path, named_in: Option<&str>) -> Result<(), ConfigError> {
        let shown = path.display().to_string();
        let refuse = |what: String| Err(ConfigError::Keys(vec![what]));
        let identity = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        if let Some(start) = self.chain.iter().position(|(open, _)| *open == identity) {
            let circle: Vec<&str> =
                self.chain[start..].iter().map(|(_, name)| name.as_str()).chain([shown.as_str()]).collect();
            let origin = named_in.unwrap_or_default();
            return refuse(format!("`{BASE_KEY}` in {origin} leads back to the file itself: {}", circle.join(" -> ")));
        }
        if self.layers.len() + self.chain.len() >= MAX_FILES {
            return refuse(format!("{shown} is one of more than {MAX_FILES} files: simplify their `{BASE_KEY}`"));
        }
        let mut layer = Layer::file(path, self.known).map_err(|e| match (e, named_in) {
            (ConfigError::Read { path, source }, Some(origin)) => {
                ConfigError::Read { path: format!("{path} (`{BASE_KEY}` in {origin})"), source }
            }
            (e, _) => e,
        })?;
        self.chain.push((identity, shown));
        let folder = path.parent().unwrap_or(Path::new(""));
        for (base, origin) in bases(&mut layer)? {
            self.read(&folder.join(base), Some(&origin))?;
        }
        self.chain.pop();
        self.layers.push(layer);
        Ok(())
    }
}

/// Removes the bases from a layer and returns them, each with its origin.
fn bases(layer: &mut Layer) -> Result<Vec<(String, String)>, ConfigError> {
    let origin = layer.origin(BASE_KEY);
    let refuse = |origin: &str| {
        let what =
            format!("`{BASE_KEY}` in {origin} is not a list of files: write it as {BASE_KEY} = [\"other.toml\"]");
        Err(ConfigError::Keys(vec![what]))
    };
    let file = |value: Value| match value {
        Value::String(file) if !file.trim().is_empty() => Some(file),
        _ => None,
    };
    match layer.table.remove(BASE_KEY) {
        None => Ok(Vec::new()),
        Some(Value::Array(list)) => {
            let mut out = Vec::with_capacity(list.len());
            for (index, value) in list.into_iter().enumerate() {
                let origin = layer.origin(&format!("{BASE_KEY}[{index}]"));
                let Some(file) = file(value) else { return refuse(&origin) };
                out.push((file, origin));
            }
            Ok(out)
        }
        Some(single) => file(single).map_or_else(|| refuse(&origin), |file| Ok(vec![(file, origin.clone())])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Loaded;

    /// Writes files and loads `files` with `sets`; the directory is left out of messages.
    fn load(written: &[(&str, &str)], files: &[&str], sets: &[&str]) -> Result<Loaded, String> {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in written {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let files: Vec<PathBuf> = files.iter().map(|name| dir.path().join(name)).collect();
        let sets: Vec<String> = sets.iter().map(|s| (*s).to_owned()).collect();
        let prefix = format!("{}/", dir.path().display());
        Loaded::new(&files, std::iter::empty(), &sets).map_err(|e| e.to_string().replace(&prefix, ""))
    }

    #[test]
    fn bases_are_overridden_in_order() {
        let written = [
            ("common/a.toml", "[run]\nseed = 1\ndir = \"a\"\n[rollout]\nn = 4\n[data.synonyms]\nnodule = [\"lump\"]"),
            ("b.toml", "[run]\nseed = 2\n[rollout]\nstop = [\"x\"]"),
            (
                "run.toml",
                "base = [\"common/a.toml\", \"b.toml\"]\n[rollout]\nstop = [\"y\"]\n[data.synonyms]\nmass = []",
            ),
            ("over.toml", "[run]\ndir = \"over\""),
        ];
        let loaded = load(&written, &["run.toml"], &[]).unwrap();
        let c = &loaded.config;
        assert_eq!(
            (c.run.seed, c.run.dir.as_str(), c.rollout.n, c.rollout.stop.as_slice()),
            (2, "a", 4, &["y".to_owned()][..])
        );
        assert_eq!(c.data.synonyms.keys().collect::<Vec<_>>(), ["mass", "nodule"]);
        assert!(loaded.origin("run.seed").unwrap().ends_with("b.toml:2"));
        assert!(loaded.origin("rollout.n").unwrap().ends_with("common/a.toml:5"));
        assert_eq!(loaded.origin("base"), None);
        let c = load(&written, &["run.toml", "over.toml"], &["run.seed=9"]).unwrap().config;
        assert_eq!((c.run.seed, c.run.dir.as_str(), c.rollout.n), (9, "over", 4));
        let c = load(&written, &["over.toml", "run.toml"], &[]).unwrap().config;
        assert_eq!(c.run.dir, "a", "the later file overrides the earlier one");
    }

    #[test]
    fn one_base_is_relative_to_its_file() {
        let written = [
            ("one/run.toml", "base = \"../two/base.toml\""),
            ("two/base.toml", "base = [\"root.toml\"]\n[sft]\nsteps = 3"),
            ("two/root.toml", "[sft]\nbatch = 5"),
        ];
        let c = load(&written, &["one/run.toml"], &[]).unwrap().config;
        assert_eq!((c.sft.steps, c.sft.batch), (3, 5));
    }

    #[test]
    fn one_file_may_be_the_base_of_several() {
        let written = [
            ("run.toml", "base = [\"a.toml\", \"b.toml\"]"),
            ("a.toml", "base = [\"root.toml\"]\n[sft]\nsteps = 3"),
            ("b.toml", "base = [\"root.toml\"]"),
            ("root.toml", "[sft]\nsteps = 1\nbatch = 5"),
        ];
        let c = load(&written, &["run.toml"], &[]).unwrap().config;
        assert_eq!((c.sft.steps, c.sft.batch), (1, 5), "the base of the later one overrides");
    }

    #[test]
    fn unusable_bases_are_named_with_their_file() {
        for (written, expected) in [
            (&[("run.toml", "base = [\"run.toml\"]")][..], &["`base` in run.toml:1", "run.toml -> run.toml"][..]),
            (
                &[("run.toml", "base = [\"a.toml\"]"), ("a.toml", "\nbase = [\"./run.toml\"]")],
                &["`base` in a.toml:2", "leads back", "run.toml -> a.toml -> ./run.toml"],
            ),
            (
                &[("run.toml", "base = [\"a.toml\",\n  \"gone.toml\"]"), ("a.toml", "")],
                &["cannot read gone.toml (`base` in run.toml:2)", "No such file"],
            ),
            (&[("run.toml", "base = [3]")], &["`base` in run.toml:1 is not a list of files", "[\"other.toml\"]"]),
            (&[("run.toml", "base = {}")], &["`base` in run.toml:1 is not a list of files"]),
            (&[("run.toml", "base = \" \"")], &["`base` in run.toml:1 is not a list of files"]),
            (&[("run.toml", "base = [\"a.toml\"]"), ("a.toml", "[run")], &["a.toml is not valid TOML"]),
            (
                &[("run.toml", "base = [\"a.toml\"]"), ("a.toml", "[run]\nsede = 1")],
                &["`run.sede` in a.toml:2", "run.seed"],
            ),
            (&[("run.toml", "base = [\"a.toml\"]"), ("a.toml", "[sft]\nsteps = \"x\"")], &["`sft.steps` in a.toml:2"]),
            (
                &[("run.toml", "base = [\"a.toml\"]\n[rollout]\nn = 9"), ("a.toml", "[rollout]\nmax_rows = 2")],
                &["rollout.max_rows in a.toml:2", "rollout.n in run.toml:3"],
            ),
            (&[("run.toml", "[run]\nbase = [\"a.toml\"]")], &["unknown key `run.base` in run.toml:2"]),
        ] {
            let e = load(written, &["run.toml"], &[]).unwrap_err();
            assert!(expected.iter().all(|w| e.contains(w)), "{e}");
        }
        let e = load(&[("run.toml", "")], &["run.toml"], &["base=[\"a.toml\"]"]).unwrap_err();
        assert!(e.contains("unknown key `base` in --set"), "{e}");
        let e = load(&[("run.toml", "")], &["run.toml", "gone.toml"], &[]).unwrap_err();
        assert!(e.contains("cannot read gone.toml: No such file"), "{e}");
    }

    #[test]
    fn endless_trees_of_bases_are_refused() {
        let files: Vec<(String, String)> =
            (0..20).map(|i| (format!("{i}.toml"), format!("base = [\"{0}.toml\", \"{0}.toml\"]", i + 1))).collect();
        let mut written: Vec<(&str, &str)> = files.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
        written.push(("20.toml", ""));
        let e = load(&written, &["0.toml"], &[]).unwrap_err();
        assert!(e.contains("more than 100 files"), "{e}");
    }
}
