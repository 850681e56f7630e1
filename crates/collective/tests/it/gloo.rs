//! The conformance suite over Gloo, and the rendezvous.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use unveil_collective::{Backend, Collective, CollectiveError, FaultKind, Setup, Timeouts, open};

use crate::suite::harness::{LIMIT, address_of, check_calls, start_all};
use crate::suite::{FailureMode, RankSpec, RankTask, TestBackend, fail};

const GLOO: TestBackend = TestBackend::Gloo;

#[test]
fn one_rank_conforms() {
    check_calls(1, GLOO);
}

#[test]
fn two_ranks_conform() {
    check_calls(2, GLOO);
}

#[test]
fn three_ranks_conform() {
    check_calls(3, GLOO);
}

#[test]
fn four_ranks_conform() {
    check_calls(4, GLOO);
}

#[test]
fn rank_killed_before_a_call_is_named() {
    fail::check_all(GLOO, FailureMode::KillBefore);
}

#[test]
fn rank_killed_inside_a_call_is_named() {
    fail::check_all(GLOO, FailureMode::KillInside);
}

#[test]
fn rank_stopped_before_a_call_is_named() {
    fail::check_all(GLOO, FailureMode::StopBefore);
}

#[test]
fn rank_stopped_inside_a_call_is_named() {
    fail::check_all(GLOO, FailureMode::StopInside);
}

#[test]
fn live_rank_that_makes_no_call_is_named() {
    fail::check(GLOO, "all_reduce", 2, FailureMode::Sleep);
}

#[test]
fn rank_that_leaves_is_named() {
    fail::check(GLOO, "all_gather", 0, FailureMode::Leave);
    fail::check(GLOO, "barrier", 1, FailureMode::Leave);
}

#[test]
fn failure_in_one_replica_ends_the_other_replica() {
    let victim = 3;
    let mut ranks = start_all(4, GLOO, &RankTask::FailInShards { victim });
    for rank in ranks.iter_mut().filter(|r| r.rank != victim) {
        let outcome = rank.outcome(LIMIT + Duration::from_secs(60));
        let fault = outcome.fault.clone().unwrap_or_else(|| panic!("{outcome:?}"));
        assert_eq!((fault.ranks, fault.kind, fault.group.as_str()), (vec![victim], FaultKind::Silent, "shards.0.1"));
        assert!(outcome.seconds < LIMIT.as_secs_f64());
    }
}

#[test]
fn different_calls_are_reported() {
    for mut rank in start_all(3, GLOO, &RankTask::DifferentCalls) {
        let outcome = rank.outcome(LIMIT + Duration::from_secs(60));
        let fault = outcome.fault.clone().unwrap_or_else(|| panic!("{outcome:?}"));
        assert_eq!((fault.kind, fault.sequence), (FaultKind::Mismatched, 1), "{outcome:?}");
        assert!(fault.cause.contains("barrier") && fault.cause.contains("all_gather"), "{outcome:?}");
    }
}

#[test]
fn missing_ranks_are_named_on_all_ranks() {
    // On a busy machine rank 2 may start too late: the test is then repeated with a longer timeout.
    for rendezvous_ms in [2500, 10_000, 40_000] {
        let limit = LIMIT + Duration::from_millis(rendezvous_ms);
        let spec = |rank| RankSpec { rendezvous_ms, ..RankSpec::new(rank, 4, GLOO, &RankTask::Join) };
        let first = spec(0).start();
        let address = address_of(&first);
        let second = RankSpec { address, ..spec(2) }.start();
        let mut errors = Vec::new();
        for mut rank in [first, second] {
            errors.push(rank.outcome(limit).error.unwrap());
            rank.wait_for_exit(limit);
        }
        if errors[0].starts_with("ranks 1, 2, 3 of 4 ") && rendezvous_ms < 40_000 {
            continue;
        }
        for error in errors {
            assert!(error.starts_with("ranks 1, 3 of 4 did not join at 127.0.0.1:"), "{error}");
        }
        return;
    }
}

#[test]
fn missing_rank_0_is_named() {
    // A port that was free a moment ago.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let begin = Instant::now();
    let error = RankSpec { address, rendezvous_ms: 1500, ..RankSpec::new(1, 2, GLOO, &RankTask::Join) }
        .start()
        .outcome(LIMIT)
        .error
        .unwrap();
    assert!(error.starts_with("rank 0 of 2 did not join at 127.0.0.1:"), "{error}");
    assert!(begin.elapsed() < LIMIT);
}

#[test]
fn different_fingerprint_is_refused_with_the_difference() {
    let fingerprint = |rate: &str| format!("build 7\nrate = {rate}\nseed = 3");
    let first = RankSpec { fingerprint: fingerprint("0.1"), ..RankSpec::new(0, 3, GLOO, &RankTask::Join) }.start();
    let address = address_of(&first);
    let start = |rank, rate: &str| {
        let address = address.clone();
        let fingerprint = fingerprint(rate);
        RankSpec { address, fingerprint, ..RankSpec::new(rank, 3, GLOO, &RankTask::Join) }.start()
    };
    for mut rank in [first, start(1, "0.1"), start(2, "0.2")] {
        let error = rank.outcome(LIMIT).error.unwrap();
        let expected = "rank 2 was refused: it runs `rate = 0.2`, but rank 0 runs `rate = 0.1`; start";
        assert!(error.starts_with(expected), "{error}");
        rank.wait_for_exit(LIMIT);
    }
}

#[test]
fn ranks_authenticate_each_other_by_a_token() {
    let spec = |rank, token: Option<&str>| RankSpec {
        token: token.map(str::to_owned),
        ..RankSpec::new(rank, 2, GLOO, &RankTask::Join)
    };
    let errors_with_second_token = |second_token: Option<&str>| {
        let mut first = spec(0, Some("the token of these ranks")).start();
        let address = address_of(&first);
        let mut second = RankSpec { address, ..spec(1, second_token) }.start();
        [first.outcome(LIMIT).error, second.outcome(LIMIT).error]
    };
    assert_eq!(errors_with_second_token(Some("the token of these ranks")), [None, None]);
    for error in errors_with_second_token(Some("the token of other ranks")) {
        let error = error.unwrap();
        assert!(error.contains("ranks 0, 1") || error.contains("ranks 1, 0"), "{error}");
        assert!(error.contains("different tokens") && !error.contains("the token of"), "{error}");
    }
    for error in errors_with_second_token(None) {
        let error = error.unwrap();
        assert!(error.starts_with("rank 1 was refused: it runs `without a token`"), "{error}");
    }
}

#[test]
fn rendezvous_beyond_loopback_needs_a_token() {
    let mut setup = single_rank(Backend::Gloo);
    setup.world = 2;
    setup.address = "0.0.0.0:0".into();
    setup.local_address = Some("127.0.0.1".into());
    setup.timeouts.rendezvous = Duration::from_millis(300);
    let error = open(&setup).err().unwrap().to_string();
    assert!(error.contains("auth.token_env") && error.contains("0.0.0.0:0"), "{error}");
    setup.token = Some(unveil_core::Secret::new("the token of these ranks"));
    let error = open(&setup).err().unwrap();
    assert!(matches!(&error, CollectiveError::Missing { ranks, .. } if *ranks == [1]), "{error}");
}

#[test]
fn duplicate_rank_is_refused_and_the_others_continue() {
    let mut first = RankSpec::new(0, 3, GLOO, &RankTask::Join).start();
    let address = address_of(&first);
    let start = |rank| RankSpec { address: address.clone(), ..RankSpec::new(rank, 3, GLOO, &RankTask::Join) }.start();
    // Rank 2 starts last, so that both processes of rank 1 find the others waiting.
    let (send, outcomes_of_rank_1) = std::sync::mpsc::channel();
    for mut twin in [start(1), start(1)] {
        let send = send.clone();
        std::thread::spawn(move || drop(send.send(twin.outcome(Duration::from_secs(60)))));
    }
    let refused = outcomes_of_rank_1.recv().unwrap().error.unwrap();
    assert!(refused.starts_with("rank 1 has already joined at 127.0.0.1:"), "{refused}");
    let outcomes = [start(2).outcome(LIMIT), first.outcome(LIMIT), outcomes_of_rank_1.recv().unwrap()];
    assert!(outcomes.iter().all(|o| o.error.is_none()), "{outcomes:?}");
}

fn single_rank(backend: Backend) -> Setup {
    Setup {
        rank: 0,
        world: 1,
        address: "127.0.0.1:0".into(),
        local_address: None,
        backend,
        fingerprint: "v1".into(),
        token: None,
        timeouts: Timeouts::default(),
    }
}

#[test]
fn nccl_without_a_gpu_is_refused() {
    if std::fs::exists("/dev/nvidia0").unwrap_or(false) {
        let tensor = tch::Tensor::ones([3], (tch::Kind::Float, tch::Device::Cuda(0)));
        let world = open(&single_rank(Backend::Nccl { device: 0 })).unwrap();
        assert_eq!(world.group().all_reduce(tensor.shallow_clone()).unwrap(), tensor);
        return;
    }
    let error = open(&single_rank(Backend::Nccl { device: 0 })).err().unwrap();
    assert!(
        matches!(&error, CollectiveError::Backend { backend: "nccl", message } if message.contains("driver")),
        "{error}"
    );
}

#[test]
fn world_of_one_rank_needs_no_address() {
    let mut setup = single_rank(Backend::Solo);
    setup.address = "nowhere".into();
    let world = open(&setup).unwrap();
    let tensor = tch::Tensor::from_slice(&[1f32, 2.0]);
    assert_eq!(world.group().reduce_scatter(tensor.shallow_clone()).unwrap(), tensor);
    assert_eq!((world.rank(), world.size(), world.group().name()), (0, 1, "world"));
}

#[test]
fn unusable_address_is_named() {
    let mut setup = single_rank(Backend::Gloo);
    setup.world = 2;
    setup.address = "here".into();
    setup.timeouts.rendezvous = Duration::from_millis(300);
    let error = open(&setup).err().unwrap().to_string();
    assert!(error.contains("rank 0 cannot listen at here"), "{error}");
    setup.rank = 1;
    let error = open(&setup).err().unwrap().to_string();
    assert!(error.contains("`here` is not an address, host:port"), "{error}");
}
