//! Who is to blame for a call that did not end: a pure function of the signs of life.

use crate::Why;
use crate::beat::{Beat, Call, Phase};

/// A rank's newest sign of life, and whether it is a new one since the call failed.
pub(crate) struct Seen<'a> {
    pub(crate) beat: &'a Beat,
    pub(crate) alive: bool,
}

/// The ranks that did not come, why, and what they did instead. `seen` is by rank of the world, rank `me` judges.
///
/// Silent ranks come first, wherever they are in the world: a rank that waits for them in another group is behind in this one
/// without fault.
pub(crate) fn verdict(me: usize, call: &Call, seen: &[Seen<'_>]) -> (Vec<usize>, Why, Option<String>) {
    let others = || seen.iter().enumerate().filter(|(rank, _)| *rank != me);
    let silent: Vec<usize> =
        others().filter(|(_, s)| s.beat.phase == Phase::Running && !s.alive).map(|(rank, _)| rank).collect();
    if !silent.is_empty() {
        return (silent, Why::Silent, None);
    }
    let members = || others().filter(|(rank, _)| call.members.contains(rank));
    let behind: Vec<_> = members().filter(|(_, s)| !s.beat.reached(call)).collect();
    let left: Vec<usize> = behind.iter().filter(|(_, s)| s.beat.phase == Phase::Left).map(|(rank, _)| *rank).collect();
    if !left.is_empty() {
        return (left, Why::Left, None);
    }
    if !behind.is_empty() {
        return (behind.into_iter().map(|(rank, _)| rank).collect(), Why::Behind, None);
    }
    let other: Vec<_> = members().filter_map(|(rank, s)| Some((rank, s.beat.instead(call)?))).collect();
    if let Some((rank, made)) = other.first() {
        let note = format!(
            "rank {me} made {} of {} elements, rank {rank} {} of {}",
            call.made.collective, call.made.count, made.collective, made.count
        );
        return (other.iter().map(|(rank, _)| *rank).collect(), Why::Differs, Some(note));
    }
    (Vec::new(), Why::Transport, None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::beat::Made;

    fn call(members: &[usize]) -> Call {
        let made = Made { sequence: 5, collective: "all_reduce".into(), count: 8 };
        Call { group: "g".into(), members: members.into(), made }
    }

    /// Rank that made call `sequence` of the group.
    fn beat(phase: Phase, sequence: u64) -> Beat {
        let made = Made { sequence, ..call(&[]).made };
        Beat { number: 1, phase, calls: [("g".to_owned(), made)].into() }
    }

    fn judge(beats: &[(Beat, bool)], members: &[usize]) -> (Vec<usize>, Why, Option<String>) {
        let seen: Vec<_> = beats.iter().map(|(beat, alive)| Seen { beat, alive: *alive }).collect();
        verdict(0, &call(members), &seen)
    }

    #[test]
    fn silence_is_worse_than_being_behind_and_counts_in_the_whole_world() {
        let beats = [
            (beat(Phase::Running, 5), false),
            (beat(Phase::Running, 4), true),
            (beat(Phase::Running, 9), false),
            (Beat::default(), true),
        ];
        assert_eq!(judge(&beats, &[0, 1, 3]), (vec![2], Why::Silent, None));
    }

    #[test]
    fn ranks_behind_are_members_that_did_not_make_the_call() {
        let beats = [
            (beat(Phase::Running, 5), true),
            (beat(Phase::Running, 4), true),
            (beat(Phase::Running, 6), true),
            (Beat::default(), true),
            (beat(Phase::Running, 1), true),
        ];
        assert_eq!(judge(&beats, &[0, 1, 2, 3]), (vec![1, 3], Why::Behind, None));
    }

    #[test]
    fn who_left_is_named_before_who_is_behind() {
        let beats = [
            (beat(Phase::Running, 5), true),
            (beat(Phase::Left, 4), false),
            (beat(Phase::Running, 4), true),
            (beat(Phase::Left, 5), false),
        ];
        assert_eq!(judge(&beats, &[0, 1, 2, 3]), (vec![1], Why::Left, None));
        assert_eq!(judge(&beats, &[0, 3]), (vec![], Why::Transport, None));
    }

    #[test]
    fn another_call_in_the_same_place_is_named() {
        let mut other = beat(Phase::Running, 5);
        other.calls.get_mut("g").unwrap().count = 9;
        let (ranks, why, note) = judge(&[(beat(Phase::Running, 5), true), (other, true)], &[0, 1]);
        assert_eq!((ranks, why), (vec![1], Why::Differs));
        assert_eq!(note.unwrap(), "rank 0 made all_reduce of 8 elements, rank 1 all_reduce of 9");
    }
}
