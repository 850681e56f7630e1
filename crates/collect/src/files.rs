//! Names of the files of a collection.

/// Name of the record file in the output folder: all records of the input, with the collected answers.
pub const COLLECTED: &str = "collected.jsonl";
/// Name of the journal in the output folder.
pub const JOURNAL: &str = "journal.jsonl";
