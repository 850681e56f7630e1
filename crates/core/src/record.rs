//! The dataset record (one JSON line) and its rules. Owns field names and validity; knows no file system.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::geometry::{BBox, BoxFault};
use crate::task::Task;

/// Stands in [`Record::answer`] for boxes and category, which each model family writes in its own way.
pub const REGION: &str = "<region>";

/// One dataset record: an image, a question, the abnormal class and its boxes in original-image pixels.
///
/// `boxes: []` means "no finding". Keys that Unveil does not know are kept in [`Record::extra`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Unique id, also the group key.
    pub id: String,
    /// Path relative to the record file, or an object URL. May be empty when `image_size` is given.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub image: String,
    /// `[width, height]` in pixels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_size: Option<[u32; 2]>,
    /// What is asked.
    #[serde(default)]
    pub question: String,
    /// Reference answer in free text; may be empty, then the training answer is made from boxes and category. It is the training answer
    /// itself where it holds [`REGION`] (boxes and category go there), and where [`Record::is_text`].
    #[serde(default)]
    pub answer: String,
    /// The abnormal class, in words.
    #[serde(default)]
    pub category: String,
    /// True boxes.
    #[serde(default)]
    pub boxes: Vec<BBox>,
    /// A label per box, or empty.
    #[serde(default)]
    pub labels: Vec<String>,
    /// CT, X-ray, endoscopy…
    #[serde(default)]
    pub modality: String,
    /// The data set it comes from.
    #[serde(default)]
    pub source: String,
    /// `train`, `val` or `test`.
    #[serde(default)]
    pub split: String,
    /// What kind of answer is asked for. Absent: where something is.
    #[serde(default, skip_serializing_if = "Task::is_default")]
    pub task: Task,
    /// Keys that Unveil does not interpret.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
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
}
