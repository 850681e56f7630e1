//! The answer text: boxes followed by the category, or "no finding". Owns formatting it and parsing it from arbitrary model output.
//!
//! Coordinates are in the units of the model family's codec, which maps them to original pixels. Rewards, gradients, evaluation and pages
//! all parse answers with [`AnswerReader`].

use std::borrow::Cow;
use std::collections::HashSet;
use std::ops::Range;

use serde::{Deserialize, Serialize};

mod class;
mod fault;
mod form;
mod json;
mod native;
mod no_finding;
mod reader;

pub use class::{ClassMatch, KnownClass, fold_class_name};
pub use fault::ParseFault;
pub use form::{AnswerForm, Reasoning};
pub use native::parse_answer;
pub use no_finding::NO_FINDING_PHRASES;
pub use reader::AnswerReader;

/// A parsed answer with boxes of type `B`: the four numbers of the text, unless they were converted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer<B = [f64; 4]> {
    /// All groups of four numbers, as written (never repaired, never dropped).
    pub boxes: Vec<B>,
    /// Category as written: the text after the boxes, or their labels joined by commas.
    pub category: String,
    /// One label per box, "" for a box without one, in notations that label each box; empty in other notations.
    pub labels: Vec<String>,
    /// All text outside of the boxes.
    pub words: String,
    /// Whether the answer is "no finding".
    pub no_finding: bool,
    /// First rule of the configured form that the response breaks, if any.
    pub fault: Option<ParseFault>,
    /// Byte range of the text that was parsed; `None` if the text holds no answer.
    pub span: Option<Range<usize>>,
}

// A derived implementation would require `B: Default`.
impl<B> Default for Answer<B> {
    fn default() -> Self {
        Self {
            boxes: Vec::new(),
            category: String::new(),
            labels: Vec::new(),
            words: String::new(),
            no_finding: false,
            fault: None,
            span: None,
        }
    }
}

impl<B> Answer<B> {
    /// Converts each box with `convert`.
    pub fn map_boxes<C>(self, convert: impl FnMut(B) -> C) -> Answer<C> {
        let Self { boxes, category, labels, words, no_finding, fault, span } = self;
        Answer { boxes: boxes.into_iter().map(convert).collect(), category, labels, words, no_finding, fault, span }
    }
}

/// Answer text for "no box".
pub const NO_FINDING: &str = "no finding";

/// Formats an answer: `[x1,y1,x2,y2], [..] category`, or `no finding` without boxes.
pub fn format_answer<N: std::fmt::Display>(boxes: &[[N; 4]], category: &str) -> String {
    if boxes.is_empty() {
        return NO_FINDING.to_owned();
    }
    let list: Vec<String> = boxes.iter().map(|[x1, y1, x2, y2]| format!("[{x1},{y1},{x2},{y2}]")).collect();
    format!("{} {category}", list.join(", "))
}

/// Joins labels to one category: each label once, in order of first occurrence.
pub fn join_labels<'a>(labels: impl Iterator<Item = &'a str>) -> String {
    let mut seen = HashSet::new();
    let unique: Vec<&str> = labels.map(str::trim).filter(|l| !l.is_empty() && seen.insert(*l)).collect();
    unique.join(", ")
}

/// Parses exactly four numbers separated by commas.
fn parse_four_numbers(inner: &str) -> Option<[f64; 4]> {
    let mut out = [0.0; 4];
    let mut parts = inner.split(',');
    for slot in &mut out {
        *slot = parts.next()?.trim().parse().ok()?;
    }
    parts.next().is_none().then_some(out)
}

/// String of a model's JSON, borrowed unless it contains escapes.
type JsonText<'a> = Cow<'a, str>;
