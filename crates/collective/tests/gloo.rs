//! The conformance suite over Gloo, and how ranks come together.

mod suite;

use std::net::TcpListener;
use std::time::{Duration, Instant};

use suite::harness::{LIMIT, address_of, start_all};
use suite::{How, Kind, Spec, Task, fail};
use unveil_collective::{Backend, Collective, CollectiveError, Setup, Timing, Why, open};

const GLOO: Kind = Kind::Gloo;

#[test]
#[ignore = "one rank, which the other tests start"]
fn rank() {
    suite::harness::rank();
}

fn conform(world: usize) {
    suite::harness::check_calls(world, GLOO);
}

#[test]
fn one_rank_conforms() {
    conform(1);
}

#[test]
fn two_ranks_conform() {
    conform(2);
}

#[test]
fn three_ranks_conform() {
    conform(3);
}

#[test]
fn four_ranks_conform() {
    conform(4);
}

#[test]
fn a_rank_killed_before_its_call_is_named() {
    fail::check_all(GLOO, How::KillBefore);
}

#[test]
fn a_rank_killed_inside_a_call_is_named() {
    fail::check_all(GLOO, How::KillInside);
}

#[test]
fn a_rank_stopped_before_its_call_is_named() {
    fail::check_all(GLOO, How::StopBefore);
}

#[test]
fn a_rank_stopped_inside_a_call_is_named() {
    fail::check_all(GLOO, How::StopInside);
}

#[test]
fn a_rank_that_lives_but_does_not_come_is_named() {
    fail::check(GLOO, "all_reduce", 2, How::Sleep);
}

#[test]
fn a_rank_that_leaves_is_named() {
    fail::check(GLOO, "all_gather", 0, How::Leave);
    fail::check(GLOO, "barrier", 1, How::Leave);
}

#[test]
fn a_rank_that_fails_among_its_shards_ends_the_other_replica_too() {
    let victim = 3;
    let mut ranks = start_all(4, GLOO, &Task::FailInShards { victim });
    for rank in ranks.iter_mut().filter(|r| r.rank != victim) {
        let outcome = rank.outcome(LIMIT + Duration::from_secs(60));
        let fault = outcome.fault.clone().unwrap_or_else(|| panic!("{outcome:?}"));
        assert_eq!((fault.ranks, fault.why, fault.group.as_str()), (vec![victim], Why::Silent, "shards.0.1"));
        assert!(outcome.seconds < LIMIT.as_secs_f64());
    }
}

#[test]
fn ranks_that_make_different_calls_are_told() {
    for mut rank in start_all(3, GLOO, &Task::Differ) {
        let outcome = rank.outcome(LIMIT + Duration::from_secs(60));
        let fault = outcome.fault.clone().unwrap_or_else(|| panic!("{outcome:?}"));
        assert_eq!((fault.why, fault.sequence), (Why::Differs, 1), "{outcome:?}");
        assert!(fault.cause.contains("barrier") && fault.cause.contains("all_gather"), "{outcome:?}");
    }
}

#[test]
fn missing_ranks_are_named_to_all() {
    // On a busy machine rank 2 may start too late to be met: it is then given longer.
    for join_ms in [2500, 10_000, 40_000] {
        let limit = LIMIT + Duration::from_millis(join_ms);
        let short = |rank| Spec { join_ms, ..Spec::new(rank, 4, GLOO, &Task::Meet) };
        let first = short(0).start();
        let address = address_of(&first);
        let second = Spec { address, ..short(2) }.start();
        let mut errors = Vec::new();
        for mut rank in [first, second] {
            errors.push(rank.outcome(limit).error.unwrap());
            rank.ended(limit);
        }
        if errors[0].starts_with("ranks 1, 2, 3 of 4 ") && join_ms < 40_000 {
            continue;
        }
        for error in errors {
            assert!(error.starts_with("ranks 1, 3 of 4 did not come to 127.0.0.1:"), "{error}");
        }
        return;
    }
}

#[test]
fn a_missing_rank_0_is_named() {
    // A port that was free a moment ago.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let begin = Instant::now();
    let error =
        Spec { address, join_ms: 1500, ..Spec::new(1, 2, GLOO, &Task::Meet) }.start().outcome(LIMIT).error.unwrap();
    assert!(error.starts_with("rank 0 of 2 did not come to 127.0.0.1:"), "{error}");
    assert!(begin.elapsed() < LIMIT);
}

#[test]
fn a_rank_with_another_fingerprint_is_refused_with_what_differs() {
    let print = |rate: &str| format!("build 7\nrate = {rate}\nseed = 3");
    let first = Spec { fingerprint: print("0.1"), ..Spec::new(0, 3, GLOO, &Task::Meet) }.start();
    let address = address_of(&first);
    let other = |rank, rate: &str| {
        let (address, fingerprint) = (address.clone(), print(rate));
        Spec { address, fingerprint, ..Spec::new(rank, 3, GLOO, &Task::Meet) }.start()
    };
    for mut rank in [first, other(1, "0.1"), other(2, "0.2")] {
        let error = rank.outcome(LIMIT).error.unwrap();
        let wanted = "rank 2 was refused: it runs `rate = 0.2`, but rank 0 runs `rate = 0.1`; start";
        assert!(error.starts_with(wanted), "{error}");
        rank.ended(LIMIT);
    }
}

#[test]
fn ranks_know_each_other_by_a_token() {
    let spec =
        |rank, token: Option<&str>| Spec { token: token.map(str::to_owned), ..Spec::new(rank, 2, GLOO, &Task::Meet) };
    let meet = |other: Option<&str>| {
        let mut first = spec(0, Some("the token of these ranks")).start();
        let address = address_of(&first);
        let mut second = Spec { address, ..spec(1, other) }.start();
        [first.outcome(LIMIT).error, second.outcome(LIMIT).error]
    };
    assert_eq!(meet(Some("the token of these ranks")), [None, None]);
    for error in meet(Some("the token of other ranks")) {
        let error = error.unwrap();
        assert!(error.contains("ranks 0, 1") || error.contains("ranks 1, 0"), "{error}");
        assert!(error.contains("the same token") && !error.contains("the token of"), "{error}");
    }
    for error in meet(None) {
        let error = error.unwrap();
        assert!(error.starts_with("rank 1 was refused: it runs `without a token`"), "{error}");
    }
}

#[test]
fn beyond_this_machine_ranks_need_a_token() {
    let mut setup = alone(Backend::Gloo);
    (setup.world, setup.address, setup.local) = (2, "0.0.0.0:0".into(), Some("127.0.0.1".into()));
    setup.timing.join = Duration::from_millis(300);
    let error = open(&setup).err().unwrap().to_string();
    assert!(error.contains("auth.token_env") && error.contains("0.0.0.0:0"), "{error}");
    setup.token = Some(unveil_core::Secret::new("the token of these ranks"));
    let error = open(&setup).err().unwrap();
    assert!(matches!(&error, CollectiveError::Missing { ranks, .. } if *ranks == [1]), "{error}");
}

#[test]
fn a_rank_that_is_there_twice_is_refused_and_the_others_go_on() {
    let first = Spec::new(0, 3, GLOO, &Task::Meet).start();
    let address = address_of(&first);
    let rank = |rank| Spec { address: address.clone(), ..Spec::new(rank, 3, GLOO, &Task::Meet) }.start();
    // Rank 2 comes late, so that both processes of rank 1 find the others waiting.
    let (send, seen) = std::sync::mpsc::channel();
    for mut twin in [rank(1), rank(1)] {
        let send = send.clone();
        std::thread::spawn(move || drop(send.send(twin.outcome(Duration::from_secs(60)))));
    }
    let refused = seen.recv().unwrap().error.unwrap();
    assert!(refused.starts_with("rank 1 is at 127.0.0.1:"), "{refused}");
    let outcomes = [rank(2).outcome(LIMIT), { first }.outcome(LIMIT), seen.recv().unwrap()];
    assert!(outcomes.iter().all(|o| o.error.is_none()), "{outcomes:?}");
}

fn alone(backend: Backend) -> Setup {
    let fingerprint = "v1".into();
    Setup {
        rank: 0,
        world: 1,
        address: "127.0.0.1:0".into(),
        local: None,
        backend,
        fingerprint,
        token: None,
        timing: Timing::default(),
    }
}

#[test]
fn nccl_without_a_gpu_is_refused_at_once() {
    if std::fs::exists("/dev/nvidia0").unwrap_or(false) {
        let tensor = tch::Tensor::ones([3], (tch::Kind::Float, tch::Device::Cuda(0)));
        let world = open(&alone(Backend::Nccl { device: 0 })).unwrap();
        assert_eq!(world.group().all_reduce(tensor.shallow_clone()).unwrap(), tensor);
        return;
    }
    let error = open(&alone(Backend::Nccl { device: 0 })).err().unwrap();
    assert!(
        matches!(&error, CollectiveError::Backend { backend: "nccl", message } if message.contains("driver")),
        "{error}"
    );
}

#[test]
fn a_world_of_one_needs_no_address() {
    let mut setup = alone(Backend::Solo);
    setup.address = "nowhere".into();
    let world = open(&setup).unwrap();
    let tensor = tch::Tensor::from_slice(&[1f32, 2.0]);
    assert_eq!(world.group().reduce_scatter(tensor.shallow_clone()).unwrap(), tensor);
    assert_eq!((world.rank(), world.size(), world.group().name()), (0, 1, "world"));
}

#[test]
fn an_address_that_cannot_be_used_is_named() {
    let mut setup = alone(Backend::Gloo);
    setup.world = 2;
    setup.address = "here".into();
    setup.timing.join = Duration::from_millis(300);
    let error = open(&setup).err().unwrap().to_string();
    assert!(error.contains("rank 0 cannot listen at here"), "{error}");
    setup.rank = 1;
    let error = open(&setup).err().unwrap().to_string();
    assert!(error.contains("`here` is not an address, host:port"), "{error}");
}
