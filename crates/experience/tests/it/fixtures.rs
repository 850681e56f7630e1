//! A state machine without payloads, and shorthands for calls on it.

use std::time::Duration;

use unveil_core::GroupId;
use unveil_experience::{
    Experience, Heartbeat, HeldLease, Lease, LeaseCall, Settings, Submission, Verdict, VersionSpan,
};

pub(crate) fn settings(groups_per_step: usize, max_staleness: u64, total_groups: Option<u64>) -> Settings {
    Settings {
        groups_per_step,
        max_staleness,
        lease_s: 30.0,
        stall_s: 60.0,
        silence_s: 8.0,
        seed: 11,
        term: 1,
        total_groups,
    }
}

pub(crate) fn ids(n: usize) -> Vec<String> {
    (0..n).map(|i| format!("r{i}")).collect()
}

pub(crate) fn run(records: usize, groups_per_step: usize, total: u64) -> Experience<()> {
    Experience::new(settings(groups_per_step, 0, Some(total)), ids(records)).unwrap().with_max_losses(3)
}

pub(crate) fn at(s: u64) -> Duration {
    Duration::from_secs(s)
}

/// Leases up to `max` groups by a call without a number, with every group prepared.
pub(crate) fn lease(e: &mut Experience<()>, worker: &str, max: usize, now: Duration) -> Vec<Lease> {
    e.lease(LeaseCall::new(worker, max), now, |_| true)
}

pub(crate) fn submit(e: &mut Experience<()>, worker: &str, l: &Lease, now: Duration) -> Verdict {
    let versions = VersionSpan::at(e.version());
    e.submit(&Submission { worker, lease: &l.id, group: &l.group, versions }, (), now)
}

/// Trains the next batch, if it is complete, and returns its size.
pub(crate) fn learn(e: &mut Experience<()>, step: &mut u64, now: Duration) -> Option<usize> {
    let batch = e.next_batch(now)?;
    let groups: Vec<GroupId> = batch.into_iter().map(|(g, ())| g).collect();
    *step += 1;
    e.record_trained(*step, &groups, now).unwrap();
    e.publish(*step).unwrap();
    Some(groups.len())
}

/// Sends a heartbeat with one lease and returns the lost leases.
pub(crate) fn heartbeat(
    e: &mut Experience<()>,
    worker: &str,
    lease: &str,
    progress: u64,
    now: Duration,
) -> Vec<String> {
    let held = [HeldLease { lease: lease.to_owned(), progress }];
    e.heartbeat(&Heartbeat { worker, answered_calls: 0, held: &held }, now)
}
