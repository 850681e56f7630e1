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
use unveil_collective::{Backend, Setup, Timing, open};
use unveil_config::schema::{self, Algorithm, Critic, KlPlace};
use unveil_learner::{Learner, Models, Named, Ranks, StepSettings, TrainGroup, Zero, dump};
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
}

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
    let spec = Spec {
        dir: dir.into(),
        rank: 0,
        world: 1,
        zero: 0,
        shards: 0,
        port: 0,
        double: false,
        ppo: false,
        critic: false,
        small: false,
    };
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
    let mut out = Vec::new();
    for b in 0..BATCHES {
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
    out
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
    let solo =
        Spec { dir: dir.path().into(), rank: 0, world: 1, zero: 0, shards: 0, port: 0, double, ppo, critic, small };
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
