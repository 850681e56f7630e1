//! Trainers of several ranks (real processes, Gloo) against a trainer of one rank, over recorded batches: losses, gradient norms,
//! weights, moments.

use std::collections::BTreeSet;

use unveil_model::read_safetensors;
use unveil_testkit_model::rank_processes::{ALL_BATCHES, RankSpec, Update, record, relative_difference, run, serve};
use unveil_torch_ext::memory_size;
use unveil_trainer::{NamedTensors, PolicyTrainer, TrainerError};

/// The process of one rank, started by other tests.
#[test]
#[ignore = "started by other tests"]
fn rank() {
    serve(|_, _| {}, check_visit);
}

/// Checks that rank 0 reads every parameter once, with the weights of the optimiser, and that the others are not whole meanwhile.
fn check_visit(spec: &RankSpec, trainer: &PolicyTrainer) {
    let (weights, _) = trainer.state().unwrap();
    let mut names = Vec::new();
    let visited: Result<(), TrainerError> = trainer.visit_parameters(&mut |part| {
        for (name, tensor) in part {
            if let Some((_, own)) = weights.iter().find(|(n, _)| n == name) {
                assert_eq!(tensor, own, "{name}");
            }
            names.push(name.clone());
        }
        if spec.zero == 3 {
            let all = trainer.vlm().named_parameters().iter();
            let held = all.filter(|(_, t)| memory_size(t).unwrap() != Some(0)).map(|(n, _)| n);
            let layers: BTreeSet<&str> =
                held.filter_map(|n| n.strip_prefix("model.layers.")?.split('.').next()).collect();
            assert!(layers.len() <= 1, "{layers:?}");
        }
        Ok(())
    });
    visited.unwrap();
    let expected = if spec.rank == 0 { trainer.vlm().named_parameters().len() } else { 0 };
    assert_eq!((names.len(), names.iter().collect::<BTreeSet<_>>().len()), (expected, expected));
    trainer.gather_on_rank_0().unwrap();
    for (name, tensor) in trainer.vlm().named_parameters() {
        let is_whole = memory_size(tensor).unwrap() != Some(0);
        assert_eq!(is_whole, spec.rank == 0 || spec.zero < 3 || spec.world == 1, "{name}");
    }
}

fn run_ranks(spec: &RankSpec) -> Vec<(Vec<Update>, NamedTensors)> {
    run(spec, "ranks::rank", &[])
}

fn compare(double: bool, (ppo, critic): (bool, bool), small: bool, worlds: &[(usize, u8, usize)]) {
    let dir = tempfile::tempdir().unwrap();
    record(dir.path());
    let solo = RankSpec { dir: dir.path().into(), double, ppo, critic, small, ..ALL_BATCHES };
    let base: Vec<_> = read_safetensors(&dir.path().join("base/model.safetensors")).unwrap();
    let (wanted, state) = run_ranks(&solo).remove(0);
    let (of_loss, of_state) = if double { (1e-9, 1e-9) } else { (1e-4, 1e-3) };
    for (world, zero, shards) in worlds.iter().copied() {
        let what = format!("{world} ranks, zero {zero}, {shards} shards, fp64 {double}, ppo {ppo}");
        for (updates, found) in run_ranks(&RankSpec { world, zero, shards, ..solo.clone() }) {
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
