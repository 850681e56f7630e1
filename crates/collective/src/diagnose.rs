//! Determines which ranks made a call fail: a pure function of heartbeats.

use crate::FaultKind;
use crate::heartbeat::{Call, Heartbeat, Phase};

/// A rank's newest heartbeat, and whether the rank has sent new ones since the call failed.
pub(crate) struct Observation<'a> {
    pub(crate) heartbeat: &'a Heartbeat,
    pub(crate) alive: bool,
}

/// The ranks that made a call fail, the kind of failure, and a detail for the error message.
pub(crate) type Diagnosis = (Vec<usize>, FaultKind, Option<String>);

/// Diagnoses a failed call of rank `own_rank` from one observation per world rank.
///
/// Silent ranks are reported first, in whichever group they are: a rank that waits for them in another group is behind in this
/// one through no fault of that rank.
pub(crate) fn diagnose(own_rank: usize, call: &Call, observations: &[Observation<'_>]) -> Diagnosis {
    let others = || observations.iter().enumerate().filter(|(rank, _)| *rank != own_rank);
    let silent: Vec<usize> =
        others().filter(|(_, o)| o.heartbeat.phase == Phase::Running && !o.alive).map(|(rank, _)| rank).collect();
    if !silent.is_empty() {
        return (silent, FaultKind::Silent, None);
    }
    let members = || others().filter(|(rank, _)| call.members.contains(rank));
    let behind: Vec<_> = members().filter(|(_, o)| !o.heartbeat.reached(call)).collect();
    let left: Vec<usize> =
        behind.iter().filter(|(_, o)| o.heartbeat.phase == Phase::Left).map(|(rank, _)| *rank).collect();
    if !left.is_empty() {
        return (left, FaultKind::Left, None);
    }
    if !behind.is_empty() {
        return (behind.into_iter().map(|(rank, _)| rank).collect(), FaultKind::Behind, None);
    }
    let different: Vec<_> =
        members().filter_map(|(rank, o)| Some((rank, o.heartbeat.conflicting_call(call)?))).collect();
    if let Some((rank, record)) = different.first() {
        let detail = format!(
            "rank {own_rank} called {} with {} elements, rank {rank} {} with {}",
            call.record.collective, call.record.count, record.collective, record.count
        );
        return (different.iter().map(|(rank, _)| *rank).collect(), FaultKind::Mismatched, Some(detail));
    }
    (Vec::new(), FaultKind::Transport, None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::heartbeat::CallRecord;

    fn call(members: &[usize]) -> Call {
        let record = CallRecord { sequence: 5, collective: "all_reduce".into(), count: 8 };
        Call { group: "g".into(), members: members.into(), record }
    }

    /// A rank that has made call `sequence` of the group.
    fn heartbeat(phase: Phase, sequence: u64) -> Heartbeat {
        let record = CallRecord { sequence, ..call(&[]).record };
        Heartbeat { number: 1, phase, calls: [("g".to_owned(), record)].into() }
    }

    fn diagnosis(heartbeats: &[(Heartbeat, bool)], members: &[usize]) -> Diagnosis {
        let observations: Vec<_> =
            heartbeats.iter().map(|(heartbeat, alive)| Observation { heartbeat, alive: *alive }).collect();
        diagnose(0, &call(members), &observations)
    }

    #[test]
    fn silent_ranks_of_the_whole_world_are_reported_first() {
        let heartbeats = [
            (heartbeat(Phase::Running, 5), false),
            (heartbeat(Phase::Running, 4), true),
            (heartbeat(Phase::Running, 9), false),
            (Heartbeat::default(), true),
        ];
        assert_eq!(diagnosis(&heartbeats, &[0, 1, 3]), (vec![2], FaultKind::Silent, None));
    }

    #[test]
    fn members_without_the_call_are_behind() {
        let heartbeats = [
            (heartbeat(Phase::Running, 5), true),
            (heartbeat(Phase::Running, 4), true),
            (heartbeat(Phase::Running, 6), true),
            (Heartbeat::default(), true),
            (heartbeat(Phase::Running, 1), true),
        ];
        assert_eq!(diagnosis(&heartbeats, &[0, 1, 2, 3]), (vec![1, 3], FaultKind::Behind, None));
    }

    #[test]
    fn left_ranks_are_reported_before_ranks_behind() {
        let heartbeats = [
            (heartbeat(Phase::Running, 5), true),
            (heartbeat(Phase::Left, 4), false),
            (heartbeat(Phase::Running, 4), true),
            (heartbeat(Phase::Left, 5), false),
        ];
        assert_eq!(diagnosis(&heartbeats, &[0, 1, 2, 3]), (vec![1], FaultKind::Left, None));
        assert_eq!(diagnosis(&heartbeats, &[0, 3]), (vec![], FaultKind::Transport, None));
    }

    #[test]
    fn different_calls_with_one_number_are_reported() {
        let mut different = heartbeat(Phase::Running, 5);
        different.calls.get_mut("g").unwrap().count = 9;
        let (ranks, kind, detail) = diagnosis(&[(heartbeat(Phase::Running, 5), true), (different, true)], &[0, 1]);
        assert_eq!((ranks, kind), (vec![1], FaultKind::Mismatched));
        assert_eq!(detail.unwrap(), "rank 0 called all_reduce with 8 elements, rank 1 all_reduce with 9");
    }
}
