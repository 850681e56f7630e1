//! Groups that teach nothing are replaced: up to the limit, in the order of the pass, exactly once.

use proptest::prelude::*;
use unveil_core::GroupId;
use unveil_experience::{Event, Experience, Lease, LeaseCall, Submission, Verdict, VersionSpan};

use crate::fixtures::{at, ids, settings};

const RECORDS: u64 = 50;

/// Creates a machine whose payloads say whether their group teaches nothing.
fn machine(groups_per_step: usize, limit: usize, total: Option<u64>, in_rounds: bool) -> Experience<bool> {
    let machine = Experience::new(settings(groups_per_step, 0, total), ids(RECORDS as usize)).unwrap();
    replacing(machine, limit, in_rounds)
}

fn replacing(machine: Experience<bool>, limit: usize, in_rounds: bool) -> Experience<bool> {
    machine.with_replacement(limit, |flat: &bool| *flat, in_rounds)
}

fn number(group: &GroupId) -> u64 {
    group.pass * RECORDS + group.position
}

fn lease(e: &mut Experience<bool>, max: usize) -> Vec<Lease> {
    e.lease(LeaseCall::new("w", max), at(0), |_| true)
}

fn submit(e: &mut Experience<bool>, l: &Lease, flat: bool) -> Verdict {
    let versions = VersionSpan::at(e.version());
    e.submit(&Submission { worker: "w", lease: &l.id, group: &l.group, versions }, flat, at(0))
}

/// Takes the next batch and returns the numbers of its groups and of the replaced ones.
fn train(e: &mut Experience<bool>) -> Option<(Vec<u64>, Vec<u64>)> {
    let groups: Vec<GroupId> = e.next_batch(at(0))?.into_iter().map(|(g, _)| g).collect();
    let replaced: Vec<u64> = e.replaced_in_training().iter().map(number).collect();
    let step = e.version() + 1;
    e.record_trained(step, &groups, at(0)).unwrap();
    assert!(e.replaced_in_training().is_empty());
    e.publish(step).unwrap();
    Some((groups.iter().map(number).collect(), replaced))
}

/// Leases and submits until nothing is left to lease.
fn generate(e: &mut Experience<bool>, flat: impl Fn(u64) -> bool) -> Vec<Lease> {
    let mut seen = Vec::new();
    loop {
        let leases = lease(e, 100);
        if leases.is_empty() {
            return seen;
        }
        for l in leases {
            assert_eq!(submit(e, &l, flat(number(&l.group))), Verdict::Accepted);
            seen.push(l);
        }
    }
}

fn numbers(leases: &[Lease]) -> Vec<u64> {
    leases.iter().map(|l| number(&l.group)).collect()
}

#[test]
fn no_more_groups_than_the_limit_are_replaced() {
    let mut e = machine(2, 3, None, false);
    let seen = generate(&mut e, |_| true);
    assert_eq!(numbers(&seen), [0, 1, 2, 3, 4]);
    assert_eq!((e.stats().replaced, e.stats().ready), (3, 2));
    assert_eq!(submit(&mut e, &seen[0], true), Verdict::Duplicate);
    assert_eq!(train(&mut e), Some((vec![3, 4], vec![0, 1, 2])));
    let replaced = e.drain_events().into_iter().filter(|event| matches!(event, Event::Replaced { .. }));
    assert_eq!(replaced.count(), 3);
    assert_eq!(submit(&mut e, &seen[0], false), Verdict::Duplicate, "never trained after all");
    let account = e.snapshot().accounting();
    assert_eq!((account.trained, account.replaced, account.exactly_once), (2, 3, true));
    assert_eq!((e.stats().trained, e.stats().replaced), (2, 3));
    // The next batch starts with its own limit, after everything that was looked at.
    assert_eq!(numbers(&generate(&mut e, |_| true)), [5, 6, 7, 8, 9]);
}

#[test]
fn without_a_limit_nothing_is_replaced() {
    let mut e = machine(2, 0, None, false);
    assert_eq!(numbers(&generate(&mut e, |_| true)), [0, 1]);
    assert_eq!(train(&mut e), Some((vec![0, 1], vec![])));
}

#[test]
fn the_first_groups_are_replaced_whatever_comes_first() {
    let mut e = machine(2, 1, None, false);
    let first = lease(&mut e, 9);
    assert_eq!(submit(&mut e, &first[1], true), Verdict::Accepted);
    let second = lease(&mut e, 9);
    assert_eq!(numbers(&second), [2], "one more group is needed");
    assert_eq!(submit(&mut e, &first[0], true), Verdict::Accepted);
    assert!(lease(&mut e, 9).is_empty(), "the limit is reached");
    assert_eq!(submit(&mut e, &second[0], false), Verdict::Accepted);
    assert_eq!(train(&mut e), Some((vec![1, 2], vec![0])));
}

#[test]
fn accounting_is_the_same_after_a_resume() {
    let flat = |g: u64| g == 0 || g == 3;
    let mut e = machine(2, 2, Some(4), false);
    assert_eq!(numbers(&generate(&mut e, flat)), [0, 1, 2]);
    assert_eq!(train(&mut e), Some((vec![1, 2], vec![0])));
    let saved = serde_json::to_string(&e.snapshot()).unwrap();
    let before = e.snapshot().accounting();
    // Looked at, but not part of a batch when the learner dies.
    let lost = lease(&mut e, 1);
    assert_eq!((numbers(&lost), submit(&mut e, &lost[0], true)), (vec![3], Verdict::Accepted));
    assert_eq!(e.stats().replaced, 2);
    let saved = serde_json::from_str(&saved).unwrap();
    let restored = Experience::restore(settings(2, 0, Some(4)), ids(RECORDS as usize), &saved).unwrap();
    let mut e = replacing(restored, 2, false);
    assert_eq!(e.snapshot().accounting(), before);
    assert_eq!((before.trained, before.replaced, before.exactly_once), (2, 1, true));
    assert_eq!(
        numbers(&generate(&mut e, flat)),
        [3, 4, 5],
        "what was not counted is looked at again, and nothing else"
    );
    assert_eq!(train(&mut e), Some((vec![4, 5], vec![3])));
    assert!(e.is_finished() && lease(&mut e, 9).is_empty(), "replaced groups do not shorten the run");
    let account = e.snapshot().accounting();
    assert_eq!((account.trained, account.replaced, account.exactly_once), (4, 2, true));
}

#[test]
fn rounds_wait_for_all_earlier_groups() {
    let mut e = machine(3, 5, None, true);
    let first = lease(&mut e, 9);
    assert_eq!(submit(&mut e, &first[2], true), Verdict::Accepted);
    assert_eq!(submit(&mut e, &first[0], true), Verdict::Accepted);
    assert!(lease(&mut e, 9).is_empty(), "group 1 may teach nothing, too");
    assert_eq!(submit(&mut e, &first[1], false), Verdict::Accepted);
    assert_eq!(numbers(&lease(&mut e, 9)), [3, 4]);
}

/// Returns the batches and the replaced groups of the first `steps` updates, one group after another.
fn expected(
    flat: impl Fn(u64) -> bool,
    groups_per_step: usize,
    limit: usize,
    steps: usize,
) -> Vec<(Vec<u64>, Vec<u64>)> {
    let mut next = 0..;
    let mut out = Vec::new();
    for _ in 0..steps {
        let mut batch = Vec::new();
        let mut replaced = Vec::new();
        while batch.len() < groups_per_step {
            let g = next.next().unwrap();
            if flat(g) && replaced.len() < limit { replaced.push(g) } else { batch.push(g) }
        }
        out.push((batch, replaced));
    }
    out
}

/// Record of a run: its batches with the replaced groups, and the groups of each lease.
type Run = (Vec<(Vec<u64>, Vec<u64>)>, Vec<Vec<u64>>);

/// Trains `steps` batches with leases of up to `max` groups, which are submitted in the order of `picks`.
fn run(mut e: Experience<bool>, flat: impl Fn(u64) -> bool, max: usize, steps: usize, picks: &[usize]) -> Run {
    let mut held: Vec<Lease> = Vec::new();
    let mut batches = Vec::new();
    let mut leases = Vec::new();
    let mut picks = picks.iter().cycle();
    while batches.len() < steps {
        loop {
            let more = lease(&mut e, max);
            if more.is_empty() {
                break;
            }
            leases.push(numbers(&more));
            held.extend(more);
        }
        let l = held.swap_remove(picks.next().unwrap() % held.len());
        assert_eq!(submit(&mut e, &l, flat(number(&l.group))), Verdict::Accepted);
        batches.extend(train(&mut e));
    }
    (batches, leases)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]
    #[test]
    fn replaced_groups_follow_from_the_order_of_the_pass(
        flats in prop::collection::vec(any::<bool>(), 1..40),
        groups_per_step in 1..5usize,
        limit in 0..6usize,
        max in 1..4usize,
        in_rounds in any::<bool>(),
        picks in prop::collection::vec(any::<usize>(), 1..50),
        others in prop::collection::vec(any::<usize>(), 1..50),
    ) {
        let flat = |g: u64| flats[g as usize % flats.len()];
        let one = run(machine(groups_per_step, limit, None, in_rounds), flat, max, 4, &picks);
        prop_assert_eq!(&one.0, &expected(flat, groups_per_step, limit, 4));
        let two = run(machine(groups_per_step, limit, None, in_rounds), flat, max, 4, &others);
        prop_assert_eq!(&one.0, &two.0);
        if in_rounds {
            prop_assert_eq!(one.1, two.1, "leases depend on the order of submissions");
        }
    }
}
