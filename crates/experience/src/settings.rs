//! What goes into and comes out of the state machine: settings, leases, submissions, verdicts, snapshots, errors.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use unveil_core::{GroupId, Response, WeightVersion};

use crate::ledger::Ledger;

/// Settings of one run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Groups per training step, at least 1.
    pub groups_per_step: usize,
    /// Weight versions that a group's oldest token may lag the learner when it is trained; 0 is strictly on-policy.
    pub max_staleness: u64,
    /// Seconds until a lease that no heartbeat renews returns to the queue.
    pub lease_s: f64,
    /// Seconds without progress after which a group returns to the queue, though its worker lives.
    pub stall_s: f64,
    /// Seconds after which a worker that was not heard of is taken for dead: what it holds returns to the queue.
    pub silence_s: f64,
    /// Run seed: the order of a pass is a function of (seed, pass).
    pub seed: u64,
    /// The learner's term. It is part of every lease id, so leases that a dead learner gave are refused.
    pub term: u64,
    /// Groups of the whole run, counted over all passes; none beyond is leased. `None` is endless.
    pub total_groups: Option<u64>,
}

impl Settings {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`ExperienceError::Setting`] names the setting.
    pub fn check(&self) -> Result<(), ExperienceError> {
        let fault = |name, why: &str| Err(ExperienceError::Setting { name, why: why.to_string() });
        if self.groups_per_step == 0 {
            return fault("groups_per_step", "it must be at least 1");
        }
        for (name, seconds) in [("lease_s", self.lease_s), ("stall_s", self.stall_s), ("silence_s", self.silence_s)] {
            if !(seconds.is_finite() && seconds > 0.0 && seconds < 1e9) {
                return fault(name, "it must be a positive number of seconds below 1e9");
            }
        }
        if self.max_staleness > 1_000_000 {
            return fault("max_staleness", "it must be at most 1000000");
        }
        Ok(())
    }
}

/// A worker's call for groups.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    /// Who.
    pub worker: &'a str,
    /// Number of the call, from 1 on: a repeated call has the number of the first one and gets the same leases. 0 = no number.
    pub call: u64,
    /// Most groups.
    pub max: usize,
}

impl<'a> Ask<'a> {
    /// A call without a number.
    pub fn new(worker: &'a str, max: usize) -> Self {
        Self { worker, call: 0, max }
    }
}

/// What a worker has in hand.
#[derive(Debug, Clone, Copy)]
pub struct Heartbeat<'a> {
    /// Who.
    pub worker: &'a str,
    /// Its calls for groups up to this number are over: it knows all leases that they brought.
    pub done: u64,
    /// Leases that it works on.
    pub in_hand: &'a [InHand],
}

/// A lease that a worker works on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InHand {
    /// Its id.
    pub lease: String,
    /// A number that grows as the work goes on.
    pub progress: u64,
}

/// One group in a worker's hands.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Lease {
    /// Unique over all learners of the run.
    pub id: String,
    /// What to generate.
    pub group: GroupId,
    /// Weights older than this would make the group too stale to train.
    pub min_version: WeightVersion,
    /// When the lease runs out if nothing renews it, on the clock of the `now` arguments.
    pub deadline: Duration,
}

/// Oldest and newest weight version among the tokens of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionSpan {
    /// Oldest.
    pub oldest: WeightVersion,
    /// Newest.
    pub newest: WeightVersion,
}

impl VersionSpan {
    /// All tokens by one version.
    pub fn at(version: WeightVersion) -> Self {
        Self { oldest: version, newest: version }
    }

    /// Span over all tokens of all responses; `None` when there is not one token.
    pub fn of(responses: &[Response]) -> Option<Self> {
        responses.iter().flat_map(|r| r.versions.iter().copied()).fold(None, |span, v| {
            Some(match span {
                None => Self::at(v),
                Some(s) => Self { oldest: s.oldest.min(v), newest: s.newest.max(v) },
            })
        })
    }
}

/// A finished group coming back; the payload travels beside it.
#[derive(Debug, Clone, Copy)]
pub struct Submission<'a> {
    /// Who.
    pub worker: &'a str,
    /// Under which lease.
    pub lease: &'a str,
    /// Which group.
    pub group: &'a GroupId,
    /// By which weights.
    pub versions: VersionSpan,
}

/// Answer to a submission. Only `Accepted` counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Taken; it will be trained.
    Accepted,
    /// The group has been taken already.
    Duplicate,
    /// Made by weights that are too old, or that this learner does not have; the group is leased again.
    Stale,
    /// The lease is not this worker's any more, or never was.
    Expired,
}

/// Where a run stands in its data; goes into the checkpoint. Groups in flight return to the queue on restore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Groups that are done, over all passes; the order of passes makes this the whole position. What became of them is in the ledger.
    pub trained: u64,
    /// Pass of the next group.
    pub pass: u64,
    /// Position of the next group in that pass.
    pub position: u64,
    /// Published weight version.
    pub version: WeightVersion,
    /// Seed of the order.
    pub seed: u64,
    /// Records in the data set.
    pub records: u64,
    /// BLAKE3 over the record ids in order, hex.
    pub data: String,
    /// Groups leased, ready or in training when the snapshot was taken (for the reader; restore does not need them).
    pub in_flight: Vec<GroupId>,
    /// What became of groups, counted apart from the position.
    pub ledger: Ledger,
    /// Groups that are set aside and that the position has not passed, with why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aside: Vec<(GroupId, String)>,
}

/// What can be wrong.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ExperienceError {
    /// A setting is out of range.
    #[error("setting `{name}`: {why}")]
    Setting {
        /// Which.
        name: &'static str,
        /// Why.
        why: String,
    },
    /// No records.
    #[error("the training data holds no records")]
    NoRecords,
    /// Two records share an id.
    #[error("two training records share the id `{0}`: ids must be unique")]
    DoubleId(String),
    /// The snapshot was made with other data or another seed.
    #[error(
        "the checkpoint was made with another {what} ({was}, now {now}): resume with the same one, or start afresh"
    )]
    OtherRun {
        /// What differs.
        what: &'static str,
        /// In the snapshot.
        was: String,
        /// Now.
        now: String,
    },
    /// [`crate::Experience::trained`] was called with groups that are not in training.
    #[error("step {step} reports {reported} trained groups that are not the batch in training ({taken} groups)")]
    NotInTraining {
        /// The step.
        step: u64,
        /// Groups reported.
        reported: usize,
        /// Groups in training.
        taken: usize,
    },
    /// A version was published that is not newer.
    #[error("weight version {version} was published after version {current}: versions only grow")]
    VersionBack {
        /// The published one.
        version: WeightVersion,
        /// The current one.
        current: WeightVersion,
    },
}

/// Record ids by pass, in order: a batch may straddle the end of a pass.
pub fn by_pass(groups: &[GroupId]) -> Vec<(u64, Vec<String>)> {
    let mut out: Vec<(u64, Vec<String>)> = Vec::new();
    for g in groups {
        match out.last_mut() {
            Some((pass, ids)) if *pass == g.pass => ids.push(g.record.clone()),
            _ => out.push((g.pass, vec![g.record.clone()])),
        }
    }
    out
}
