//! Errors of the crate, with one-line messages: what, where, why, and what to do.

use std::error::Error as StdError;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Errors of stores, log and checkpoints. `location` is the run's directory or URL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the fields are named after their contents
pub enum Error {
    /// The store cannot be opened.
    #[error("cannot open the run directory or URL `{location}`: {cause}")]
    Open { location: String, cause: String },
    /// An object could not be written. Earlier checkpoints are untouched.
    #[error("cannot write `{object}` to {location}: {cause}")]
    Write { location: String, object: String, cause: String },
    /// An object could not be read.
    #[error("cannot read `{object}` from {location}: {cause}")]
    Read { location: String, object: String, cause: String },
    /// An object is missing, or differs from what was written.
    #[error("`{object}` in {location} is damaged: {why}")]
    Corrupt { location: String, object: String, why: String },
    /// A log entry could be neither written nor read back after several attempts; it may still appear.
    #[error("cannot append to the run log of {location} (entry {seq}): {cause}")]
    Log { location: String, seq: u64, cause: String },
    /// The store does not support the conditional writes that the run log relies on.
    #[error(
        "{location} cannot be used for a run: the store {how} (If-None-Match: *), so two learners could overwrite each other. Use a store \
         that supports conditional writes (AWS S3, Ceph 19, MinIO, Azure, GCS), or a local path"
    )]
    NoConditionalWrites { location: String, how: &'static str },
    /// Another learner has claimed the run: this one must stop.
    #[error("another learner has claimed {location} (term {theirs}, ours is {ours}): stopping without further commits")]
    Fenced { location: String, ours: u64, theirs: u64 },
    /// The run has no checkpoint.
    #[error("no checkpoint in {location}")]
    NoCheckpoint { location: String },
    /// The requested step has no checkpoint.
    #[error("no checkpoint of step {step} in {location} (available: {have})")]
    NoSuchStep { location: String, step: u64, have: String },
    /// Checkpoints exist, but none is valid.
    #[error("no checkpoint in {location} is usable: {reasons}. Set `resume = \"never\"` to start from scratch")]
    NoUsableCheckpoint { location: String, reasons: String },
    /// The step has already been saved in this term.
    #[error("step {step} has already been saved to {location} (term {term})")]
    StepAlreadySaved { location: String, step: u64, term: u64 },
    /// An object in the store differs from what its writer reported.
    #[error(
        "`{object}` was written with {written} bytes, but {location} has {}: give all ranks the same checkpoint.url",
        describe_size(*.found)
    )]
    ObjectMismatch { location: String, object: String, written: u64, found: Option<u64> },
    /// The slices that the writers reported do not form complete tensors.
    #[error("the checkpoint of step {step} cannot be committed to {location}: {why}")]
    IncompleteTensors { location: String, step: u64, why: String },
    /// The checkpoint does not have the requested tensor or range.
    #[error("cannot read {kind} of `{name}` from the checkpoint of step {step}: {why}")]
    NoSuchTensor { step: u64, kind: String, name: String, why: String },
    /// An object name is invalid.
    #[error("`{name}` is not a valid object name: {why}")]
    BadName { name: String, why: &'static str },
    /// A resume setting is not `auto`, `never` or a step.
    #[error("`{0}` is not a valid resume setting: use auto, never or a step number")]
    BadResume(String),
    /// An export failed; the target directory is unchanged.
    #[error("cannot export to {dir}: {cause}")]
    Export { dir: String, cause: String },
}

fn describe_size(found: Option<u64>) -> String {
    found.map_or_else(|| "no such object".to_owned(), |size| format!("{size} bytes"))
}

/// Describes an error in one line: by the operating system's error if it has one, else by its outermost text.
pub(crate) fn cause(e: &(dyn StdError + 'static)) -> String {
    let mut next: Option<&(dyn StdError + 'static)> = Some(e);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<std::io::Error>().filter(|io| io.raw_os_error().is_some()) {
            return io.to_string();
        }
        next = error.source();
    }
    // Stores echo keys, so redact before truncating: a truncated key would not be recognised.
    let text = unveil_core::redact(&e.to_string()).split_whitespace().collect::<Vec<_>>().join(" ");
    match text.char_indices().nth(400) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
