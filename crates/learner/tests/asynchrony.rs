//! The real worker beside a real learner, over gRPC: strictly on-policy it is the synchronous run to the bit; otherwise nothing
//! that is trained lags more than it may, whoever is slow.

mod common;
#[path = "common/stage.rs"]
mod stage;

use std::path::PathBuf;
use std::time::Duration;

use common::{breakdown, low_tokens, weights};
use serde_json::Value;
use stage::Small;
use tch::{Device, Kind, Tensor};
use tonic::{Request, Response, Status};
use unveil_config::Config;
use unveil_data::store::ContentHash;
use unveil_engine::random::group_key;
use unveil_engine::{Engine, GroupInput, GroupRequest};
use unveil_experience::{Ask, Experience, Settings};
use unveil_learner::{EventSink, Learner, LeaseSource, Ready, Silent, StepSettings, TrainGroup, run_rl, sampling};
use unveil_model::Vlm;
use unveil_proto::v1::reward_server::{Reward, RewardServer};
use unveil_proto::{breakdown_to_wire, v1};
use unveil_rollout::{WorkerOptions, WorkerReport};
use unveil_service::{CancellationToken, Routes, ServeOptions, limited};

/// Rewards low tokens, after a while.
struct Toy(Duration);

#[tonic::async_trait]
impl Reward for Toy {
    async fn score(&self, r: Request<v1::ScoreRequest>) -> Result<Response<v1::ScoreResponse>, Status> {
        tokio::time::sleep(self.0).await;
        let one = |r: &v1::Response| breakdown_to_wire(&breakdown("", r.index as usize, low_tokens(&r.tokens)));
        let breakdowns = r.into_inner().responses.iter().map(one).collect();
        Ok(Response::new(v1::ScoreResponse { breakdowns, scorer_version: "toy".into() }))
    }
}

type Working = std::thread::JoinHandle<WorkerReport>;

/// A worker with a reward service of its own, on a thread, until the run is over.
fn work(config: &Config, model: PathBuf, address: String, name: &str, reward_takes: Duration) -> Working {
    let (config, name) = (config.clone(), name.to_owned());
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(async {
            let stop = CancellationToken::new();
            let routes = Routes::new(limited!(RewardServer::new(Toy(reward_takes))));
            let reward =
                unveil_service::start("127.0.0.1:0", routes, ServeOptions::default(), stop.clone()).await.unwrap();
            let reward_at = format!("http://{}", reward.address);
            let options = WorkerOptions::new(config, model, format!("http://{address}"), reward_at, name);
            let report = unveil_rollout::run(options, stop.clone()).await.unwrap();
            stop.cancel();
            report
        })
    })
}

/// Keeps events; a slow learner takes its time after each update.
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

fn small(steps: u64, max_staleness: u64, groups_per_lease: usize) -> Small {
    let mut small = Small::new(5);
    let c = &mut small.config;
    (c.learner.steps, c.learner.checkpoint_every) = (steps, 0);
    (c.rollout.max_staleness, c.rollout.groups_per_lease, c.rollout.threads) = (max_staleness, groups_per_lease, 1);
    c.rollout.max_new_tokens = 12;
    small
}

/// A whole run with a worker for each time that a reward takes; its events and reports.
fn run(small: &Small, pause: Duration, rewards: &[Duration]) -> (Vec<Value>, Vec<WorkerReport>) {
    let (model, out) = (small.model(), small.dir.path().join("rl-out"));
    let mut events = Events { pause, seen: vec![] };
    let mut silent = Silent;
    let stage = small.stage(&model, &out, &mut events, &mut silent, CancellationToken::new());
    let mut workers = Vec::new();
    let outcome = run_rl(stage, |ready| {
        let Ready::Experience(address) = ready else { return };
        for (k, takes) in rewards.iter().enumerate() {
            workers.push(work(&small.config, small.model(), address.to_string(), &format!("w{k}"), *takes));
        }
    });
    assert_eq!(outcome.unwrap().step, small.config.learner.steps);
    (events.seen, workers.into_iter().map(|w| w.join().unwrap()).collect())
}

fn trained(events: &[Value]) -> Vec<Value> {
    events.iter().filter(|e| e["kind"] == "train").cloned().collect()
}

/// What a run without a worker gives.
struct Expected {
    /// The `train` event of each update.
    reports: Vec<Value>,
    /// Responses of each update, in the order of the batch.
    texts: Vec<Vec<String>>,
    /// Parameters at the end.
    weights: Vec<(String, Vec<f32>)>,
}

/// The same run with nothing at once: lease, generate, score, update, one after another in one thread.
fn synchronous(small: &Small) -> Expected {
    let (config, data) = (&small.config, small.data());
    let load = || Vlm::load(&small.model(), Device::Cpu, Kind::Float).unwrap();
    let preparer = data.preparer().clone();
    let banned = preparer.tokenizer().special().banned.clone();
    let vlm = load();
    let settings = StepSettings::new(config, &vlm, &banned);
    let options = unveil_rollout::engine_options(config, vlm.config(), &banned);
    let mut learner = Learner::new(vlm, None, settings).unwrap();
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
    let (mut reports, mut texts) = (Vec::new(), Vec::new());
    for step in 0..config.learner.steps {
        let named: Vec<(String, Tensor)> =
            learner.vlm().named_parameters().iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
        engine.load_weights(step, &named).unwrap();
        let (mut batch, mut said) = (Vec::new(), Vec::new());
        let leases = machine.lease(Ask::new("w", config.learner.groups), Duration::ZERO, |_| true);
        for lease in leases.chunks(config.rollout.groups_per_lease) {
            let made: Vec<_> =
                lease.iter().map(|l| data.lease(machine.index_of(&l.group).unwrap(), &l.group).unwrap()).collect();
            let request = |(l, made): (&unveil_experience::Lease, &unveil_learner::Leased)| GroupRequest {
                input: GroupInput {
                    id: l.group.record.clone(),
                    prompt: made.input.prompt.clone(),
                    patches: made.input.patches.clone().into(),
                    hashes: vec![*ContentHash::parse(&made.image_hash).unwrap().as_bytes()],
                },
                key: group_key(&[
                    &l.group.pass.to_le_bytes(),
                    &l.group.position.to_le_bytes(),
                    l.group.record.as_bytes(),
                ]),
                sampling: sampling(config),
                stop: None,
            };
            let requests: Vec<GroupRequest> = lease.iter().zip(&made).map(request).collect();
            let outputs = engine.generate(&requests, None).unwrap();
            for ((l, made), output) in lease.iter().zip(made).zip(outputs) {
                let text = |tokens: &[u32]| preparer.tokenizer().decode(tokens).unwrap();
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
                said.extend(responses.iter().map(|r| r.text.clone()));
                let one = |r: &unveil_core::Response| breakdown(&l.group.record, r.index, low_tokens(&r.tokens));
                let breakdowns = responses.iter().map(one).collect();
                let spans = vec![vec![]; responses.len()];
                let (id, input) = (l.group.clone(), made.input);
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
        machine.trained(step + 1, &ids, Duration::ZERO).unwrap();
        machine.published(step + 1).unwrap();
        texts.push(said);
    }
    Expected { reports, texts, weights: weights(learner.vlm()) }
}

/// All numbers of an update but times and the term.
fn numbers(report: &Value) -> serde_json::Map<String, Value> {
    let mut out = report.as_object().unwrap().clone();
    out.retain(|key, _| key != "kind" && key != "term" && !key.ends_with("_ms"));
    out
}

#[test]
fn strictly_on_policy_is_the_synchronous_run_bit_for_bit() {
    for groups_per_lease in [2, 1] {
        let small = small(4, 0, groups_per_lease);
        let (events, reports) = run(&small, Duration::ZERO, &[Duration::ZERO]);
        let expected = synchronous(&small);
        let found = trained(&events);
        assert_eq!(found.len(), 4);
        for (step, (found, report)) in found.iter().zip(&expected.reports).enumerate() {
            assert_eq!(numbers(found), numbers(report), "update {} with {groups_per_lease} per lease", step + 1);
            assert_eq!(found["staleness"], 0);
            let samples =
                std::fs::read_to_string(small.run().join(format!("rollouts/step-{}.jsonl", step + 1))).unwrap();
            let said: Vec<String> = samples
                .lines()
                .map(|l| serde_json::from_str::<Value>(l).unwrap()["text"].as_str().unwrap().to_owned())
                .collect();
            assert_eq!(said, expected.texts[step], "responses of update {}", step + 1);
        }
        let moved = expected.reports.iter().any(|e| e["grad_norm"].as_f64().is_some_and(|g| g > 0.0));
        assert!(moved, "nothing was learned, so nothing is compared");
        let out = Vlm::load(&small.dir.path().join("rl-out"), Device::Cpu, Kind::Float).unwrap();
        assert!(weights(&out) == expected.weights, "the weights differ");
        assert_eq!((reports[0].accepted, reports[0].refused, reports[0].weights), (8, 0, 4));
    }
}

fn staleness(events: &[Value]) -> Vec<u64> {
    trained(events).iter().map(|e| e["staleness"].as_u64().unwrap()).collect()
}

fn each_group_once(events: &[Value], steps: usize) {
    let groups: Vec<Value> = trained(events).iter().flat_map(|e| e["groups"].as_array().unwrap().clone()).collect();
    assert_eq!(groups.len(), steps * 2);
    for pass in groups.chunks_exact(5) {
        let distinct: std::collections::BTreeSet<&str> = pass.iter().map(|g| g.as_str().unwrap()).collect();
        assert_eq!(distinct.len(), 5, "a record was trained twice in a pass: {groups:?}");
    }
}

#[test]
fn a_slow_learner_is_waited_for_at_the_bound() {
    let small = small(6, 2, 2);
    let (events, reports) = run(&small, Duration::from_millis(400), &[Duration::ZERO]);
    let lags = staleness(&events);
    assert!(lags.iter().all(|s| *s <= 2), "{lags:?}");
    assert!(lags.contains(&2), "the worker never was as far ahead as it may be: {lags:?}");
    each_group_once(&events, 6);
    assert_eq!((reports[0].accepted, reports[0].refused), (12, 0));
}

#[test]
fn a_slow_worker_holds_nothing_beyond_the_bound() {
    let small = small(8, 1, 1);
    let (events, reports) = run(&small, Duration::ZERO, &[Duration::from_millis(300), Duration::ZERO]);
    let lags = staleness(&events);
    assert!(lags.iter().all(|s| *s <= 1) && lags.contains(&1), "{lags:?}");
    each_group_once(&events, 8);
    assert!(reports.iter().all(|r| r.accepted > 0 && r.refused == 0 && r.finished), "{reports:?}");
    assert_eq!(reports.iter().map(|r| r.accepted).sum::<u64>(), 16);
}

#[test]
fn frozen_parameters_travel_once() {
    let mut small = small(3, 1, 2);
    small.config.learner.frozen = vec!["visual.".into(), "model.embed_tokens.".into()];
    let (events, reports) = run(&small, Duration::ZERO, &[Duration::ZERO]);
    // The worker agrees with the learner on every update: what it was not sent again is as it should be.
    for e in trained(&events) {
        assert!(e["agreement"].as_f64().is_none_or(|a| a < 1e-5), "{e}");
    }
    assert!(reports[0].accepted == 6 && reports[0].weights >= 2, "{reports:?}");
    let (before, after) = (small.model(), small.dir.path().join("rl-out"));
    let [before, after] = [before, after].map(|dir| weights(&Vlm::load(&dir, Device::Cpu, Kind::Float).unwrap()));
    for ((name, old), (_, new)) in before.iter().zip(&after) {
        let frozen = small.config.learner.frozen.iter().any(|p| name.starts_with(p.as_str()));
        assert!(!frozen || old == new, "{name} is frozen");
    }
    assert!(before != after);
}
