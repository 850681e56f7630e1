//! ms-swift grounding data (<https://swift.readthedocs.io/en/latest/Customization/Custom-dataset.html>, "Grounding").
//!
//! Files: `*.jsonl` or `*.json`, at most one folder deep; images relative to the file or to the folder. The split is read from the file name.
//!
//! Fields: `messages`, `images` (one) and `objects`: `{"ref": […], "bbox": [[x1,y1,x2,y2]], "bbox_type": "real" | "norm1", "image_id": […]}`.
//! In version 2, `objects` is a list (or its JSON text) of `{"caption", "bbox", "bbox_type": "real" | "norm_1" | "norm_1000"}`, and `query`,
//! `response`, `history` and `system` may replace `messages`. Each question with its answer becomes a record with the boxes of its answer;
//! the system text is kept as the key `system`. `<ref-object>` and `<bbox>` are filled in order over all messages, as ms-swift does. The
//! label of a box is its caption, else the last name before it, else the name with its index.
//!
//! Left out: lines without an image or with several, points (two numbers), boxes without a label, placeholders without a value, questions
//! that contain a box, and lines of several turns with boxes that no `<bbox>` refers to.

use std::path::Path;

use serde_json::Value;

use super::ImportError;
use super::conversation::{Message, Role, Turns, messages, strip_image_tags, turns};
use super::draft::{Coords, DraftRecord, Object, ParsedDataset};
use super::source::{four_numbers, json_text, stem};
use super::split::split_from_name;

pub(super) fn read(dataset: &mut ParsedDataset) -> Result<(), ImportError> {
    let root = dataset.source.root.clone();
    let files = dataset.source.list_files(&root, &["jsonl", "json"], 2);
    if files.is_empty() {
        return Err(dataset.source.dataset_error("no *.jsonl"));
    }
    for file in files {
        for (row, line) in dataset.source.read_json_rows(&file)?.iter().enumerate() {
            if let Err(reason) = import_line(dataset, &file, row, line) {
                dataset.leave_out(&file, row, "line", reason);
            }
        }
    }
    Ok(())
}

/// Adds a draft for each question of a line.
///
/// # Errors
/// Returns the reason for leaving the line out.
fn import_line(dataset: &mut ParsedDataset, file: &Path, row: usize, line: &Value) -> Result<(), &'static str> {
    let images = match &line["images"] {
        Value::Array(list) => list.iter().map(|i| json_text(i.get("path").unwrap_or(i))).collect(),
        image => vec![json_text(image.get("path").unwrap_or(image))],
    };
    let [name] = images.as_slice() else { return Err("it has no image or several") };
    let folder = file.parent().and_then(|p| p.strip_prefix(&dataset.source.root).ok()).unwrap_or(Path::new(""));
    let image = dataset.source.find_image(&[&folder.to_string_lossy(), ""], name)?;
    let conversation = parse_messages(line)?;
    let Turns { system, pairs } = turns(&conversation).ok_or("its turns are not user, then assistant")?;
    let mut filled = fill_placeholders(&conversation, &LineObjects::parse(&line["objects"])?)?;
    if system.iter().any(|k| !filled.objects[*k].is_empty()) {
        return Err("its system text contains a box");
    }
    let take_objects = |a: Option<usize>| a.map(|a| std::mem::take(&mut filled.objects[a])).unwrap_or_default();
    let mut boxes: Vec<Vec<Object>> = pairs.iter().map(|(_, a)| *a).map(take_objects).collect();
    if !filled.unused.is_empty() {
        let [only] = boxes.as_mut_slice() else { return Err("it has several turns, and boxes without a <bbox>") };
        only.append(&mut filled.unused);
    }
    let system = system.iter().map(|k| filled.texts[*k].as_str()).collect::<Vec<_>>().join("\n");
    for (k, ((q, a), objects)) in pairs.iter().zip(boxes).enumerate() {
        let question = filled.texts[*q].clone();
        let answer = a.map(|a| filled.texts[a].clone()).unwrap_or_default();
        let problem = if question.is_empty() {
            Some("it has no question")
        } else if !filled.objects[*q].is_empty() {
            Some("its question contains a box")
        } else {
            Some("it has neither boxes nor an answer").filter(|_| objects.is_empty() && answer.is_empty())
        };
        match problem {
            Some(problem) if pairs.len() == 1 => return Err(problem),
            Some(problem) => {
                dataset.leave_out(file, row, &format!("turn {k}"), problem);
                continue;
            }
            None => {}
        }
        let id = format!("{}-{row}", stem(file));
        let mut item = DraftRecord {
            id: if pairs.len() == 1 { id } else { format!("{id}-{k}") },
            image: image.clone(),
            file: file.to_owned(),
            row,
            question: Some(question),
            answer,
            text_only: objects.is_empty(),
            objects,
            split: split_from_name(&stem(file)).to_owned(),
            ..DraftRecord::default()
        };
        item.set_system(&system);
        dataset.items.push(item);
    }
    Ok(())
}

/// Returns the messages of a line, in either form.
fn parse_messages(line: &Value) -> Result<Vec<Message>, &'static str> {
    if let Some(list) = line["messages"].as_array() {
        return Ok(messages(list));
    }
    let mut out = Vec::new();
    let mut push = |role, text: &Value| out.push(Message { role, text: json_text(text) });
    if !json_text(&line["system"]).is_empty() {
        push(Role::System, &line["system"]);
    }
    for turn in line["history"].as_array().into_iter().flatten() {
        push(Role::User, &turn[0]);
        push(Role::Assistant, &turn[1]);
    }
    push(Role::User, line.get("query").ok_or("it has no question")?);
    if let Some(response) = line.get("response") {
        push(Role::Assistant, response);
    }
    Ok(out)
}

/// Names and boxes of a line, in their order.
#[derive(Default)]
struct LineObjects {
    refs: Vec<String>,
    boxes: Vec<PlaceholderBoxes>,
}

/// Value of one `<bbox>`: its boxes, and their caption if there is one.
#[derive(Clone)]
struct PlaceholderBoxes {
    caption: Option<String>,
    coords: Vec<Coords>,
}

impl LineObjects {
    fn parse(value: &Value) -> Result<Self, &'static str> {
        let parsed;
        let value = match value {
            Value::String(text) => {
                parsed = serde_json::from_str::<Value>(text).map_err(|_| "its objects are not JSON")?;
                &parsed
            }
            other => other,
        };
        let boxed = |caption, boxes: &Value, kind: &str| match boxes.as_array() {
            Some(list) if list.first().is_some_and(Value::is_array) => Ok(PlaceholderBoxes {
                caption,
                coords: list.iter().map(|b| coords(b, kind)).collect::<Result<_, _>>()?,
            }),
            _ => Ok::<_, &'static str>(PlaceholderBoxes { caption, coords: vec![coords(boxes, kind)?] }),
        };
        match value {
            Value::Object(_) => {
                let refs = value["ref"].as_array().into_iter().flatten().map(json_text).collect();
                let kind = json_text(&value["bbox_type"]);
                let boxes = value["bbox"].as_array().into_iter().flatten().map(|b| boxed(None, b, &kind));
                Ok(Self { refs, boxes: boxes.collect::<Result<_, _>>()? })
            }
            Value::Array(list) => {
                let refs: Vec<String> = list.iter().map(|o| json_text(&o["caption"])).collect();
                let boxes = list.iter().zip(&refs).map(|(o, caption)| {
                    let caption = Some(caption.clone()).filter(|c| !c.is_empty());
                    boxed(caption, &o["bbox"], &json_text(&o["bbox_type"]))
                });
                Ok(Self { boxes: boxes.collect::<Result<_, _>>()?, refs })
            }
            _ => Ok(Self::default()),
        }
    }

    /// Returns the name of box `k` if no name precedes it: there is one name for all boxes, or one per box.
    fn name_of(&self, k: usize) -> Option<&String> {
        match self.refs.len() {
            1 => self.refs.first(),
            n if n == self.boxes.len() => self.refs.get(k),
            _ => None,
        }
    }
}

fn coords(b: &Value, kind: &str) -> Result<Coords, &'static str> {
    let c = four_numbers(b).ok_or("a box is not four numbers (a point has two)")?;
    match kind {
        "" | "real" => Ok(Coords::Pixels(c)),
        "norm1" | "norm_1" => Ok(Coords::Fractions(c.map(f64::from))),
        "norm1000" | "norm_1000" => Ok(Coords::Fractions(c.map(|v| f64::from(v) / 1000.0))),
        _ => Err("its bbox_type is unknown"),
    }
}

/// Messages with their placeholders filled: texts with names and without `<bbox>`, and the boxes of each message.
struct FilledMessages {
    texts: Vec<String>,
    objects: Vec<Vec<Object>>,
    /// Boxes that no placeholder refers to.
    unused: Vec<Object>,
}

/// Fills `<ref-object>` and `<bbox>` in their order over all messages.
///
/// # Errors
/// Returns the reason for leaving the line out.
fn fill_placeholders(conversation: &[Message], objects_of_line: &LineObjects) -> Result<FilledMessages, &'static str> {
    let mut refs = objects_of_line.refs.iter();
    let mut boxes = objects_of_line.boxes.iter().enumerate();
    let mut name = None;
    let labelled = |k: usize, boxed: &PlaceholderBoxes, name: Option<&String>| {
        let label = boxed.caption.as_ref().or(name).or_else(|| objects_of_line.name_of(k)).filter(|n| !n.is_empty());
        let label = label.ok_or("a box has no label")?.clone();
        let each = boxed.coords.iter().map(|c| Object { label: label.clone(), coords: *c });
        Ok::<Vec<Object>, &'static str>(each.collect())
    };
    let mut out = FilledMessages { texts: Vec::new(), objects: Vec::new(), unused: Vec::new() };
    for message in conversation {
        let mut text = String::new();
        let mut objects = Vec::new();
        let mut rest = message.text.as_str();
        while let Some(start) = rest.find("<ref-object>").into_iter().chain(rest.find("<bbox>")).min() {
            text.push_str(&rest[..start]);
            rest = &rest[start..];
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
        out.texts.push(strip_image_tags(&text));
        out.objects.push(objects);
    }
    for (k, boxed) in boxes {
        out.unused.extend(labelled(k, boxed, None)?);
    }
    Ok(out)
}
