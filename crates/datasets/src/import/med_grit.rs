//! Med-GRIT-270k (<https://github.com/ShawnHuang497/BiRD>; Huang et al., MICCAI 2024).
//!
//! Files: `*.json` or `*.jsonl` with arrays of `id` and `conversations`; images `ID.png` of SA-Med2D-20M, in `images/` or the folder itself.
//! Split and task are read from the file name (`Train_VG.json`, `Test_ROC.json`, …; `--task` overrides it).
//!
//! Fields: `conversations` is a list of pairs of question and answer in the tags of Qwen-VL: `<img>…</img>`, `<ref>…</ref>`,
//! `<box>(x1,y1),(x2,y2)</box>`. An answer with boxes becomes a grounding record, labelled by the nearest `<ref>` before the box or in the
//! question; an answer without boxes becomes a text record. Box numbers up to 1 are fractions of the sides, up to 1000 thousandths; larger
//! ones leave the turn out. `suite_task` is VG, ROC, RC or MIA, the key `turn` the position in the conversation, the patient the volume in
//! the name of SA-Med2D-20M (`MODALITY--DATASET--VOLUME--SLICE`).

use std::sync::LazyLock;

use regex::Regex;

use super::conversation::strip_image_tags;
use super::draft::{Coords, DraftRecord, Object, ParsedDataset};
use super::source::{json_text, stem};
use super::split::split_from_name;
use super::{ImportError, ImportOptions};

const FOLDERS: [&str; 2] = ["images", ""];

static TAGS: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"(?s)<ref>(.*?)</ref>|<box>(.*?)</box>").ok());
static NUMBER: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"-?\d+(?:\.\d+)?").ok());

/// Names of each task in file names: the authors' files also use GC for RC and MII for MIA.
const TASKS: [(&str, &[&str]); 4] =
    [("VG", &["vg"]), ("ROC", &["roc", "ro"]), ("RC", &["rc", "gc"]), ("MIA", &["mia", "mi", "mii"])];

/// Returns the task named by a word of `text`; `None` if there is none or several.
fn task_from_name(text: &str) -> Option<&'static str> {
    let text = text.to_lowercase();
    let words = text.split(|c: char| !c.is_alphanumeric());
    let mut tasks = words.filter_map(|w| TASKS.iter().find(|(_, names)| names.contains(&w)).map(|(task, _)| *task));
    let first = tasks.next()?;
    tasks.all(|t| t == first).then_some(first)
}

pub(super) fn read(dataset: &mut ParsedDataset, options: &ImportOptions) -> Result<(), ImportError> {
    if let Some(other) = options.task.as_ref().filter(|t| TASKS.iter().all(|(name, _)| name != t)) {
        return Err(dataset.source.dataset_error(format!("unknown task \"{other}\": the tasks are VG, ROC, RC, MIA")));
    }
    let files = dataset.source.list_files(&dataset.source.root, &["json", "jsonl"], 2);
    if files.is_empty() {
        return Err(dataset.source.dataset_error("no *.json with conversations"));
    }
    for file in files {
        let split = split_from_name(&stem(&file)).to_owned();
        let task = task_from_name(&stem(&file)).unwrap_or_default();
        if task.is_empty() && options.task.is_none() {
            let note =
                format!("{}: the file name contains no task (VG, ROC, RC, MIA): give it with --task", file.display());
            dataset.report.notes.push(note);
        }
        for (row, entry) in dataset.source.read_json_rows(&file)?.iter().enumerate() {
            let id = json_text(&entry["id"]);
            let image = match dataset.source.find_image(&FOLDERS, &format!("{id}.png")) {
                Ok(image) => image,
                Err(reason) => {
                    dataset.leave_out(&file, row, &id, reason);
                    continue;
                }
            };
            for (k, turn) in entry["conversations"].as_array().into_iter().flatten().enumerate() {
                let question = json_text(&turn[0]);
                let answer = json_text(&turn[1]);
                if question.is_empty() || answer.is_empty() {
                    dataset.leave_out(&file, row, &id, "a turn is not question and answer");
                    continue;
                }
                let asked = tags(&question).find_map(|tag| if let Tag::Name(n) = tag { Some(n) } else { None });
                let objects = match objects(&answer, asked) {
                    Ok(objects) => objects,
                    Err(reason) => {
                        dataset.leave_out(&file, row, &id, reason);
                        continue;
                    }
                };
                let mut item = DraftRecord {
                    id: format!("{id}-{k}"),
                    image: image.clone(),
                    file: file.clone(),
                    row,
                    question: Some(strip_tags(&question)),
                    answer: strip_tags(&answer),
                    text_only: objects.is_empty(),
                    objects,
                    modality: modality(&id).to_owned(),
                    split: split.clone(),
                    patient: id.rsplit_once("--").map_or("", |(volume, _)| volume).to_owned(),
                    suite_task: task.to_owned(),
                    ..DraftRecord::default()
                };
                item.extra.insert("turn".to_owned(), k.into());
                dataset.items.push(item);
            }
        }
    }
    Ok(())
}

/// A tag of an answer, with its content.
enum Tag<'a> {
    Name(&'a str),
    Box(&'a str),
}

/// Returns the `<ref>` and `<box>` tags of a text in their order.
fn tags(text: &str) -> impl Iterator<Item = Tag<'_>> {
    TAGS.iter().flat_map(move |r| r.captures_iter(text)).filter_map(|c| match (c.get(1), c.get(2)) {
        (Some(name), _) => Some(Tag::Name(name.as_str().trim())),
        (_, Some(b)) => Some(Tag::Box(b.as_str())),
        _ => None,
    })
}

/// Returns the objects of an answer; `asked` is the name in the question.
///
/// # Errors
/// Returns the reason for leaving the turn out.
fn objects(answer: &str, asked: Option<&str>) -> Result<Vec<Object>, &'static str> {
    const NO_BOX: &str = "a box is not four numbers up to 1000";
    let mut out = Vec::new();
    let mut name = asked;
    for tag in tags(answer) {
        match tag {
            Tag::Name(n) => name = Some(n),
            Tag::Box(text) => {
                let numbers: Vec<f64> =
                    NUMBER.iter().flat_map(|r| r.find_iter(text)).filter_map(|n| n.as_str().parse().ok()).collect();
                let c = <[f64; 4]>::try_from(numbers).map_err(|_| NO_BOX)?;
                let most = c.iter().copied().fold(0.0, f64::max);
                if most > 1000.0 {
                    return Err(NO_BOX);
                }
                let unit = if most <= 1.0 { 1.0 } else { 1000.0 };
                let label = name.filter(|n| !n.is_empty()).ok_or("a box has no name")?.to_owned();
                out.push(Object { label, coords: Coords::Fractions(c.map(|v| v / unit)) });
            }
        }
    }
    // An unclosed tag would leave the box in the text.
    if answer.matches("<box>").count() != out.len() {
        return Err("a <box> is not closed");
    }
    Ok(out)
}

/// Removes the tags from a text; the numbers of boxes remain.
fn strip_tags(text: &str) -> String {
    let text = strip_image_tags(text);
    let text = text.replace("<ref>", "").replace("</ref>", "");
    text.replace("<box>", " ").replace("</box>", "").split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Returns the modality by the first part of a SA-Med2D-20M name; empty if unknown.
fn modality(id: &str) -> &'static str {
    match id.split(['_', '-']).next().unwrap_or_default() {
        "ct" => "CT",
        "mr" => "MRI",
        "x" => "X-ray",
        "pet" => "PET",
        "endoscopy" => "endoscopy",
        "dermoscopy" => "dermoscopy",
        "fundus" => "fundus",
        "ultrasound" => "ultrasound",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_by_file_name() {
        let tasks =
            ["Test_VG", "train-roc", "Test_RO", "Test_GC", "rc.test", "Test_MII", "mia", "MI_test"].map(task_from_name);
        assert_eq!(tasks, ["VG", "ROC", "ROC", "RC", "RC", "MIA", "MIA", "MIA"].map(Some));
        assert_eq!(["train", "vgg", "Test_VG_RC", "aroc", ""].map(task_from_name), [None; 5]);
    }
}
