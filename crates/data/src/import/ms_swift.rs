//! ms-swift grounding lines (<https://swift.readthedocs.io/en/latest/Customization/Custom-dataset.html>, "Grounding"): `*.jsonl` with
//! `messages`, `images` and `objects`: `{"ref": […], "bbox": [[x1,y1,x2,y2]], "bbox_type": "real" | "norm1", "image_id": […]}`; and the form of
//! version 2, a list (or its JSON text) of `{"caption", "bbox", "bbox_type": "real" | "norm_1" | "norm_1000"}` beside `messages` or `query`,
//! `response`, `history` and `system`.
//!
//! Each question with its answer becomes a record with its own boxes; the system's text is kept as `system`. `<ref-object>` and
//! `<bbox>` are filled in their order over all messages, as ms-swift does; a box gets its caption, or the label that was named last
//! before it, or that of its number. Left out: lines without an image or with several, points (two numbers), boxes without a label,
//! placeholders for which nothing is there, questions that point at a box, several turns with boxes that no `<bbox>` takes.

use std::path::Path;

use serde_json::Value;

use super::ImportError;
use super::conversation::{Message, Role, Turns, messages, turns, without_image};
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
    let said = said(line)?;
    let Turns { system, pairs } = turns(&said).ok_or("its turns are not user, then assistant")?;
    let mut filled = fill(&said, &Named::read(&line["objects"])?)?;
    if system.iter().any(|k| !filled.objects[*k].is_empty()) {
        return Err("its system's text points at a box");
    }
    let answered = |a: Option<usize>| a.map(|a| std::mem::take(&mut filled.objects[a])).unwrap_or_default();
    let mut boxes: Vec<Vec<Object>> = pairs.iter().map(|(_, a)| *a).map(answered).collect();
    if !filled.rest.is_empty() {
        let [only] = boxes.as_mut_slice() else { return Err("it has several turns, and boxes without a <bbox>") };
        only.append(&mut filled.rest);
    }
    let system = system.iter().map(|k| filled.texts[*k].as_str()).collect::<Vec<_>>().join("\n");
    for (k, ((q, a), objects)) in pairs.iter().zip(boxes).enumerate() {
        let (question, answer) = (filled.texts[*q].clone(), a.map(|a| filled.texts[a].clone()).unwrap_or_default());
        let fault = if question.is_empty() {
            Some("it has no question")
        } else if !filled.objects[*q].is_empty() {
            Some("its question points at a box")
        } else {
            Some("it has neither boxes nor an answer").filter(|_| objects.is_empty() && answer.is_empty())
        };
        match fault {
            Some(fault) if pairs.len() == 1 => return Err(fault),
            Some(fault) => {
                found.leave_out(file, row, &format!("turn {k}"), fault);
                continue;
            }
            None => {}
        }
        let id = format!("{}-{row}", stem(file));
        let mut item = Item {
            id: if pairs.len() == 1 { id } else { format!("{id}-{k}") },
            image: image.clone(),
            file: file.to_owned(),
            row,
            question: Some(question),
            answer,
            text_only: objects.is_empty(),
            objects,
            split: named(&stem(file)).to_owned(),
            ..Item::default()
        };
        item.system(&system);
        found.items.push(item);
    }
    Ok(())
}

/// The messages of a line, in either form.
fn said(line: &Value) -> Result<Vec<Message>, &'static str> {
    if let Some(list) = line["messages"].as_array() {
        return Ok(messages(list));
    }
    let mut out = Vec::new();
    let mut say = |role, text: &Value| out.push(Message { role, text: text_of(text) });
    if !text_of(&line["system"]).is_empty() {
        say(Role::System, &line["system"]);
    }
    for turn in line["history"].as_array().into_iter().flatten() {
        say(Role::User, &turn[0]);
        say(Role::Assistant, &turn[1]);
    }
    say(Role::User, line.get("query").ok_or("it has no question")?);
    if let Some(response) = line.get("response") {
        say(Role::Assistant, response);
    }
    Ok(out)
}

/// Names and boxes of a line, in their order.
#[derive(Default)]
struct Named {
    refs: Vec<String>,
    boxes: Vec<Boxed>,
}

/// What one `<bbox>` stands for: a caption of its own, where it has one, and its boxes.
#[derive(Clone)]
struct Boxed {
    caption: Option<String>,
    coords: Vec<Coords>,
}

impl Named {
    fn read(value: &Value) -> Result<Self, &'static str> {
        let parsed;
        let value = match value {
            Value::String(text) => {
                parsed = serde_json::from_str::<Value>(text).map_err(|_| "its objects are not JSON")?;
                &parsed
            }
            other => other,
        };
        let boxed = |caption, boxes: &Value, kind: &str| match boxes.as_array() {
            Some(list) if list.first().is_some_and(Value::is_array) => {
                Ok(Boxed { caption, coords: list.iter().map(|b| coords(b, kind)).collect::<Result<_, _>>()? })
            }
            _ => Ok::<_, &'static str>(Boxed { caption, coords: vec![coords(boxes, kind)?] }),
        };
        match value {
            Value::Object(_) => {
                let refs = value["ref"].as_array().into_iter().flatten().map(text_of).collect();
                let kind = text_of(&value["bbox_type"]);
                let boxes = value["bbox"].as_array().into_iter().flatten().map(|b| boxed(None, b, &kind));
                Ok(Self { refs, boxes: boxes.collect::<Result<_, _>>()? })
            }
            Value::Array(list) => {
                let refs: Vec<String> = list.iter().map(|o| text_of(&o["caption"])).collect();
                let boxes = list.iter().zip(&refs).map(|(o, caption)| {
                    let caption = Some(caption.clone()).filter(|c| !c.is_empty());
                    boxed(caption, &o["bbox"], &text_of(&o["bbox_type"]))
                });
                Ok(Self { boxes: boxes.collect::<Result<_, _>>()?, refs })
            }
            _ => Ok(Self::default()),
        }
    }

    /// The name for the box at this place where none was said before it: one for all, or as many as there are boxes.
    fn of(&self, k: usize) -> Option<&String> {
        match self.refs.len() {
            1 => self.refs.first(),
            n if n == self.boxes.len() => self.refs.get(k),
            _ => None,
        }
    }
}

fn coords(b: &Value, kind: &str) -> Result<Coords, &'static str> {
    let c = four(b).ok_or("a box is not four numbers (a point has two)")?;
    match kind {
        "" | "real" => Ok(Coords::Pixels(c)),
        "norm1" | "norm_1" => Ok(Coords::Fractions(c.map(f64::from))),
        "norm1000" | "norm_1000" => Ok(Coords::Fractions(c.map(|v| f64::from(v) / 1000.0))),
        _ => Err("its bbox_type is not known"),
    }
}

/// Messages with names in place of their placeholders and without those of boxes, each with its boxes; and the boxes that no
/// placeholder takes.
struct Filled {
    texts: Vec<String>,
    objects: Vec<Vec<Object>>,
    rest: Vec<Object>,
}

fn fill(said: &[Message], named: &Named) -> Result<Filled, &'static str> {
    let (mut refs, mut boxes, mut name) = (named.refs.iter(), named.boxes.iter().enumerate(), None);
    let labelled = |k: usize, boxed: &Boxed, name: Option<&String>| {
        let label = boxed.caption.as_ref().or(name).or_else(|| named.of(k)).filter(|n| !n.is_empty());
        let label = label.ok_or("a box has no label")?.clone();
        let each = boxed.coords.iter().map(|c| Object { label: label.clone(), coords: *c });
        Ok::<Vec<Object>, &'static str>(each.collect())
    };
    let mut out = Filled { texts: Vec::new(), objects: Vec::new(), rest: Vec::new() };
    for message in said {
        let (mut text, mut objects, mut rest) = (String::new(), Vec::new(), message.text.as_str());
        while let Some(at) = rest.find("<ref-object>").into_iter().chain(rest.find("<bbox>")).min() {
            text.push_str(&rest[..at]);
            rest = &rest[at..];
            if let Some(after) = rest.strip_prefix("<ref-object>") {
                rest = after;
                name = Some(refs.next().filter(|n| !n.is_empty()).ok_or("a <ref-object> has no name")?);
                text.push_str(name.map_or("", String::as_str));
            } else if let Some(after) = rest.strip_prefix("<bbox>") {
                rest = after;
                let (k, boxed) = boxes.next().ok_or("a <bbox> has no box")?;
                objects.extend(labelled(k, boxed, name)?);
            }
        }
        text.push_str(rest);
        out.texts.push(without_image(&text));
        out.objects.push(objects);
    }
    for (k, boxed) in boxes {
        out.rest.extend(labelled(k, boxed, None)?);
    }
    Ok(out)
}
