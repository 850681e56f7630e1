//! LLaVA conversations (<https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md>).
//!
//! Files: `*.json` or `*.jsonl`, at most one folder deep; images below the folder or in `images/`. The split is read from the file name.
//!
//! Fields: `id`, `image` (a name, or a list with one), and `conversations` (also `conversatons`, as LLaVA-Med's files spell it): turns
//! `{"from": "human" | "gpt", "value"}`, also with the roles `user` and `assistant`. Each question with its answer becomes a text record;
//! `<image>` is removed; a system turn at the start is kept as the key `system` of each record. Numbers in brackets remain text, because
//! the file does not say whether they refer to the image or to one padded to a square.
//!
//! Left out: entries without an image or with several, and conversations that do not alternate between human and gpt.

use std::path::Path;

use serde_json::Value;

use super::ImportError;
use super::conversation::{Role, messages, strip_image_tags, turns};
use super::draft::{DraftRecord, ParsedDataset};
use super::source::{json_text, stem};
use super::split::split_from_name;

const FOLDERS: [&str; 2] = ["", "images"];

pub(super) fn read(dataset: &mut ParsedDataset) -> Result<(), ImportError> {
    let files = dataset.source.list_files(&dataset.source.root, &["json", "jsonl"], 2);
    if files.is_empty() {
        return Err(dataset.source.dataset_error("no *.json with conversations"));
    }
    for file in files {
        for (row, entry) in dataset.source.read_json_rows(&file)?.iter().enumerate() {
            if let Err(reason) = import_entry(dataset, &file, row, entry) {
                dataset.leave_out(&file, row, &json_text(&entry["id"]), reason);
            }
        }
    }
    Ok(())
}

/// Returns the image name of an entry, which may be in a list of one; `None` if there is no image or several.
fn image_name(entry: &Value) -> Option<String> {
    let name = match &entry["image"] {
        Value::Array(list) => list.first().filter(|_| list.len() == 1)?,
        name => name,
    };
    name.as_str().map(|name| name.trim().to_owned())
}

/// Adds a draft for each question of an entry.
///
/// # Errors
/// Returns the reason for leaving the entry out.
fn import_entry(dataset: &mut ParsedDataset, file: &Path, row: usize, entry: &Value) -> Result<(), &'static str> {
    let name = image_name(entry).ok_or("it has no image or several")?;
    let image = dataset.source.find_image(&FOLDERS, &name)?;
    let list = ["conversations", "conversatons"].iter().find_map(|key| entry[*key].as_array());
    let all = messages(list.ok_or("it has no conversation")?);
    let turns = turns(&all).filter(|_| all.last().is_some_and(|m| m.role == Role::Assistant));
    let turns = turns.ok_or("its turns are not human, then gpt")?;
    let system = turns.system.iter().map(|k| all[*k].text.as_str()).collect::<Vec<_>>().join("\n");
    let id = Some(json_text(&entry["id"])).filter(|i| !i.is_empty()).unwrap_or_else(|| format!("{}-{row}", stem(file)));
    for (k, (q, a)) in turns.pairs.iter().enumerate() {
        let question = strip_image_tags(&all[*q].text);
        let answer = a.map(|a| all[a].text.clone()).unwrap_or_default();
        if question.is_empty() || answer.is_empty() {
            dataset.leave_out(file, row, &id, "a turn is empty");
            continue;
        }
        let mut item = DraftRecord {
            id: if turns.pairs.len() == 1 { id.clone() } else { format!("{id}-{k}") },
            image: image.clone(),
            file: file.to_owned(),
            row,
            question: Some(question),
            answer,
            split: split_from_name(&stem(file)).to_owned(),
            text_only: true,
            ..DraftRecord::default()
        };
        item.set_system(&system);
        dataset.items.push(item);
    }
    Ok(())
}
