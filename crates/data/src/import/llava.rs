//! LLaVA conversations (<https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md>): JSON arrays (or lines) of `id`, `image`
//! and `conversations`, turns `{"from": "human" | "gpt", "value"}`; also `conversatons` (so spelt in LLaVA-Med's files), `image` as a
//! list of one, roles `user` and `assistant`.
//!
//! Each question with its answer becomes a record in text; `<image>` is dropped; a system turn at the start is kept as `system` of
//! each. Numbers in brackets stay text: whether they belong to the image or to one padded to a square is not stated in the file. Left
//! out: entries without an image or with several, turns that are not human, then gpt, after a system's.

use std::path::Path;

use serde_json::Value;

use super::ImportError;
use super::conversation::{Role, messages, turns, without_image};
use super::item::{Found, Item};
use super::source::{stem, text_of};
use super::split::named;

const FOLDERS: [&str; 2] = ["", "images"];

pub(super) fn read(found: &mut Found) -> Result<(), ImportError> {
    let files = found.source.files(&found.source.root, &["json", "jsonl"], 2);
    if files.is_empty() {
        return Err(found.source.wrong("no *.json with conversations"));
    }
    for file in files {
        for (row, entry) in found.source.json_rows(&file)?.iter().enumerate() {
            if let Err(reason) = take(found, &file, row, entry) {
                found.leave_out(&file, row, &text_of(&entry["id"]), reason);
            }
        }
    }
    Ok(())
}

/// The image's name, which may stand in a list of one.
fn image_name(entry: &Value) -> Option<String> {
    let one = match &entry["image"] {
        Value::Array(list) => list.first().filter(|_| list.len() == 1)?,
        one => one,
    };
    one.as_str().map(|name| name.trim().to_owned())
}

fn take(found: &mut Found, file: &Path, row: usize, entry: &Value) -> Result<(), &'static str> {
    let name = image_name(entry).ok_or("it has no image or several")?;
    let image = found.source.image(&FOLDERS, &name)?;
    let list = ["conversations", "conversatons"].iter().find_map(|key| entry[*key].as_array());
    let all = messages(list.ok_or("it has no conversation")?);
    let turns = turns(&all).filter(|_| all.last().is_some_and(|m| m.role == Role::Assistant));
    let turns = turns.ok_or("its turns are not human, then gpt")?;
    let system = turns.system.iter().map(|k| all[*k].text.as_str()).collect::<Vec<_>>().join("\n");
    let id = Some(text_of(&entry["id"])).filter(|i| !i.is_empty()).unwrap_or_else(|| format!("{}-{row}", stem(file)));
    for (k, (q, a)) in turns.pairs.iter().enumerate() {
        let (question, answer) = (without_image(&all[*q].text), a.map(|a| all[a].text.clone()).unwrap_or_default());
        if question.is_empty() || answer.is_empty() {
            found.leave_out(file, row, &id, "a turn is empty");
            continue;
        }
        let mut item = Item {
            id: if turns.pairs.len() == 1 { id.clone() } else { format!("{id}-{k}") },
            image: image.clone(),
            file: file.to_owned(),
            row,
            question: Some(question),
            answer,
            split: named(&stem(file)).to_owned(),
            text_only: true,
            ..Item::default()
        };
        item.system(&system);
        found.items.push(item);
    }
    Ok(())
}
