//! Images of MedVH in the data sets they were taken from, searched below one folder by the name each data set gives them.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::super::source::{IMAGES, SourceFolder, has_ending, stem};
use super::{QuestionFile, SHARED_IMAGE_TASKS, image_name, normalize, origin};

/// Search depth, enough for the folders of MIMIC-CXR.
const MAX_DEPTH: usize = 12;

/// Files in the folder of `--images`, and the names by which rows refer to them.
#[derive(Default)]
pub(super) struct ExternalImages {
    root: Option<PathBuf>,
    /// Requested files by name without extension.
    files: HashMap<String, Vec<PathBuf>>,
    /// Origins by their last component without extension, which many may share (`source` in SLAKE).
    origins: HashMap<String, BTreeSet<String>>,
    /// Distinct images by their name within a task, each identified by its origin, or by its folder if that is unknown.
    by_name: HashMap<String, BTreeSet<String>>,
    /// Origins by task and image name, for twins whose row does not name one.
    twin_origins: HashMap<(String, String), String>,
}

impl ExternalImages {
    /// Searches the folder of `--images`, if one is given.
    pub(super) fn new(source: &SourceFolder, question_files: &[QuestionFile]) -> Self {
        let Some(root) = &source.images else { return Self::default() };
        let mut out = Self { root: Some(root.clone()), ..Self::default() };
        let rows = || question_files.iter().flat_map(|s| s.rows.iter().map(move |q| (s, q)));
        for (questions, q) in
            rows().filter(|(s, q)| SHARED_IMAGE_TASKS.contains(&s.task.as_str()) && !origin(q).is_empty())
        {
            out.twin_origins.insert((questions.task.clone(), image_name(q)), origin(q));
        }
        for (questions, q) in rows() {
            let origin = out.origin(questions, q);
            if !origin.is_empty() {
                out.origins.entry(last_component(&origin)).or_default().insert(origin.clone());
            }
            let image =
                if origin.is_empty() { questions.folders.first().unwrap_or(&questions.label).clone() } else { origin };
            out.by_name.entry(image_name(q)).or_default().insert(image);
        }
        for file in source.list_files_to_depth(root, &IMAGES, MAX_DEPTH) {
            let name = stem(&file);
            let full = file.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            if out.origins.contains_key(&name) || out.by_name.contains_key(&full) {
                out.files.entry(name).or_default().push(file);
            }
        }
        out
    }

    /// Returns the name of the row's image in its data set, from the row or from its twin with the same image.
    fn origin(&self, questions: &QuestionFile, q: &Value) -> String {
        let stated = origin(q);
        if !stated.is_empty() {
            return stated;
        }
        self.twin_origins.get(&(questions.task.clone(), image_name(q))).cloned().unwrap_or_default()
    }

    /// Finds the row's image: by its name in a folder of its task, else by its origin, else by its name if no other image has it.
    pub(super) fn find(&self, questions: &QuestionFile, q: &Value) -> Option<PathBuf> {
        let root = self.root.as_ref()?;
        let name = image_name(q);
        let origin = self.origin(questions, q);
        let relative = |file: &Path| file.strip_prefix(root).unwrap_or(file).to_owned();
        let same_name = || {
            let files = self.files.get(&last_component(&name)).into_iter().flatten();
            files.filter(|f| f.file_name().is_some_and(|n| n.to_string_lossy() == name))
        };
        let in_task = same_name().find(|f| {
            let folder = relative(f).parent().map(|p| normalize(&p.to_string_lossy())).unwrap_or_default();
            questions.folders.iter().map(|s| format!("/{}", normalize(s))).any(|s| {
                format!("/{folder}").ends_with(&s) || (!folder.is_empty() && s.ends_with(&format!("/{folder}")))
            })
        });
        let by_origin = || {
            let files = self.files.get(&last_component(&origin)).filter(|_| !origin.is_empty())?;
            let expected = Path::new(&origin).with_file_name(last_component(&origin));
            let matching = files.iter().find(|f| relative(f).with_extension("").ends_with(&expected));
            let unique = self.origins.get(&last_component(&origin)).is_some_and(|o| o.len() == 1);
            matching.or_else(|| files.first().filter(|_| unique))
        };
        let by_unique_name =
            || same_name().next().filter(|_| self.by_name.get(&name).is_some_and(|images| images.len() == 1));
        in_task.or_else(by_origin).or_else(by_unique_name).cloned()
    }
}

/// Returns the last component of a path, without the extension of an image.
fn last_component(name: &str) -> String {
    let name = name.replace('\\', "/");
    let last = name.rsplit('/').next().unwrap_or_default();
    let path = Path::new(last);
    if has_ending(path, &IMAGES) { stem(path) } else { last.to_owned() }
}
