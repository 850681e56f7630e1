//! LLaVA conversations (<https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md>): JSON arrays (or lines) of `id`, `image`
//! and `conversations`, turns `{"from": "human" | "gpt", "value"}`.
//!
//! Each question with its answer becomes a record in text; `<image>` is dropped. Numbers in brackets stay text: whether they
//! belong to the image or to one padded to a square is not stated in the file. Left out: entries without an image or with several,
//! turns that are not human, then gpt.

use std::path::Path;

use serde_json::Value;

use super::ImportError;
use super::conversation::without_image;
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

fn take(found: &mut Found, file: &Path, row: usize, entry: &Value) -> Result<(), &'static str> {
    let name = text_of(entry.get("image").filter(|i| i.is_string()).ok_or("it has no image or several")?);
    let image = found.source.image(&FOLDERS, &name)?;
    let turns = entry["conversations"].as_array().ok_or("it has no conversation")?;
    let id = Some(text_of(&entry["id"])).filter(|i| !i.is_empty()).unwrap_or_else(|| format!("{}-{row}", stem(file)));
    let (pairs, rest) = turns.as_chunks::<2>();
    if !rest.is_empty() || pairs.iter().any(|[q, a]| q["from"] != "human" || a["from"] != "gpt") || pairs.is_empty() {
        return Err("its turns are not human, then gpt");
    }
    for (k, [q, a]) in pairs.iter().enumerate() {
        let (question, answer) = (without_image(&text_of(&q["value"])), text_of(&a["value"]));
        if question.is_empty() || answer.is_empty() {
            found.leave_out(file, row, &id, "a turn is empty");
            continue;
        }
        found.items.push(Item {
            id: if pairs.len() == 1 { id.clone() } else { format!("{id}-{k}") },
            image: image.clone(),
            file: file.to_owned(),
            row,
            question: Some(question),
            answer,
            split: named(&stem(file)).to_owned(),
            text_only: true,
            ..Item::default()
        });
    }
    Ok(())
}
