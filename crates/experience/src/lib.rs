//! Experience: which worker has a lease on which prompt group, which groups have been submitted, and what may be trained next.
//!
//! A pure state machine without clock (each call is given the time), threads or sockets; the learner's rank 0 wraps it in a service.
//!
//! Must not depend on: tch, tonic, tokio.
//!
//! Guarantees, regardless of worker behaviour:
//! - each group of a pass is returned by [`Experience::next_batch`] exactly once, in the order of the pass;
//! - no group is trained whose oldest token lags the learner by more than `max_staleness` versions;
//! - the outcome of each group (trained, skipped, wholly masked, set aside) is counted independently, by record, in a ledger that is part
//!   of every checkpoint;
//! - a group that repeatedly kills workers is set aside, named and counted, and a worker whose submissions are repeatedly rejected is
//!   quarantined;
//! - a group whose worker died, fell silent, stalled or returned it is leased again, before any newer group, and never to a worker that may
//!   still be working on it;
//! - a lease is valid as long as its worker's heartbeats report progress, however long the work takes.

mod batch;
mod data_order;
mod event;
mod lease_index;
mod leases;
mod ledger;
mod machine;
mod settings;

pub use event::Event;
pub use ledger::{Accounting, DroppedGroup, ExperienceSnapshot, GroupOutcome, Ledger, PassAccount};
pub use machine::{Experience, ReturnReason, Stats};
pub use settings::{
    ExperienceError, Heartbeat, HeldLease, Lease, LeaseCall, Settings, Submission, Verdict, VersionSpan,
    records_by_pass,
};
