//! The real worker beside a real learner, where leases are short, workers slow or stuck, images large, and learners come back older.

mod common;
#[path = "common/stage.rs"]
mod stage;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{breakdown, low_tokens};
use serde_json::Value;
use stage::Small;
use tch::{Device, Kind, Tensor};
use tokio::runtime::Runtime;
use tonic::{Request, Response, Status};
use unveil_config::Config;
use unveil_config::schema::WeightSync;
use unveil_core::GroupId;
use unveil_experience::{Event, Experience, Settings};
use unveil_learner::{Broadcasting, Host, HostOptions, NewWeights, Ready, Silent, TrainGroup, run_rl, sampling};
use unveil_model::Vlm;
use unveil_proto::v1::experience_client::ExperienceClient;
use unveil_proto::v1::reward_server::{Reward, RewardServer};
use unveil_proto::{breakdown_to_wire, v1};
use unveil_rollout::{WorkerOptions, WorkerReport};
use unveil_service::{CancellationToken, Routes, ServeOptions, limited};

const SOON: Duration = Duration::from_secs(120);

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

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// A worker with a reward service of its own, on a thread, until the run is over.
fn work(config: &Config, model: PathBuf, address: SocketAddr, reward_takes: Duration) -> Working {
    let config = config.clone();
    std::thread::spawn(move || {
        runtime().block_on(async {
            let stop = CancellationToken::new();
            let routes = Routes::new(limited!(RewardServer::new(Toy(reward_takes))));
            let reward =
                unveil_service::start("127.0.0.1:0", routes, ServeOptions::default(), stop.clone()).await.unwrap();
            let at = format!("http://{}", reward.address);
            let options = WorkerOptions::new(config, model, format!("http://{address}"), at, "real".into());
            let report = unveil_rollout::run(options, stop.clone()).await.unwrap();
            stop.cancel();
            report
        })
    })
}

fn small(steps: u64) -> Small {
    let mut small = Small::new(5);
    let c = &mut small.config;
    (c.learner.steps, c.learner.checkpoint_every) = (steps, 0);
    (c.rollout.max_staleness, c.rollout.groups_per_lease, c.rollout.threads) = (0, 2, 1);
    small
}

/// A whole run beside `workers`; its events.
fn run(small: &Small, workers: impl FnOnce(SocketAddr)) -> Vec<Value> {
    let (model, out, mut silent) = (small.model(), small.dir.path().join("rl-out"), Silent);
    let mut events: Vec<Value> = vec![];
    let cancel = CancellationToken::new();
    let over = Arc::new(AtomicBool::new(false));
    let (end, guard) = (over.clone(), cancel.clone());
    let watch = std::thread::spawn(move || {
        let begun = Instant::now();
        while !end.load(Ordering::Relaxed) && begun.elapsed() < SOON {
            std::thread::sleep(Duration::from_millis(20));
        }
        guard.cancel();
    });
    let stage = small.stage(&model, &out, &mut events, &mut silent, cancel);
    let mut workers = Some(workers);
    let outcome = run_rl(stage, |ready| {
        if let (Ready::Experience(address), Some(start)) = (ready, workers.take()) {
            start(address);
        }
    });
    over.store(true, Ordering::Relaxed);
    watch.join().unwrap();
    let outcome = outcome.unwrap();
    assert!(!outcome.interrupted, "stuck at update {}", outcome.step);
    assert_eq!(outcome.step, small.config.learner.steps);
    events
}

/// A lease lasts for a tenth of a second and a group takes three times as long: nothing is made twice.
#[test]
fn a_worker_three_times_slower_than_a_lease_trains() {
    let mut small = small(3);
    small.config.rollout.lease_s = 0.1;
    let mut worker = None;
    run(&small, |at| worker = Some(work(&small.config, small.model(), at, Duration::from_millis(300))));
    let report = worker.unwrap().join().unwrap();
    assert_eq!((report.accepted, report.refused, report.finished), (6, 0, true), "{report:?}");
}

/// A worker takes leases and lives, and its engine stands still.
async fn stuck(address: SocketAddr, over: CancellationToken) -> usize {
    let channel = unveil_service::connect(&address.to_string(), SOON).await.unwrap();
    let mut client = limited!(ExperienceClient::new(channel));
    let (worker, session) = ("stuck", 7);
    let (mut in_hand, mut call, mut lost) = (Vec::new(), 0, 0);
    while !over.is_cancelled() {
        call += 1;
        let ask = v1::LeaseRequest {
            worker: worker.into(),
            max_groups: 2,
            wait_ms: if call == 1 { 20_000 } else { 0 },
            weights: None,
            session,
            call,
        };
        let Ok(answer) = client.lease(ask).await else { break };
        in_hand.extend(answer.into_inner().groups.into_iter().map(|g| v1::InHand { lease: g.lease, progress: 1 }));
        let beat = v1::HeartbeatRequest { worker: worker.into(), session, done: call, in_hand: in_hand.clone() };
        let Ok(answer) = client.heartbeat(beat).await else { break };
        let gone = answer.into_inner().lost;
        lost += gone.len();
        in_hand.retain(|h| !gone.contains(&h.lease));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    lost
}

#[test]
fn a_worker_whose_engine_stands_still_loses_its_groups_to_another() {
    let mut small = small(2);
    (small.config.rollout.lease_s, small.config.rollout.stall_s) = (600.0, 1.0);
    let (runtime, over) = (runtime(), CancellationToken::new());
    let (mut worker, mut other) = (None, None);
    run(&small, |at| {
        other = Some(runtime.spawn(stuck(at, over.clone())));
        std::thread::sleep(Duration::from_millis(300));
        worker = Some(work(&small.config, small.model(), at, Duration::ZERO));
    });
    over.cancel();
    let (lost, report) = (runtime.block_on(other.unwrap()).unwrap(), worker.unwrap().join().unwrap());
    assert_eq!((report.accepted, report.refused), (4, 0), "{report:?}");
    assert!(lost >= 2, "it heard of {lost}");
}

/// Noise, which no PNG makes smaller.
fn noise(path: &Path, side: u32, seed: u64) -> u64 {
    let mut image = unveil_data::store::Image::new(side, side);
    let mut state = seed;
    for byte in image.rgb_mut() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *byte = state as u8;
    }
    std::fs::write(path, image.to_png().unwrap()).unwrap();
    std::fs::metadata(path).unwrap().len()
}

/// Images of more than a message in all, one of them by itself, with defaults.
#[test]
fn large_images_train() {
    let mut small = small(1);
    small.config.learner.groups = 5;
    small.config.rollout.groups_per_lease = Config::default().rollout.groups_per_lease;
    let data = small.dir.path().join("data");
    let file = data.join(unveil_data::synth::RECORDS_FILE);
    let (mut bytes, mut lines) = (vec![], vec![]);
    for line in std::fs::read_to_string(&file).unwrap().lines() {
        let mut record: Value = serde_json::from_str(line).unwrap();
        if record["split"] == small.config.data.train_split.as_str() {
            let k = bytes.len();
            record["image"] = format!("noise-{k}.png").into();
            record.as_object_mut().unwrap().remove("image_size");
            bytes.push(noise(&data.join(format!("noise-{k}.png")), if k == 0 { 4800 } else { 1600 }, 7 + k as u64));
        }
        lines.push(record.to_string());
    }
    std::fs::write(&file, lines.join("\n")).unwrap();
    assert!(bytes[0] > 64 << 20 && bytes.len() == 5, "{bytes:?}");
    let mut worker = None;
    let events = run(&small, |at| worker = Some(work(&small.config, small.model(), at, Duration::ZERO)));
    assert_eq!(events.iter().filter(|e| e["kind"] == "train").count(), 1);
    let report = worker.unwrap().join().unwrap();
    assert_eq!((report.accepted, report.refused), (5, 0), "{report:?}");
}

/// A learner's term, version and number of groups.
struct Stand {
    term: u64,
    version: u64,
    groups: Option<u64>,
}

/// A learner with the weights of the model directory.
fn learner(small: &Small, runtime: &Runtime, listen: &str, stand: &Stand) -> Host {
    let &Stand { term, version, groups: total_groups } = stand;
    let c = &small.config;
    let settings = Settings {
        groups_per_step: 2,
        max_staleness: 0,
        lease_s: 60.0,
        stall_s: 300.0,
        silence_s: 8.0,
        seed: 0,
        term,
        total_groups,
    };
    let data = small.data();
    let machine: Experience<TrainGroup> = Experience::new(settings, data.ids()).unwrap();
    let broadcast = (c.rollout.weight_sync == WeightSync::Broadcast)
        .then_some(Broadcasting { device: Device::Cpu, limit: Duration::from_secs(4) });
    let vlm = Vlm::load(&small.model(), Device::Cpu, Kind::Float).unwrap();
    let vocab = vlm.config().text.vocab_size as u32;
    let listen = listen.to_owned();
    let options = HostOptions { listen, sampling: sampling(c), stop: vec![], vocab, fixed: None, broadcast };
    let host = Host::start(runtime.handle(), options, machine, data).unwrap();
    publish(small, &host, version, 1.0);
    host
}

fn publish(small: &Small, host: &Host, version: u64, factor: f64) {
    let vlm = Vlm::load(&small.model(), Device::Cpu, Kind::Float).unwrap();
    let named: Vec<(String, Tensor)> =
        vlm.named_parameters().iter().map(|(n, t)| (n.clone(), t.detach() * factor)).collect();
    host.publish(&NewWeights { version, named: &named, kind: Kind::Float, adapters: None, changes: &|_| true })
        .unwrap();
}

fn train(host: &Host, step: u64) {
    let begun = Instant::now();
    loop {
        if let Some(batch) = host.next_batch(Duration::from_millis(200)).unwrap() {
            let groups: Vec<GroupId> = batch.iter().map(|g| g.id.clone()).collect();
            return host.trained(step, &groups).unwrap();
        }
        assert!(begun.elapsed() < SOON, "no batch: {:?}", host.stats());
    }
}

/// A learner is lost while its worker holds version 10 and leases of it, and comes back, twice, at version 8: the worker takes what
/// that learner has, also where its version 9 has other bits than the one that the worker knew.
#[test]
fn a_worker_that_knows_a_newer_version_starts_over() {
    for sync in [WeightSync::Grpc, WeightSync::Broadcast] {
        let mut small = small(1);
        small.config.rollout.weight_sync = sync;
        let runtime = runtime();
        let first = learner(&small, &runtime, "127.0.0.1:0", &Stand { term: 1, version: 9, groups: None });
        let address = first.address();
        let worker = work(&small.config, small.model(), address, Duration::from_millis(100));
        train(&first, 1);
        publish(&small, &first, 10, 1.01);
        let begun = Instant::now();
        while first.stats().leased == 0 && first.stats().ready == 0 {
            assert!(begun.elapsed() < SOON, "nothing is leased of version 10");
            std::thread::sleep(Duration::from_millis(2));
        }
        drop(first);
        for term in [2, 3] {
            // The last one ends with its last group; the one before is lost, so it must not tell that the run is over.
            let steps = if sync == WeightSync::Broadcast { 3 } else { 2 };
            let groups = (term == 3).then_some(2 * steps);
            let back = learner(&small, &runtime, &address.to_string(), &Stand { term, version: 8, groups });
            train(&back, 1);
            publish(&small, &back, 9, 1.0 + term as f64 / 100.0);
            train(&back, 2);
            if sync == WeightSync::Broadcast {
                publish(&small, &back, 10, 1.0 + term as f64 / 50.0);
                train(&back, 3);
                let sent = back.drain_broadcasts();
                assert!(!sent.is_empty(), "a world of the learner before was taken for one of this");
            }
            let refused = back.drain_events().into_iter().filter(|e| matches!(e, Event::Stale { .. })).count();
            assert!(refused <= 2, "{refused} groups by weights of another learner");
            if term == 3 {
                back.finish(SOON);
                break;
            }
            drop(back);
        }
        let report = worker.join().unwrap();
        assert!(report.finished && report.accepted >= 8, "{report:?}");
    }
}
