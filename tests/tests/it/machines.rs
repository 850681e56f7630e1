//! Roles on separate hosts with mutual TLS, a token and host names: callers without a certificate, with another token or without TLS are
//! refused, and a learner that returns at another address is found again.

use std::path::Path;
use std::time::Duration;

use unveil_testkit::{Hosts, Lineage, Process, Sandbox, binary, committed_steps, events_of};

const SOON: Duration = Duration::from_secs(120);
const TOKEN: &str = "9f2c7f0f-token-of-these-machines";

/// Writes the configuration of a run without stage 1, with separately started roles.
fn config(s: &Sandbox, records: &Path, model: &Path) -> std::path::PathBuf {
    s.write("token", TOKEN);
    let text = format!(
        r#"[run]
dir = "{run}"
seed = 3
device = "cpu"
threads = 1
[model]
dir = "{model}"
[data]
kind = "jsonl"
root = "{records}"
[sft]
steps = 0
[rollout]
n = 2
max_new_tokens = 8
groups_per_lease = 1
threads = 1
lease_s = 20.0
[learner]
steps = 8
groups = 2
checkpoint_every = 1
eval_every = 0
listen = "0.0.0.0:7701"
address = "learner:7701"
[learner.optimizer]
lr = 1e-4
[reward]
listen = "0.0.0.0:7702"
address = "https://reward:7702"
[tls]
dir = "{tls}"
[auth]
token_file = "{token}"
"#,
        run = s.path("run").display(),
        model = model.display(),
        records = records.display(),
        tls = s.path("tls").display(),
        token = s.path("token").display(),
    );
    s.write("machines.toml", text)
}

#[test]
fn moved_learners_are_found_and_strangers_refused() {
    let s = Sandbox::new();
    let records = s.synth("data", 20, 5);
    let model = s.tiny_model("model", 1);
    let tls = s.path("tls");
    let tls = tls.to_string_lossy();
    let made = s.unveil(&["tls", "init", "--out", &tls, "--hosts", "learner.cluster"]).ok().json();
    assert_eq!(made[0]["roles"]["learner"]["names"][4], "learner.cluster");
    s.unveil(&["tls", "init", "--out", &tls]).fails_with(1, &["already", "--renew"]);
    let file = config(&s, &records, &model);
    let file = file.to_string_lossy().into_owned();

    let hosts = Hosts::start(&s, 4);
    hosts.set_names(&[("reward", 1), ("learner", 2)]);
    let on = |host: u8, program: &str, args: &[&str], sets: &[&str]| -> Process {
        let mut all = args.to_vec();
        all.extend(["--config", &file]);
        all.extend(sets.iter().flat_map(|set| ["--set", *set]));
        s.start(&mut hosts.command(&s, host, &binary(program), &all))
    };
    // Without TLS, services listen on loopback only.
    let plain = on(1, "unveil-reward", &["serve"], &["tls.dir="]).wait(SOON);
    plain.fails_with(1, &["refuses to listen on 0.0.0.0:7702", "unveil tls init"]);

    let mut reward = on(1, "unveil-reward", &["serve"], &[]);
    reward.first_line(SOON);
    let mut learner = on(2, "unveil", &["learner"], &[]);
    learner.first_line(SOON);
    // A caller with a certificate but another token, and one that would send the token in plaintext.
    let other = s.write("other", "another token of other machines");
    let other = format!("auth.token_file={}", other.display());
    let stranger = on(4, "unveil", &["rollout", "--worker", "x"], &[&other]).wait(SOON);
    stranger.fails_with(1, &["experience", "learner:7701", "Unauthenticated"]);
    let clear = ["learner.address=http://learner:7701", "reward.address=http://reward:7702"];
    let clear = on(4, "unveil", &["rollout", "--worker", "x"], &clear).wait(SOON);
    clear.fails_with(1, &["refuses to send the token", "http://reward:7702"]);

    let worker = on(3, "unveil", &["rollout", "--worker", "w#1"], &[]);
    let run = s.path("run");
    learner.until("some checkpoints", SOON, || (committed_steps(&run).len() >= 2).then_some(()));
    learner.kill();
    let before = learner.wait(SOON);
    assert_ne!(before.code(), Some(0));
    hosts.set_names(&[("reward", 1), ("learner", 4)]);
    let mut learner = on(4, "unveil", &["learner"], &[]);
    learner.first_line(SOON);
    let after = learner.wait(SOON).ok();
    let worked = worker.wait(SOON).ok();
    Lineage::read(&run).assert_exactly_once(8, 2, 16);
    let updates = events_of(&run, "train");
    assert!(updates.iter().all(|e| e["masked"]["format"].is_null()), "rewards were available: {updates:?}");
    let logs = [before.stderr, after.stderr, worked.stderr, reward.stderr()].concat();
    assert!(!logs.contains(TOKEN) && !logs.contains("another token"), "{logs}");
}
