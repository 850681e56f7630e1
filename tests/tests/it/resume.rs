//! Resumed runs: bit for bit after a kill and on another machine, from the checkpoint before a damaged one, beyond their original end, and
//! not with another configuration. On a real S3 server, or in the run directory if the store does not matter.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use unveil_testkit::{
    Finished, Lineage, Process, Sandbox, StoreServer, binary, committed_steps, events_of, read_json, run_args,
};

const SOON: Duration = Duration::from_secs(180);

/// A machine: a sandbox with its own run directory, and access to the store.
struct Machine<'a> {
    s: Sandbox,
    s3: &'a StoreServer,
}

impl<'a> Machine<'a> {
    fn new(s3: &'a StoreServer) -> Self {
        Self { s: Sandbox::new(), s3 }
    }

    fn spawn(&self, args: &[&str]) -> Process {
        let mut command = self.s.command(&binary("unveil"), args);
        self.s.start(self.s3.configure(&mut command, self.s3.endpoint()))
    }

    fn run(&self, args: &[&str]) -> Finished {
        self.spawn(args).wait(SOON)
    }

    fn train(&self, sets: &[&str]) -> Process {
        let config = self.s.micro_config();
        self.spawn(&run_args("train", &config, sets))
    }

    fn run_dir(&self) -> PathBuf {
        self.s.path("run")
    }
}

/// Returns the reported updates, without times and the learner's term.
fn updates(run: &Path) -> Vec<Value> {
    let mut all = events_of(run, "train");
    for event in &mut all {
        let fields = event.as_object_mut().expect("an object");
        // Which worker generates which group is not repeatable.
        fields.retain(|key, _| !key.ends_with("_ms") && !matches!(key.as_str(), "term" | "agreement_by_worker"));
    }
    all
}

/// Returns the sizes and hashes of all objects of a checkpoint: weights, moments, value head, model files.
fn objects(shown: &Value) -> Vec<(u64, String)> {
    let all = shown["manifest"]["objects"].as_array().expect("objects");
    let mut all: Vec<(u64, String)> = all
        .iter()
        .map(|o| (o["size"].as_u64().expect("a size"), o["blake3"].as_str().expect("a hash").to_owned()))
        .collect();
    all.sort();
    all
}

fn step(event: &Value) -> u64 {
    event["step"].as_u64().expect("a step")
}

/// Compares twenty uninterrupted updates with seven, a kill -9, and the rest on another machine that has only the store.
#[test]
fn resumed_runs_equal_uninterrupted_ones() {
    let server = Sandbox::new();
    let s3 = StoreServer::start(&server);
    let straight = Machine::new(&s3);
    let first = Machine::new(&s3);
    let second = Machine::new(&s3);
    let whole = s3.url("whole");
    let broken = s3.url("broken");
    // PPO with a value head, mini-batches and an adaptive KL weight covers all trainer state.
    let always = [
        "run.deterministic=true",
        "rollout.max_staleness=0",
        "rollout.groups_per_lease=1",
        "rollout.workers=2",
        "sft.steps=20",
        "learner.steps=20",
        "learner.checkpoint_every=3",
        "learner.algorithm=ppo",
        "learner.minibatches=2",
        "learner.kl_coef=0.05",
        "learner.kl_target=0.02",
    ];
    let start = |m: &Machine<'_>, url: &str| {
        let place = format!("checkpoint.url={url}");
        m.train(&[&always[..], &[place.as_str()]].concat())
    };

    start(&straight, &whole).wait(SOON).ok();
    let mut train = start(&first, &broken);
    let there = first.run_dir();
    train.until("the seventh update", SOON, || (events_of(&there, "train").len() >= 7).then_some(()));
    first.s.find_role("learner").expect("the learner runs").kill();
    train.wait(SOON).fails_with(1, &["learner", "SIGKILL"]);
    let before = updates(&there);
    assert!(before.len() < 20, "it was killed before the end");

    let done = start(&second, &broken).wait(SOON).ok();
    let lineage = Lineage::read(&second.run_dir());
    let [from] = lineage.resumed[..] else { panic!("it resumes once: {:?}", lineage.resumed) };
    assert!((3..=before.len() as u64).contains(&from) && from.is_multiple_of(3), "from step {from}\n{}", done.stderr);

    // Losses, rewards, learning rates, KL weights, and the ids of the groups.
    let mut after: Vec<Value> = before.into_iter().filter(|e| step(e) <= from).collect();
    after.extend(updates(&second.run_dir()));
    let expected = updates(&straight.run_dir());
    assert_eq!(expected.iter().map(step).collect::<Vec<_>>(), (1..=20).collect::<Vec<_>>());
    let coefs: Vec<&Value> = expected.iter().map(|e| &e["kl_coef"]).collect();
    assert!(coefs.windows(2).any(|c| c[0] != c[1]), "the weight of KL is adapted: {coefs:?}");
    for (a, b) in after.iter().zip(&expected) {
        assert_eq!(a, b, "update {}", step(b));
    }
    assert_eq!(after.len(), expected.len());

    // Weights and optimiser state, in the store and in the final model.
    let show = |url: &str| second.run(&["checkpoint", "show", url]).ok().json().remove(0);
    let a = show(&whole);
    let b = show(&broken);
    assert_eq!((&a["manifest"]["step"], &b["manifest"]["step"]), (&json!(20), &json!(20)));
    assert!(objects(&a).iter().map(|o| o.0).sum::<u64>() > 12_000_000, "weights and two moments: {a}");
    assert_eq!(objects(&a), objects(&b));
    let model = |m: &Machine<'_>| std::fs::read(m.run_dir().join("model/model.safetensors")).expect("the final model");
    assert!(model(&straight) == model(&second), "the models differ");

    // Accounting of both lineages: 40 groups in five passes over eight records.
    for shown in [&a, &b] {
        let account = &shown["accounting"];
        assert_eq!(account["exactly_once"], true, "{account}");
        let pass = |pass: u64| json!({"pass": pass, "trained": 8, "twice": 0, "lost": 0});
        assert_eq!(account["passes"], json!((0..5).map(pass).collect::<Vec<_>>()));
        assert_eq!((&account["trained"], &account["records"]), (&json!(40), &json!(8)));
        assert_eq!(shown["lineage"].as_array().and_then(|l| l.last()).map(|l| &l["step"]), Some(&json!(20)));
    }
    assert_eq!((&a["info"]["term"], &b["info"]["term"]), (&json!(1), &json!(2)));

    // The store has everything: nothing is staged or damaged, and no file of the run contains the secret.
    assert!(!second.run_dir().join("checkpoints").exists(), "nothing is staged on the local disk");
    let checks = second.run(&["checkpoint", "verify", &broken]).ok().json();
    assert!(!checks.is_empty() && checks.iter().all(|c| c["ok"] == true), "{checks:?}");
    let out = second.s.path("exported");
    second.run(&["checkpoint", "export", &broken, "--out", &out.to_string_lossy()]).ok();
    second.s.unveil(&["model", "inspect", &out.to_string_lossy()]).ok();
    for file in ["config.toml", "events.jsonl", "report.html"] {
        let text = std::fs::read_to_string(second.run_dir().join(file)).expect(file);
        assert!(!text.contains(s3.secret()), "{file} holds a credential");
    }
}

/// Flips a bit in the middle of the largest object of a step's checkpoint.
fn damage(place: &Path, step: u64) {
    let mut todo = vec![place.join(format!("checkpoints/step-{step}"))];
    let mut largest: Option<(u64, PathBuf)> = None;
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(&dir).expect("a folder of the checkpoint").flatten() {
            match entry.metadata().expect("an object") {
                m if m.is_dir() => todo.push(entry.path()),
                m => largest = largest.max(Some((m.len(), entry.path()))),
            }
        }
    }
    let (size, path) = largest.expect("an object");
    let mut bytes = std::fs::read(&path).expect("the object");
    bytes[size as usize / 2] ^= 1;
    std::fs::write(&path, bytes).expect("the object is written back");
}

/// A run of exactly one pass is extended twice; before the second time its newest checkpoint is damaged.
#[test]
fn extended_runs_skip_damaged_checkpoints() {
    let s = Sandbox::new();
    let config = s.micro_config();
    let run = s.path("run");
    let train = |steps: u64| {
        let steps = format!("learner.steps={steps}");
        s.unveil(&["train", "--config", &config, "--set", "sft.steps=10", "--set", &steps]).ok()
    };
    train(4);
    Lineage::read(&run).assert_exactly_once(4, 2, 8);

    let more = train(8);
    assert!(more.stderr.contains("continues with learner.steps = 8, was 4"), "{}", more.stderr);
    let lineage = Lineage::read(&run);
    assert_eq!(lineage.resumed, [4], "it resumes where the first pass ends");
    lineage.assert_exactly_once(8, 2, 8);
    assert_eq!(read_json(&run.join("summary.json"))["steps"], 8);
    let evaluated: Vec<u64> = events_of(&run, "eval").iter().filter(|e| e["stage"] == "rl").map(step).collect();
    assert_eq!(evaluated, [4, 8], "both ends are measured");

    assert_eq!(committed_steps(&run).last(), Some(&8));
    damage(&run, 8);
    let bad = s.unveil(&["checkpoint", "verify", &run.to_string_lossy()]).exits(1).json();
    assert_eq!(bad.iter().filter(|c| c["ok"] == false).count(), 1, "{bad:?}");
    let past = train(10);
    assert!(past.stderr.contains("skipped step 8") && past.stderr.contains("damaged"), "{}", past.stderr);
    let lineage = Lineage::read(&run);
    assert_eq!(lineage.resumed, [4, 6], "the one before the damaged one");
    lineage.assert_exactly_once(10, 2, 8);
    let shown = s.unveil(&["checkpoint", "show", &run.to_string_lossy()]).ok().json().remove(0);
    assert_eq!((&shown["accounting"]["trained"], &shown["accounting"]["exactly_once"]), (&json!(20), &json!(true)));

    // The learner itself compares the configuration of the checkpoint: the run may be on another machine.
    let sets = ["sft.steps=10", "learner.steps=12", "rollout.n=3", "learner.optimizer.lr=0.5"];
    let line = s.run_micro("learner", &sets).fails_with(1, &["step 10", "rollout.n = 3, was 4"]);
    assert!(!line.contains("optimizer.lr"), "the learning rate may change: {line}");
}
