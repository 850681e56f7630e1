//! The conformance suite over NCCL: one rank, and two that share one GPU. `make test-gpu`; every test fails where there is no GPU.

mod suite;

use suite::{How, Kind, fail};

const NCCL: Kind = Kind::Nccl;

#[test]
#[ignore = "one rank, which the other tests start"]
fn rank() {
    suite::harness::rank();
}

fn conform(world: usize) {
    suite::harness::check_calls(world, NCCL);
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
