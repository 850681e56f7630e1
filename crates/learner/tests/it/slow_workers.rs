//! The real worker with the real learner: short leases, slow or stalled workers, large images, and learners resumed at
//! older versions.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::common::real_worker::{runtime, start_worker};
use crate::common::small_run::SmallRun;
use serde_json::Value;
use tch::{Device, Kind, Tensor};
use tokio::runtime::Runtime;
use unveil_config::Config;
use unveil_config::schema::WeightSync;
use unveil_core::{GroupId, TrainGroup};
use unveil_experience::{Event, Experience, Settings};
use unveil_experience_rpc::{BroadcastOptions, ExperienceServer, ExperienceServerOptions, NewWeights};
use unveil_learner::{Ready, SilentProgress, run_rl, sampling};
use unveil_model::Vlm;
use unveil_proto::v1;
use unveil_proto::v1::experience_client::ExperienceClient;
use unveil_service::{CancellationToken, limited};

const SOON: Duration = Duration::from_secs(120);

fn small(steps: u64) -> SmallRun {
    let mut small = SmallRun::new(5);
    let c = &mut small.config;
    c.learner.steps = steps;
    c.learner.checkpoint_every = 0;
    c.rollout.max_staleness = 0;
    c.rollout.groups_per_lease = 2;
    c.rollout.threads = 1;
    small
}

/// Performs a run with `workers`; returns its events.
fn run(small: &SmallRun, workers: impl FnOnce(SocketAddr)) -> Vec<Value> {
    let model = small.model();
    let out = small.dir.path().join("rl-out");
    let mut silent = SilentProgress;
    let mut events: Vec<Value> = vec![];
    let cancel = CancellationToken::new();
    let over = Arc::new(AtomicBool::new(false));
    let end = over.clone();
    let guard = cancel.clone();
    let watch = std::thread::spawn(move || {
        let start = Instant::now();
        while !end.load(Ordering::Relaxed) && start.elapsed() < SOON {
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

/// A lease lasts a tenth of a second and a group takes three times as long, yet no group is generated twice.
#[test]
fn workers_slower_than_a_lease_can_train() {
    let mut small = small(3);
    small.config.rollout.lease_s = 0.1;
    let mut worker = None;
    run(&small, |at| {
        worker = Some(start_worker(&small.config, small.model(), at.to_string(), "real", Duration::from_millis(300)))
    });
    let report = worker.unwrap().join().unwrap();
    assert_eq!((report.accepted, report.refused, report.finished), (6, 0, true), "{report:?}");
}

/// A worker that leases groups and sends heartbeats without making progress.
async fn stalled_worker(address: SocketAddr, over: CancellationToken) -> usize {
    let channel = unveil_service::connect(&address.to_string(), SOON).await.unwrap();
    let mut client = limited!(ExperienceClient::new(channel));
    let worker = "stuck";
    let session = 7;
    let mut in_hand = Vec::new();
    let mut call = 0;
    let mut lost = 0;
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
fn stalled_worker_loses_its_groups_to_another() {
    let mut small = small(2);
    small.config.rollout.lease_s = 600.0;
    small.config.rollout.stall_s = 1.0;
    let runtime = runtime();
    let over = CancellationToken::new();
    let mut worker = None;
    let mut other = None;
    run(&small, |at| {
        other = Some(runtime.spawn(stalled_worker(at, over.clone())));
        std::thread::sleep(Duration::from_millis(300));
        worker = Some(start_worker(&small.config, small.model(), at.to_string(), "real", Duration::ZERO));
    });
    over.cancel();
    let lost = runtime.block_on(other.unwrap()).unwrap();
    let report = worker.unwrap().join().unwrap();
    assert_eq!((report.accepted, report.refused), (4, 0), "{report:?}");
    assert!(lost >= 2, "the worker was notified of {lost} lost leases");
}

/// Writes an image of noise, which PNG cannot compress; returns its size in bytes.
fn noise(path: &Path, side: u32, seed: u64) -> u64 {
    let mut image = unveil_data::image_store::Image::new(side, side);
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

/// Images that exceed the message limit, one of them by itself, with default settings.
#[test]
fn large_images_train() {
    let mut small = small(1);
    small.config.learner.groups = 5;
    small.config.rollout.groups_per_lease = Config::default().rollout.groups_per_lease;
    let data = small.dir.path().join("data");
    let file = data.join(unveil_datasets::synth::RECORDS_FILE);
    let mut bytes = vec![];
    let mut lines = vec![];
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
    let events = run(&small, |at| {
        worker = Some(start_worker(&small.config, small.model(), at.to_string(), "real", Duration::ZERO))
    });
    assert_eq!(events.iter().filter(|e| e["kind"] == "train").count(), 1);
    let report = worker.unwrap().join().unwrap();
    assert_eq!((report.accepted, report.refused), (5, 0), "{report:?}");
}

/// Term, version and number of groups of a learner.
struct LearnerState {
    term: u64,
    version: u64,
    groups: Option<u64>,
}

/// Starts an experience server that has published the weights of the model directory.
fn learner(small: &SmallRun, runtime: &Runtime, listen: &str, state: &LearnerState) -> ExperienceServer {
    let &LearnerState { term, version, groups: total_groups } = state;
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
        .then_some(BroadcastOptions { device: Device::Cpu, timeout: Duration::from_secs(4) });
    let vlm = Vlm::load(&small.model(), Device::Cpu, Kind::Float).unwrap();
    let vocab = vlm.config().text.vocab_size as u32;
    let listen = listen.to_owned();
    let options = ExperienceServerOptions {
        listen,
        sampling: sampling(c),
        stop: vec![],
        vocab,
        fixed_lease_size: None,
        broadcast,
    };
    let server = ExperienceServer::start(runtime.handle(), options, machine, data).unwrap();
    publish(small, &server, version, 1.0);
    server
}

fn publish(small: &SmallRun, server: &ExperienceServer, version: u64, factor: f64) {
    let vlm = Vlm::load(&small.model(), Device::Cpu, Kind::Float).unwrap();
    let named: Vec<(String, Tensor)> =
        vlm.named_parameters().iter().map(|(n, t)| (n.clone(), t.detach() * factor)).collect();
    server
        .publish(&NewWeights { version, named: &named, kind: Kind::Float, adapters: None, may_change: &|_| true })
        .unwrap();
}

fn train(server: &ExperienceServer, step: u64) {
    let start = Instant::now();
    loop {
        if let Some(batch) = server.next_batch(Duration::from_millis(200)).unwrap() {
            let groups: Vec<GroupId> = batch.iter().map(|g| g.id.clone()).collect();
            return server.mark_trained(step, &groups).unwrap();
        }
        assert!(start.elapsed() < SOON, "no batch: {:?}", server.stats());
    }
}

/// A learner is lost while its worker has version 10 and leases for it, and is resumed twice at version 8. The worker
/// loads the weights of the resumed learner, even if its version 9 differs from the one that the worker knew.
#[test]
fn worker_with_newer_weights_resets_to_a_resumed_learner() {
    for sync in [WeightSync::Grpc, WeightSync::Broadcast] {
        let mut small = small(1);
        small.config.rollout.weight_sync = sync;
        let runtime = runtime();
        let first = learner(&small, &runtime, "127.0.0.1:0", &LearnerState { term: 1, version: 9, groups: None });
        let address = first.address();
        let worker =
            start_worker(&small.config, small.model(), address.to_string(), "real", Duration::from_millis(100));
        train(&first, 1);
        publish(&small, &first, 10, 1.01);
        let start = Instant::now();
        while first.stats().leased == 0 && first.stats().ready == 0 {
            assert!(start.elapsed() < SOON, "nothing is leased of version 10");
            std::thread::sleep(Duration::from_millis(2));
        }
        drop(first);
        for term in [2, 3] {
            // The last learner ends with its last group; the one before is lost and must not report the end of the run.
            let steps = if sync == WeightSync::Broadcast { 3 } else { 2 };
            let groups = (term == 3).then_some(2 * steps);
            let back = learner(&small, &runtime, &address.to_string(), &LearnerState { term, version: 8, groups });
            train(&back, 1);
            publish(&small, &back, 9, 1.0 + term as f64 / 100.0);
            train(&back, 2);
            if sync == WeightSync::Broadcast {
                publish(&small, &back, 10, 1.0 + term as f64 / 50.0);
                train(&back, 3);
                let sent = back.drain_broadcasts();
                assert!(!sent.is_empty(), "a broadcast group of the previous learner was reused");
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
