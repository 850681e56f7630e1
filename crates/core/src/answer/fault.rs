//! The rule of the configured form that a response breaks.

use serde::{Deserialize, Serialize};

/// First rule that a response breaks, of the form, the span and the reasoning that are configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ParseFault {
    /// The text is empty.
    Empty,
    /// The answer span is missing or not closed.
    NoSpan,
    /// The reasoning never ends.
    OpenReasoning,
    /// A bracket does not hold four numbers or is not closed.
    Bracket,
    /// Boxes without a category.
    NoCategory,
    /// A category without boxes.
    NoBox,
    /// Words before or between the boxes, or brackets after the category.
    Order,
    /// The answer is readable but in another form than expected.
    OtherForm,
    /// The answer is readable but not valid JSON: a trailing comma, a number that is not finite.
    MalformedJson,
    /// The block around the JSON is not closed.
    OpenFence,
    /// There is text beside the answer where only the answer is expected.
    TextAround,
    /// There is more than one answer span, or a tag without its counterpart beside it.
    RepeatedSpan,
    /// There is reasoning, but none is expected.
    UnwantedReasoning,
    /// There is no reasoning, or it is blank, but it is required.
    NoReasoning,
    /// The reasoning ends more than once.
    RepeatedReasoning,
    /// A box is inverted, has no area or is not finite; found by rewards, not by the reader.
    InvalidBox,
}

impl ParseFault {
    /// All faults.
    pub const ALL: [Self; 16] = [
        Self::Empty,
        Self::NoSpan,
        Self::OpenReasoning,
        Self::Bracket,
        Self::NoCategory,
        Self::NoBox,
        Self::Order,
        Self::OtherForm,
        Self::MalformedJson,
        Self::OpenFence,
        Self::TextAround,
        Self::RepeatedSpan,
        Self::UnwantedReasoning,
        Self::NoReasoning,
        Self::RepeatedReasoning,
        Self::InvalidBox,
    ];

    /// Returns whether the answer cannot be read completely; all other faults concern its form alone.
    pub fn prevents_reading(self) -> bool {
        match self {
            Self::Empty
            | Self::NoSpan
            | Self::OpenReasoning
            | Self::Bracket
            | Self::NoCategory
            | Self::NoBox
            | Self::Order => true,
            Self::OtherForm
            | Self::MalformedJson
            | Self::OpenFence
            | Self::TextAround
            | Self::RepeatedSpan
            | Self::UnwantedReasoning
            | Self::NoReasoning
            | Self::RepeatedReasoning
            | Self::InvalidBox => false,
        }
    }
}

impl std::fmt::Display for ParseFault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Empty => "the answer is empty",
            Self::NoSpan => "no answer span is closed",
            Self::OpenReasoning => "the reasoning never ends",
            Self::Bracket => "a bracket does not hold four numbers or is not closed",
            Self::NoCategory => "a box has no class",
            Self::NoBox => "the class has no box",
            Self::Order => "there are words before or between the boxes",
            Self::OtherForm => "the answer is in another form",
            Self::MalformedJson => "the JSON is malformed",
            Self::OpenFence => "the block around the JSON is not closed",
            Self::TextAround => "there is text around the answer",
            Self::RepeatedSpan => "there is more than one answer span",
            Self::UnwantedReasoning => "there is reasoning, but none is expected",
            Self::NoReasoning => "the required reasoning is missing",
            Self::RepeatedReasoning => "the reasoning ends more than once",
            Self::InvalidBox => "a box is inverted, has no area or is not finite",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_descriptions_are_distinct() {
        let names: std::collections::BTreeSet<String> =
            ParseFault::ALL.iter().map(|f| serde_json::to_string(f).unwrap()).collect();
        let texts: std::collections::BTreeSet<String> = ParseFault::ALL.iter().map(ToString::to_string).collect();
        assert_eq!((names.len(), texts.len()), (ParseFault::ALL.len(), ParseFault::ALL.len()));
        assert!(names.contains("\"no_span\"") && names.contains("\"text_around\""));
    }
}
