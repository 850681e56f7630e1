//! The dataset record (one JSON line) and its rules. Owns field names and validity; knows no file system.

mod keys;
mod read;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use keys::meant;

use crate::geometry::{BBox, BoxFault};
use crate::task::Task;

/// Stands in [`Record::answer`] for boxes and category, which each model family writes in its own way.
pub const REGION: &str = "<region>";

/// One dataset record: an image, a question, the abnormal class and its boxes in original-image pixels.
///
/// `boxes: []` means "no finding"; where something is asked for, a category without the key is an error. A null counts as an absent key, a
/// number as an id is its digits. Keys that Unveil does not know are kept in [`Record::extra`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "read::Fields")]
pub struct Record {
    /// Unique id, also the group key.
    pub id: String,
    /// Path relative to the record file, or an object URL. May be empty when `image_size` is given.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub image: String,
    /// `[width, height]` in pixels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_size: Option<[u32; 2]>,
    /// What is asked.
    pub question: String,
    /// Reference answer in free text; may be empty, then the training answer is made from boxes and category. It is the training answer
    /// itself where it holds [`REGION`] (boxes and category go there), and where [`Record::is_text`].
    pub answer: String,
    /// The abnormal class, in words.
    pub category: String,
    /// True boxes.
    pub boxes: Vec<BBox>,
    /// A label per box, or empty.
    pub labels: Vec<String>,
    /// CT, X-ray, endoscopy…
    pub modality: String,
    /// The data set it comes from.
    pub source: String,
    /// `train`, `val` or `test`.
    pub split: String,
    /// What kind of answer is asked for. Absent: where something is.
    #[serde(skip_serializing_if = "Task::is_default")]
    pub task: Task,
    /// Keys that Unveil does not interpret.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// Why a text is no record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{what}", match .id.as_str() { "" => String::new(), id => format!("record \"{id}\": ") })]
pub struct RecordError {
    /// Its id, where there is one.
    pub id: String,
    /// What is wrong, with the key.
    pub what: String,
}

/// What is wrong with a record.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RecordFault {
    /// The id is missing or empty.
    #[error("the record has no id")]
    NoId,
    /// Neither an image nor its size.
    #[error("the record has neither `image` nor `image_size`")]
    NoImage,
    /// Labels do not match the boxes.
    #[error("{labels} labels for {boxes} boxes: give one label per box, or none")]
    Labels {
        /// Number of labels.
        labels: usize,
        /// Number of boxes.
        boxes: usize,
    },
    /// One box is not valid.
    #[error("box {index} {coords:?} {fault}")]
    Box {
        /// Which box.
        index: usize,
        /// Its coordinates.
        coords: [f32; 4],
        /// What is wrong.
        fault: BoxFault,
    },
}

impl Record {
    /// Reads one line of a record file; a byte-order mark before it is dropped.
    ///
    /// # Errors
    /// The id, where there is one, and the key that is wrong.
    pub fn parse(line: &str) -> Result<Self, RecordError> {
        read::parse(line)
    }

    /// The person whose image it is, where that is said: a text or a number, alike.
    pub fn patient(&self) -> Option<String> {
        let text = match self.extra.get("patient")? {
            Value::String(s) => s.trim().to_owned(),
            Value::Number(n) => match n.as_f64() {
                // 7.0 is what a table of numbers with gaps makes of 7.
                Some(x) if x.fract() == 0.0 && x.abs() < 1e15 => format!("{x:.0}"),
                _ => n.to_string(),
            },
            _ => return None,
        };
        (!text.is_empty()).then_some(text)
    }

    /// Whether the question is answered in text rather than by a region.
    pub fn is_text(&self) -> bool {
        self.task.is_text()
    }

    /// Checks what can be checked without the image; `size` is `(width, height)` when known, else borders are not checked.
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
    fn a_task_is_one_that_is_known() {
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
    fn a_category_without_boxes_is_refused_where_a_place_is_asked_for() {
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
    fn tables_of_other_tools_are_read() {
        let r = Record::parse("\u{feff}{\"id\":17,\"answer\":null,\"labels\":null,\"modality\":null,\"image_size\":null,\"task\":null}\r\n")
            .unwrap();
        assert_eq!((r.id.as_str(), r.answer.as_str(), r.labels.len(), r.image_size), ("17", "", 0, None));
        let patient = |value: &str| Record::parse(&format!(r#"{{"id":"a","patient":{value}}}"#)).unwrap().patient();
        assert_eq!([patient("7"), patient("7.0"), patient("\" 7 \"")], [(); 3].map(|()| Some("7".to_owned())));
        assert_eq!([patient("null"), patient("\"\""), patient("[7]")], [None, None, None]);
        assert_eq!(patient("7.5").as_deref(), Some("7.5"));
    }

    #[test]
    fn what_is_wrong_names_id_and_key() {
        for (line, needles) in [
            (r#"{"id":"a7","boxes":[["5","5","20","20"]]}"#, ["a7", "`boxes`[0] holds the text \"5\""]),
            (r#"{"id":"a7","boxes":[[1,2,3,4],[1,2,3]]}"#, ["a7", "`boxes`[1] is not of length 4"]),
            (r#"{"id":"a7","boxes":[1,2,3,4]}"#, ["a7", "`boxes`[0] is the number 1"]),
            (r#"{"id":"a7","boxes":{"x":1}}"#, ["a7", "`boxes` is an object"]),
            (r#"{"id":"a7","boxes":[[1,2,3,null]]}"#, ["a7", "`boxes`[0] holds null"]),
            (r#"{"id":"a7","boxes":[[1,NaN,3,4]]}"#, ["a7", "`boxes` holds NaN"]),
            (r#"{"answer":"NaN \" Infinity","age":-Infinity,"id":"a7"}"#, ["a7", "`age` holds -Infinity"]),
            (r#"{"id":"a7","question":3}"#, ["a7", "`question` is the number 3"]),
            (r#"{"id":"a7","labels":["x",null]}"#, ["a7", "`labels`[1] is null"]),
            (r#"{"id":"a7","image_size":[5,-1]}"#, ["a7", "`image_size`"]),
            (r#"{"id":"a7","task":"vga"}"#, ["a7", "`vga` is no task"]),
            (r#"{"id":[7]}"#, ["`id`", "a list of 1"]),
            (r#"{"question":"x"}"#, ["missing field `id`", "of its own"]),
            (r#"{"id":"a7","boxes":[],"boxes":[]}"#, ["`boxes`", "twice"]),
            (r#"["a7"]"#, ["not a record", "JSON object"]),
            (r#"{"id":"a7""#, ["not JSON", "column"]),
        ] {
            let e = refusal(line);
            assert!(needles.iter().all(|n| e.contains(n)), "{line}: {e}");
        }
    }
}
