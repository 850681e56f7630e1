//! Experience: who works on which prompt group, what has come back, and what may be trained next.
//!
//! A pure state machine. It has no clock (time comes in with each call), no threads and no sockets; the learner's first
//! rank wraps it in a service. Must not know: tch, tonic, tokio.
//!
//! What it promises, whatever workers do:
//! - each group of a pass is returned by [`Experience::next_batch`] exactly once, in the order of the pass;
//! - no group is trained whose oldest token lags the learner by more than `max_staleness` versions;
//! - what became of each group (trained, skipped, wholly masked, set aside) is counted a second time, by record, in a ledger that
//!   every checkpoint holds;
//! - a group that workers die of is set aside, named and counted, and a worker whose work is refused again and again gets no more;
//! - a group whose worker died, fell silent, stood still or gave it back is handed out again, before any newer group, and never to
//!   the worker that still has it in hand;
//! - a lease holds while its worker's heartbeat tells of progress, however long the work takes.

mod aside;
mod batch;
mod event;
mod hands;
mod leases;
mod ledger;
mod machine;
mod order;
mod settings;
mod standing;

pub use aside::Return;
pub use event::Event;
pub use ledger::{Accounting, Dropped, Fate, Ledger, PassAccount};
pub use machine::{Experience, Stats};
pub use settings::{
    Ask, ExperienceError, Heartbeat, InHand, Lease, Settings, Snapshot, Submission, Verdict, VersionSpan, by_pass,
};
