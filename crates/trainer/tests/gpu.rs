//! Tests of updates on a GPU: equality with the CPU, and deterministic mode. Run by `make test-gpu`; every test fails without a GPU.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and prints what it measured")]

use std::path::Path;

use tch::{Device, Kind, Tensor};
use unveil_core::TrainGroup;
use unveil_model::{Vlm, device};
use unveil_testkit_model::{configured, low_tokens, rollout, write_model};
use unveil_torch_ext::set_deterministic;
use unveil_trainer::{PolicyTrainer, UpdateReport};

fn gpu() -> Device {
    device("cuda").unwrap_or_else(|e| panic!("these tests need a GPU: {e}"))
}

fn load(dir: &Path, device: Device, kind: Kind) -> Vlm {
    Vlm::load(dir, device, kind).unwrap()
}

/// Generates batches with the first weights on the CPU.
fn batches(dir: &Path, count: u64) -> Vec<Vec<TrainGroup>> {
    let vlm = load(dir, Device::Cpu, Kind::Float);
    (0..count).map(|step| rollout(&vlm, 4, 4, step, &low_tokens)).collect()
}

/// Performs one update for each batch; returns the reports and the weights on the CPU.
fn updates(
    vlm: Vlm,
    batches: &[Vec<TrainGroup>],
    (recompute, token_budget): (bool, usize),
) -> (Vec<UpdateReport>, Vec<(String, Tensor)>) {
    let mut settings = configured(&vlm, 10, |l| l.agreement_limit = 1.0);
    (settings.recompute, settings.token_budget) = (recompute, token_budget);
    settings.objective.attention_coef = 0.5;
    let mut trainer = PolicyTrainer::new(vlm, None, settings).unwrap();
    let reports: Vec<UpdateReport> = batches.iter().map(|batch| trainer.update(batch).unwrap()).collect();
    assert!(reports.iter().all(|r| r.skipped.is_none()));
    let (weights, _) = trainer.state().unwrap();
    (reports, weights.into_iter().map(|(name, t)| (name, t.to_device(Device::Cpu))).collect())
}

#[test]
fn gpu_update_equals_cpu() {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), 3);
    let batches = batches(dir.path(), 1);
    let (on_cpu, _) = updates(load(dir.path(), Device::Cpu, Kind::Float), &batches, (false, usize::MAX));
    for options in [(false, usize::MAX), (true, 1)] {
        let (on_gpu, _) = updates(load(dir.path(), gpu(), Kind::Float), &batches, options);
        let (a, b) = (&on_cpu[0], &on_gpu[0]);
        println!("loss {} and {}, gradient norm {} and {}", a.loss["loss"], b.loss["loss"], a.grad_norm, b.grad_norm);
        assert!((a.loss["loss"] - b.loss["loss"]).abs() < 1e-4);
        assert!((a.grad_norm - b.grad_norm).abs() < 1e-3 * a.grad_norm);
        assert!(b.agreement.unwrap() < 1e-5, "{b:?}");
    }
}

/// Deterministic algorithms exist for all operations of an update, and repeat it bit for bit.
#[test]
fn deterministic_updates_repeat() {
    let gpu = gpu();
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), 4);
    let batches = batches(dir.path(), 2);
    set_deterministic(true).unwrap();
    for kind in [Kind::Float, Kind::BFloat16] {
        for options in [(false, usize::MAX), (true, 1)] {
            let run = || updates(load(dir.path(), gpu, kind), &batches, options);
            let (reports, weights) = run();
            let (again, same) = run();
            assert_eq!(
                reports.iter().map(|r| r.grad_norm).collect::<Vec<_>>(),
                again.iter().map(|r| r.grad_norm).collect::<Vec<_>>()
            );
            for ((name, a), (_, b)) in weights.iter().zip(&same) {
                assert_eq!(a, b, "{kind:?} {name}");
            }
        }
    }
    set_deterministic(false).unwrap();
}
