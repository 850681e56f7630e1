//! Two learners on one prefix of an object store: the newer one wins and the other stops without committing anything, even if the older one
//! was paused in the middle of a save.

use std::time::Duration;

use serde_json::json;
use unveil_testkit::{Lineage, Process, Sandbox, StoreFault, StoreProxy, StoreServer, binary, run_args};

const SOON: Duration = Duration::from_secs(180);

#[test]
fn paused_learners_commit_nothing_after_a_takeover() {
    let old = Sandbox::new();
    let new = Sandbox::new();
    let s3 = StoreServer::start(&new);
    let run = |args: &[&str]| {
        let mut command = new.command(&binary("unveil"), args);
        new.start(s3.configure(&mut command, s3.endpoint())).wait(SOON).ok().json()
    };
    let place = s3.url("run");
    let saved =
        || -> Vec<u64> { run(&["checkpoint", "list", &place]).iter().filter_map(|c| c["step"].as_u64()).collect() };
    let proxy = StoreProxy::start(s3.endpoint());
    let url = format!("checkpoint.url={}", s3.url("run"));
    let start = |s: &Sandbox, endpoint: &str, steps: u64| -> Process {
        let steps = format!("learner.steps={steps}");
        let config = s.micro_config();
        let sets = ["sft.steps=5", "learner.checkpoint_every=1", "checkpoint.keep=9", &url, &steps];
        let args = run_args("train", &config, &sets);
        s.start(s3.configure(&mut s.command(&binary("unveil"), &args), endpoint))
    };

    // The first learner hangs in the middle of a save, and is stopped there.
    let mut first = start(&old, &proxy.url(), 60);
    first.until("a checkpoint", SOON, || (!saved().is_empty()).then_some(()));
    proxy.inject_faults(|c| {
        let writes = !matches!(c.method.as_str(), "GET" | "HEAD");
        (writes && c.path.contains("/run/checkpoints/")).then_some(StoreFault::Delay(Duration::from_secs(600)))
    });
    first.until("the middle of a save", SOON, || (proxy.faulted_requests() > 0).then_some(()));
    let paused = old.find_role("learner").expect("the learner runs");
    paused.pause();
    let newest = saved().last().copied().expect("a checkpoint");

    // A second learner adopts the run on another machine, without the proxy.
    let steps = newest + 3;
    let second = start(&new, s3.endpoint(), steps).wait(SOON).ok();
    assert_eq!(Lineage::read(&new.path("run")).resumed, [newest], "{}", second.stderr);

    // The first one wakes up, and its save succeeds except for the commit.
    let all = saved();
    proxy.clear_faults();
    paused.resume();
    let ended = first.wait(SOON).exits(1);
    let cause = "another learner has claimed";
    assert!(ended.stderr.lines().any(|l| l.starts_with("error:") && l.contains(cause)), "{}", ended.stderr);
    assert_eq!(saved(), all, "it committed nothing more");

    let list = run(&["checkpoint", "list", &place]);
    let known: Vec<_> = list.iter().map(|c| (c["step"].as_u64(), c["term"].as_u64())).collect();
    let expected = (1..=steps).map(|s| (Some(s), Some(if s <= newest { 1 } else { 2 })));
    assert_eq!(known, expected.collect::<Vec<_>>());
    assert!(list.iter().all(|c| c["current"] == true), "one lineage: {list:?}");
    assert!(run(&["checkpoint", "verify", &place]).iter().all(|c| c["ok"] == true));
    let account = &run(&["checkpoint", "show", &place])[0]["accounting"];
    assert_eq!((&account["trained"], &account["exactly_once"]), (&json!(2 * steps), &json!(true)));
}
