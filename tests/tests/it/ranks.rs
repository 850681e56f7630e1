//! A learner with several ranks: a complete run, a rank that dies, a resume with another number of ranks, and mismatched ranks.

use std::net::SocketAddr;
use std::time::Duration;

use nix::sys::signal::Signal;
use unveil_service::{READY, check_health};
use unveil_testkit::{FoundProcess, Lineage, Process, Sandbox, committed_steps, events_of, free_address};

const SOON: Duration = Duration::from_secs(120);
const TWO: [&str; 2] = ["learner.parallel.ranks=2", "learner.parallel.lost_s=5"];

fn start(s: &Sandbox, command: &str, sets: &[&str]) -> Process {
    s.start_micro(command, sets)
}

fn rank_one(s: &Sandbox) -> Option<FoundProcess> {
    s.processes().into_iter().find(|p| p.args.iter().any(|a| a == "learner.parallel.rank=1"))
}

/// Queries the health endpoint.
fn is_serving(health: SocketAddr, service: &str) -> bool {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(check_health(&health.to_string(), service, SOON)).unwrap()
}

/// Returns loss and gradient norm of the first update.
fn first_update(s: &Sandbox) -> (f64, f64) {
    let event = events_of(&s.path("run"), "train").remove(0);
    (event["loss"]["loss"].as_f64().unwrap(), event["grad_norm"].as_f64().unwrap())
}

#[test]
fn two_ranks_train_like_one() {
    let one = Sandbox::new();
    let two = Sandbox::new();
    let alone = start(&one, "train", &["learner.steps=1"]);
    let sets = [&TWO[..], &["learner.parallel.zero=2"]].concat();
    start(&two, "train", &sets).wait(SOON).ok();
    alone.wait(SOON).ok();
    Lineage::read(&two.path("run")).assert_exactly_once(6, 2, 8);
    assert_eq!(two.processes(), []);
    let (loss, norm) = first_update(&two);
    let (expected_loss, expected_norm) = first_update(&one);
    assert!(
        (loss - expected_loss).abs() <= 1e-4 * expected_loss.abs().max(1e-2),
        "loss {loss}, one rank {expected_loss}"
    );
    assert!((norm - expected_norm).abs() <= 1e-4 * expected_norm, "gradient norm {norm}, one rank {expected_norm}");
}

#[test]
fn dead_ranks_end_the_run_and_any_rank_count_resumes() {
    let s = Sandbox::new();
    let run = s.path("run");
    let sets = [&TWO[..], &["learner.parallel.zero=3", "learner.steps=60", "learner.checkpoint_every=2"]].concat();
    let mut train = start(&s, "train", &sets);
    train.until("a checkpoint", SOON, || (!committed_steps(&run).is_empty()).then_some(()));
    rank_one(&s).expect("rank 1 runs").kill();
    let ended = train.wait(Duration::from_secs(30));
    assert_eq!(ended.status.code(), Some(1), "{}", ended.stderr);
    let cause = ended.stderr.lines().find(|l| l.starts_with("error: ranks: "));
    let named = |l: &str| l.contains("rank 1 stopped sending heartbeats") && l.contains("failed");
    assert!(cause.is_some_and(named), "{}", ended.stderr);
    assert_eq!(s.processes(), [], "nothing is left behind");
    let checks = s.unveil(&["checkpoint", "verify", &run.to_string_lossy()]).ok().json();
    assert!(!checks.is_empty() && checks.iter().all(|c| c["ok"] == true), "{checks:?}");
    let newest = committed_steps(&run).last().copied().expect("a checkpoint");

    let steps = format!("learner.steps={}", newest + 3);
    start(&s, "train", &["learner.checkpoint_every=2", &steps]).wait(SOON).ok();
    let after = Lineage::read(&run);
    assert_eq!(after.resumed, [newest], "it resumes from the newest checkpoint");
    after.assert_exactly_once(newest + 3, 2, 8);
}

#[test]
fn ranks_that_die_at_start_end_the_run() {
    let s = Sandbox::new();
    let mut train = start(&s, "train", &TWO);
    train.until("rank 1", SOON, || rank_one(&s)).kill();
    // Rank 0 alone would wait for it for five minutes.
    let ended = train.wait(Duration::from_secs(60));
    assert_eq!(ended.status.code(), Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("learner-1 ended with signal: 9"), "{}", ended.stderr);
    assert_eq!(s.processes(), []);
}

#[test]
fn mismatched_ranks_are_refused() {
    let s = Sandbox::new();
    start(&s, "train", &["learner.steps=1"]).wait(SOON).ok();
    let own = ["learner.steps=3", "learner.parallel.join_s=60"];
    let health = free_address();
    let listen = format!("health.listen={health}");
    let mut zero = start(&s, "learner", &[&TWO[..], &own, &[&listen]].concat());
    let line: serde_json::Value = serde_json::from_str(&zero.first_line(SOON)).unwrap();
    assert!(is_serving(health, "") && !is_serving(health, READY), "it waits for rank 1: alive, not ready");
    let address = line["address"].as_str().expect("an address");
    let meet = format!("learner.parallel.rendezvous={address}");
    let others = ["learner.parallel.rank=1", &meet, "learner.optimizer.lr=0.5"];
    let one = start(&s, "learner", &[&TWO[..], &own, &others].concat());
    let parts = ["rank 1 was refused", "learner.optimizer.lr = 0.5", "one binary and configuration"];
    one.wait(SOON).fails_with(1, &parts);
    zero.wait(SOON).fails_with(1, &parts);
    let run = s.path("run").to_string_lossy().into_owned();
    s.unveil(&["checkpoint", "list", &run]).ok();

    // A single rank continues in the same run: ready once it serves, and stopped by SIGTERM.
    let mut learner = start(&s, "learner", &["learner.steps=9", &listen]);
    learner.until("readiness", SOON, || {
        std::net::TcpStream::connect(health).ok().filter(|_| is_serving(health, READY)).map(drop)
    });
    learner.signal(Signal::SIGTERM);
    let signalled = std::time::Instant::now();
    learner.wait(Duration::from_secs(10)).fails_with(130, &["interrupted"]);
    assert!(signalled.elapsed() < Duration::from_secs(10));
    assert_eq!(committed_steps(&s.path("run")).last(), Some(&1), "nothing was trained, and nothing is lost");
}
