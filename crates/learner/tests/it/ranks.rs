//! Learners of several ranks (real processes, Gloo) against a learner of one rank, over recorded batches: losses,
//! gradient norms, weights, moments. Some prompts have no image, and some ranks have no groups.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::common::{configured, input, low_tokens, model, rollout, write_model};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};
use tokio::runtime::Runtime;
use unveil_checkpoint::{
    Access, CheckpointHeader, Checkpoints, Reader, Resume, Retention, Store, WriteReport, WriteTask, list,
    resume_candidates, verify, write,
};
use unveil_collective::{Backend, Setup, Timeouts, open};
use unveil_config::schema::{self, Algorithm, Critic, KlPlacement};
use unveil_learner::{
    HostBufferPool, Models, NamedTensors, PolicyTrainer, Ranks, StepSettings, TrainGroup, TrainerProgress, ZeroStage,
    dump,
};
use unveil_model::{Vlm, read_safetensors, write_safetensors};

/// Environment variable with the specification of a rank's process.
const RANK_SPEC: &str = "UNVEIL_TEST_RANK";
const BATCHES: usize = 5;
const SEED: u64 = 5;

#[derive(Clone, Serialize, Deserialize)]
struct RankSpec {
    dir: PathBuf,
    rank: usize,
    world: usize,
    zero: u8,
    shards: usize,
    port: u16,
    double: bool,
    ppo: bool,
    /// A separate critic, with `ppo`.
    critic: bool,
    /// A small token budget, so that a rank needs several micro-batches.
    small: bool,
    /// Range of batches.
    batches: (usize, usize),
    /// Resumes from the newest checkpoint.
    resume: bool,
    /// Saves a checkpoint at the end.
    save: bool,
}

/// All batches on one rank, without checkpoints.
const ALL_BATCHES: RankSpec = RankSpec {
    dir: PathBuf::new(),
    rank: 0,
    world: 1,
    zero: 0,
    shards: 0,
    port: 0,
    double: false,
    ppo: false,
    critic: false,
    small: false,
    batches: (0, BATCHES),
    resume: false,
    save: false,
};

#[derive(Debug, Serialize, Deserialize)]
struct Update {
    loss: f64,
    kl: f64,
    grad_norm: f64,
    entropy: f64,
    clip_fraction: f64,
    tokens: usize,
}

fn settings(vlm: &Vlm, spec: &RankSpec) -> StepSettings {
    let change = |l: &mut schema::Learner| {
        l.entropy_coef = 0.01;
        l.kl_coef = 0.05;
        l.optimizer.weight_decay = 0.1;
        l.optimizer.clip_norm = 0.5;
        if spec.ppo {
            l.algorithm = Algorithm::Ppo;
            l.kl_in = KlPlacement::Reward;
            l.kl_target = 0.01;
            l.recompute = true;
            (l.inner_epochs, l.minibatches) = (2, 2);
            l.critic = if spec.critic { Critic::Separate } else { Critic::Shared };
        }
    };
    let mut s = configured(vlm, 20, change);
    s.agreement_limit = f64::INFINITY;
    if spec.small {
        s.token_budget = 60;
    }
    s
}

/// Records batches with perturbed log-probabilities and an increasing number of groups.
fn record(dir: &Path) {
    write_model(&dir.join("base"), SEED);
    let vlm = model(SEED);
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let mut batches: Vec<Vec<TrainGroup>> = Vec::new();
    for b in 0..BATCHES {
        let mut groups = rollout(&vlm, 2 + b, 3, b as u64, &low_tokens);
        for (k, g) in groups.iter_mut().enumerate() {
            if k % 3 == 1 {
                let mut text = input(&vlm, k);
                text.prompt.tokens.retain(|t| *t != crate::common::IMAGE);
                text.prompt.grids.clear();
                text.patches.clear();
                text.record.boxes.clear();
                g.input = text.into();
            }
            for r in &mut g.responses {
                r.logprobs.iter_mut().for_each(|v| *v += rng.random_range(-0.5..0.4));
                r.versions.fill(0);
                r.tokens.truncate(2 + k);
                let n = r.tokens.len();
                r.logprobs.truncate(n);
                r.versions.truncate(n);
            }
            g.spans.iter_mut().zip(&g.responses).for_each(|(s, r)| s.truncate(r.tokens.len()));
        }
        groups[0].breakdowns[1].total = None;
        batches.push(groups);
    }
    let spec = RankSpec { dir: dir.into(), ..ALL_BATCHES };
    let settings = settings(&vlm, &spec);
    let mut config = unveil_config::Config::default();
    config.run.device = "cpu".into();
    let learner = PolicyTrainer::new(vlm, Some(model(SEED)), settings).unwrap();
    for (b, groups) in batches.iter().enumerate() {
        dump::write(&dir.join(format!("batch-{b}")), &config, &learner, groups).unwrap();
    }
}

/// Performs all updates of a rank and writes its view of the state to a file.
fn work(spec: &RankSpec) -> Vec<Update> {
    tch::set_num_threads(1);
    let kind = if spec.double { Kind::Double } else { Kind::Float };
    let load = || Vlm::load(&spec.dir.join("base"), Device::Cpu, kind).unwrap();
    let ranks = if spec.world == 1 {
        Ranks::solo()
    } else {
        let timeouts =
            Timeouts { rendezvous: Duration::from_secs(60), call: Duration::from_secs(60), ..Timeouts::default() };
        let address = format!("127.0.0.1:{}", spec.port);
        let backend = Backend::Gloo;
        let fingerprint = "test".into();
        let setup = Setup {
            rank: spec.rank,
            world: spec.world,
            address,
            local_address: None,
            backend,
            fingerprint,
            token: None,
            timeouts,
        };
        Ranks::new(open(&setup).unwrap(), ZeroStage::from_number(spec.zero), spec.shards).unwrap()
    };
    let vlm = load();
    let patch_len = vlm.config().vision.patch_len();
    let settings = settings(&vlm, spec);
    let mut learner = PolicyTrainer::distributed(
        ranks,
        Models { vlm, reference: Some(load()), critic: spec.critic.then(load) },
        settings,
    )
    .unwrap();
    if spec.resume {
        resume(spec, &mut learner);
    }
    let mut out = Vec::new();
    for b in spec.batches.0..spec.batches.1 {
        let groups = dump::load(&spec.dir.join(format!("batch-{b}")), patch_len).unwrap();
        let r = learner.update(&groups).unwrap();
        assert_eq!(r.skipped, None);
        out.push(Update {
            loss: r.loss["loss"],
            kl: r.kl_reference,
            grad_norm: r.grad_norm,
            entropy: r.entropy,
            clip_fraction: r.clip_fraction,
            tokens: r.tokens,
        });
    }
    // The gathered parameters equal the weights of the optimiser.
    learner.gather_parameters().unwrap();
    let (mut state, moments) = learner.state().unwrap();
    for (name, tensor) in &state {
        if let Some(own) = learner.vlm().parameter(name) {
            assert_eq!(own, tensor, "{name}");
        }
    }
    state.extend(moments);
    write_safetensors(&spec.dir.join(format!("state-{}.safetensors", spec.rank)), &state).unwrap();
    if spec.save {
        save(spec, &learner);
    }
    out
}

/// Opens the checkpoint store of the test.
fn checkpoints(spec: &RankSpec) -> (Runtime, Store) {
    let runtime = Runtime::new().unwrap();
    let (place, none): (_, [(&str, &str); 0]) = (spec.dir.join("run"), []);
    let store = runtime.block_on(Store::open(place.to_str().unwrap(), none, Access::Write)).unwrap();
    (runtime, store)
}

/// Writes the shard of a rank; rank 0 commits once all ranks have written theirs.
fn save(spec: &RankSpec, learner: &PolicyTrainer) {
    let (runtime, store) = checkpoints(spec);
    let report = |rank: usize| spec.dir.join(format!("report-{}-{rank}.json", learner.step()));
    runtime.block_on(async {
        let retention = Retention { keep: 9, keep_best: false, keep_every: 0 };
        let mut held = None;
        if spec.rank == 0 {
            held = Some(Checkpoints::claim(store.clone(), retention).await.unwrap());
        }
        let copied = learner.snapshot(&HostBufferPool::default()).unwrap();
        // Every save claims a new term.
        let term = list(&store).await.unwrap().len() as u64 + 1;
        let task = WriteTask { step: learner.step(), term, rank: spec.rank, objects: copied.objects };
        let write_report = write(&store, task).await.unwrap();
        let whole = report(spec.rank).with_extension("part");
        std::fs::write(&whole, serde_json::to_vec(&write_report).unwrap()).unwrap();
        std::fs::rename(&whole, report(spec.rank)).unwrap();
        let Some(mut held) = held else { return };
        assert_eq!(held.term(), term);
        let mut reports: Vec<WriteReport> = Vec::new();
        for rank in 0..spec.world {
            while !report(rank).exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            reports.push(serde_json::from_slice(&std::fs::read(report(rank)).unwrap()).unwrap());
        }
        let bytes = |r: &WriteReport| r.objects.iter().map(|o| o.size).sum::<u64>() as f64;
        let most = reports.iter().map(bytes).fold(0.0, f64::max);
        let mean = reports.iter().map(bytes).sum::<f64>() / spec.world as f64;
        assert!(most < 1.2 * mean + 65536.0, "ranks write similar amounts: at most {most}, {mean} on average");
        let meta = serde_json::to_value(learner.progress()).unwrap();
        held.commit(CheckpointHeader { step: learner.step(), meta, best: false }, reports).await.unwrap();
    });
}

/// Resumes and checks that the saved state was restored bit for bit.
fn resume(spec: &RankSpec, learner: &mut PolicyTrainer) {
    let (runtime, store) = checkpoints(spec);
    let info = runtime.block_on(resume_candidates(&store, Resume::Auto)).unwrap().next_candidate().unwrap().unwrap();
    let reader = runtime.block_on(Reader::open(&store, &info)).unwrap();
    learner.read(runtime.handle(), &reader).unwrap();
    let stand: TrainerProgress = serde_json::from_value(reader.manifest().meta.clone()).unwrap();
    learner.resume_from(&stand).unwrap();
    assert_eq!((learner.step(), learner.progress()), (info.step, stand));
    let (weights, moments) = learner.state().unwrap();
    let saved = read_safetensors(&spec.dir.join("before.safetensors")).unwrap();
    assert_eq!(saved.len(), weights.len() + moments.len());
    for (name, tensor) in weights.iter().chain(&moments) {
        let wanted = &saved.iter().find(|(n, _)| n == name).unwrap().1;
        assert_eq!(tensor, wanted, "{name}");
        if let Some(own) = learner.vlm().parameter(name) {
            assert_eq!(own, wanted, "{name}");
        }
    }
}

/// The process of one rank, started by other tests.
#[test]
#[ignore = "started by other tests"]
fn rank() {
    let spec: RankSpec = serde_json::from_str(&std::env::var(RANK_SPEC).expect("started by another test")).unwrap();
    let updates = work(&spec);
    let path = spec.dir.join(format!("updates-{}.json", spec.rank));
    std::fs::write(path, serde_json::to_vec(&updates).unwrap()).unwrap();
}

fn start(spec: &RankSpec) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["ranks::rank", "--exact", "--ignored", "--nocapture"]).env("OMP_NUM_THREADS", "1");
    command.env(RANK_SPEC, serde_json::to_string(spec).unwrap()).stdout(Stdio::null()).spawn().unwrap()
}

/// Runs all ranks; returns the updates and final state of each.
fn run(spec: &RankSpec) -> Vec<(Vec<Update>, NamedTensors)> {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let children: Vec<Child> = (0..spec.world).map(|rank| start(&RankSpec { rank, port, ..spec.clone() })).collect();
    for mut child in children {
        assert!(child.wait().unwrap().success(), "a rank of {} failed", spec.world);
    }
    let result_of_rank = |rank: usize| {
        let text = std::fs::read(spec.dir.join(format!("updates-{rank}.json"))).unwrap();
        let state = read_safetensors(&spec.dir.join(format!("state-{rank}.safetensors"))).unwrap();
        (serde_json::from_slice(&text).unwrap(), state)
    };
    (0..spec.world).map(result_of_rank).collect()
}

/// Returns the norm of the difference of two tensors, relative to the second.
fn relative_difference(a: &Tensor, b: &Tensor) -> f64 {
    let norm = |t: &Tensor| t.to_kind(Kind::Double).norm().double_value(&[]);
    norm(&(a.to_kind(Kind::Double) - b.to_kind(Kind::Double))) / norm(b).max(1e-30)
}

fn compare(double: bool, (ppo, critic): (bool, bool), small: bool, worlds: &[(usize, u8, usize)]) {
    let dir = tempfile::tempdir().unwrap();
    record(dir.path());
    let solo = RankSpec { dir: dir.path().into(), double, ppo, critic, small, ..ALL_BATCHES };
    let base: Vec<_> = read_safetensors(&dir.path().join("base/model.safetensors")).unwrap();
    let (wanted, state) = run(&solo).remove(0);
    let (of_loss, of_state) = if double { (1e-9, 1e-9) } else { (1e-4, 1e-3) };
    for (world, zero, shards) in worlds.iter().copied() {
        let what = format!("{world} ranks, zero {zero}, {shards} shards, fp64 {double}, ppo {ppo}");
        for (updates, found) in run(&RankSpec { world, zero, shards, ..solo.clone() }) {
            for (u, w) in updates.iter().zip(&wanted) {
                assert_eq!(u.tokens, w.tokens);
                let pairs = [
                    (u.loss, w.loss),
                    (u.kl, w.kl),
                    (u.grad_norm, w.grad_norm),
                    (u.entropy, w.entropy),
                    (u.clip_fraction, w.clip_fraction),
                ];
                for (found, wanted) in pairs {
                    assert!((found - wanted).abs() <= of_loss * wanted.abs().max(1e-6), "{what}: {u:?}, wanted {w:?}");
                }
            }
            assert_eq!(found.len(), state.len(), "{what}");
            for (name, wanted) in &state {
                let tensor = &found.iter().find(|(n, _)| n == name).unwrap().1;
                // Weights are compared by their change.
                let plain = name.trim_start_matches("critic.");
                let before = base.iter().find(|(n, _)| unveil_model::canonical_name(n) == plain).map(|(_, t)| t);
                let (tensor, wanted) = match before {
                    Some(b) => (tensor - b.to_kind(tensor.kind()), wanted - b.to_kind(tensor.kind())),
                    None => (tensor.shallow_clone(), wanted.shallow_clone()),
                };
                let off = relative_difference(&tensor, &wanted);
                assert!(off <= of_state, "{what}: {name} is {off:e} away");
            }
        }
    }
}

/// Performs one run over all batches with other ranks and another ZeRO stage for each, through checkpoints.
#[test]
fn checkpoints_can_be_resumed_by_any_number_of_ranks() {
    for ppo in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        record(dir.path());
        let solo = RankSpec { dir: dir.path().into(), double: true, ppo, critic: ppo, ..ALL_BATCHES };
        let (wanted, state) = run(&solo).remove(0);
        let of_loss = 1e-9;
        let of_state = 1e-9;
        let base: Vec<_> = read_safetensors(&dir.path().join("base/model.safetensors")).unwrap();
        let mut last = Vec::new();
        let worlds = [(1, 0, 0), (2, 3, 0), (4, 2, 2), (2, 0, 0), (1, 0, 0)];
        for (b, (world, zero, shards)) in worlds.into_iter().enumerate() {
            let (resume, save, batches) = (b > 0, b + 1 < BATCHES, (b, b + 1));
            let spec = RankSpec { world, zero, shards, resume, save, batches, ..solo.clone() };
            last = run(&spec);
            let update = &last[0].0[0];
            let wanted = &wanted[b];
            for (actual, wanted) in [(update.loss, wanted.loss), (update.grad_norm, wanted.grad_norm)] {
                let off = (actual - wanted).abs();
                assert!(off <= of_loss * wanted.abs().max(1e-6), "batch {b}: {actual}, wanted {wanted}");
            }
            std::fs::copy(dir.path().join("state-0.safetensors"), dir.path().join("before.safetensors")).unwrap();
        }
        for (name, wanted) in &state {
            let tensor = &last[0].1.iter().find(|(n, _)| n == name).unwrap().1;
            let plain = name.trim_start_matches("critic.");
            let before = base.iter().find(|(n, _)| unveil_model::canonical_name(n) == plain).map(|(_, t)| t);
            let off = match before {
                Some(b) => {
                    relative_difference(&(tensor - b.to_kind(tensor.kind())), &(wanted - b.to_kind(tensor.kind())))
                }
                None => relative_difference(tensor, wanted),
            };
            assert!(off <= of_state, "{name} is {off:e} away");
        }
        let (runtime, store) = checkpoints(&solo);
        let shown = runtime.block_on(verify(&store, None)).unwrap();
        assert!(shown.len() > 10 && shown.iter().all(|o| o.ok), "{shown:?}");
    }
}

#[test]
fn summed_gradients_equal_one_rank() {
    compare(true, (false, false), false, &[(2, 0, 0), (4, 0, 0)]);
}

#[test]
fn sharded_state_equals_one_rank() {
    compare(true, (false, false), true, &[(2, 1, 0), (2, 2, 0), (2, 3, 0), (4, 2, 2), (4, 3, 2), (4, 3, 4)]);
}

#[test]
fn value_head_and_mini_batches_equal_one_rank() {
    compare(true, (true, false), true, &[(2, 3, 0), (4, 1, 4), (2, 0, 0)]);
    compare(true, (true, true), false, &[(2, 3, 0)]);
}

#[test]
fn fp32_equals_one_rank_within_tolerance() {
    compare(false, (false, false), false, &[(2, 2, 0), (4, 3, 4)]);
}
