//! The real worker with the real learner over gRPC: on policy, the run equals a synchronous one bit for bit; otherwise
//! staleness stays within its limit.

use std::time::Duration;

use crate::common::real_worker::start_worker;
use crate::common::small_run::SmallRun;
use serde_json::Value;
use tch::{Device, Kind, Tensor};
use unveil_core::TrainGroup;
use unveil_data::image_store::ContentHash;
use unveil_engine::random::group_key;
use unveil_engine::{Engine, GroupRequest, PromptInput};
use unveil_experience::{Experience, LeaseCall, Settings};
use unveil_experience_rpc::GroupSource;
use unveil_learner::{EventSink, Ready, SilentProgress, run_rl, sampling};
use unveil_model::Vlm;
use unveil_rollout::WorkerReport;
use unveil_service::CancellationToken;
use unveil_testkit_model::{breakdown, low_tokens, weights};
use unveil_trainer::{PolicyTrainer, StepSettings};

/// An event log that pauses after each update, like a slow learner.
struct Events {
    pause: Duration,
    seen: Vec<Value>,
}

impl EventSink for Events {
    fn append(&mut self, event: &Value) -> std::io::Result<()> {
        if event["kind"] == "train" {
            std::thread::sleep(self.pause);
        }
        self.seen.push(event.clone());
        Ok(())
    }
}

fn small(steps: u64, max_staleness: u64, groups_per_lease: usize) -> SmallRun {
    let mut small = SmallRun::new(5);
    let c = &mut small.config;
    c.learner.steps = steps;
    c.learner.checkpoint_every = 0;
    c.rollout.max_staleness = max_staleness;
    c.rollout.groups_per_lease = groups_per_lease;
    c.rollout.threads = 1;
    c.rollout.max_new_tokens = 12;
    small
}

/// Performs a run with one worker per reward delay; returns its events and the reports of the workers.
fn run(small: &SmallRun, pause: Duration, rewards: &[Duration]) -> (Vec<Value>, Vec<WorkerReport>) {
    let model = small.model();
    let out = small.dir.path().join("rl-out");
    let mut events = Events { pause, seen: vec![] };
    let mut silent = SilentProgress;
    let stage = small.stage(&model, &out, &mut events, &mut silent, CancellationToken::new());
    let mut workers = Vec::new();
    let outcome = run_rl(stage, |ready| {
        let Ready::Experience(address) = ready else { return };
        for (k, takes) in rewards.iter().enumerate() {
            workers.push(start_worker(&small.config, small.model(), address.to_string(), &format!("w{k}"), *takes));
        }
    });
    assert_eq!(outcome.unwrap().step, small.config.learner.steps);
    (events.seen, workers.into_iter().map(|w| w.join().unwrap()).collect())
}

fn train_events(events: &[Value]) -> Vec<Value> {
    events.iter().filter(|e| e["kind"] == "train").cloned().collect()
}

/// Result of a run without workers.
struct SynchronousRun {
    /// Report of each update.
    reports: Vec<Value>,
    /// Responses of each update, in batch order.
    texts: Vec<Vec<String>>,
    /// Final parameters.
    weights: Vec<(String, Vec<f32>)>,
}

/// Performs the same run synchronously: lease, generate, score, update, in one thread.
fn synchronous(small: &SmallRun) -> SynchronousRun {
    let config = &small.config;
    let data = small.data();
    let load = || Vlm::load(&small.model(), Device::Cpu, Kind::Float).unwrap();
    let preprocessor = data.preprocessor().clone();
    let banned = preprocessor.tokenizer().banned().to_vec();
    let vlm = load();
    let settings = StepSettings::new(config, &vlm, &banned);
    let options = unveil_rollout::engine_options(config, vlm.config(), &banned);
    let mut learner = PolicyTrainer::new(vlm, None, settings).unwrap();
    let mut engine = Engine::new(load(), options).unwrap();
    let accounting = Settings {
        groups_per_step: config.learner.groups,
        max_staleness: 0,
        lease_s: 60.0,
        stall_s: 300.0,
        silence_s: 60.0,
        seed: config.run.seed,
        term: 1,
        total_groups: None,
    };
    let mut machine: Experience<()> = Experience::new(accounting, data.ids()).unwrap();
    let mut reports = Vec::new();
    let mut texts = Vec::new();
    for step in 0..config.learner.steps {
        let named: Vec<(String, Tensor)> =
            learner.vlm().named_parameters().iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
        engine.load_weights(step, &named).unwrap();
        let mut batch = Vec::new();
        let mut update_texts = Vec::new();
        let leases = machine.lease(LeaseCall::new("w", config.learner.groups), Duration::ZERO, |_| true);
        for lease in leases.chunks(config.rollout.groups_per_lease) {
            let prepared: Vec<_> = lease
                .iter()
                .map(|l| data.prepare(machine.record_index(&l.group).unwrap(), &l.group).unwrap())
                .collect();
            let request =
                |(l, prepared): (&unveil_experience::Lease, &unveil_experience_rpc::PreparedGroup)| GroupRequest {
                    input: PromptInput {
                        id: l.group.record.clone(),
                        prompt: prepared.input.prompt.clone(),
                        patches: prepared.input.patches.clone().into(),
                        hashes: vec![*ContentHash::parse(&prepared.image_hash).unwrap().as_bytes()],
                    },
                    key: group_key(&[
                        &l.group.pass.to_le_bytes(),
                        &l.group.position.to_le_bytes(),
                        l.group.record.as_bytes(),
                    ]),
                    sampling: sampling(config),
                    stop: None,
                };
            let requests: Vec<GroupRequest> = lease.iter().zip(&prepared).map(request).collect();
            let outputs = engine.generate(&requests, None).unwrap();
            for ((l, prepared), output) in lease.iter().zip(prepared).zip(outputs) {
                let text = |tokens: &[u32]| preprocessor.tokenizer().decode(tokens).unwrap();
                let responses: Vec<unveil_core::Response> = output
                    .responses
                    .into_iter()
                    .map(|r| unveil_core::Response {
                        index: r.index,
                        text: text(&r.tokens),
                        tokens: r.tokens,
                        logprobs: r.logprobs,
                        versions: r.versions,
                        finish: r.finish,
                    })
                    .collect();
                update_texts.extend(responses.iter().map(|r| r.text.clone()));
                let score = |r: &unveil_core::Response| breakdown(&l.group.record, r.index, low_tokens(&r.tokens));
                let breakdowns = responses.iter().map(score).collect();
                let spans = vec![vec![]; responses.len()];
                let id = l.group.clone();
                let input = prepared.input;
                batch.push(TrainGroup {
                    id,
                    worker: "w".into(),
                    input,
                    responses,
                    spans,
                    breakdowns,
                    attention: Vec::new(),
                    generate_ms: 0.0,
                    reward_ms: 0.0,
                });
            }
        }
        for (l, g) in leases.iter().zip(&batch) {
            let versions = unveil_experience::VersionSpan::of(&g.responses).unwrap();
            let s = unveil_experience::Submission { worker: "w", lease: &l.id, group: &l.group, versions };
            machine.submit(&s, (), Duration::ZERO);
        }
        let ids: Vec<_> = machine.next_batch(Duration::ZERO).unwrap().into_iter().map(|(id, ())| id).collect();
        reports.push(serde_json::to_value(learner.update(&batch).unwrap()).unwrap());
        machine.record_trained(step + 1, &ids, Duration::ZERO).unwrap();
        machine.publish(step + 1).unwrap();
        texts.push(update_texts);
    }
    SynchronousRun { reports, texts, weights: weights(learner.vlm()) }
}

/// Returns all values of an update except times and the term.
fn deterministic_values(report: &Value) -> serde_json::Map<String, Value> {
    let mut out = report.as_object().unwrap().clone();
    out.retain(|key, _| key != "kind" && key != "term" && !key.ends_with("_ms"));
    out
}

#[test]
fn on_policy_run_equals_a_synchronous_run() {
    for groups_per_lease in [2, 1] {
        let small = small(4, 0, groups_per_lease);
        let (events, reports) = run(&small, Duration::ZERO, &[Duration::ZERO]);
        let expected = synchronous(&small);
        let updates = train_events(&events);
        assert_eq!(updates.len(), 4);
        for (step, (update, report)) in updates.iter().zip(&expected.reports).enumerate() {
            assert_eq!(
                deterministic_values(update),
                deterministic_values(report),
                "update {} with {groups_per_lease} per lease",
                step + 1
            );
            assert_eq!(update["staleness"], 0);
            let samples =
                std::fs::read_to_string(small.run().join(format!("rollouts/step-{}.jsonl", step + 1))).unwrap();
            let sample_texts: Vec<String> = samples
                .lines()
                .map(|l| serde_json::from_str::<Value>(l).unwrap()["text"].as_str().unwrap().to_owned())
                .collect();
            assert_eq!(sample_texts, expected.texts[step], "responses of update {}", step + 1);
        }
        let moved = expected.reports.iter().any(|e| e["grad_norm"].as_f64().is_some_and(|g| g > 0.0));
        assert!(moved, "nothing was learned, so nothing is compared");
        let out = Vlm::load(&small.dir.path().join("rl-out"), Device::Cpu, Kind::Float).unwrap();
        assert!(weights(&out) == expected.weights, "the weights differ");
        assert_eq!((reports[0].accepted, reports[0].refused, reports[0].weights), (8, 0, 4));
    }
}

fn staleness_values(events: &[Value]) -> Vec<u64> {
    train_events(events).iter().map(|e| e["staleness"].as_u64().unwrap()).collect()
}

fn check_each_group_once(events: &[Value], steps: usize) {
    let groups: Vec<Value> =
        train_events(events).iter().flat_map(|e| e["groups"].as_array().unwrap().clone()).collect();
    assert_eq!(groups.len(), steps * 2);
    for pass in groups.chunks_exact(5) {
        let distinct: std::collections::BTreeSet<&str> = pass.iter().map(|g| g.as_str().unwrap()).collect();
        assert_eq!(distinct.len(), 5, "a record was trained twice in a pass: {groups:?}");
    }
}

#[test]
fn workers_wait_at_the_staleness_limit() {
    let small = small(6, 2, 2);
    let (events, reports) = run(&small, Duration::from_millis(400), &[Duration::ZERO]);
    let lags = staleness_values(&events);
    assert!(lags.iter().all(|s| *s <= 2), "{lags:?}");
    assert!(lags.contains(&2), "the worker never reached the limit: {lags:?}");
    check_each_group_once(&events, 6);
    assert_eq!((reports[0].accepted, reports[0].refused), (12, 0));
}

#[test]
fn a_slow_worker_does_not_exceed_the_staleness_limit() {
    let small = small(8, 1, 1);
    let (events, reports) = run(&small, Duration::ZERO, &[Duration::from_millis(300), Duration::ZERO]);
    let lags = staleness_values(&events);
    assert!(lags.iter().all(|s| *s <= 1) && lags.contains(&1), "{lags:?}");
    check_each_group_once(&events, 8);
    assert!(reports.iter().all(|r| r.accepted > 0 && r.refused == 0 && r.finished), "{reports:?}");
    assert_eq!(reports.iter().map(|r| r.accepted).sum::<u64>(), 16);
}

#[test]
fn frozen_parameters_are_sent_once() {
    let mut small = small(3, 1, 2);
    small.config.learner.frozen = vec!["visual.".into(), "model.embed_tokens.".into()];
    let (events, reports) = run(&small, Duration::ZERO, &[Duration::ZERO]);
    // The worker agrees with the learner on every update, so parameters that were not sent again are correct.
    for e in train_events(&events) {
        assert!(e["agreement"].as_f64().is_none_or(|a| a < 1e-5), "{e}");
    }
    assert!(reports[0].accepted == 6 && reports[0].weights >= 2, "{reports:?}");
    let before = small.model();
    let after = small.dir.path().join("rl-out");
    let [before, after] = [before, after].map(|dir| weights(&Vlm::load(&dir, Device::Cpu, Kind::Float).unwrap()));
    for ((name, old), (_, new)) in before.iter().zip(&after) {
        let frozen = small.config.learner.frozen.iter().any(|p| name.starts_with(p.as_str()));
        assert!(!frozen || old == new, "{name} is frozen");
    }
    assert!(before != after);
}
