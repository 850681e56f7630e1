//! Ranks that fail, and the faults that the other ranks report.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, raise};
use tch::{Device, Kind, Tensor};
use unveil_collective::{Barrier, Collective, CollectiveError, Fault, FaultKind, Group, Result, Work, World};

use super::harness::{LIMIT, Outcome, outcome_of, start_all};
use super::{COLLECTIVES, FailureMode, RankTask, TestBackend};

/// Timeout of each call of a rank.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);

/// Number of the victim's call that fails.
const FAILING_CALL: u64 = 3;

enum Started {
    Work(Work),
    Barrier(Barrier),
}

fn begin(group: &Group, collective: &str, device: Device) -> Result<Started> {
    // Large enough to be in flight for a moment.
    let tensor = Tensor::ones([240_000 * group.world_size() as i64], (Kind::Float, device));
    Ok(match collective {
        "all_reduce" => Started::Work(group.start_all_reduce(tensor)?),
        "reduce_scatter" => Started::Work(group.start_reduce_scatter(tensor)?),
        "all_gather" => Started::Work(group.start_all_gather(tensor)?),
        "broadcast" => Started::Work(group.start_broadcast(tensor, 1)?),
        _ => Started::Barrier(group.start_barrier()?),
    })
}

fn end(started: Started) -> Result<()> {
    let deadline = Instant::now() + CALL_TIMEOUT;
    match started {
        Started::Work(work) => work.wait(deadline).map(drop),
        Started::Barrier(barrier) => barrier.wait(deadline),
    }
}

/// Repeats a call until one fails; the victim fails in its third call.
pub(crate) fn call_until_failure(
    world: &World,
    device: Device,
    collective: &str,
    victim: usize,
    mode: FailureMode,
) -> Outcome {
    repeat_call(world.group(), device, collective, world.rank() == victim, mode)
}

fn repeat_call(group: &Group, device: Device, collective: &str, is_victim: bool, mode: FailureMode) -> Outcome {
    for number in 1..1000 {
        let now = is_victim && number == FAILING_CALL;
        match mode {
            FailureMode::KillBefore if now => drop(raise(Signal::SIGKILL)),
            FailureMode::StopBefore if now => drop(raise(Signal::SIGSTOP)),
            FailureMode::Sleep if now => std::thread::sleep(LIMIT * 2),
            FailureMode::Leave if now => return Outcome::default(),
            _ => {}
        }
        let started_at = Instant::now();
        let result = begin(group, collective, device).and_then(|started| {
            match mode {
                FailureMode::KillInside if now => drop(raise(Signal::SIGKILL)),
                FailureMode::StopInside if now => drop(raise(Signal::SIGSTOP)),
                _ => {}
            }
            end(started)
        });
        if let Err(e) = result {
            let seconds = started_at.elapsed().as_secs_f64();
            let next_error = begin(group, "all_reduce", device).err().map(|e: CollectiveError| e.to_string());
            return Outcome { next_error, seconds, ..outcome_of(Some(e)) };
        }
    }
    Outcome::default()
}

/// Fails the victim among the shards of its replica; the other replica makes no call with it.
pub(crate) fn call_in_shards_until_failure(world: &World, device: Device, victim: usize) -> Outcome {
    let mesh = world.mesh(2, 2).unwrap();
    repeat_call(&mesh.shards, device, "all_reduce", world.rank() == victim, FailureMode::KillBefore)
}

/// Makes a different call on rank 1 than on the others.
pub(crate) fn make_different_calls(world: &World, device: Device) -> Outcome {
    let group = world.group();
    let collective = if world.rank() == 1 { "all_gather" } else { "barrier" };
    outcome_of(begin(group, collective, device).and_then(end).err())
}

/// Checks that, when one of three ranks fails in a call, the other two end in time with the same fault.
#[track_caller]
pub(crate) fn check(backend: TestBackend, collective: &str, victim: usize, mode: FailureMode) {
    let world = if backend == TestBackend::Nccl { 2 } else { 3 };
    let victim = victim % world;
    let task = RankTask::Fail { collective: collective.into(), victim, mode };
    let mut ranks = start_all(world, backend, &task);
    let mut first_fault: Option<Fault> = None;
    for rank in ranks.iter_mut().filter(|r| r.rank != victim) {
        let outcome = rank.outcome(LIMIT + Duration::from_secs(60));
        let context = format!("{mode:?} of rank {victim} in {collective}, reported by rank {}: {outcome:?}", rank.rank);
        let fault = outcome.fault.clone().unwrap_or_else(|| panic!("{context}"));
        assert!(outcome.seconds < LIMIT.as_secs_f64(), "too late: {context}");
        assert_eq!((fault.collective.as_str(), fault.group.as_str()), (collective, "world"), "{context}");
        assert_eq!(fault.ranks, [victim], "{context}");
        // A victim inside a call may have completed its side of it, and a broadcast does not wait for ranks that only receive.
        let last = match (mode, collective) {
            (_, "broadcast") => u64::MAX,
            (FailureMode::KillInside | FailureMode::StopInside, _) => FAILING_CALL + 1,
            _ => FAILING_CALL,
        };
        assert!((FAILING_CALL..=last).contains(&fault.sequence), "{context}");
        let kind = match mode {
            FailureMode::Sleep => FaultKind::Behind,
            FailureMode::Leave => FaultKind::Left,
            _ => FaultKind::Silent,
        };
        assert_eq!(fault.kind, kind, "{context}");
        let error = outcome.error.unwrap();
        assert!(error.contains(&format!("{collective} #{}", fault.sequence)), "{error}");
        assert!(error.contains(&format!("rank {victim}")), "{error}");
        assert_eq!(outcome.next_error.as_ref(), Some(&error), "every later call returns the first error");
        let first = first_fault.get_or_insert_with(|| fault.clone());
        // Without rank 0 there is no store to share the fault in: each rank has its own.
        let same = if victim == 0 { first.ranks == fault.ranks && first.kind == fault.kind } else { *first == fault };
        assert!(same, "ranks disagree: {first:?} and {fault:?}");
        rank.wait_for_exit(LIMIT);
    }
    if matches!(mode, FailureMode::StopBefore | FailureMode::StopInside) {
        // When it resumes, it finds the world closed.
        let mut stopped = ranks.swap_remove(victim);
        stopped.resume();
        let outcome = stopped.outcome(LIMIT);
        assert!(outcome.fault.is_some(), "{mode:?} of rank {victim} in {collective}, after it resumed: {outcome:?}");
    }
}

/// Checks every collective, each with a different victim; rank 0, which hosts the store, is one of them.
#[track_caller]
pub(crate) fn check_all(backend: TestBackend, mode: FailureMode) {
    let cases = COLLECTIVES.iter().enumerate().collect::<Vec<_>>();
    for pair in cases.chunks(2) {
        std::thread::scope(|s| {
            let running: Vec<_> = pair
                .iter()
                .map(|(victim, collective)| s.spawn(move || check(backend, collective, *victim, mode)))
                .collect();
            for thread in running {
                thread.join().unwrap();
            }
        });
    }
}
