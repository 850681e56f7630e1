//! The conformance suite over NCCL: one rank, and two that share one GPU. `make test-gpu`; every test fails where there is no GPU.

mod suite;

use std::time::Duration;

use suite::harness::{LIMIT, start_all};
use suite::{How, Kind, Task, fail};

const NCCL: Kind = Kind::Nccl;

#[test]
#[ignore = "one rank, which the other tests start"]
fn rank() {
    suite::harness::rank();
}

fn conform(world: usize) {
    let seed = u64::from(std::process::id());
    for mut rank in start_all(world, NCCL, &Task::Conform { seed }) {
        let outcome = rank.outcome(Duration::from_secs(300));
        assert!(outcome.error.is_none(), "seed {seed}: {outcome:?}");
        rank.ended(LIMIT);
    }
}

#[test]
fn one_rank_conforms() {
    conform(1);
}

#[test]
fn two_ranks_on_one_gpu_conform() {
    conform(2);
}

#[test]
fn a_rank_killed_before_its_call_is_named() {
    fail::check_all(NCCL, How::KillBefore);
}

#[test]
fn a_rank_stopped_before_its_call_is_named() {
    fail::check_all(NCCL, How::StopBefore);
}

#[test]
fn a_rank_killed_inside_a_call_is_named() {
    fail::check_all(NCCL, How::KillInside);
}
