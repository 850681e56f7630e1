//! Scorers outside this process: an external judge and custom scorers run by users. A group is always answered within its deadline, and
//! scores that they did not deliver are masked.

mod custom;
mod judge;
mod prompt;

pub use custom::CustomScorer;
pub use judge::Judge;
pub use prompt::Prompt;
