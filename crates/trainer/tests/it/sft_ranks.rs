//! Stage 1 on several ranks (real processes, Gloo) against one rank that pads: losses, gradients, weights, moments, at every ZeRO stage,
//! packed and padded, also in bf16.

use std::path::PathBuf;
use std::process::{Child, Stdio};

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};
use unveil_config::schema::Optimizer;
use unveil_model::{Vlm, read_safetensors, write_safetensors};
use unveil_testkit::{free_address, ignored_test};
use unveil_testkit_model::rank_processes::{join_ranks, relative_difference};
use unveil_testkit_model::write_model;
use unveil_trainer::{Freezing, SftBatch, SftSettings, SftTrainer};

use crate::sft::batch;

const SPEC: &str = "UNVEIL_TEST_SFT_RANK";
/// Numbers of samples of the batches; some ranks have none.
const BATCHES: [usize; 3] = [7, 2, 1];

/// Work of a rank's process.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Spec {
    dir: PathBuf,
    rank: usize,
    world: usize,
    zero: u8,
    shards: usize,
    port: u16,
    dtype: Dtype,
    packing: bool,
    recompute: bool,
    /// A small token budget, so that a rank needs several micro-batches.
    small: bool,
    /// Whether the vision tower is frozen.
    frozen: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
enum Dtype {
    #[default]
    Double,
    Float,
    BFloat16,
}

impl Dtype {
    fn kind(self) -> Kind {
        match self {
            Self::Double => Kind::Double,
            Self::Float => Kind::Float,
            Self::BFloat16 => Kind::BFloat16,
        }
    }
}

/// Losses and gradient norms of the updates, and the final weights, moments and gradients, by name.
type Outcome = (Vec<(f64, f64)>, Vec<(String, Tensor)>);

fn settings(spec: &Spec) -> SftSettings {
    let optimizer = Optimizer { lr: 1e-3, warmup: 2, weight_decay: 0.1, clip_norm: 0.5, ..Optimizer::default() };
    let mut s = SftSettings::new(optimizer, 10);
    s.packing = spec.packing;
    s.recompute = spec.recompute;
    if spec.small {
        s.token_budget = 30;
    }
    if spec.frozen {
        s.freezing = Freezing::always("sft.frozen", &["vision_tower".to_owned()]);
    }
    s
}

/// Removes the pixels of samples that other ranks compute.
fn keep_local_pixels(trainer: &SftTrainer, samples: &mut SftBatch) {
    let local = trainer.local_samples(samples).unwrap();
    for (i, input) in samples.inputs.iter_mut().enumerate() {
        if !local.contains(&i) {
            let mut other = (**input).clone();
            other.patches.clear();
            *input = other.into();
        }
    }
}

/// The process of one rank, started by other tests.
#[test]
#[ignore = "started by other tests"]
fn rank() {
    let spec: Spec = serde_json::from_str(&std::env::var(SPEC).expect("started by another test")).unwrap();
    tch::set_num_threads(1);
    let ranks = join_ranks((spec.rank, spec.world), spec.port, (spec.zero, spec.shards));
    let load = |kind| Vlm::load(&spec.dir.join("base"), Device::Cpu, kind).unwrap();
    let mut trainer = SftTrainer::distributed(ranks, load(spec.dtype.kind()), settings(&spec)).unwrap();
    trainer.record_gradients();
    let exact: Vec<(String, Tensor)> = if spec.dtype == Dtype::BFloat16 && spec.rank == 0 {
        let vlm = load(Kind::Float);
        vlm.named_parameters().iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect()
    } else {
        Vec::new()
    };
    trainer.broadcast_from_rank_0(&exact).unwrap();
    let mut updates = Vec::new();
    for (step, count) in BATCHES.iter().enumerate() {
        let mut samples = batch(trainer.vlm(), 9 * step, *count);
        keep_local_pixels(&trainer, &mut samples);
        let report = trainer.update(&samples).unwrap();
        assert_eq!(report.skipped, None);
        updates.push((report.loss, report.grad_norm));
    }
    trainer.gather_parameters().unwrap();
    let (mut state, moments) = trainer.state().unwrap();
    for (name, tensor) in &state {
        let own = trainer.vlm().parameter(name).unwrap();
        assert_eq!(*own, tensor.to_kind(own.kind()), "{name}");
    }
    state.extend(moments);
    let gradients = trainer.recorded_gradients().iter().map(|(n, t)| (format!("gradient.{n}"), t.shallow_clone()));
    state.extend(gradients);
    write_safetensors(&spec.dir.join(format!("state-{}.safetensors", spec.rank)), &state).unwrap();
    let path = spec.dir.join(format!("updates-{}.json", spec.rank));
    std::fs::write(path, serde_json::to_vec(&updates).unwrap()).unwrap();
}

/// Runs all ranks; returns the outcome of each.
fn run(spec: &Spec) -> Vec<Outcome> {
    let port = free_address().port();
    let start = |rank: usize| -> Child {
        let spec = serde_json::to_string(&Spec { rank, port, ..spec.clone() }).unwrap();
        ignored_test("sft_ranks::rank").env(SPEC, spec).stdout(Stdio::null()).spawn().unwrap()
    };
    let children: Vec<Child> = (0..spec.world).map(start).collect();
    for mut child in children {
        assert!(child.wait().unwrap().success(), "a rank of {} failed: {spec:?}", spec.world);
    }
    let outcome = |rank: usize| {
        let updates = std::fs::read(spec.dir.join(format!("updates-{rank}.json"))).unwrap();
        let state = read_safetensors(&spec.dir.join(format!("state-{rank}.safetensors"))).unwrap();
        (serde_json::from_slice(&updates).unwrap(), state)
    };
    (0..spec.world).map(outcome).collect()
}

/// Compares `specs`, given as ranks, ZeRO stage and shards, with one rank that pads and computes each batch in one pass.
fn compare(dtype: Dtype, change: impl Fn(&mut Spec), layouts: &[(usize, u8, usize)]) {
    let dir = tempfile::tempdir().unwrap();
    write_model(&dir.path().join("base"), 5);
    let base = read_safetensors(&dir.path().join("base/model.safetensors")).unwrap();
    let mut varied = Spec { dir: dir.path().into(), world: 1, dtype, ..Spec::default() };
    change(&mut varied);
    let plain = Spec { packing: false, recompute: false, small: false, ..varied.clone() };
    let (wanted, state) = run(&plain).remove(0);
    let (of_loss, of_state) = match dtype {
        Dtype::Double => (1e-9, 1e-9),
        Dtype::Float => (1e-4, 1e-3),
        // Gradients of bf16 weights are rounded to 8 bits on each rank before they are summed.
        Dtype::BFloat16 => (1e-3, 3e-2),
    };
    for (world, zero, shards) in layouts.iter().copied() {
        let spec = Spec { world, zero, shards, ..varied.clone() };
        for (updates, found) in run(&spec) {
            for (u, w) in updates.iter().zip(&wanted) {
                assert!((u.0 - w.0).abs() <= of_loss * w.0, "{spec:?}: loss {}, wanted {}", u.0, w.0);
                assert!((u.1 - w.1).abs() <= of_loss * w.1, "{spec:?}: norm {}, wanted {}", u.1, w.1);
            }
            assert_eq!(found.len(), state.len(), "{spec:?}");
            for (name, wanted) in &state {
                let tensor = &found.iter().find(|(n, _)| n == name).unwrap().1;
                // Weights are compared by their change.
                let before = base.iter().find(|(n, _)| unveil_model::canonical_name(n) == *name).map(|(_, t)| t);
                let (tensor, wanted) = match before {
                    Some(b) => (tensor - b.to_kind(tensor.kind()), wanted - b.to_kind(tensor.kind())),
                    None => (tensor.shallow_clone(), wanted.shallow_clone()),
                };
                let off = relative_difference(&tensor, &wanted);
                assert!(off <= of_state, "{spec:?}: {name} is {off:e} away");
            }
        }
    }
}

#[test]
fn padded_ranks_equal_one_rank() {
    compare(Dtype::Double, |_| (), &[(2, 0, 0), (4, 1, 0), (2, 2, 0), (4, 3, 2)]);
}

#[test]
fn packed_ranks_equal_one_padded_rank() {
    let packed = |s: &mut Spec| (s.packing, s.small) = (true, true);
    compare(Dtype::Double, packed, &[(1, 0, 0), (2, 1, 0), (4, 2, 2), (2, 3, 0), (4, 0, 0)]);
}

#[test]
fn recomputing_ranks_with_frozen_parts_equal_one_rank() {
    let change = |s: &mut Spec| (s.recompute, s.frozen, s.small) = (true, true, true);
    compare(Dtype::Double, change, &[(1, 0, 0), (2, 0, 0), (2, 3, 0)]);
}

#[test]
fn fp32_ranks_are_within_the_tolerance() {
    compare(Dtype::Float, |s| s.packing = true, &[(2, 1, 0), (4, 3, 4)]);
}

#[test]
fn bf16_ranks_are_within_the_tolerance() {
    compare(Dtype::BFloat16, |_| (), &[(2, 0, 0), (2, 2, 0), (4, 3, 2)]);
}
