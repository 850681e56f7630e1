//! MedVH (<https://github.com/dongzizhu/MedVH>; Gu et al., 2024), hallucination tests on chest X-rays: `multi_choices/test_TASK.json` and
//! `text_generation/test_TASK.json`, arrays with `question`, `img_name`, `choices` (one text), `gt` (letter); images in a folder
//! named after the task, of `TASK_baseline` also in that of `TASK` or `baseline_TASK`.
//!
//! All records are of split test. `suggested_answer` (what the false confidence task claims) is kept. Rows of the report task have
//! `image_name` and `pos_labels` instead: these become a question about the findings; without a positive label they are left out. Names
//! of images repeat between tasks and mean different images.

use serde_json::Value;

use super::ImportError;
use super::choices::{self, NO_CHOICE};
use super::item::{Found, Item};
use super::source::{stem, text_of};

pub(super) fn read(found: &mut Found) -> Result<(), ImportError> {
    let root = found.source.root.clone();
    let parts = ["multi_choices", "text_generation"];
    let files: Vec<_> = parts.iter().flat_map(|p| found.source.files(&root.join(p), &["json"], 1)).collect();
    if files.is_empty() {
        return Err(found.source.wrong("no multi_choices/test_*.json or text_generation/test_*.json"));
    }
    for file in files {
        let part = file.parent().map(stem).unwrap_or_default();
        let name = stem(&file);
        let task = name.strip_prefix("test_").unwrap_or(&name);
        let base = task.strip_suffix("_baseline").unwrap_or(task);
        let folders = [task.to_owned(), format!("baseline_{base}"), base.to_owned()].map(|f| format!("{part}/{f}"));
        let folders: Vec<&str> = folders.iter().map(String::as_str).collect();
        for (row, q) in found.source.json_rows(&file)?.into_iter().enumerate() {
            let get = |key: &str| text_of(q.get(key).unwrap_or(&Value::Null));
            let image = Some(get("img_name")).filter(|n| !n.is_empty()).unwrap_or_else(|| get("image_name"));
            let number = Some(get("question_id")).filter(|n| !n.is_empty()).unwrap_or_else(|| get("report_id"));
            let mut item = Item {
                id: format!("{task}-{number}"),
                file: file.clone(),
                row,
                modality: "X-ray".to_owned(),
                split: "test".to_owned(),
                ..Item::default()
            };
            item.extra.insert("test".to_owned(), task.into());
            if let Some(claim) = Some(get("suggested_answer")).filter(|c| !c.is_empty()) {
                item.extra.insert("suggested_answer".to_owned(), claim.into());
            }
            let made = found.source.image(&folders, &image).and_then(|path| {
                item.image = path;
                fill(&mut item, &q, &get)
            });
            match made {
                Ok(()) => found.items.push(item),
                Err(reason) => found.leave_out(&file, row, &image, reason),
            }
        }
    }
    Ok(())
}

fn fill(item: &mut Item, q: &Value, get: &impl Fn(&str) -> String) -> Result<(), &'static str> {
    if let Some(labels) = q.get("pos_labels").and_then(Value::as_array) {
        let labels: Vec<String> = labels.iter().map(text_of).filter(|l| !l.is_empty()).collect();
        if labels.is_empty() {
            return Err("it has no positive label");
        }
        item.question = Some("Which findings does this chest X-ray show?".to_owned());
        item.answer = labels.join(", ");
        item.text_only = true;
        return Ok(());
    }
    let choices = choices::split(&get("choices"));
    let right = get("gt").parse().ok().or_else(|| choices::letter_of(&choices, &get("correct_answer")));
    choices::ask(item, &get("question"), &choices, right.ok_or(NO_CHOICE)?)
}
