//! Stage 1 of several ranks: the ranks run as processes, resume together, and reach the weights of one rank.

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;

use serde_json::Value;
use tch::Tensor;
use unveil_config::Config;
use unveil_config::schema::{Optimizer, SftLora, SftPhase};
use unveil_data::records::RecordFile;
use unveil_datasets::synth::RECORDS_FILE;
use unveil_learner::{Dataset, Outcome, SilentProgress, Stage, ValidationResult, run_sft};
use unveil_model::read_safetensors;
use unveil_preprocess::preprocessor::Preprocessor;
use unveil_service::CancellationToken;
use unveil_testkit::{free_address, ignored_test};

use crate::common::small_run::{SmallRun, StopAt};

/// Environment variables of a rank: its configuration, the directory of the fixture, and the update at which it stops.
const CONFIG: &str = "UNVEIL_TEST_SFT_CONFIG";
const FIXTURE: &str = "UNVEIL_TEST_SFT_FIXTURE";
const STOP: &str = "UNVEIL_TEST_SFT_STOP";

/// Runs one rank in this process.
fn train(config: Config, fixture: &Path, stop: u64) -> (Outcome, Vec<Value>) {
    let records = RecordFile::load(&fixture.join("data").join(RECORDS_FILE)).unwrap();
    let model = fixture.join("model0");
    let preprocessor = Arc::new(Preprocessor::load(&model).unwrap());
    let cancel = CancellationToken::new();
    let mut events = StopAt { kind: "sft", step: stop, cancel: cancel.clone(), seen: vec![] };
    let mut evaluator = |_: &mut unveil_model::Vlm, step: u64| {
        let score = if step == 2 { 1.0 } else { 0.5 };
        Ok(ValidationResult { metrics: serde_json::Map::new(), score })
    };
    let stage = Stage {
        config: &config,
        model_dir: &model,
        out: &fixture.join("sft-out"),
        data: Arc::new(Dataset::new(&config, records, preprocessor).unwrap()),
        environment: vec![],
        cancel,
        events: &mut events,
        progress: &mut SilentProgress,
        evaluator: Some(&mut evaluator),
    };
    let outcome = run_sft(stage, |_| ()).unwrap();
    (outcome, events.seen)
}

/// The process of a rank other than rank 0, started by other tests.
#[test]
#[ignore = "started by other tests"]
fn rank() {
    let variable = |name: &str| std::env::var(name).expect("started by another test");
    let config: Config = serde_json::from_str(&variable(CONFIG)).unwrap();
    tch::set_num_threads(1);
    train(config, &PathBuf::from(variable(FIXTURE)), variable(STOP).parse().unwrap());
}

/// Trains on all ranks of `config`, rank 0 in this process.
pub(crate) fn train_all(config: &Config, fixture: &Path, stop: u64) -> (Outcome, Vec<Value>) {
    let mut config = config.clone();
    config.sft.parallel.rendezvous = format!("127.0.0.1:{}", free_address().port());
    let start = |rank: usize| -> Child {
        let mut config = config.clone();
        config.sft.parallel.rank = rank;
        let text = serde_json::to_string(&config).unwrap();
        let mut command = ignored_test("sft_ranks::rank");
        command.env(CONFIG, text).env(FIXTURE, fixture).env(STOP, stop.to_string());
        command.stdout(Stdio::null()).spawn().unwrap()
    };
    let children: Vec<Child> = (1..config.sft.parallel.ranks).map(start).collect();
    let outcome = train(config, fixture, stop);
    for mut child in children {
        assert!(child.wait().unwrap().success(), "a rank failed");
    }
    outcome
}

pub(crate) fn fixture() -> SmallRun {
    let mut small = SmallRun::new(7);
    small.config.sft.steps = 4;
    small.config.sft.batch = 5;
    small.config.sft.optimizer.eps = 1e-5;
    small.config.data.augment.flip_horizontal = true;
    small.config.sft.frozen = vec!["vision_tower".into()];
    small
}

fn exported(small: &SmallRun) -> Vec<(String, Tensor)> {
    read_safetensors(&small.dir.path().join("sft-out/model.safetensors")).unwrap()
}

/// Packed, recomputing, sharded over two ranks and interrupted in between, the stage reaches the weights of one rank that pads.
#[test]
fn ranks_that_resume_reach_the_weights_of_one_rank() {
    let plain = fixture();
    let (outcome, events) = train_all(&plain.config, plain.dir.path(), u64::MAX);
    assert_eq!((outcome.interrupted, outcome.step, outcome.exported), (false, 4, Some(4)));
    let losses = |events: &[Value]| -> Vec<f64> {
        events.iter().filter(|e| e["kind"] == "sft").map(|e| e["loss"].as_f64().unwrap()).collect()
    };
    let mut sharded = fixture();
    let sft = &mut sharded.config.sft;
    (sft.packing, sft.recompute, sft.token_budget) = (true, true, 300);
    (sft.parallel.ranks, sft.parallel.zero) = (2, 3);
    let (outcome, first) = train_all(&sharded.config, sharded.dir.path(), 2);
    assert_eq!((outcome.interrupted, outcome.step, outcome.exported), (true, 2, None));
    // Ranks, ZeRO stage, budget and recomputation may change when a run is resumed.
    sharded.config.sft.parallel.zero = 1;
    let (outcome, second) = train_all(&sharded.config, sharded.dir.path(), u64::MAX);
    assert_eq!((outcome.interrupted, outcome.step, outcome.exported), (false, 4, Some(4)));
    let found = [losses(&first), losses(&second)].concat();
    for (a, b) in found.iter().zip(losses(&events)) {
        assert!((a - b).abs() < 1e-4 * b, "{found:?}");
    }
    let wanted = exported(&plain);
    let base = read_safetensors(&plain.dir.path().join("model0/model.safetensors")).unwrap();
    let (mut off, mut size) = (0.0, 0.0);
    for (name, tensor) in exported(&sharded) {
        let of = |all: &[(String, Tensor)]| all.iter().find(|(n, _)| *n == name).map(|(_, t)| t.copy()).unwrap();
        let norm = |t: Tensor| t.square().sum(tch::Kind::Double).double_value(&[]);
        off += norm(&tensor - of(&wanted));
        size += norm(of(&wanted) - of(&base));
    }
    assert!((off / size).sqrt() < 1e-3, "the change of all weights is {} away", (off / size).sqrt());
}

/// With `eval.best` the stage exports the best evaluated model instead of the last.
#[test]
fn best_model_of_stage_1_is_exported() {
    let mut small = fixture();
    small.config.eval.best = "mean_iou".into();
    small.config.sft.eval_every = 1;
    let (outcome, events) = train_all(&small.config, small.dir.path(), u64::MAX);
    assert_eq!((outcome.step, outcome.exported), (4, Some(2)));
    assert_eq!(events.iter().filter(|e| e["kind"] == "eval").count(), 4);
}

/// The merger first, then adapters: each phase trains what it names, with its own schedule. Interrupted in the second phase and resumed on two
/// ranks, the stage reaches the weights of one rank.
#[test]
fn phases_run_in_order_and_resume() {
    let phased = |ranks: usize| {
        let mut small = fixture();
        small.config.sft.frozen.clear();
        small.config.sft.optimizer = Optimizer::default();
        let optimizer = Optimizer { warmup: 1, decay: 0.0, eps: 1e-5, ..Optimizer::default() };
        let frozen = ["language_model", "vision_tower"].map(str::to_owned).to_vec();
        let merger = SftPhase { steps: 2, frozen, lora: SftLora::default(), optimizer: optimizer.clone() };
        let lora = SftLora { rank: 3, ..SftLora::default() };
        let adapters = SftPhase { steps: 2, frozen: Vec::new(), lora, optimizer: Optimizer { lr: 2e-3, ..optimizer } };
        small.config.sft.stage = vec![merger, adapters];
        small.config.sft.parallel.ranks = ranks;
        small
    };
    let plain = phased(1);
    let (outcome, events) = train_all(&plain.config, plain.dir.path(), u64::MAX);
    assert_eq!((outcome.interrupted, outcome.step, outcome.exported), (false, 4, Some(4)));
    let updates = |events: &[Value]| -> Vec<(u64, f64)> {
        let updates = events.iter().filter(|e| e["kind"] == "sft");
        updates.map(|e| (e["step"].as_u64().unwrap(), e["lr"].as_f64().unwrap())).collect()
    };
    assert_eq!(updates(&events), [(1, 1e-3), (2, 1e-3), (3, 2e-3), (4, 2e-3)]);
    let read = |path: PathBuf| read_safetensors(&path.join("model.safetensors")).unwrap();
    let changed = |from: &[(String, Tensor)], to: &[(String, Tensor)]| -> Vec<String> {
        from.iter().zip(to).filter(|((_, a), (_, b))| a != b).map(|((n, _), _)| n.clone()).collect()
    };
    let first = read(plain.run().join("stage1-phase-1"));
    let merger = changed(&read(plain.model()), &first);
    assert!(!merger.is_empty() && merger.iter().all(|n| n.starts_with("visual.merger.")), "{merger:?}");
    let layers = changed(&first, &exported(&plain));
    assert!(!layers.is_empty() && layers.iter().all(|n| n.ends_with("_proj.weight")), "{layers:?}");

    let ranks = phased(2);
    let (outcome, _) = train_all(&ranks.config, ranks.dir.path(), 3);
    assert_eq!((outcome.interrupted, outcome.step), (true, 3));
    let (outcome, events) = train_all(&ranks.config, ranks.dir.path(), u64::MAX);
    assert_eq!((outcome.interrupted, outcome.step, updates(&events)), (false, 4, vec![(4, 2e-3)]));
    for ((name, a), (_, b)) in exported(&ranks).iter().zip(exported(&plain)) {
        let off = (a - &b).norm().double_value(&[]) / b.norm().double_value(&[]).max(1e-9);
        assert!(off < 1e-4, "{name} is {off:e} away");
    }
}

/// A phase that would train nothing ends the stage before its first update.
#[test]
fn a_phase_that_trains_nothing_is_refused() {
    let mut small = fixture();
    small.config.sft.frozen.clear();
    let phase = |frozen: &[&str]| SftPhase {
        steps: 2,
        frozen: frozen.iter().map(|s| (*s).to_owned()).collect(),
        lora: SftLora::default(),
        optimizer: Optimizer::default(),
    };
    small.config.sft.stage = vec![phase(&[]), phase(&["visual.", "model."])];
    let model = small.model();
    let out = small.dir.path().join("sft-out");
    let (mut events, mut silent) = (Vec::new(), SilentProgress);
    let stage = small.stage(&model, &out, &mut events, &mut silent, CancellationToken::new());
    let e = run_sft(stage, |_| ()).unwrap_err().to_string();
    assert!(e.contains("sft.stage, entry 1: frozen: nothing is trained"), "{e}");
    assert_eq!(events.iter().filter(|e| e["kind"] == "sft").count(), 0);
}
