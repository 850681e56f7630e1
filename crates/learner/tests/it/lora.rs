//! Adapters in stage 2: weight sync, checkpoints and export.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::common::small_run::{SmallRun, StopAt, experience, work};
use serde_json::Value;
use tch::{Device, Kind, Tensor};
use unveil_checkpoint::{Access, Manifest, ManifestTensor, Store};
use unveil_core::{Algorithm, TrainGroup};
use unveil_engine::{Engine, EngineOptions};
use unveil_experience::Experience;
use unveil_experience_rpc::{
    BroadcastMember, BroadcastOptions, ExperienceServer, ExperienceServerOptions, NewWeights, WeightReceiver,
};
use unveil_learner::{LearnerError, Outcome, SilentProgress, run_rl};
use unveil_model::{AdapterMerger, LoraSpec, Vlm, export, read_adapters};
use unveil_rollout::load_update;
use unveil_service::CancellationToken;
use unveil_testkit_model::{NoLeases, adapters, add_noise, experience_settings, lora_spec, model, server_options};

fn run(small: &SmallRun, stop: u64) -> Result<(Outcome, Vec<Value>), LearnerError> {
    let model = small.model();
    let out = small.dir.path().join("out/model");
    let cancel = CancellationToken::new();
    let mut events = StopAt { kind: "train", step: stop, cancel: cancel.clone(), seen: vec![] };
    let mut silent = SilentProgress;
    let mut worker = None;
    let stage = small.stage(&model, &out, &mut events, &mut silent, cancel);
    let outcome = run_rl(stage, |ready| worker = Some(work(experience(ready), small.model(), "w1")))?;
    worker.unwrap().join().unwrap();
    Ok((outcome, events.seen))
}

fn small(algorithm: Algorithm) -> SmallRun {
    let mut small = SmallRun::new(5);
    let l = &mut small.config.learner;
    l.algorithm = algorithm;
    l.steps = 4;
    l.checkpoint_every = 0;
    l.kl_coef = 0.1;
    l.lora.rank = 3;
    l.lora.rslora = true;
    l.lora.targets.push("visual.blocks.*.attn.qkv".into());
    small
}

#[test]
fn resumed_run_reaches_the_same_adapters() {
    for algorithm in [Algorithm::Grpo, Algorithm::Ppo] {
        let straight = small(algorithm);
        let broken = small(algorithm);
        let (outcome, events) = run(&straight, u64::MAX).unwrap();
        assert_eq!((outcome.step, outcome.exported), (4, Some(4)));
        let trained: Vec<&Value> = events.iter().filter(|e| e["kind"] == "train").collect();
        assert!(trained.iter().all(|e| e["agreement"].as_f64().is_some_and(|a| a < 1e-5)), "{trained:?}");
        assert!(trained[3]["kl_reference"].as_f64().unwrap() > 0.0, "the policy leaves the reference: {trained:?}");
        assert_eq!((run(&broken, 2).unwrap().0.step, run(&broken, u64::MAX).unwrap().0.step), (2, 4));
        let path_in = |s: &SmallRun, name: &str| s.dir.path().join("out").join(name);
        for file in ["model/model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"] {
            let bytes = |s: &SmallRun| {
                let text = std::fs::read(path_in(s, file)).unwrap();
                // Only the path of the base model differs.
                let place = s.model().display().to_string();
                if file.ends_with("json") { String::from_utf8(text).unwrap().replace(&place, "").into() } else { text }
            };
            assert!(bytes(&straight) == bytes(&broken), "{file}: 2 + 2 updates are not 4 with {algorithm:?}");
        }
        // The exported model is the complete base model with the adapters merged.
        let again = path_in(&straight, "again");
        export(&straight.model(), &again, None, Some(&path_in(&straight, "adapter"))).unwrap();
        let read = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
        assert!(read(&again) == read(&path_in(&straight, "model")) && read(&again) != read(&straight.model()));
        unveil_preprocess::preprocessor::Preprocessor::load(&path_in(&straight, "model")).unwrap();
        // A checkpoint contains the adapters and only their moments.
        let named = read_adapters(&path_in(&straight, "adapter")).unwrap().1;
        let saved = newest_manifest(&straight);
        assert!(saved.objects.iter().any(|o| o.name == "adapter/adapter_config.json"));
        assert!(saved.objects.iter().all(|o| !o.name.starts_with("model/")));
        let scalars = |kind: &str, part: &str| -> u64 {
            let is_selected = |t: &&ManifestTensor| t.kind == kind && (part.is_empty() || t.artifact == part);
            saved.tensors.iter().filter(is_selected).map(ManifestTensor::count).sum()
        };
        let adapters = named.iter().map(|(_, t)| t.numel() as u64).sum::<u64>();
        assert_eq!(scalars("weight", "adapter"), adapters);
        let head = scalars("weight", "") - adapters;
        assert_eq!(head > 0, algorithm == Algorithm::Ppo, "the value head is there");
        assert_eq!((scalars("exp_avg", ""), scalars("exp_avg_sq", "")), (adapters + head, adapters + head));
    }
}

/// Returns the manifest of the newest checkpoint.
fn newest_manifest(small: &SmallRun) -> Manifest {
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let none: [(&str, &str); 0] = [];
        let store = Store::open(&small.config.run.dir, none, Access::Read).await.unwrap();
        unveil_checkpoint::show(&store, None).await.unwrap().manifest
    })
}

#[test]
fn mismatched_checkpoints_are_refused() {
    let mut small = small(Algorithm::Grpo);
    assert_eq!(run(&small, 2).unwrap().0.step, 2);
    let refused = |small: &SmallRun, words: &[&str]| {
        let e = run(small, u64::MAX).map(|o| o.0).unwrap_err().to_string();
        assert!(words.iter().all(|w| e.contains(w)), "{words:?}: {e}");
    };
    small.config.learner.lora.alpha = 7.0;
    refused(&small, &["checkpoint of step 2", "alpha = 16", "alpha = 7", "use the same"]);
    small.config.learner.lora.alpha = 16.0;
    small.config.learner.lora.targets.pop();
    refused(&small, &["checkpoint of step 2", "learner.lora.targets", "visual.blocks.0.attn.qkv.lora_A.weight"]);
    small.config.learner.lora.targets = vec!["nothing".into()];
    refused(&small, &["learner.lora", "`nothing`", "`q_proj`"]);
    small.config.learner.lora.targets = small_targets();
    small.config.learner.lora.rank = 0;
    refused(&small, &["checkpoint of step 2", "adapters of rank 3", "learner.lora.rank is 0"]);
    small.config.learner.lora.rank = 3;
    let weights = small.model().join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    refused(&small, &["checkpoint of step 2", "BLAKE3", "model0", "never"]);
    // A checkpoint of whole weights cannot be resumed with adapters.
    let mut whole = SmallRun::new(5);
    whole.config.learner.steps = 3;
    whole.config.learner.checkpoint_every = 0;
    assert_eq!(run(&whole, 1).unwrap().0.step, 1);
    whole.config.learner.lora.rank = 2;
    refused(&whole, &["checkpoint of step 1", "whole weights", "learner.lora.rank"]);
}

fn small_targets() -> Vec<String> {
    small(Algorithm::Grpo).config.learner.lora.targets
}

/// Over real gRPC, the first version is sent whole and later ones as adapters only. A worker that joins late has the
/// same bytes as an early one, in both dtypes, by stream and by broadcast.
#[test]
fn only_adapters_are_sent_after_the_first_version() {
    let limit = Duration::from_secs(5);
    for (kind, by_broadcast) in [(Kind::Float, false), (Kind::BFloat16, false), (Kind::Float, true)] {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let settings = experience_settings(1, 9.0);
        let machine: Experience<TrainGroup> = Experience::new(settings, vec!["a".into()]).unwrap();
        let broadcast = by_broadcast.then_some(BroadcastOptions { device: Device::Cpu, timeout: limit });
        let options = ExperienceServerOptions { broadcast, ..server_options() };
        let server = ExperienceServer::start(runtime.handle(), options, machine, Arc::new(NoLeases)).unwrap();
        let mut vlm = model(2);
        vlm.init_adapters(
            &LoraSpec { targets: vec!["q_proj".into(), "down_proj".into(), "visual.*.qkv".into()], ..lora_spec(3) },
            1,
        )
        .unwrap();
        vlm.set_trainable(|_| false);
        let publish = |vlm: &Vlm, version: u64| {
            let changes = |name: &str| vlm.parameter(name).is_none_or(Tensor::requires_grad);
            let named = vlm.named_parameters();
            let adapters = vlm.adapters();
            server.publish(&NewWeights { version, named, kind, adapters, may_change: &changes }).unwrap();
        };
        let address = server.address().to_string();
        let patience = Duration::from_secs(5);
        let connect = |name: &str| runtime.block_on(WeightReceiver::connect(&address, name, patience)).unwrap();
        let engine = || {
            let mut other = model(9);
            if kind == Kind::BFloat16 {
                let dir = tempfile::tempdir().unwrap();
                other.save(dir.path()).unwrap();
                other = Vlm::load(dir.path(), Device::Cpu, kind).unwrap();
            }
            Engine::new(other, EngineOptions::default()).unwrap()
        };
        let take = |receiver: &mut WeightReceiver, engine: &mut Engine<Vlm>| {
            let update = runtime.block_on(receiver.fetch(patience)).unwrap().unwrap();
            load_update(engine, &update).unwrap();
            let bytes: usize = update.tensors.iter().map(|(_, t)| t.numel() * t.kind().elt_size_in_bytes()).sum();
            let received = (update.whole, update.tensors.len(), bytes);
            receiver.adopt(update);
            received
        };
        let base = vlm.named_parameters().iter().map(|(_, t)| t.numel()).sum::<usize>() * kind.elt_size_in_bytes();
        let named_adapters = vlm.adapters().unwrap().named_parameters();
        let count = named_adapters.len();
        let size = named_adapters.iter().map(|(_, t)| t.numel() * 4).sum::<usize>();
        let mut early = connect("early");
        let mut follower = engine();
        if by_broadcast {
            early = early.with_broadcast(Some(BroadcastMember::start(Device::Cpu, limit, None).unwrap()));
        }
        publish(&vlm, 0);
        let whole = vlm.named_parameters().len() + count;
        assert_eq!(take(&mut early, &mut follower), (true, whole, base + size));
        for version in 1..4 {
            add_noise(&mut vlm, version);
            publish(&vlm, version as u64);
            assert_eq!(take(&mut early, &mut follower), (false, count, size));
        }
        assert!(size * 10 < base, "{size} of {base} bytes travel");
        // The worker first reported its weights with the request for version 2.
        let mut sent = Vec::new();
        let end = Instant::now() + limit;
        while by_broadcast && sent.len() < 2 && Instant::now() < end {
            sent.extend(
                server.drain_broadcasts().into_iter().map(|s| (s.version, s.round, s.workers, s.bytes as usize)),
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(sent, if by_broadcast { vec![(2, 1, 1, size), (3, 1, 1, size)] } else { vec![] });
        let mut late = connect("late");
        let mut joiner = engine();
        assert_eq!(take(&mut late, &mut joiner), (true, whole, base + size));
        assert_eq!((early.held(), follower.version(), joiner.version()), (late.held(), 3, 3));
        let bits = |vlm: &Vlm| vlm.named_parameters().iter().map(|(n, t)| (n.clone(), t.copy())).collect::<Vec<_>>();
        assert!(bits(follower.vlm()) == bits(joiner.vlm()), "errors accumulate over versions, {kind:?}");
        // The weights equal the base with the last adapters merged once.
        let mut fresh = engine();
        let last = adapters(&vlm);
        let named: Vec<_> = vlm.named_parameters().iter().map(|(n, t)| (n.clone(), t.to_kind(kind))).collect();
        fresh.load_weights(0, &named).unwrap();
        let scale = vlm.adapters().unwrap().spec().scale();
        let mut once = model(9);
        if kind == Kind::Float {
            once.load_state(&named).unwrap();
            AdapterMerger::default().merge(&mut once, &last, scale).unwrap();
            assert!(bits(&once) == bits(follower.vlm()));
        }
        assert!(bits(fresh.vlm()) != bits(follower.vlm()));
    }
}
