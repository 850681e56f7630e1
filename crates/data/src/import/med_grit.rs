//! Med-GRIT-270k (<https://github.com/ShawnHuang497/BiRD>; Huang et al., MICCAI 2024): JSON arrays of `id` and `conversations`, a list of
//! question and answer pairs in Qwen-VL's words, `<img>…</img>`, `<ref>…</ref>`, `<box>(x1,y1),(x2,y2)</box>`; images `ID.png` of SA-Med2D-20M.
//!
//! Numbers up to 1 are fractions of the sides, up to 1000 thousandths; larger ones leave the box out. An answer with boxes becomes a
//! record of them, labelled by the nearest `<ref>` before or by that of the question; an answer without becomes a question in text.
//! Splits are what the files are named after; the patient is the volume of SA-Med2D's name (`MODALITY--DATASET--VOLUME--SLICE`).

use std::sync::LazyLock;

use regex::Regex;

use super::ImportError;
use super::conversation::without_image;
use super::item::{Coords, Found, Item, Object};
use super::source::{stem, text_of};
use super::split::named;

const FOLDERS: [&str; 2] = ["images", ""];

static TAGS: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"(?s)<ref>(.*?)</ref>|<box>(.*?)</box>").ok());
static NUMBER: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"-?\d+(?:\.\d+)?").ok());

pub(super) fn read(found: &mut Found) -> Result<(), ImportError> {
    let files = found.source.files(&found.source.root, &["json", "jsonl"], 2);
    if files.is_empty() {
        return Err(found.source.wrong("no *.json with conversations"));
    }
    for file in files {
        let split = named(&stem(&file)).to_owned();
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
                let Some(objects) = objects(&answer, asked) else {
                    found.leave_out(&file, row, &id, "a box is not four numbers up to 1000");
                    continue;
                };
                found.items.push(Item {
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
                    ..Item::default()
                });
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

/// The objects of an answer; none where a box cannot be read.
fn objects(answer: &str, asked: Option<&str>) -> Option<Vec<Object>> {
    let (mut out, mut name) = (Vec::new(), asked);
    for part in parts(answer) {
        match part {
            Part::Name(n) => name = Some(n),
            Part::Box(text) => {
                let numbers: Vec<f32> =
                    NUMBER.iter().flat_map(|r| r.find_iter(text)).filter_map(|n| n.as_str().parse().ok()).collect();
                let c = <[f32; 4]>::try_from(numbers).ok()?;
                let most = c.iter().copied().fold(0.0, f32::max);
                let unit = if most <= 1.0 { 1.0 } else { 1000.0 };
                let label = name.filter(|n| !n.is_empty())?.to_owned();
                out.push(Object { label, coords: Coords::Fractions(c.map(|v| v / unit)) });
                if most > 1000.0 {
                    return None;
                }
            }
        }
    }
    Some(out)
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
