//! A learner of several ranks as a user runs it: the whole job, a rank that dies, another number of ranks after it, and ranks that do
//! not belong together.

use std::net::SocketAddr;
use std::time::Duration;

use nix::sys::signal::Signal;
use unveil_service::{READY, check_health};
use unveil_testkit::{Found, Lineage, Process, Sandbox, committed, events_of};

const SOON: Duration = Duration::from_secs(120);
const TWO: [&str; 2] = ["learner.parallel.ranks=2", "learner.parallel.lost_s=5"];

fn start(s: &Sandbox, command: &str, sets: &[&str]) -> Process {
    let config = s.micro_config();
    let config = config.to_string_lossy();
    let mut args = vec![command, "--config", &config];
    args.extend(sets.iter().flat_map(|set| ["--set", *set]));
    s.spawn(&args)
}

fn rank_one(s: &Sandbox) -> Option<Found> {
    s.processes().into_iter().find(|p| p.args.iter().any(|a| a == "learner.parallel.rank=1"))
}

fn free() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// What the listener for probes says.
fn asked(health: SocketAddr, service: &str) -> bool {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(check_health(&health.to_string(), service, SOON)).unwrap()
}

/// Loss and gradient norm of the first update.
fn first(s: &Sandbox) -> (f64, f64) {
    let event = events_of(&s.path("run"), "train").remove(0);
    (event["loss"]["loss"].as_f64().unwrap(), event["grad_norm"].as_f64().unwrap())
}

#[test]
fn two_ranks_do_the_whole_job() {
    let (one, two) = (Sandbox::new(), Sandbox::new());
    let alone = start(&one, "train", &["learner.steps=1"]);
    let sets = [&TWO[..], &["learner.parallel.zero=2"]].concat();
    start(&two, "train", &sets).wait(SOON).ok();
    alone.wait(SOON).ok();
    Lineage::read(&two.path("run")).is_exactly_once(6, 2, 8);
    assert_eq!(two.processes(), []);
    let ((loss, norm), (wanted, of)) = (first(&two), first(&one));
    assert!((loss - wanted).abs() <= 1e-4 * wanted.abs().max(1e-2), "loss {loss}, of one rank {wanted}");
    assert!((norm - of).abs() <= 1e-4 * of, "gradient norm {norm}, of one rank {of}");
}

#[test]
fn a_rank_that_dies_ends_the_run_and_another_number_of_ranks_resumes() {
    let s = Sandbox::new();
    let run = s.path("run");
    let sets = [&TWO[..], &["learner.parallel.zero=3", "learner.steps=60", "learner.checkpoint_every=2"]].concat();
    let mut train = start(&s, "train", &sets);
    train.until("a checkpoint", SOON, || (!committed(&run).is_empty()).then_some(()));
    rank_one(&s).expect("rank 1 runs").kill();
    let ended = train.wait(Duration::from_secs(30));
    assert_eq!(ended.status.code(), Some(1), "{}", ended.stderr);
    let cause = ended.stderr.lines().find(|l| l.starts_with("error: ranks: "));
    let named = |l: &str| l.contains("rank 1 gave no sign of life") && l.contains("failed");
    assert!(cause.is_some_and(named), "{}", ended.stderr);
    assert_eq!(s.processes(), [], "nothing is left behind");
    let checks = s.unveil(&["checkpoint", "verify", &run.to_string_lossy()]).ok().json();
    assert!(!checks.is_empty() && checks.iter().all(|c| c["ok"] == true), "{checks:?}");
    let newest = committed(&run).last().copied().expect("a checkpoint");

    let steps = format!("learner.steps={}", newest + 3);
    start(&s, "train", &["learner.checkpoint_every=2", &steps]).wait(SOON).ok();
    let after = Lineage::read(&run);
    assert_eq!(after.resumed, [newest], "it goes on from the newest checkpoint");
    after.is_exactly_once(newest + 3, 2, 8);
}

#[test]
fn a_rank_that_does_not_even_start_is_not_waited_for() {
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
fn ranks_that_do_not_belong_together_are_refused() {
    let s = Sandbox::new();
    start(&s, "train", &["learner.steps=1"]).wait(SOON).ok();
    let own = ["learner.steps=3", "learner.parallel.join_s=60"];
    let health = free();
    let listen = format!("health.listen={health}");
    let mut zero = start(&s, "learner", &[&TWO[..], &own, &[&listen]].concat());
    let line: serde_json::Value = serde_json::from_str(&zero.first_line(SOON)).unwrap();
    assert!(asked(health, "") && !asked(health, READY), "it waits for rank 1: alive, not ready");
    let address = line["address"].as_str().expect("an address");
    let meet = format!("learner.parallel.rendezvous={address}");
    let others = ["learner.parallel.rank=1", &meet, "learner.optimizer.lr=0.5"];
    let one = start(&s, "learner", &[&TWO[..], &own, &others].concat());
    let said = ["rank 1 was refused", "learner.optimizer.lr = 0.5", "one binary and configuration"];
    one.wait(SOON).says(1, &said);
    zero.wait(SOON).says(1, &said);
    let run = s.path("run").to_string_lossy().into_owned();
    s.unveil(&["checkpoint", "list", &run]).ok();

    // One rank alone goes on in the same place: ready when it serves, and gone when it is told to end.
    let mut learner = start(&s, "learner", &["learner.steps=9", &listen]);
    learner.until("readiness", SOON, || {
        std::net::TcpStream::connect(health).ok().filter(|_| asked(health, READY)).map(drop)
    });
    learner.signal(Signal::SIGTERM);
    let asked_at = std::time::Instant::now();
    learner.wait(Duration::from_secs(10)).says(130, &["interrupted"]);
    assert!(asked_at.elapsed() < Duration::from_secs(10));
    assert_eq!(committed(&s.path("run")).last(), Some(&1), "nothing was trained, and nothing is lost");
}
