//! What can go wrong, in one line each: what, where, why, and what to do.

use std::error::Error as StdError;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Errors of stores, log and checkpoints. `place` is the run's directory or URL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the fields are named after what they hold
pub enum Error {
    /// The store cannot be used at all.
    #[error("cannot open the run directory or URL `{place}`: {cause}")]
    Open { place: String, cause: String },
    /// An object could not be written. What was committed before is untouched.
    #[error("cannot write `{object}` to {place}: {cause}")]
    Write { place: String, object: String, cause: String },
    /// An object could not be read.
    #[error("cannot read `{object}` from {place}: {cause}")]
    Read { place: String, object: String, cause: String },
    /// An object is there, but not as it was written.
    #[error("`{object}` in {place} is damaged: {why}")]
    Corrupt { place: String, object: String, why: String },
    /// A log entry could be neither written nor found after several tries; whether it will appear is unknown.
    #[error("cannot append to the run log of {place} (entry {seq}): {cause}")]
    Log { place: String, seq: u64, cause: String },
    /// The store does not do what the run log stands on.
    #[error(
        "{place} cannot hold a run: asked to write an object only where there is none (If-None-Match: *), the store {how}, so two learners \
         could overwrite each other. Use a store that does (AWS S3, Ceph 19, MinIO, Azure, GCS), or a local path"
    )]
    NoCondition { place: String, how: &'static str },
    /// Another learner has taken over this prefix: this one must stop.
    #[error("another learner holds {place} (term {theirs}, ours is {ours}): this one stops and commits nothing more")]
    Fenced { place: String, ours: u64, theirs: u64 },
    /// There is no checkpoint at all.
    #[error("no checkpoint in {place}")]
    Empty { place: String },
    /// No checkpoint of that step.
    #[error("no checkpoint of step {step} in {place} (there are: {have})")]
    NoSuchStep { place: String, step: u64, have: String },
    /// Checkpoints exist, none verifies.
    #[error("no checkpoint in {place} can be used: {reasons}. Give `resume = \"never\"` to start afresh")]
    NoneUsable { place: String, reasons: String },
    /// The step was saved in this term already.
    #[error("step {step} is already saved in {place} (term {term})")]
    StepTaken { place: String, step: u64, term: u64 },
    /// An object is not there as its writer reported it.
    #[error(
        "`{object}` in {place} was written with {written} bytes and is seen with {}: give all ranks one and the same checkpoint.url",
        seen(*.found)
    )]
    Lost { place: String, object: String, written: u64, found: Option<u64> },
    /// What the writers of a checkpoint report does not make whole tensors.
    #[error("the checkpoint of step {step} cannot be committed to {place}: {why}")]
    Parts { place: String, step: u64, why: String },
    /// A tensor that the checkpoint does not have, or not so large.
    #[error("the checkpoint of step {step} has no such {kind} of `{name}`: {why}")]
    NoTensor { step: u64, kind: String, name: String, why: String },
    /// An object name that cannot be stored.
    #[error("`{name}` cannot be an object of a checkpoint: {why}")]
    BadName { name: String, why: &'static str },
    /// Not `auto`, `never` or a step.
    #[error("`{0}` is not a way to resume: use auto, never or a step number")]
    BadResume(String),
    /// An export failed; the target directory is as it was.
    #[error("cannot export to {dir}: {cause}")]
    Export { dir: String, cause: String },
}

fn seen(found: Option<u64>) -> String {
    found.map_or_else(|| "none at all".to_owned(), |n| n.to_string())
}

/// One line for the cause: the operating system's error where there is one, else the outermost text.
pub(crate) fn cause(e: &(dyn StdError + 'static)) -> String {
    let mut at: Option<&(dyn StdError + 'static)> = Some(e);
    while let Some(x) = at {
        if let Some(io) = x.downcast_ref::<std::io::Error>().filter(|io| io.raw_os_error().is_some()) {
            return io.to_string();
        }
        at = x.source();
    }
    // Stores say keys back, and a cut one would not be known any more.
    let text = unveil_core::redact(&e.to_string()).split_whitespace().collect::<Vec<_>>().join(" ");
    match text.char_indices().nth(400) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
