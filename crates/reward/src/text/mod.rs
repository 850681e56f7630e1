//! Scores of open and closed answers against a reference text. Pure functions over strings; time is bounded by cutting both.
//!
//! Must not know: records, configuration, who asks.

pub mod bleu;
pub mod choice;
pub mod clean;
pub mod difflib;
pub mod overlap;

/// Words of either text that are compared; what lies beyond is not looked at.
pub(crate) const WORD_LIMIT: usize = 2048;
