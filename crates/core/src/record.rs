//! The dataset record (one JSON line): field names and validity rules. Does no file access.

mod keys;
mod parse;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use keys::intended_key;

use crate::geometry::{BBox, BoxFault};
use crate::task::Task;

/// Placeholder in [`Record::answer`] for boxes and category, which each model family writes in its own notation.
pub const REGION: &str = "<region>";

/// One dataset record: an image, a question, the abnormal class and its boxes in original-image pixels.
///
/// `boxes: []` means "no finding"; a grounding record with a category but without `boxes` is an error. A null counts as an absent key, a
/// number as `id` is read as its digits. Unknown keys are kept in [`Record::extra`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "parse::Fields")]
pub struct Record {
    /// Unique id; also the group key.
    pub id: String,
    /// Path relative to the record file, or an object URL. May be empty when `image_size` is given.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub image: String,
    /// `[width, height]` in pixels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_size: Option<[u32; 2]>,
    /// Question to the model; see [`Record::question_or`].
    pub question: String,
    /// Reference answer in free text. If empty, the training answer is built from boxes and category. It is itself the training answer
    /// if it contains [`REGION`] (replaced by boxes and category) or if [`Record::is_text`].
    pub answer: String,
    /// Name of the abnormal class.
    pub category: String,
    /// True boxes.
    pub boxes: Vec<BBox>,
    /// One label per box, or empty.
    pub labels: Vec<String>,
    /// Imaging modality (CT, X-ray, endoscopy…).
    pub modality: String,
    /// Source data set.
    pub source: String,
    /// Split: `train`, `val` or `test`.
    pub split: String,
    /// Kind of answer that is asked for; grounding if the key is absent.
    #[serde(skip_serializing_if = "Task::is_default")]
    pub task: Task,
    /// Keys that Unveil does not interpret.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// Error for a text that is not a record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{what}", match .id.as_str() { "" => String::new(), id => format!("record \"{id}\": ") })]
pub struct RecordError {
    /// Id of the record; empty if it cannot be read.
    pub id: String,
    /// Description of the problem, naming the key.
    pub what: String,
}

/// Problem of a record.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RecordFault {
    /// The id is missing or empty.
    #[error("the record has no id")]
    NoId,
    /// Both `image` and `image_size` are missing.
    #[error("the record has neither `image` nor `image_size`")]
    NoImage,
    /// The number of labels differs from the number of boxes.
    #[error("{labels} labels for {boxes} boxes: give one label per box, or none")]
    Labels {
        /// Number of labels.
        labels: usize,
        /// Number of boxes.
        boxes: usize,
    },
    /// A box is invalid.
    #[error("box {index} {coords:?} {fault}")]
    Box {
        /// Index of the box.
        index: usize,
        /// Coordinates of the box.
        coords: [f32; 4],
        /// Problem of the box.
        fault: BoxFault,
    },
}

impl Record {
    /// Parses one line of a record file, without a leading byte-order mark.
    ///
    /// # Errors
    /// Returns a [`RecordError`] with the id, if there is one, and the invalid key.
    pub fn parse(line: &str) -> Result<Self, RecordError> {
        parse::parse(line)
    }

    /// Returns the question, or `default` if the question is empty or blank.
    pub fn question_or<'a>(&'a self, default: &'a str) -> &'a str {
        if self.question.trim().is_empty() { default } else { &self.question }
    }

    /// Returns the patient id of the image, if the record gives one as text or as a number.
    pub fn patient(&self) -> Option<String> {
        let text = match self.extra.get("patient")? {
            Value::String(s) => s.trim().to_owned(),
            Value::Number(n) => match n.as_f64() {
                // Tables with missing values store 7 as 7.0.
                Some(x) if x.fract() == 0.0 && x.abs() < 1e15 => format!("{x:.0}"),
                _ => n.to_string(),
            },
            _ => return None,
        };
        (!text.is_empty()).then_some(text)
    }

    /// Returns whether the answer is text rather than a region.
    pub fn is_text(&self) -> bool {
        self.task.is_text()
    }

    /// Returns the problems that can be found without reading the image. `size` is `(width, height)` in pixels; without it and without
    /// `image_size`, image borders are not checked.
    pub fn faults(&self, size: Option<(u32, u32)>) -> Vec<RecordFault> {
        let mut out = Vec::new();
        if self.id.trim().is_empty() {
            out.push(RecordFault::NoId);
        }
        if self.image.is_empty() && self.image_size.is_none() {
            out.push(RecordFault::NoImage);
        }
        if !self.labels.is_empty() && self.labels.len() != self.boxes.len() {
            out.push(RecordFault::Labels { labels: self.labels.len(), boxes: self.boxes.len() });
        }
        let (w, h) = size
            .or(self.image_size.map(|[w, h]| (w, h)))
            .map_or((f32::INFINITY, f32::INFINITY), |(w, h)| (w as f32, h as f32));
        for (index, b) in self.boxes.iter().enumerate() {
            if let Some(fault) = b.fault(w, h) {
                out.push(RecordFault::Box { index, coords: (*b).into(), fault });
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blank_question_is_replaced_by_the_default() {
        for (line, asked) in [
            (r#"{"id":"a"}"#, "Where?"),
            (r#"{"id":"a","question":""}"#, "Where?"),
            (r#"{"id":"a","question":" \n"}"#, "Where?"),
            (r#"{"id":"a","question":" What? "}"#, " What? "),
        ] {
            assert_eq!(Record::parse(line).unwrap().question_or("Where?"), asked, "{line}");
        }
    }

    #[test]
    fn extra_keys_survive() {
        let line = r#"{"id":"a","image":"x.png","category":"nodule","boxes":[[1.0,2.0,3.0,4.0]],"patient":"p7"}"#;
        let r: Record = serde_json::from_str(line).unwrap();
        assert_eq!(r.boxes[0], [1.0, 2.0, 3.0, 4.0].into());
        let back: Value = serde_json::from_str(&serde_json::to_string(&r).unwrap()).unwrap();
        assert_eq!(back["patient"], "p7");
        assert!(r.faults(Some((10, 10))).is_empty());
        assert_eq!(r.faults(Some((1, 1))).len(), 1);
    }

    #[test]
    fn unknown_tasks_are_refused() {
        let read = |task: &str| serde_json::from_str::<Record>(&format!(r#"{{"id":"a"{task}}}"#));
        assert_eq!(read("").unwrap().task, Task::Grounding);
        assert!(!serde_json::to_string(&read("").unwrap()).unwrap().contains("task"));
        let choice = read(r#","task":"choice""#).unwrap();
        assert!(choice.is_text() && choice.extra.is_empty());
        assert!(serde_json::to_string(&choice).unwrap().contains(r#""task":"choice""#));
        let e = read(r#","task":"vga""#).unwrap_err().to_string();
        assert!(e.contains("`vga`") && e.contains("grounding, vqa, choice, caption, report or dialogue"), "{e}");
    }

    fn refusal(line: &str) -> String {
        Record::parse(line).unwrap_err().to_string()
    }

    #[test]
    fn grounding_categories_need_boxes() {
        for line in [
            r#"{"id":"a7","category":"nodule"}"#,
            r#"{"id":"a7","category":"nodule","boxes":null}"#,
            r#"{"id":"a7","category":"nodule","task":"grounding","boxs":[]}"#,
        ] {
            let e = refusal(line);
            assert!(e.contains("record \"a7\"") && e.contains("nodule") && e.contains("`boxes`"), "{e}");
            let e = serde_json::from_str::<Record>(line).unwrap_err().to_string();
            assert!(e.contains("a7") && e.contains("`boxes`"), "{e}");
        }
        for key in ["bboxes", "bbox", "box", "bbox_2d"] {
            for category in ["", "nodule"] {
                let e = refusal(&format!(r#"{{"id":"a7","category":"{category}","{key}":[[1,2,3,4]]}}"#));
                assert!(e.contains(&format!("`{key}`")) && e.contains("rename"), "{e}");
            }
        }
        for line in [
            r#"{"id":"a","category":"nodule","boxes":[]}"#,
            r#"{"id":"a"}"#,
            r#"{"id":"a","category":"No finding"}"#,
            r#"{"id":"a","category":"nodule","task":"vqa","answer":"yes"}"#,
            r#"{"id":"a","task":"caption","bbox":[[1,2,3,4]]}"#,
            r#"{"id":"a","bbox":[],"boxes":null}"#,
        ] {
            assert!(Record::parse(line).unwrap().boxes.is_empty(), "{line}");
        }
    }

    #[test]
    fn nulls_and_numeric_ids_are_accepted() {
        let r = Record::parse("\u{feff}{\"id\":17,\"answer\":null,\"labels\":null,\"modality\":null,\"image_size\":null,\"task\":null}\r\n")
            .unwrap();
        assert_eq!((r.id.as_str(), r.answer.as_str(), r.labels.len(), r.image_size), ("17", "", 0, None));
        let patient = |value: &str| Record::parse(&format!(r#"{{"id":"a","patient":{value}}}"#)).unwrap().patient();
        assert_eq!([patient("7"), patient("7.0"), patient("\" 7 \"")], [(); 3].map(|()| Some("7".to_owned())));
        assert_eq!([patient("null"), patient("\"\""), patient("[7]")], [None, None, None]);
        assert_eq!(patient("7.5").as_deref(), Some("7.5"));
    }

    #[test]
    fn errors_name_id_and_key() {
        for (line, needles) in [
            (r#"{"id":"a7","boxes":[["5","5","20","20"]]}"#, ["a7", "`boxes`[0] holds the string \"5\""]),
            (r#"{"id":"a7","boxes":[[1,2,3,4],[1,2,3]]}"#, ["a7", "`boxes`[1] is not of length 4"]),
            (r#"{"id":"a7","boxes":[1,2,3,4]}"#, ["a7", "`boxes`[0] is the number 1"]),
            (r#"{"id":"a7","boxes":{"x":1}}"#, ["a7", "`boxes` is an object"]),
            (r#"{"id":"a7","boxes":[[1,2,3,null]]}"#, ["a7", "`boxes`[0] holds null"]),
            (r#"{"id":"a7","boxes":[[1,NaN,3,4]]}"#, ["a7", "`boxes` holds NaN"]),
            (r#"{"answer":"NaN \" Infinity","age":-Infinity,"id":"a7"}"#, ["a7", "`age` holds -Infinity"]),
            (r#"{"id":"a7","question":3}"#, ["a7", "`question` is the number 3"]),
            (r#"{"id":"a7","labels":["x",null]}"#, ["a7", "`labels`[1] is null"]),
            (r#"{"id":"a7","image_size":[5,-1]}"#, ["a7", "`image_size`"]),
            (r#"{"id":"a7","task":"vga"}"#, ["a7", "`vga` is not a task"]),
            (r#"{"id":[7]}"#, ["`id`", "a list of 1"]),
            (r#"{"question":"x"}"#, ["missing field `id`", "unique id"]),
            (r#"{"id":"a7","boxes":[],"boxes":[]}"#, ["`boxes`", "twice"]),
            (r#"["a7"]"#, ["not a record", "JSON object"]),
            (r#"{"id":"a7""#, ["not JSON", "column"]),
        ] {
            let e = refusal(line);
            assert!(needles.iter().all(|n| e.contains(n)), "{line}: {e}");
        }
    }
}
