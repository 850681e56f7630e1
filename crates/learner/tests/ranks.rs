//! Learners of several ranks (real processes, Gloo) against one of one rank, over recorded batches: losses, gradient norms, weights,
//! moments. Some prompts have no image, and some ranks have no group at all.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{configured, input, low_tokens, model, rollout, write_model};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};
use tokio::runtime::Runtime;
use unveil_checkpoint::{
    Access, Checkpoints, Reader, Report, Resume, Retention, Snapshot, Store, Task, choice, list, verify, write,
};
use unveil_collective::{Backend, Setup, Timing, open};
use unveil_config::schema::{self, Algorithm, Critic, KlPlace};
use unveil_learner::{Buffers, Learner, Models, Named, Ranks, Stand, StepSettings, TrainGroup, Zero, dump};
use unveil_model::{Vlm, read_safetensors, write_safetensors};

/// What a rank's process is told.
const SPEC: &str = "UNVEIL_TEST_RANK";
const BATCHES: usize = 5;
const SEED: u64 = 5;

#[derive(Clone, Serialize, Deserialize)]
struct Spec {
    dir: PathBuf,
    rank: usize,
    world: usize,
    zero: u8,
    shards: usize,
    port: u16,
    double: bool,
    ppo: bool,
    /// A critic of its own, with `ppo`.
    critic: bool,
    /// Parts of so few positions that a rank makes several passes.
    small: bool,
    /// The batches, from and to.
    batches: (usize, usize),
    /// Goes on from the newest checkpoint.
    resume: bool,
    /// Ends with a checkpoint.
    save: bool,
}

/// All batches, without checkpoints.
const STRAIGHT: Spec = Spec {
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

fn settings(vlm: &Vlm, spec: &Spec) -> StepSettings {
    let change = |l: &mut schema::Learner| {
        l.entropy_coef = 0.01;
        l.kl_coef = 0.05;
        l.optimizer.weight_decay = 0.1;
        l.optimizer.clip_norm = 0.5;
        if spec.ppo {
            l.algorithm = Algorithm::Ppo;
            l.kl_in = KlPlace::Reward;
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

/// The batches, with log-probabilities that are not those of the weights; as many groups as there are batches behind them.
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
                text.prompt.tokens.retain(|t| *t != common::IMAGE);
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
    let spec = Spec { dir: dir.into(), ..STRAIGHT };
    let settings = settings(&vlm, &spec);
    let mut config = unveil_config::Config::default();
    config.run.device = "cpu".into();
    let learner = Learner::new(vlm, Some(model(SEED)), settings).unwrap();
    for (b, groups) in batches.iter().enumerate() {
        dump::write(&dir.join(format!("batch-{b}")), &config, &learner, groups).unwrap();
    }
}

/// What every rank does: all updates, then its view of the state into a file.
fn work(spec: &Spec) -> Vec<Update> {
    tch::set_num_threads(1);
    let kind = if spec.double { Kind::Double } else { Kind::Float };
    let load = || Vlm::load(&spec.dir.join("base"), Device::Cpu, kind).unwrap();
    let ranks = if spec.world == 1 {
        Ranks::solo()
    } else {
        let timing = Timing { join: Duration::from_secs(60), call: Duration::from_secs(60), ..Timing::default() };
        let address = format!("127.0.0.1:{}", spec.port);
        let (backend, fingerprint) = (Backend::Gloo, "test".into());
        let setup = Setup {
            rank: spec.rank,
            world: spec.world,
            address,
            local: None,
            backend,
            fingerprint,
            token: None,
            timing,
        };
        Ranks::new(open(&setup).unwrap(), Zero::stage(spec.zero), spec.shards).unwrap()
    };
    let vlm = load();
    let (patch_len, settings) = (vlm.config().vision.patch_len(), settings(&vlm, spec));
    let mut learner =
        Learner::on(ranks, Models { vlm, reference: Some(load()), critic: spec.critic.then(load) }, settings).unwrap();
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
    // What is seen from outside is what the optimiser has.
    learner.bring().unwrap();
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

/// The checkpoints of the test.
fn checkpoints(spec: &Spec) -> (Runtime, Store) {
    let runtime = Runtime::new().unwrap();
    let (place, none): (_, [(&str, &str); 0]) = (spec.dir.join("run"), []);
    let store = runtime.block_on(Store::open(place.to_str().unwrap(), none, Access::Write)).unwrap();
    (runtime, store)
}

/// Every rank writes its share; rank 0 commits when all have.
fn save(spec: &Spec, learner: &Learner) {
    let (runtime, store) = checkpoints(spec);
    let report = |rank: usize| spec.dir.join(format!("report-{}-{rank}.json", learner.step()));
    runtime.block_on(async {
        let retention = Retention { keep: 9, keep_best: false, keep_every: 0 };
        let mut held = None;
        if spec.rank == 0 {
            held = Some(Checkpoints::claim(store.clone(), retention).await.unwrap());
        }
        let copied = learner.snapshot(&Buffers::default()).unwrap();
        // One term per world; its number is the number of saves before.
        let term = list(&store).await.unwrap().len() as u64 + 1;
        let task = Task { step: learner.step(), term, rank: spec.rank, objects: copied.objects };
        let made = write(&store, task).await.unwrap();
        let whole = report(spec.rank).with_extension("part");
        std::fs::write(&whole, serde_json::to_vec(&made).unwrap()).unwrap();
        std::fs::rename(&whole, report(spec.rank)).unwrap();
        let Some(mut held) = held else { return };
        assert_eq!(held.term(), term);
        let mut reports: Vec<Report> = Vec::new();
        for rank in 0..spec.world {
            while !report(rank).exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            reports.push(serde_json::from_slice(&std::fs::read(report(rank)).unwrap()).unwrap());
        }
        let bytes = |r: &Report| r.objects.iter().map(|o| o.size).sum::<u64>() as f64;
        let most = reports.iter().map(bytes).fold(0.0, f64::max);
        let mean = reports.iter().map(bytes).sum::<f64>() / spec.world as f64;
        assert!(most < 1.2 * mean + 65536.0, "ranks write about as much as each other: {most} of {mean}");
        let meta = serde_json::to_value(learner.stand()).unwrap();
        held.commit(Snapshot { step: learner.step(), meta, best: false }, reports).await.unwrap();
    });
}

/// What was saved is there to the last digit, whoever saved it.
fn resume(spec: &Spec, learner: &mut Learner) {
    let (runtime, store) = checkpoints(spec);
    let info = runtime.block_on(choice(&store, Resume::Auto)).unwrap().take().unwrap().unwrap();
    let reader = runtime.block_on(Reader::open(&store, &info)).unwrap();
    learner.read(runtime.handle(), &reader).unwrap();
    let stand: Stand = serde_json::from_value(reader.manifest().meta.clone()).unwrap();
    learner.go_on(&stand).unwrap();
    assert_eq!((learner.step(), learner.stand()), (info.step, stand));
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

/// The process of one rank; it is told what to do by the test that starts it.
#[test]
#[ignore = "started by other tests"]
fn rank() {
    let spec: Spec = serde_json::from_str(&std::env::var(SPEC).expect("started by another test")).unwrap();
    let updates = work(&spec);
    let path = spec.dir.join(format!("updates-{}.json", spec.rank));
    std::fs::write(path, serde_json::to_vec(&updates).unwrap()).unwrap();
}

fn start(spec: &Spec) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["rank", "--exact", "--ignored", "--nocapture"]).env("OMP_NUM_THREADS", "1");
    command.env(SPEC, serde_json::to_string(spec).unwrap()).stdout(Stdio::null()).spawn().unwrap()
}

/// Updates and the state after them, of each rank.
fn run(spec: &Spec) -> Vec<(Vec<Update>, Named)> {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let children: Vec<Child> = (0..spec.world).map(|rank| start(&Spec { rank, port, ..spec.clone() })).collect();
    for mut child in children {
        assert!(child.wait().unwrap().success(), "a rank of {} failed", spec.world);
    }
    let of = |rank: usize| {
        let text = std::fs::read(spec.dir.join(format!("updates-{rank}.json"))).unwrap();
        let state = read_safetensors(&spec.dir.join(format!("state-{rank}.safetensors"))).unwrap();
        (serde_json::from_slice(&text).unwrap(), state)
    };
    (0..spec.world).map(of).collect()
}

/// Relative difference of two tensors by norm.
fn apart(a: &Tensor, b: &Tensor) -> f64 {
    let norm = |t: &Tensor| t.to_kind(Kind::Double).norm().double_value(&[]);
    norm(&(a.to_kind(Kind::Double) - b.to_kind(Kind::Double))) / norm(b).max(1e-30)
}

fn compare(double: bool, (ppo, critic): (bool, bool), small: bool, worlds: &[(usize, u8, usize)]) {
    let dir = tempfile::tempdir().unwrap();
    record(dir.path());
    let solo = Spec { dir: dir.path().into(), double, ppo, critic, small, ..STRAIGHT };
    let base: Vec<_> = read_safetensors(&dir.path().join("base/model.safetensors")).unwrap();
    let (wanted, state) = run(&solo).remove(0);
    let (of_loss, of_state) = if double { (1e-9, 1e-9) } else { (1e-4, 1e-3) };
    for (world, zero, shards) in worlds.iter().copied() {
        let what = format!("{world} ranks, zero {zero}, {shards} shards, fp64 {double}, ppo {ppo}");
        for (updates, found) in run(&Spec { world, zero, shards, ..solo.clone() }) {
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
                let own = &found.iter().find(|(n, _)| n == name).unwrap().1;
                // Weights by what became of them.
                let plain = name.trim_start_matches("critic.");
                let before = base.iter().find(|(n, _)| unveil_model::own_name(n) == plain).map(|(_, t)| t);
                let (own, wanted) = match before {
                    Some(b) => (own - b.to_kind(own.kind()), wanted - b.to_kind(own.kind())),
                    None => (own.shallow_clone(), wanted.shallow_clone()),
                };
                let off = apart(&own, &wanted);
                assert!(off <= of_state, "{what}: {name} is {off:e} away");
            }
        }
    }
}

/// One run over all batches, each of them with other ranks and another stage than the one before, through checkpoints.
#[test]
fn any_ranks_go_on_from_any_ranks() {
    for ppo in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        record(dir.path());
        let solo = Spec { dir: dir.path().into(), double: true, ppo, critic: ppo, ..STRAIGHT };
        let (wanted, state) = run(&solo).remove(0);
        let (of_loss, of_state) = (1e-9, 1e-9);
        let base: Vec<_> = read_safetensors(&dir.path().join("base/model.safetensors")).unwrap();
        let mut last = Vec::new();
        let worlds = [(1, 0, 0), (2, 3, 0), (4, 2, 2), (2, 0, 0), (1, 0, 0)];
        for (b, (world, zero, shards)) in worlds.into_iter().enumerate() {
            let (resume, save, batches) = (b > 0, b + 1 < BATCHES, (b, b + 1));
            let spec = Spec { world, zero, shards, resume, save, batches, ..solo.clone() };
            last = run(&spec);
            let (found, wanted) = (&last[0].0[0], &wanted[b]);
            for (found, wanted) in [(found.loss, wanted.loss), (found.grad_norm, wanted.grad_norm)] {
                let off = (found - wanted).abs();
                assert!(off <= of_loss * wanted.abs().max(1e-6), "batch {b}: {found}, wanted {wanted}");
            }
            std::fs::copy(dir.path().join("state-0.safetensors"), dir.path().join("before.safetensors")).unwrap();
        }
        for (name, wanted) in &state {
            let own = &last[0].1.iter().find(|(n, _)| n == name).unwrap().1;
            let plain = name.trim_start_matches("critic.");
            let before = base.iter().find(|(n, _)| unveil_model::own_name(n) == plain).map(|(_, t)| t);
            let off = match before {
                Some(b) => apart(&(own - b.to_kind(own.kind())), &(wanted - b.to_kind(own.kind()))),
                None => apart(own, wanted),
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
fn divided_state_equals_one_rank() {
    compare(true, (false, false), true, &[(2, 1, 0), (2, 2, 0), (2, 3, 0), (4, 2, 2), (4, 3, 2), (4, 3, 4)]);
}

#[test]
fn value_head_and_mini_batches_equal_one_rank() {
    compare(true, (true, false), true, &[(2, 3, 0), (4, 1, 4), (2, 0, 0)]);
    compare(true, (true, true), false, &[(2, 3, 0)]);
}

#[test]
fn fp32_is_as_near_as_fp32_is() {
    compare(false, (false, false), false, &[(2, 2, 0), (4, 3, 4)]);
}
