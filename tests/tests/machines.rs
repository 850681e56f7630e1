//! Roles on machines of their own, with mutual TLS and a token, called by names: who comes without a certificate, with another token
//! or without TLS is refused, and a learner that comes back at another address is found again.

use std::path::Path;
use std::time::Duration;

use unveil_testkit::{Hosts, Lineage, Process, Sandbox, binary, committed, events_of};

const SOON: Duration = Duration::from_secs(120);
const TOKEN: &str = "9f2c7f0f-token-of-these-machines";

/// A run that starts from a model without stage 1, each role by itself.
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
fn a_learner_that_moves_is_found_by_its_name_and_strangers_are_refused() {
    let s = Sandbox::new();
    let (records, model) = (s.synth("data", 20, 5), s.tiny_model("model", 1));
    let tls = s.path("tls");
    let tls = tls.to_string_lossy();
    let made = s.unveil(&["tls", "init", "--out", &tls, "--hosts", "learner.cluster"]).ok().json();
    assert_eq!(made[0]["roles"]["learner"]["names"][4], "learner.cluster");
    s.unveil(&["tls", "init", "--out", &tls]).says(1, &["already", "--renew"]);
    let file = config(&s, &records, &model);
    let file = file.to_string_lossy().into_owned();

    let hosts = Hosts::start(&s, 4);
    hosts.name(&[("reward", 1), ("learner", 2)]);
    let on = |host: u8, program: &str, args: &[&str], sets: &[&str]| -> Process {
        let mut all = args.to_vec();
        all.extend(["--config", &file]);
        all.extend(sets.iter().flat_map(|set| ["--set", *set]));
        s.start(&mut hosts.on(&s, host, &binary(program), &all))
    };
    // Without TLS nobody is served beyond loopback.
    let plain = on(1, "unveil-reward", &["serve"], &["tls.dir="]).wait(SOON);
    plain.says(1, &["refuses to listen on 0.0.0.0:7702", "unveil tls init"]);

    let mut reward = on(1, "unveil-reward", &["serve"], &[]);
    reward.first_line(SOON);
    let mut learner = on(2, "unveil", &["learner"], &[]);
    learner.first_line(SOON);
    // A stranger with a certificate, but not the token; and one that would send the token in the clear.
    let other = s.write("other", "another token of other machines");
    let other = format!("auth.token_file={}", other.display());
    let stranger = on(4, "unveil", &["rollout", "--worker", "x"], &[&other]).wait(SOON);
    stranger.says(1, &["experience", "learner:7701", "Unauthenticated"]);
    let clear = ["learner.address=http://learner:7701", "reward.address=http://reward:7702"];
    let clear = on(4, "unveil", &["rollout", "--worker", "x"], &clear).wait(SOON);
    clear.says(1, &["refuses to send the token", "http://reward:7702"]);

    let worker = on(3, "unveil", &["rollout", "--worker", "w#1"], &[]);
    let run = s.path("run");
    learner.until("some checkpoints", SOON, || (committed(&run).len() >= 2).then_some(()));
    learner.kill();
    let before = learner.wait(SOON);
    assert_ne!(before.code(), Some(0));
    hosts.name(&[("reward", 1), ("learner", 4)]);
    let mut learner = on(4, "unveil", &["learner"], &[]);
    learner.first_line(SOON);
    let after = learner.wait(SOON).ok();
    let worked = worker.wait(SOON).ok();
    Lineage::read(&run).is_exactly_once(8, 2, 16);
    let updates = events_of(&run, "train");
    assert!(updates.iter().all(|e| e["masked"]["format"].is_null()), "rewards were had: {updates:?}");
    let said = [before.stderr, after.stderr, worked.stderr, reward.stderr()].concat();
    assert!(!said.contains(TOKEN) && !said.contains("another token"), "{said}");
}
