//! Ranks as processes over Gloo that train on recorded batches. Some prompts have no image, and some ranks have no groups.

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::rc::Rc;
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};
use unveil_collective::{Backend, Setup, Timeouts, open};
use unveil_config::schema::{self, Critic, KlPlacement};
use unveil_core::{Algorithm, TrainGroup};
use unveil_model::{Vlm, read_safetensors, write_safetensors};
use unveil_testkit::{free_address, ignored_test};
use unveil_trainer::{Models, NamedTensors, PolicyTrainer, Ranks, StepSettings, ZeroStage, dump};

use crate::{IMAGE, configured, input, low_tokens, model, rollout, write_model};

/// Environment variable with the specification of a rank's process.
const RANK_SPEC: &str = "UNVEIL_TEST_RANK";
/// Number of recorded batches.
pub const BATCHES: usize = 5;
const SEED: u64 = 5;

/// Work of a rank's process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RankSpec {
    /// Directory of the batches, the first model and the results.
    pub dir: PathBuf,
    /// Number of this rank.
    pub rank: usize,
    /// Number of ranks.
    pub world: usize,
    /// ZeRO stage.
    pub zero: u8,
    /// Number of ranks of a replica; 0: all.
    pub shards: usize,
    /// Port of rank 0 on the loopback.
    pub port: u16,
    /// Whether to train in fp64.
    pub double: bool,
    /// Whether to train with PPO and a value head.
    pub ppo: bool,
    /// A separate critic, with `ppo`.
    pub critic: bool,
    /// A small token budget, so that a rank needs several micro-batches.
    pub small: bool,
    /// Range of batches.
    pub batches: (usize, usize),
}

/// All batches on one rank.
pub const ALL_BATCHES: RankSpec = RankSpec {
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
};

/// Report of one update.
#[derive(Debug, Serialize, Deserialize)]
pub struct Update {
    /// Loss.
    pub loss: f64,
    /// KL divergence from the reference.
    pub kl: f64,
    /// Norm of the gradient.
    pub grad_norm: f64,
    /// Mean entropy.
    pub entropy: f64,
    /// Share of clipped ratios.
    pub clip_fraction: f64,
    /// Number of trained tokens.
    pub tokens: usize,
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
            l.inner_epochs = 2;
            l.minibatches = 2;
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
pub fn record(dir: &Path) {
    write_model(&dir.join("base"), SEED);
    let vlm = model(SEED);
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let mut batches: Vec<Vec<TrainGroup>> = Vec::new();
    for b in 0..BATCHES {
        let mut groups = rollout(&vlm, 2 + b, 3, b as u64, &low_tokens);
        for (k, g) in groups.iter_mut().enumerate() {
            if k % 3 == 1 {
                let mut text = input(&vlm, k);
                text.prompt.tokens.retain(|t| *t != IMAGE);
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
    let learner = PolicyTrainer::new(vlm, Some(model(SEED)), settings).expect("a trainer of one rank");
    for (b, groups) in batches.iter().enumerate() {
        dump::write(&dir.join(format!("batch-{b}")), &config, &learner, groups).expect("a batch is written");
    }
}

/// Joins the ranks of a `world` over Gloo on the loopback, at this `port` of rank 0, with a ZeRO stage and a number of shards.
pub fn join_ranks((rank, world): (usize, usize), port: u16, (zero, shards): (u8, usize)) -> Rc<Ranks> {
    if world == 1 {
        return Ranks::solo();
    }
    let timeouts =
        Timeouts { rendezvous: Duration::from_secs(60), call: Duration::from_secs(60), ..Timeouts::default() };
    let address = format!("127.0.0.1:{port}");
    let backend = Backend::Gloo;
    let fingerprint = "test".into();
    let setup = Setup { rank, world, address, local_address: None, backend, fingerprint, token: None, timeouts };
    let group = open(&setup).expect("all ranks join");
    Ranks::new(group, ZeroStage::from_number(zero), shards).expect("shards divide the ranks")
}

/// Performs all updates of a rank and writes its view of the state to a file; `before` and `after` surround the updates.
fn work(
    spec: &RankSpec,
    before: impl FnOnce(&RankSpec, &mut PolicyTrainer),
    after: impl FnOnce(&RankSpec, &PolicyTrainer),
) -> Vec<Update> {
    tch::set_num_threads(1);
    let kind = if spec.double { Kind::Double } else { Kind::Float };
    let load = || Vlm::load(&spec.dir.join("base"), Device::Cpu, kind).expect("the recorded model loads");
    let ranks = join_ranks((spec.rank, spec.world), spec.port, (spec.zero, spec.shards));
    let vlm = load();
    let patch_len = vlm.config().vision.patch_len();
    let settings = settings(&vlm, spec);
    let mut learner = PolicyTrainer::distributed(
        ranks,
        Models { vlm, reference: Some(load()), critic: spec.critic.then(load) },
        settings,
    )
    .expect("a trainer of several ranks");
    before(spec, &mut learner);
    let mut out = Vec::new();
    for b in spec.batches.0..spec.batches.1 {
        let groups = dump::load(&spec.dir.join(format!("batch-{b}")), patch_len).expect("a batch is read");
        let r = learner.update(&groups).expect("the batch is trained");
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
    learner.gather_parameters().expect("parameters are gathered");
    let (mut state, moments) = learner.state().expect("the state is gathered");
    for (name, tensor) in &state {
        if let Some(own) = learner.vlm().parameter(name) {
            assert_eq!(own, tensor, "{name}");
        }
    }
    state.extend(moments);
    write_safetensors(&state_path(spec, spec.rank), &state).expect("the state is written");
    after(spec, &learner);
    out
}

/// Returns the file with the final state of a rank.
fn state_path(spec: &RankSpec, rank: usize) -> PathBuf {
    spec.dir.join(format!("state-{rank}.safetensors"))
}

/// Returns the file with the updates of a rank.
fn updates_path(spec: &RankSpec, rank: usize) -> PathBuf {
    spec.dir.join(format!("updates-{rank}.json"))
}

/// The process of one rank, to be called by the test that [`run`] starts. `before` and `after` surround the updates.
#[expect(clippy::disallowed_methods, reason = "a rank reads its task from the environment")]
pub fn serve(before: impl FnOnce(&RankSpec, &mut PolicyTrainer), after: impl FnOnce(&RankSpec, &PolicyTrainer)) {
    let text = std::env::var(RANK_SPEC).expect("started by another test");
    let spec: RankSpec = serde_json::from_str(&text).expect("a specification");
    let updates = serde_json::to_vec(&work(&spec, before, after)).expect("finite numbers");
    std::fs::write(updates_path(&spec, spec.rank), updates).expect("updates are written");
}

fn start(spec: &RankSpec, test: &str, environment: &[(&str, &str)]) -> Child {
    let mut command = ignored_test(test);
    command.envs(environment.iter().copied());
    command.env(RANK_SPEC, serde_json::to_string(spec).expect("a specification"));
    command.stdout(Stdio::null()).spawn().expect("a process for the rank")
}

/// Runs all ranks as processes that execute the ignored `test` in this `environment`; returns the updates and final state of each.
pub fn run(spec: &RankSpec, test: &str, environment: &[(&str, &str)]) -> Vec<(Vec<Update>, NamedTensors)> {
    let port = free_address().port();
    let children: Vec<Child> =
        (0..spec.world).map(|rank| start(&RankSpec { rank, port, ..spec.clone() }, test, environment)).collect();
    for mut child in children {
        let status = child.wait().expect("the rank ends");
        assert!(status.success(), "a rank of {} failed", spec.world);
    }
    let result_of_rank = |rank: usize| {
        let updates = std::fs::read(updates_path(spec, rank)).expect("the rank has written its updates");
        let state = read_safetensors(&state_path(spec, rank)).expect("the rank has written its state");
        (serde_json::from_slice(&updates).expect("updates"), state)
    };
    (0..spec.world).map(result_of_rank).collect()
}

/// Returns the norm of the difference of two tensors, relative to the second.
pub fn relative_difference(a: &Tensor, b: &Tensor) -> f64 {
    let norm = |t: &Tensor| t.to_kind(Kind::Double).norm().double_value(&[]);
    norm(&(a.to_kind(Kind::Double) - b.to_kind(Kind::Double))) / norm(b).max(1e-30)
}
