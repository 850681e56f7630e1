//! ms-swift grounding lines (<https://swift.readthedocs.io/en/latest/Customization/Custom-dataset.html>, "Grounding"): `*.jsonl` with
//! `messages`, `images` and `objects`: `{"ref": […], "bbox": [[x1,y1,x2,y2]], "bbox_type": "real" | "norm1", "image_id": […]}`; and the form of
//! version 2, a list (or its JSON text) of `{"caption", "bbox", "bbox_type": "real" | "norm_1" | "norm_1000"}`.
//!
//! `<ref-object>` and `<bbox>` are filled in their order over all messages, as ms-swift does; a box gets the label that was named last
//! before it. Left out: lines without an image or with several, points (two numbers), boxes without a label.

use std::path::Path;

use serde_json::Value;

use super::ImportError;
use super::conversation::without_image;
use super::item::{Coords, Found, Item, Object};
use super::source::{four, stem, text_of};
use super::split::named;

pub(super) fn read(found: &mut Found) -> Result<(), ImportError> {
    let root = found.source.root.clone();
    let files = found.source.files(&root, &["jsonl", "json"], 2);
    if files.is_empty() {
        return Err(found.source.wrong("no *.jsonl"));
    }
    for file in files {
        for (row, line) in found.source.json_rows(&file)?.iter().enumerate() {
            if let Err(reason) = take(found, &file, row, line) {
                found.leave_out(&file, row, "line", reason);
            }
        }
    }
    Ok(())
}

fn take(found: &mut Found, file: &Path, row: usize, line: &Value) -> Result<(), &'static str> {
    let images = match &line["images"] {
        Value::Array(list) => list.iter().map(|i| text_of(i.get("path").unwrap_or(i))).collect(),
        one => vec![text_of(one.get("path").unwrap_or(one))],
    };
    let [name] = images.as_slice() else { return Err("it has no image or several") };
    let folder = file.parent().and_then(|p| p.strip_prefix(&found.source.root).ok()).unwrap_or(Path::new(""));
    let image = found.source.image(&[&folder.to_string_lossy(), ""], name)?;
    let messages: Vec<(String, String)> = line["messages"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|m| (text_of(&m["role"]), text_of(&m["content"])))
        .collect();
    let (refs, boxes) = objects(&line["objects"])?;
    let (texts, objects) = fill(&messages, &refs, &boxes)?;
    let of = |role: &str| messages.iter().position(|(r, _)| r == role).map(|k| texts[k].clone());
    let question = of("user").filter(|q| !q.is_empty()).ok_or("it has no question")?;
    let answer = of("assistant").unwrap_or_default();
    if objects.is_empty() && answer.is_empty() {
        return Err("it has neither boxes nor an answer");
    }
    found.items.push(Item {
        id: format!("{}-{row}", stem(file)),
        image,
        file: file.to_owned(),
        row,
        question: Some(question),
        answer,
        text_only: objects.is_empty(),
        objects,
        split: named(&stem(file)).to_owned(),
        ..Item::default()
    });
    Ok(())
}

/// Names and boxes, in their order.
fn objects(value: &Value) -> Result<(Vec<String>, Vec<Coords>), &'static str> {
    let parsed;
    let value = match value {
        Value::String(text) => {
            parsed = serde_json::from_str::<Value>(text).map_err(|_| "its objects are not JSON")?;
            &parsed
        }
        other => other,
    };
    match value {
        Value::Object(_) => {
            let refs = value["ref"].as_array().into_iter().flatten().map(text_of).collect();
            let kind = text_of(&value["bbox_type"]);
            let boxes = value["bbox"].as_array().into_iter().flatten().map(|b| coords(b, &kind));
            Ok((refs, boxes.collect::<Result<_, _>>()?))
        }
        Value::Array(list) => {
            let refs = list.iter().map(|o| text_of(&o["caption"])).collect();
            let boxes = list.iter().map(|o| coords(&o["bbox"], &text_of(&o["bbox_type"])));
            Ok((refs, boxes.collect::<Result<_, _>>()?))
        }
        _ => Ok((Vec::new(), Vec::new())),
    }
}

fn coords(b: &Value, kind: &str) -> Result<Coords, &'static str> {
    let c = four(b).ok_or("a box is not four numbers (a point has two)")?;
    match kind {
        "" | "real" => Ok(Coords::Pixels(c)),
        "norm1" | "norm_1" => Ok(Coords::Fractions(c)),
        "norm1000" | "norm_1000" => Ok(Coords::Fractions(c.map(|v| v / 1000.0))),
        _ => Err("its bbox_type is not known"),
    }
}

/// The messages with names in place of their placeholders and without those of boxes; and the boxes with labels.
fn fill(
    messages: &[(String, String)],
    refs: &[String],
    boxes: &[Coords],
) -> Result<(Vec<String>, Vec<Object>), &'static str> {
    let (mut r, mut b, mut name) = (refs.iter(), boxes.iter(), None);
    let (mut texts, mut objects) = (Vec::new(), Vec::new());
    for (_, content) in messages {
        let (mut out, mut rest) = (String::new(), content.as_str());
        while let Some(at) = rest.find("<ref-object>").into_iter().chain(rest.find("<bbox>")).min() {
            out.push_str(&rest[..at]);
            rest = &rest[at..];
            if let Some(after) = rest.strip_prefix("<ref-object>") {
                rest = after;
                name = r.next().or(name);
                out.push_str(name.map_or("", String::as_str));
            } else if let Some(after) = rest.strip_prefix("<bbox>") {
                rest = after;
                if let Some(c) = b.next() {
                    objects.push((name, *c));
                }
            }
        }
        out.push_str(rest);
        texts.push(without_image(&out));
    }
    // Boxes that no placeholder takes: as many names as boxes, or one name for all.
    let taken = boxes.len() - b.len();
    for (k, c) in b.enumerate() {
        objects.push((if refs.len() == 1 { refs.first() } else { refs.get(taken + k) }, *c));
    }
    let labelled = objects.into_iter().map(|(name, coords)| {
        let label = name.filter(|n| !n.is_empty()).ok_or("a box has no label")?.clone();
        Ok(Object { label, coords })
    });
    Ok((texts, labelled.collect::<Result<_, &'static str>>()?))
}
