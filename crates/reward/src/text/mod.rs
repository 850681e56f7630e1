//! Scores of open and closed answers against a reference text: pure functions over strings, whose time is bounded by truncating both.

pub mod bleu;
pub mod choice;
pub mod clean;
pub mod difflib;
pub mod overlap;

/// Words of either text that are compared; further words are ignored.
pub(crate) const WORD_LIMIT: usize = 2048;
