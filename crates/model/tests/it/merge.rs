//! Merging of adapters into the weights: no drift, restored originals, refusals.

use tch::{Device, Kind, Tensor};
use unveil_core::Family;
use unveil_model::{AdapterMerger, LoraSpec, Vlm};

use crate::common::{fresh, max_diff};

fn model() -> Vlm {
    fresh(Family::Qwen2_5Vl, 3)
}

fn state(vlm: &Vlm) -> Vec<(String, Tensor)> {
    vlm.named_parameters().iter().map(|(n, t)| (n.clone(), t.detach().copy())).collect()
}

fn adapters(seed: i64, targets: &[&str]) -> Vec<(String, Tensor)> {
    let targets = targets.iter().map(|t| (*t).to_owned()).collect();
    let mut vlm = model();
    vlm.init_adapters(&LoraSpec { rank: 2, alpha: 4.0, rank_stabilised: false, targets }, 0).expect("adapts");
    tch::manual_seed(seed);
    let parameters = vlm.adapters().expect("there").named_parameters();
    parameters.iter().map(|(n, t)| (n.clone(), t.randn_like())).collect()
}

/// Many merges equal one, and can be undone.
#[test]
fn merges_do_not_drift() {
    let mut vlm = model();
    let before = state(&vlm);
    let mut merger = AdapterMerger::default();
    let last = adapters(9, &["q_proj", "down_proj", "visual.*.qkv"]);
    for seed in 0..5 {
        merger.merge(&mut vlm, &adapters(seed, &["q_proj", "up_proj"]), 0.5).expect("merges");
    }
    merger.merge(&mut vlm, &last, 0.5).expect("merges");
    let mut once = model();
    AdapterMerger::default().merge(&mut once, &last, 0.5).expect("merges");
    let merged = state(&vlm);
    let merged_once = state(&once);
    assert!(merged == merged_once, "earlier merges leave no trace");
    let moved = merged_once.iter().zip(&before).filter(|(a, b)| a != b).count();
    assert_eq!(moved, last.len() / 2);
    let name = "model.layers.0.mlp.down_proj";
    let find = |list: &[(String, Tensor)], n: String| {
        list.iter().find(|(name, _)| *name == n).expect("there").1.to_kind(Kind::Double)
    };
    let a = find(&last, format!("{name}.lora_A.weight"));
    let b = find(&last, format!("{name}.lora_B.weight"));
    let expected = find(&before, format!("{name}.weight")) + b.matmul(&a) * 0.5;
    let gap = max_diff(&find(&merged, format!("{name}.weight")), &expected);
    assert!(gap < 1e-5, "{gap}");
    merger.restore(&mut vlm).expect("restores");
    assert!(state(&vlm) == before);
}

#[test]
fn overwritten_weights_become_the_originals() {
    let mut vlm = model();
    let mut merger = AdapterMerger::default();
    let lora = adapters(1, &["o_proj"]);
    merger.merge(&mut vlm, &lora, 1.0).expect("merges");
    let new: Vec<_> = state(&vlm).into_iter().map(|(n, t)| (n, t * 2.0)).collect();
    vlm.load_state(&new).expect("fits");
    merger.forget(|_| true);
    merger.merge(&mut vlm, &lora, 1.0).expect("merges");
    merger.restore(&mut vlm).expect("restores");
    assert!(state(&vlm) == new);
}

#[test]
fn invalid_adapters_leave_the_model_unchanged() {
    let mut vlm = model();
    let before = state(&vlm);
    let valid = adapters(1, &["q_proj"]);
    let copy = || valid.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect::<Vec<_>>();
    let mut refuse = |named: Vec<(String, Tensor)>, scale: f64| {
        let e = AdapterMerger::default().merge(&mut vlm, &named, scale).unwrap_err().to_string();
        assert!(state(&vlm) == before, "{e}");
        e
    };
    let e = refuse(copy().into_iter().skip(1).collect(), 1.0);
    assert!(e.contains("`model.layers.0.self_attn.q_proj.lora_A.weight` is missing"), "{e}");
    let e = refuse(copy().into_iter().take(1).collect(), 1.0);
    assert!(e.contains("`model.layers.0.self_attn.q_proj.lora_B.weight` is missing"), "{e}");
    let mut twice = copy();
    twice.extend(copy());
    assert!(refuse(twice, 1.0).contains("twice"));
    let mut other = copy();
    for (name, _) in &mut other {
        *name = name.replace("layers.0", "layers.99");
    }
    assert!(refuse(other, 1.0).contains("layers.99"));
    let mut misshapen = copy();
    misshapen[0].1 = Tensor::zeros([2, 7], (Kind::Float, Device::Cpu));
    let e = refuse(misshapen, 1.0);
    assert!(e.contains("q_proj.lora_A.weight") && e.contains("[2, 7]"), "{e}");
    assert!(refuse(vec![("model.norm.weight".into(), Tensor::new())], 1.0).contains("not a tensor of an adapter"));
    assert!(refuse(copy(), f64::NAN).contains("NaN"));
}
