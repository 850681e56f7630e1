//! Trainers of several ranks (real processes, Gloo) against a trainer of one rank, over recorded batches: losses, gradient norms,
//! weights, moments.

use unveil_model::read_safetensors;
use unveil_testkit_model::rank_processes::{ALL_BATCHES, RankSpec, Update, record, relative_difference, run, serve};
use unveil_trainer::NamedTensors;

/// The process of one rank, started by other tests.
#[test]
#[ignore = "started by other tests"]
fn rank() {
    serve(|_, _| {}, |_, _| {});
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
