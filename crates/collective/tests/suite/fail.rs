//! Ranks that fail, and what the others see.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, raise};
use tch::{Device, Kind as Number, Tensor};
use unveil_collective::{Barrier, Collective, CollectiveError, Fault, Group, Result, Why, Work, World};

use super::harness::{LIMIT, Outcome, of, start_all};
use super::{COLLECTIVES, How, Kind, Task};

/// The deadline of each call of a rank.
const CALL: Duration = Duration::from_secs(3);

/// In which of its calls the victim fails.
const TURN: u64 = 3;

enum Started {
    Work(Work),
    Barrier(Barrier),
}

fn begin(group: &Group, collective: &str, device: Device) -> Result<Started> {
    // Large enough to be under way for a moment.
    let tensor = Tensor::ones([240_000 * group.world_size() as i64], (Number::Float, device));
    Ok(match collective {
        "all_reduce" => Started::Work(group.start_all_reduce(tensor)?),
        "reduce_scatter" => Started::Work(group.start_reduce_scatter(tensor)?),
        "all_gather" => Started::Work(group.start_all_gather(tensor)?),
        "broadcast" => Started::Work(group.start_broadcast(tensor, 1)?),
        _ => Started::Barrier(group.start_barrier()?),
    })
}

fn end(started: Started) -> Result<()> {
    let deadline = Instant::now() + CALL;
    match started {
        Started::Work(work) => work.wait(deadline).map(drop),
        Started::Barrier(barrier) => barrier.wait(deadline),
    }
}

/// Calls again and again until one fails; the victim fails in its third call.
pub fn until(world: &World, device: Device, collective: &str, victim: usize, how: How) -> Outcome {
    calls(world.group(), device, collective, world.rank() == victim, how)
}

fn calls(group: &Group, device: Device, collective: &str, victim: bool, how: How) -> Outcome {
    for turn in 1..1000 {
        let now = victim && turn == TURN;
        match how {
            How::KillBefore if now => drop(raise(Signal::SIGKILL)),
            How::StopBefore if now => drop(raise(Signal::SIGSTOP)),
            How::Sleep if now => std::thread::sleep(LIMIT * 2),
            How::Leave if now => return Outcome::default(),
            _ => {}
        }
        let begun = Instant::now();
        let result = begin(group, collective, device).and_then(|started| {
            match how {
                How::KillInside if now => drop(raise(Signal::SIGKILL)),
                How::StopInside if now => drop(raise(Signal::SIGSTOP)),
                _ => {}
            }
            end(started)
        });
        if let Err(e) = result {
            let seconds = begun.elapsed().as_secs_f64();
            let again = begin(group, "all_reduce", device).err().map(|e: CollectiveError| e.to_string());
            return Outcome { again, seconds, ..of(Some(e)) };
        }
    }
    Outcome::default()
}

/// The victim fails among the shards of its replica; the other replica has no call with it.
pub fn in_shards(world: &World, device: Device, victim: usize) -> Outcome {
    let mesh = world.mesh(2, 2).unwrap();
    calls(&mesh.shards, device, "all_reduce", world.rank() == victim, How::KillBefore)
}

/// Rank 1 makes another call than the others.
pub fn differ(world: &World, device: Device) -> Outcome {
    let group = world.group();
    let collective = if world.rank() == 1 { "all_gather" } else { "barrier" };
    of(begin(group, collective, device).and_then(end).err())
}

/// One of three ranks fails in one collective; the other two end in time with the same fault.
#[track_caller]
pub fn check(backend: Kind, collective: &str, victim: usize, how: How) {
    let world = if backend == Kind::Nccl { 2 } else { 3 };
    let victim = victim % world;
    let task = Task::Fail { collective: collective.into(), victim, how };
    let mut ranks = start_all(world, backend, &task);
    let mut first: Option<Fault> = None;
    for rank in ranks.iter_mut().filter(|r| r.rank != victim) {
        let outcome = rank.outcome(LIMIT + Duration::from_secs(60));
        let shown = format!("{how:?} of rank {victim} in {collective}, seen by rank {}: {outcome:?}", rank.rank);
        let fault = outcome.fault.clone().unwrap_or_else(|| panic!("{shown}"));
        assert!(outcome.seconds < LIMIT.as_secs_f64(), "too late: {shown}");
        assert_eq!((fault.collective.as_str(), fault.group.as_str()), (collective, "world"), "{shown}");
        assert_eq!(fault.ranks, [victim], "{shown}");
        // Who fails inside a call may have done its part of it, and a broadcast does not wait for those who only receive.
        let last = match (how, collective) {
            (_, "broadcast") => u64::MAX,
            (How::KillInside | How::StopInside, _) => TURN + 1,
            _ => TURN,
        };
        assert!((TURN..=last).contains(&fault.sequence), "{shown}");
        let why = match how {
            How::Sleep => Why::Behind,
            How::Leave => Why::Left,
            _ => Why::Silent,
        };
        assert_eq!(fault.why, why, "{shown}");
        let error = outcome.error.unwrap();
        assert!(error.contains(&format!("{collective} #{}", fault.sequence)), "{error}");
        assert!(error.contains(&format!("rank {victim}")), "{error}");
        assert_eq!(outcome.again.as_ref(), Some(&error), "every later call returns the first error");
        let known = first.get_or_insert_with(|| fault.clone());
        // Without rank 0 there is no store to share the finding in: each rank has its own.
        let shared = if victim == 0 { known.ranks == fault.ranks && known.why == fault.why } else { *known == fault };
        assert!(shared, "ranks disagree: {known:?} and {fault:?}");
        rank.ended(LIMIT);
    }
    if matches!(how, How::StopBefore | How::StopInside) {
        // Waking up, it finds the world closed.
        let mut stopped = ranks.swap_remove(victim);
        stopped.wake();
        let outcome = stopped.outcome(LIMIT);
        assert!(outcome.fault.is_some(), "{how:?} of rank {victim} in {collective}, afterwards: {outcome:?}");
    }
}

/// The same in each collective, by turns with another victim: rank 0, which hosts the store, among them.
#[track_caller]
pub fn check_all(backend: Kind, how: How) {
    let wanted = COLLECTIVES.iter().enumerate().collect::<Vec<_>>();
    for some in wanted.chunks(2) {
        std::thread::scope(|s| {
            let running: Vec<_> = some
                .iter()
                .map(|(victim, collective)| s.spawn(move || check(backend, collective, *victim, how)))
                .collect();
            for one in running {
                one.join().unwrap();
            }
        });
    }
}
