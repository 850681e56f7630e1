//! The answer text: boxes, then the category; or "no finding". Owns writing it and reading it back from anything a model may say.
//!
//! Coordinates here are whatever the model family's codec uses; mapping to original pixels is the codec's work. [`Reading`] is the one
//! way in which an answer is read, for rewards, gradients, evaluation and pages.

use std::borrow::Cow;
use std::collections::HashSet;
use std::ops::Range;

use serde::{Deserialize, Serialize};

mod class;
mod json;
mod native;
mod nothing;
mod reading;

pub use class::{ClassMatch, KnownClass, fold};
pub use native::parse_answer;
pub use nothing::NO_FINDING_PHRASES;
pub use reading::Reading;

/// What an answer says, in the coordinates of the text.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Answer {
    /// Every group of four numbers, as written (never repaired, never dropped).
    pub boxes: Vec<[f64; 4]>,
    /// What the boxes are said to hold, as written: the text behind them, or their labels joined by commas.
    pub category: String,
    /// What each box is said to hold, where the form says it box by box: as many as boxes, "" = nothing is said of this one. Empty where
    /// the form does not.
    pub labels: Vec<String>,
    /// All words beside the boxes, wherever they stand.
    pub words: String,
    /// The text says that nothing is there.
    pub no_finding: bool,
    /// First deviation from the form, if any.
    pub fault: Option<ParseFault>,
    /// Bytes of the text that were read; none where it holds no answer.
    pub span: Option<Range<usize>>,
}

/// Deviation from the answer's form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ParseFault {
    /// Nothing was said.
    Empty,
    /// The span that holds the answer is not closed, or the reasoning before it never ends.
    NoSpan,
    /// A bracket does not hold four numbers, or is not closed.
    Bracket,
    /// Boxes without a category.
    NoCategory,
    /// A category without boxes.
    NoBox,
    /// Words before or between the boxes, or brackets after the category.
    Order,
    /// It reads well, but is written in another form than was asked for, or with more around it.
    OtherForm,
}

/// The words that stand for an empty answer.
pub const NO_FINDING: &str = "no finding";

/// Writes an answer: `[x1,y1,x2,y2], [..] category`, or `no finding` when there is no box.
pub fn format_answer<N: std::fmt::Display>(boxes: &[[N; 4]], category: &str) -> String {
    if boxes.is_empty() {
        return NO_FINDING.to_owned();
    }
    let list: Vec<String> = boxes.iter().map(|[x1, y1, x2, y2]| format!("[{x1},{y1},{x2},{y2}]")).collect();
    format!("{} {category}", list.join(", "))
}

/// Joins several labels to one category: each once, in their order.
pub fn joined<'a>(labels: impl Iterator<Item = &'a str>) -> String {
    let mut seen = HashSet::new();
    let each: Vec<&str> = labels.map(str::trim).filter(|l| !l.is_empty() && seen.insert(*l)).collect();
    each.join(", ")
}

/// Four numbers between commas, with nothing else.
fn numbers(inner: &str) -> Option<[f64; 4]> {
    let mut out = [0.0; 4];
    let mut parts = inner.split(',');
    for slot in &mut out {
        *slot = parts.next()?.trim().parse().ok()?;
    }
    parts.next().is_none().then_some(out)
}

/// A text of the model's, borrowed where nothing in it is escaped.
type Said<'a> = Cow<'a, str>;
