//! MedVH (<https://github.com/dongzizhu/MedVH>; Gu et al., 2024), hallucination tests on chest X-rays.
//!
//! Files, in two layouts: as the repository's page describes, `multi_choices/test_TASK.json` with images in `multi_choices/TASK/`; and as
//! the repository has them, `multi_choices/TASK/test_TASK_src.json`; `text_generation/` likewise. Most images are not distributed: `ori_id`
//! (for reports `src_img`) names them in MIMIC-CXR, SLAKE, VQA-RAD or PMC-VQA, which are given with `--images DIR`. The same image name
//! means different images in different tasks; only in the tasks nota and pre do a question and its baseline twin share an image.
//!
//! Fields: `question` and `choices` (one text) become the question, `gt` (a letter, or `C: text`) the answer. `suite_task` is the task in
//! lower case (nota, cli, pre, wrongful_image, fcj, report_generation); the key `baseline` says whether it is asked without the trap,
//! `pair` is the number that a question shares with its twin, `suggested_answer` (the claim of the false confidence task) is kept. Rows of
//! the report task have `image_name` and `gt_labels` (or `pos_labels`) and become a question about the findings; without a label they are
//! left out. All records are in split test.

mod external_images;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::ImportError;
use super::choices::{self, NO_CHOICE};
use super::draft::{DraftRecord, ParsedDataset};
use super::source::{MISSING, SourceFolder, json_text, stem};
use external_images::ExternalImages;

/// Folders of the two kinds of tasks.
const FOLDERS: [&str; 2] = ["multi_choices", "text_generation"];
/// Tasks whose questions are asked about the same image with and without the trap.
const SHARED_IMAGE_TASKS: [&str; 2] = ["nota", "pre"];
/// Reason for leaving out an image that belongs to another data set.
const IN_OTHER_DATASET: &str = "its image belongs to another data set (give that with --images)";

pub(super) fn read(dataset: &mut ParsedDataset) -> Result<(), ImportError> {
    let root = dataset.source.root.clone();
    let files: Vec<_> = FOLDERS.iter().flat_map(|p| dataset.source.list_files(&root.join(p), &["json"], 2)).collect();
    if files.is_empty() {
        return Err(dataset.source.dataset_error(
            "no test_*.json in multi_choices/ or text_generation/, nor in their folders such as multi_choices/NOTA/",
        ));
    }
    let mut question_files = Vec::new();
    for file in files {
        let rows = dataset.source.read_json_rows(&file)?;
        question_files.push(QuestionFile::new(&root, file, rows));
    }
    let external = ExternalImages::new(&dataset.source, &question_files);
    // Searched by folder only, because another task may use the same image name.
    let task_folders = SourceFolder { images: None, ..dataset.source.clone() };
    for questions in &question_files {
        let folders: Vec<&str> = questions.folders.iter().map(String::as_str).collect();
        for (row, q) in questions.rows.iter().enumerate() {
            let get = |key: &str| json_text(q.get(key).unwrap_or(&Value::Null));
            let name = image_name(q);
            let path = task_folders.find_image(&folders, &name).or_else(|reason| match external.find(questions, q) {
                Some(path) => Ok(path),
                None if reason == MISSING && !origin(q).is_empty() => Err(IN_OTHER_DATASET),
                None => Err(reason),
            });
            let mut item = questions.draft(row, q);
            let result = path.and_then(|path| {
                item.image = path;
                set_content(&mut item, q, &get)
            });
            match result {
                Ok(()) => dataset.items.push(item),
                Err(reason) => dataset.leave_out(&questions.file, row, &name, reason),
            }
        }
    }
    Ok(())
}

/// A file of questions.
struct QuestionFile {
    file: PathBuf,
    /// Name of the file without `test_` and `_src`.
    label: String,
    /// Task in lower case.
    task: String,
    /// Whether the questions are asked without the trap.
    baseline: bool,
    /// Folders of its images, relative to the root.
    folders: Vec<String>,
    rows: Vec<Value>,
}

impl QuestionFile {
    fn new(root: &Path, file: PathBuf, rows: Vec<Value>) -> Self {
        let name = stem(&file);
        let label = name.strip_prefix("test_").unwrap_or(&name);
        let label = label.strip_suffix("_src").unwrap_or(label).to_owned();
        let relative = file.parent().and_then(|p| p.strip_prefix(root).ok()).unwrap_or(Path::new("")).to_owned();
        let mut parts = relative.iter().map(|p| p.to_string_lossy().into_owned());
        let kind = parts.next().unwrap_or_default();
        let own_folder = parts.next();
        let baseline = label.ends_with("_baseline") || own_folder.as_ref().is_some_and(|o| o.starts_with("baseline_"));
        let task = normalize(label.strip_suffix("_baseline").unwrap_or(&label));
        // A folder has this file's images if its name is the task; the twin's folder only if twins share images.
        let fits = |folder: &str| {
            let folder = normalize(folder);
            let base = folder.strip_prefix("baseline_").or_else(|| folder.strip_suffix("_baseline"));
            base.unwrap_or(&folder) == task
                && (base.is_some() == baseline || SHARED_IMAGE_TASKS.contains(&task.as_str()))
        };
        let entries = std::fs::read_dir(root.join(&kind)).into_iter().flatten().flatten();
        let mut folders: Vec<String> =
            entries.filter_map(|e| e.file_name().into_string().ok()).filter(|f| fits(f)).collect();
        // The folder with the name of the file comes first.
        folders.sort_by_key(|f| (normalize(f) != normalize(&label), f.clone()));
        if let Some(own) = own_folder.filter(|o| !folders.contains(o) && fits(o)) {
            folders.insert(0, own);
        }
        if folders.is_empty() {
            folders.push(label.clone());
        }
        let folders = folders.into_iter().map(|f| format!("{kind}/{f}")).collect();
        Self { file, label, task, baseline, folders, rows }
    }

    /// Creates the draft of a row, without image and question.
    fn draft(&self, row: usize, q: &Value) -> DraftRecord {
        let number = ["question_id", "report_id"].map(|k| q.get(k).map(json_text).unwrap_or_default());
        let number = number.into_iter().find(|n| !n.is_empty()).unwrap_or_else(|| row.to_string());
        // The trap of this task is an image of another kind.
        let swapped = self.task == "wrongful_image" && !self.baseline;
        let mut item = DraftRecord {
            id: format!("{}-{number}", self.label),
            file: self.file.clone(),
            row,
            modality: if swapped { "" } else { "X-ray" }.to_owned(),
            split: "test".to_owned(),
            suite_task: self.task.clone(),
            ..DraftRecord::default()
        };
        item.extra.insert("test".to_owned(), self.label.as_str().into());
        item.extra.insert("baseline".to_owned(), self.baseline.into());
        if let Some(pair) = q.get("question_id").filter(|v| !json_text(v).is_empty()) {
            item.extra.insert("pair".to_owned(), pair.clone());
        }
        if let Some(claim) = q.get("suggested_answer").map(json_text).filter(|c| !c.is_empty()) {
            item.extra.insert("suggested_answer".to_owned(), claim.into());
        }
        item
    }
}

/// Normalizes the name of a task or folder: lower case, with the repository's misspelling corrected.
fn normalize(name: &str) -> String {
    name.to_lowercase().replace("worngful", "wrongful")
}

/// Returns the name of a row's image within its task.
fn image_name(q: &Value) -> String {
    let names = ["img_name", "image_name"].map(|k| q.get(k).map(json_text).unwrap_or_default());
    names.into_iter().find(|n| !n.is_empty()).unwrap_or_default()
}

/// Returns the name of a row's image in the data set it was taken from; empty if the row does not name it.
fn origin(q: &Value) -> String {
    let names = ["ori_id", "src_img"].map(|k| q.get(k).map(json_text).unwrap_or_default());
    names.into_iter().find(|n| !n.is_empty()).unwrap_or_default()
}

/// Sets question and answer of a draft from its row.
fn set_content(item: &mut DraftRecord, q: &Value, get: &impl Fn(&str) -> String) -> Result<(), &'static str> {
    let labels = ["gt_labels", "pos_labels"].iter().find_map(|k| q.get(*k).and_then(Value::as_array));
    if let Some(labels) = labels {
        let labels: Vec<String> = labels.iter().map(json_text).filter(|l| !l.is_empty()).collect();
        if labels.is_empty() {
            return Err("it has no positive label");
        }
        item.question = Some("Which findings does this chest X-ray show?".to_owned());
        item.answer = labels.join(", ");
        item.extra.insert("gt_labels".to_owned(), json!(labels));
        item.text_only = true;
        return Ok(());
    }
    let choices = choices::split_choices(&get("choices"));
    let right = choices::first_letter(&get("gt")).or_else(|| choices::letter_of(&choices, &get("correct_answer")));
    choices::set_question(item, &get("question"), &choices, right.ok_or(NO_CHOICE)?)
}
