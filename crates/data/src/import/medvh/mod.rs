//! MedVH (<https://github.com/dongzizhu/MedVH>; Gu et al., 2024), hallucination tests on chest X-rays: arrays with `question_id`, `question`,
//! `img_name`, `choices` (one text), `gt` (a letter, or `C: text`).
//!
//! Two layouts: that of the repository's page, `multi_choices/test_TASK.json` with images in `multi_choices/TASK/`, and that of the
//! repository itself, `multi_choices/TASK/test_TASK_src.json`; `text_generation/` likewise. Most images are not distributed: `ori_id` (reports:
//! `src_img`) names them in MIMIC-CXR, SLAKE, VQA-RAD or PMC-VQA, and `--images DIR` says where these lie.
//!
//! All records are of split test. `suite_task` is the task in small letters (nota, cli, pre, wrongful_image, fcj, report_generation),
//! `baseline` whether it is asked without the trap, `pair` the number that a question shares with its twin; `suggested_answer` (what the
//! false confidence task claims) is kept. Rows of the report task have `image_name` and `gt_labels` (or `pos_labels`) instead: these become
//! a question about the findings; without a label they are left out. Names of images repeat between tasks and mean different images;
//! only for nota and pre do twins share theirs.

mod elsewhere;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::ImportError;
use super::choices::{self, NO_CHOICE};
use super::item::{Found, Item};
use super::source::{MISSING, Source, stem, text_of};
use elsewhere::Elsewhere;

const PARTS: [&str; 2] = ["multi_choices", "text_generation"];
/// Tasks whose questions are asked of the same image with and without the trap.
const SHARED: [&str; 2] = ["nota", "pre"];
/// The rule for an image that another data set holds.
const ELSEWHERE: &str = "its image is of another data set (--images says where that lies)";

pub(super) fn read(found: &mut Found) -> Result<(), ImportError> {
    let root = found.source.root.clone();
    let files: Vec<_> = PARTS.iter().flat_map(|p| found.source.files(&root.join(p), &["json"], 2)).collect();
    if files.is_empty() {
        return Err(found.source.wrong(
            "no test_*.json: neither in multi_choices/ and text_generation/ nor in a folder of theirs, as multi_choices/NOTA/",
        ));
    }
    let mut sheets = Vec::new();
    for file in files {
        let rows = found.source.json_rows(&file)?;
        sheets.push(Sheet::new(&root, file, rows));
    }
    let elsewhere = Elsewhere::new(&found.source, &sheets);
    // Looked for by folder only: a name alone may be that of another task's image.
    let own = Source { images: None, ..found.source.clone() };
    for sheet in &sheets {
        let folders: Vec<&str> = sheet.folders.iter().map(String::as_str).collect();
        for (row, q) in sheet.rows.iter().enumerate() {
            let get = |key: &str| text_of(q.get(key).unwrap_or(&Value::Null));
            let name = image_name(q);
            let path = own.image(&folders, &name).or_else(|reason| match elsewhere.find(sheet, q) {
                Some(path) => Ok(path),
                None if reason == MISSING && !origin(q).is_empty() => Err(ELSEWHERE),
                None => Err(reason),
            });
            let mut item = sheet.item(row, q);
            let made = path.and_then(|path| {
                item.image = path;
                fill(&mut item, q, &get)
            });
            match made {
                Ok(()) => found.items.push(item),
                Err(reason) => found.leave_out(&sheet.file, row, &name, reason),
            }
        }
    }
    Ok(())
}

/// One file of questions.
struct Sheet {
    file: PathBuf,
    /// As the file is named, without `test_` and `_src`.
    label: String,
    /// The task, in small letters.
    task: String,
    /// Asked without the trap.
    baseline: bool,
    /// Where its images may lie, from the root.
    folders: Vec<String>,
    rows: Vec<Value>,
}

impl Sheet {
    fn new(root: &Path, file: PathBuf, rows: Vec<Value>) -> Self {
        let name = stem(&file);
        let label = name.strip_prefix("test_").unwrap_or(&name);
        let label = label.strip_suffix("_src").unwrap_or(label).to_owned();
        let below = file.parent().and_then(|p| p.strip_prefix(root).ok()).unwrap_or(Path::new("")).to_owned();
        let mut parts = below.iter().map(|p| p.to_string_lossy().into_owned());
        let (part, own) = (parts.next().unwrap_or_default(), parts.next());
        let baseline = label.ends_with("_baseline") || own.as_ref().is_some_and(|o| o.starts_with("baseline_"));
        let task = plain(label.strip_suffix("_baseline").unwrap_or(&label));
        // A folder holds this sheet's images when its name says so; that of the twin only where twins share them.
        let fits = |folder: &str| {
            let folder = plain(folder);
            let base = folder.strip_prefix("baseline_").or_else(|| folder.strip_suffix("_baseline"));
            base.unwrap_or(&folder) == task && (base.is_some() == baseline || SHARED.contains(&task.as_str()))
        };
        let here = std::fs::read_dir(root.join(&part)).into_iter().flatten().flatten();
        let mut folders: Vec<String> =
            here.filter_map(|e| e.file_name().into_string().ok()).filter(|f| fits(f)).collect();
        // The folder that is named as the sheet comes first.
        folders.sort_by_key(|f| (plain(f) != plain(&label), f.clone()));
        if let Some(own) = own.filter(|o| !folders.contains(o) && fits(o)) {
            folders.insert(0, own);
        }
        if folders.is_empty() {
            folders.push(label.clone());
        }
        let folders = folders.into_iter().map(|f| format!("{part}/{f}")).collect();
        Self { file, label, task, baseline, folders, rows }
    }

    /// The item of a row, without image and question.
    fn item(&self, row: usize, q: &Value) -> Item {
        let number = ["question_id", "report_id"].map(|k| q.get(k).map(text_of).unwrap_or_default());
        let number = number.into_iter().find(|n| !n.is_empty()).unwrap_or_else(|| row.to_string());
        // The trap of this task is an image of something else.
        let swapped = self.task == "wrongful_image" && !self.baseline;
        let mut item = Item {
            id: format!("{}-{number}", self.label),
            file: self.file.clone(),
            row,
            modality: if swapped { "" } else { "X-ray" }.to_owned(),
            split: "test".to_owned(),
            suite_task: self.task.clone(),
            ..Item::default()
        };
        item.extra.insert("test".to_owned(), self.label.as_str().into());
        item.extra.insert("baseline".to_owned(), self.baseline.into());
        if let Some(pair) = q.get("question_id").filter(|v| !text_of(v).is_empty()) {
            item.extra.insert("pair".to_owned(), pair.clone());
        }
        if let Some(claim) = q.get("suggested_answer").map(text_of).filter(|c| !c.is_empty()) {
            item.extra.insert("suggested_answer".to_owned(), claim.into());
        }
        item
    }
}

/// A task's or folder's name in small letters, without the repository's own misspelling.
fn plain(name: &str) -> String {
    name.to_lowercase().replace("worngful", "wrongful")
}

/// The name of a row's image within its task.
fn image_name(q: &Value) -> String {
    let names = ["img_name", "image_name"].map(|k| q.get(k).map(text_of).unwrap_or_default());
    names.into_iter().find(|n| !n.is_empty()).unwrap_or_default()
}

/// What a row's image is called in the data set that it is of; empty where the row does not say.
fn origin(q: &Value) -> String {
    let names = ["ori_id", "src_img"].map(|k| q.get(k).map(text_of).unwrap_or_default());
    names.into_iter().find(|n| !n.is_empty()).unwrap_or_default()
}

fn fill(item: &mut Item, q: &Value, get: &impl Fn(&str) -> String) -> Result<(), &'static str> {
    let labels = ["gt_labels", "pos_labels"].iter().find_map(|k| q.get(*k).and_then(Value::as_array));
    if let Some(labels) = labels {
        let labels: Vec<String> = labels.iter().map(text_of).filter(|l| !l.is_empty()).collect();
        if labels.is_empty() {
            return Err("it has no positive label");
        }
        item.question = Some("Which findings does this chest X-ray show?".to_owned());
        item.answer = labels.join(", ");
        item.extra.insert("gt_labels".to_owned(), json!(labels));
        item.text_only = true;
        return Ok(());
    }
    let choices = choices::split(&get("choices"));
    let right = choices::first_letter(&get("gt")).or_else(|| choices::letter_of(&choices, &get("correct_answer")));
    choices::ask(item, &get("question"), &choices, right.ok_or(NO_CHOICE)?)
}
