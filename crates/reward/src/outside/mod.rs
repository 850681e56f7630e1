//! Scorers outside this process: an external judge, and what users run themselves. Whatever they do, a group is answered within
//! its deadline, and what they did not say is masked.

mod custom;
mod judge;
mod prompt;

pub use custom::CustomScorer;
pub use judge::Judge;
pub use prompt::Prompt;
