//! Images of MedVH that lie in the data sets they were taken from: found below one folder by what each set calls them.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::super::source::{IMAGES, Source, has_ending, stem};
use super::{SHARED, Sheet, image_name, origin, plain};

/// Deep enough for MIMIC-CXR as it is downloaded.
const DEPTH: usize = 12;

/// What lies in the folder of `--images`, and what the rows call it.
#[derive(Default)]
pub(super) struct Elsewhere {
    root: Option<PathBuf>,
    /// Files by name without ending, of those that are asked for.
    files: HashMap<String, Vec<PathBuf>>,
    /// Origins by their last part without ending: `source` is that of many images of SLAKE.
    origins: HashMap<String, BTreeSet<String>>,
    /// Images by their name within a task, each as what tells it from others of that name.
    named: HashMap<String, BTreeSet<String>>,
    /// Origins by task and name, for the twins that do not say theirs.
    twins: HashMap<(String, String), String>,
}

impl Elsewhere {
    /// Looks through the folder of `--images`, where one is given.
    pub(super) fn new(source: &Source, sheets: &[Sheet]) -> Self {
        let Some(root) = &source.images else { return Self::default() };
        let mut out = Self { root: Some(root.clone()), ..Self::default() };
        let rows = || sheets.iter().flat_map(|s| s.rows.iter().map(move |q| (s, q)));
        for (sheet, q) in rows().filter(|(s, q)| SHARED.contains(&s.task.as_str()) && !origin(q).is_empty()) {
            out.twins.insert((sheet.task.clone(), image_name(q)), origin(q));
        }
        for (sheet, q) in rows() {
            let origin = out.origin(sheet, q);
            if !origin.is_empty() {
                out.origins.entry(last(&origin)).or_default().insert(origin.clone());
            }
            let image = if origin.is_empty() { sheet.folders.first().unwrap_or(&sheet.label).clone() } else { origin };
            out.named.entry(image_name(q)).or_default().insert(image);
        }
        for file in source.files_to(root, &IMAGES, DEPTH) {
            let name = stem(&file);
            let full = file.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            if out.origins.contains_key(&name) || out.named.contains_key(&full) {
                out.files.entry(name).or_default().push(file);
            }
        }
        out
    }

    /// What the row's image is called where it is from, by the row or by its twin of the same image.
    fn origin(&self, sheet: &Sheet, q: &Value) -> String {
        let said = origin(q);
        if !said.is_empty() {
            return said;
        }
        self.twins.get(&(sheet.task.clone(), image_name(q))).cloned().unwrap_or_default()
    }

    /// The row's image: by its name in a folder of its task, then by its origin, then by its name alone where no other image has it.
    pub(super) fn find(&self, sheet: &Sheet, q: &Value) -> Option<PathBuf> {
        let root = self.root.as_ref()?;
        let (name, origin) = (image_name(q), self.origin(sheet, q));
        let below = |file: &Path| file.strip_prefix(root).unwrap_or(file).to_owned();
        let of_name = || {
            let files = self.files.get(&last(&name)).into_iter().flatten();
            files.filter(|f| f.file_name().is_some_and(|n| n.to_string_lossy() == name))
        };
        let in_task = of_name().find(|f| {
            let folder = below(f).parent().map(|p| plain(&p.to_string_lossy())).unwrap_or_default();
            sheet.folders.iter().map(|s| format!("/{}", plain(s))).any(|s| {
                format!("/{folder}").ends_with(&s) || (!folder.is_empty() && s.ends_with(&format!("/{folder}")))
            })
        });
        let by_origin = || {
            let files = self.files.get(&last(&origin)).filter(|_| !origin.is_empty())?;
            let whole = Path::new(&origin).with_file_name(last(&origin));
            let same = files.iter().find(|f| below(f).with_extension("").ends_with(&whole));
            let only = self.origins.get(&last(&origin)).is_some_and(|o| o.len() == 1);
            same.or_else(|| files.first().filter(|_| only))
        };
        let alone = || of_name().next().filter(|_| self.named.get(&name).is_some_and(|images| images.len() == 1));
        in_task.or_else(by_origin).or_else(alone).cloned()
    }
}

/// The last part of a path, without the ending of an image.
fn last(name: &str) -> String {
    let name = name.replace('\\', "/");
    let last = name.rsplit('/').next().unwrap_or_default();
    let path = Path::new(last);
    if has_ending(path, &IMAGES) { stem(path) } else { last.to_owned() }
}
