//! Kinds of answer that a record may ask for. Rewards and metrics decide how each is scored.

use serde::{Deserialize, Serialize};

/// Kind of answer that a record asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(try_from = "String", rename_all = "lowercase")]
pub enum Task {
    /// Boxes and their class, or "no finding".
    #[default]
    Grounding,
    /// A few words.
    Vqa,
    /// One of the record's `options`.
    Choice,
    /// A sentence about the whole image.
    Caption,
    /// A report.
    Report,
    /// Several answers, one for each of the record's `turns`.
    Dialogue,
}

/// Error for a name that is not a task.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a task: use {known}", known = task_list())]
pub struct UnknownTask(pub String);

/// Lists the names of all tasks for a message.
fn task_list() -> String {
    let names = Task::ALL.map(Task::name);
    match names.split_last() {
        Some((last, rest)) => format!("{} or {last}", rest.join(", ")),
        None => String::new(),
    }
}

impl Task {
    /// All tasks.
    pub const ALL: [Self; 6] = [Self::Grounding, Self::Vqa, Self::Choice, Self::Caption, Self::Report, Self::Dialogue];

    /// Returns the name used in records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Grounding => "grounding",
            Self::Vqa => "vqa",
            Self::Choice => "choice",
            Self::Caption => "caption",
            Self::Report => "report",
            Self::Dialogue => "dialogue",
        }
    }

    /// Returns whether the answer is text rather than a region.
    pub fn is_text(self) -> bool {
        self != Self::Grounding
    }

    /// Returns whether this is the default task, which records leave out.
    pub(crate) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl std::fmt::Display for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Task {
    type Err = UnknownTask;

    fn from_str(name: &str) -> Result<Self, UnknownTask> {
        Self::ALL.into_iter().find(|t| t.name() == name).ok_or_else(|| UnknownTask(name.to_owned()))
    }
}

impl TryFrom<String> for Task {
    type Error = UnknownTask;

    fn try_from(name: String) -> Result<Self, UnknownTask> {
        name.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_match_serde() {
        for task in Task::ALL {
            assert_eq!(serde_json::to_value(task).unwrap(), task.name());
            assert_eq!(serde_json::from_value::<Task>(task.name().into()).unwrap(), task);
            assert_eq!(task.is_text(), task != Task::Grounding);
        }
        let e = serde_json::from_str::<Task>(r#""vga""#).unwrap_err().to_string();
        assert!(e.contains("`vga`") && Task::ALL.iter().all(|t| e.contains(t.name())), "{e}");
    }
}
