//! Losses and gradients of micro-batches add up to those of the batch, for every reduction.

use tch::{Kind, Tensor};
use unveil_algo::{Counts, Objective, TokenLayout};
use unveil_core::{Importance, RatioLevel};

use crate::batch::{Batch, LEAVES};
use crate::harness::seed;
use crate::losses::REDUCTIONS;

/// Returns the batch that consists of both.
fn joined(a: &Batch, b: &Batch) -> Batch {
    let layout = TokenLayout::new([a.layout.lengths(), b.layout.lengths()].concat());
    let tokens = a.layout.tokens() as i64;
    let responses = a.get("baseline").numel() as i64;
    let both = |k: &str| {
        let second = match k {
            "mention_tokens" => b.get(k) + tokens,
            "mention_response" => b.get(k) + responses,
            _ => b.get(k).shallow_clone(),
        };
        Tensor::cat(&[a.get(k), &second], 0)
    };
    let named = a.named.iter().map(|(k, _)| (*k, both(k))).collect();
    Batch { layout, named }
}

/// Pads attention rows to `cells`; the added cells get no attention.
fn widened(mut batch: Batch, cells: i64) -> Batch {
    for (k, t) in &mut batch.named {
        let fill = if *k == "scores" { f64::NEG_INFINITY } else { 0.0 };
        if *k == "scores" || *k == "coverage" {
            *t = t.constant_pad_nd([0, cells - t.size()[1]]) + pad_mask(t, cells, fill);
        }
    }
    batch
}

fn pad_mask(t: &Tensor, cells: i64, fill: f64) -> Tensor {
    let rows = t.size()[0];
    let width = t.size()[1];
    let inside = Tensor::zeros([rows, width], (t.kind(), t.device()));
    Tensor::cat(&[inside, Tensor::full([rows, cells - width], fill, (t.kind(), t.device()))], 1)
}

#[test]
fn losses_and_gradients_add_up() {
    for (i, reduction) in REDUCTIONS.into_iter().enumerate() {
        let first_seed = seed(5000 + 10 * i as u64);
        let part = |k: u64| widened(Batch::random(first_seed + k, Kind::Double), 16);
        let a = part(0);
        let b = part(1);
        let whole = joined(&a, &b);
        let counts: Counts = a.counts() + b.counts();
        assert_eq!(counts, whole.counts());
        let objective = Objective {
            reduction,
            max_length: 12,
            ratio: if i % 2 == 0 { RatioLevel::Token } else { RatioLevel::Sequence },
            importance: Importance::Truncate,
            importance_cap: 2.0,
            value_coef: 0.5,
            value_clip: 0.2,
            entropy_coef: 0.01,
            kl_coef: 0.1,
            attention_coef: 0.3,
            ..Objective::surrogate(0.2, 0.28)
        };
        let (all, gradients) = whole.loss(&objective, &counts).unwrap();
        let (first, mut gradients_a) = a.loss(&objective, &counts).unwrap();
        let (second, gradients_b) = b.loss(&objective, &counts).unwrap();
        let value = |t: &Tensor| t.double_value(&[]);
        let sums = [
            (&all.loss, &first.loss, &second.loss),
            (&all.policy, &first.policy, &second.policy),
            (&all.kl, &first.kl, &second.kl),
            (&all.attention, &first.attention, &second.attention),
            (&all.means.entropy, &first.means.entropy, &second.means.entropy),
            (&all.means.clip_fraction, &first.means.clip_fraction, &second.means.clip_fraction),
        ];
        for (whole, a, b) in sums {
            assert!((value(whole) - value(a) - value(b)).abs() < 1e-12, "{reduction:?}");
        }
        for ((leaf, whole), (a, b)) in LEAVES.iter().zip(&gradients).zip(gradients_a.drain(..).zip(&gradients_b)) {
            let difference = (whole - Tensor::cat(&[&a, b], 0)).abs().max();
            assert!(value(&difference) < 1e-14, "{reduction:?}: gradient of {leaf} differs by {difference:?}");
        }
    }
}
