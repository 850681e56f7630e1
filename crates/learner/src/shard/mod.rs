//! State of a learner divided over ranks: who they are, what each owns, and the calls that make parameters whole and sum gradients
//! around the layers of a pass. Must not know: losses, groups, where a batch comes from.

mod gathered;
mod gradients;
mod pass;
mod plan;
mod ranks;

pub(crate) use gathered::Gathered;
pub(crate) use gradients::{Gradients, SumsTime};
pub(crate) use pass::{Course, Pass};
pub(crate) use plan::{Piece, Plan, Slot, Stretch};
pub(crate) use ranks::end;
pub use ranks::{Ranks, Zero};
