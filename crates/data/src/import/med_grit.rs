//! Med-GRIT-270k (<https://github.com/ShawnHuang497/BiRD>; Huang et al., MICCAI 2024): JSON arrays of `id` and `conversations`, a list of
//! question and answer pairs in Qwen-VL's words, `<img>…</img>`, `<ref>…</ref>`, `<box>(x1,y1),(x2,y2)</box>`; images `ID.png` of SA-Med2D-20M.
//!
//! Numbers up to 1 are fractions of the sides, up to 1000 thousandths; larger ones leave the turn out. An answer with boxes becomes a
//! record of them, labelled by the nearest `<ref>` before or by that of the question; an answer without becomes a question in text.
//! Splits and tasks are what the files are named after (`Train_VG.json`, `Test_ROC.json`, …; `--task` says it otherwise): `suite_task` is
//! VG, ROC, RC or MIA, and `turn` the place in the conversation. The patient is the volume of SA-Med2D's name
//! (`MODALITY--DATASET--VOLUME--SLICE`).

use std::sync::LazyLock;

use regex::Regex;

use super::conversation::without_image;
use super::item::{Coords, Found, Item, Object};
use super::source::{stem, text_of};
use super::split::named;
use super::{ImportError, ImportOptions};

const FOLDERS: [&str; 2] = ["images", ""];

static TAGS: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"(?s)<ref>(.*?)</ref>|<box>(.*?)</box>").ok());
static NUMBER: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"-?\d+(?:\.\d+)?").ok());

/// Tasks by the words that name them: the authors' files also say GC for RC, MII for MIA.
const TASKS: [(&str, &[&str]); 4] =
    [("VG", &["vg"]), ("ROC", &["roc", "ro"]), ("RC", &["rc", "gc"]), ("MIA", &["mia", "mi", "mii"])];

/// The task that one of the words of a text names; none where there is none, or several.
fn task(text: &str) -> Option<&'static str> {
    let text = text.to_lowercase();
    let words = text.split(|c: char| !c.is_alphanumeric());
    let mut named = words.filter_map(|w| TASKS.iter().find(|(_, names)| names.contains(&w)).map(|(task, _)| *task));
    let first = named.next()?;
    named.all(|t| t == first).then_some(first)
}

pub(super) fn read(found: &mut Found, options: &ImportOptions) -> Result<(), ImportError> {
    if let Some(other) = options.task.as_ref().filter(|t| TASKS.iter().all(|(name, _)| name != t)) {
        return Err(found.source.wrong(format!("there is no task \"{other}\": the tasks are VG, ROC, RC, MIA")));
    }
    let files = found.source.files(&found.source.root, &["json", "jsonl"], 2);
    if files.is_empty() {
        return Err(found.source.wrong("no *.json with conversations"));
    }
    for file in files {
        let split = named(&stem(&file)).to_owned();
        let task = task(&stem(&file)).unwrap_or_default();
        if task.is_empty() && options.task.is_none() {
            let note = format!("{}: its name says no task (VG, ROC, RC, MIA): --task says which", file.display());
            found.report.notes.push(note);
        }
        for (row, entry) in found.source.json_rows(&file)?.iter().enumerate() {
            let id = text_of(&entry["id"]);
            let image = match found.source.image(&FOLDERS, &format!("{id}.png")) {
                Ok(image) => image,
                Err(reason) => {
                    found.leave_out(&file, row, &id, reason);
                    continue;
                }
            };
            for (k, turn) in entry["conversations"].as_array().into_iter().flatten().enumerate() {
                let (question, answer) = (text_of(&turn[0]), text_of(&turn[1]));
                if question.is_empty() || answer.is_empty() {
                    found.leave_out(&file, row, &id, "a turn is not question and answer");
                    continue;
                }
                let asked = parts(&question).find_map(|p| if let Part::Name(n) = p { Some(n) } else { None });
                let objects = match objects(&answer, asked) {
                    Ok(objects) => objects,
                    Err(reason) => {
                        found.leave_out(&file, row, &id, reason);
                        continue;
                    }
                };
                let mut item = Item {
                    id: format!("{id}-{k}"),
                    image: image.clone(),
                    file: file.clone(),
                    row,
                    question: Some(plain(&question)),
                    answer: plain(&answer),
                    text_only: objects.is_empty(),
                    objects,
                    modality: modality(&id).to_owned(),
                    split: split.clone(),
                    patient: id.rsplit_once("--").map_or("", |(volume, _)| volume).to_owned(),
                    suite_task: task.to_owned(),
                    ..Item::default()
                };
                item.extra.insert("turn".to_owned(), k.into());
                found.items.push(item);
            }
        }
    }
    Ok(())
}

enum Part<'a> {
    Name(&'a str),
    Box(&'a str),
}

fn parts(text: &str) -> impl Iterator<Item = Part<'_>> {
    TAGS.iter().flat_map(move |r| r.captures_iter(text)).filter_map(|c| match (c.get(1), c.get(2)) {
        (Some(name), _) => Some(Part::Name(name.as_str().trim())),
        (_, Some(b)) => Some(Part::Box(b.as_str())),
        _ => None,
    })
}

/// The objects of an answer.
///
/// # Errors
/// The rule by which its turn is left out.
fn objects(answer: &str, asked: Option<&str>) -> Result<Vec<Object>, &'static str> {
    const NO_BOX: &str = "a box is not four numbers up to 1000";
    let (mut out, mut name) = (Vec::new(), asked);
    for part in parts(answer) {
        match part {
            Part::Name(n) => name = Some(n),
            Part::Box(text) => {
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
    // A tag that is not closed would make a text of the box.
    if answer.matches("<box>").count() != out.len() {
        return Err("a <box> is not closed");
    }
    Ok(out)
}

/// The text without tags; boxes go with their numbers from answers, and stay as numbers where a question points.
fn plain(text: &str) -> String {
    let text = without_image(text);
    let text = text.replace("<ref>", "").replace("</ref>", "");
    text.replace("<box>", " ").replace("</box>", "").split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Modality by the first part of a SA-Med2D-20M name.
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
        let of = ["Test_VG", "train-roc", "Test_RO", "Test_GC", "rc.test", "Test_MII", "mia", "MI_test"].map(task);
        assert_eq!(of, ["VG", "ROC", "ROC", "RC", "RC", "MIA", "MIA", "MIA"].map(Some));
        assert_eq!(["train", "vgg", "Test_VG_RC", "aroc", ""].map(task), [None; 5]);
    }
}
