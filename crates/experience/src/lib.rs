//! Experience: which worker has a lease on which prompt group, which groups have been submitted, and what may be trained next.
//!
//! A pure state machine without clock (each call is given the time), threads or sockets; the learner's rank 0 wraps it in a service.
//!
//! Must not depend on: tch, tonic, tokio.
//!
//! Guarantees, regardless of worker behaviour:
//! - each group of a pass is returned by [`Experience::next_batch`] exactly once, in the order of the pass;
//! - no group is trained whose oldest token lags the learner by more than `max_staleness` versions;
//! - the outcome of each group (trained, skipped, wholly masked, set aside, replaced, filtered) is counted independently, by record, in a
//!   ledger that is part of every checkpoint;
//! - a group that teaches nothing is replaced by a further one, if so configured, up to a limit per batch: it is looked at once, counted,
//!   and never trained, and which groups are replaced follows from the order of the pass and not from the order of submissions;
//! - a group that repeatedly kills workers is set aside, named and counted, and a worker whose submissions are repeatedly rejected is
//!   quarantined;
//! - a group whose worker died, fell silent, stalled or returned it is leased again, before any newer group, and never to a worker that may
//!   still be working on it;
//! - a lease is valid as long as its worker's heartbeats report progress, however long the work takes.
//!
//! # Examples
//! A worker leases the two groups of a batch and submits them, and the learner trains the batch:
//! ```
//! use std::time::Duration;
//! use unveil_experience::{Experience, LeaseCall, Settings, Submission, Verdict, VersionSpan};
//!
//! # let settings = Settings {
//! #     groups_per_step: 2, max_staleness: 0, lease_s: 30.0, stall_s: 60.0, silence_s: 8.0, seed: 11, term: 1, total_groups: Some(2),
//! # };
//! let now = Duration::ZERO;
//! let mut experience = Experience::new(settings, vec!["ct-7".to_owned(), "ct-8".to_owned()])?;
//! for lease in experience.lease(LeaseCall::new("worker-0", 8), now, |_| true) {
//!     let versions = VersionSpan::at(experience.version());
//!     let submission = Submission { worker: "worker-0", lease: &lease.id, group: &lease.group, versions };
//!     assert_eq!(experience.submit(&submission, "responses", now), Verdict::Accepted);
//!     assert_eq!(experience.submit(&submission, "responses", now), Verdict::Duplicate);
//! }
//!
//! let batch = experience.next_batch(now).expect("both groups are submitted");
//! let groups: Vec<_> = batch.into_iter().map(|(group, _responses)| group).collect();
//! experience.record_trained(1, &groups, now)?;
//! experience.publish(1)?;
//! assert!(experience.is_finished());
//! assert_eq!(experience.stats().trained, 2);
//! # Ok::<(), unveil_experience::ExperienceError>(())
//! ```

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
};
