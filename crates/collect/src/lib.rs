//! Collecting answers for records from a vision model, and having people review them.
//!
//! Two prompts, as for the MAU data (arXiv 2501.01377): the first asks for a diagnosis, given image, class and region; the second has the
//! model rewrite it as detect, localise, recognise. Every request and answer is kept in a journal, so that a run that was killed goes
//! on without asking again. A page shows what was collected; what a person decided there makes the final records.
//!
//! Must not know: tch, how models are trained on the records.

mod answer;
mod decisions;
mod error;
mod journal;
mod ledger;
mod mark;
mod page;
mod prompts;
mod run;
mod stage;

pub use decisions::{Reviewed, review};
pub use error::CollectError;
pub use page::write_pages;
pub use prompts::Prompts;
pub use run::{COLLECTED, Failure, JOURNAL, Stop, Summary, collect};
