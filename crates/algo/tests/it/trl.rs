//! Compares the loss with TRL's `GRPOTrainer._compute_loss` of the pinned version, called by `trl_losses.py`.

use serde_json::json;
use tch::Kind;
use unveil_algo::{ClipRange, Objective};
use unveil_core::{Importance, LossReduction, RatioLevel, Surrogate};

use crate::batch::Batch;
use crate::harness::{Cases, DOUBLE, seed};

/// TRL's names of its reductions and surrogates.
const LOSSES: [(&str, LossReduction); 6] = [
    ("grpo", LossReduction::SequenceTokenMean),
    ("bnpo", LossReduction::Token),
    ("dr_grpo", LossReduction::SequenceMaxLength),
    ("dapo", LossReduction::Token),
    ("luspo", LossReduction::SequenceTokenSum),
    (CISPO, LossReduction::Token),
];

const CISPO: &str = "cispo";

#[test]
fn losses_match_trl() {
    let mut cases = Cases::default();
    let mut ours = Vec::new();
    for (i, (name, reduction)) in LOSSES.into_iter().enumerate() {
        for round in 0..6usize {
            let batch = Batch::random(seed(9000 + 100 * i as u64 + round as u64), Kind::Double);
            let objective = Objective {
                reduction,
                max_length: 12,
                surrogate: if name == CISPO { Surrogate::Cispo } else { Surrogate::Clip },
                // TRL's CISPO has no lower bound.
                clip: ClipRange {
                    low: if name == CISPO { 1.0 } else { 0.2 },
                    high: 0.28,
                    dual: [None, Some(2.5)][round % 2],
                },
                ratio: [RatioLevel::Token, RatioLevel::Sequence][round / 2 % 2],
                importance: [Importance::None, Importance::Truncate, Importance::Mask][round % 3],
                importance_cap: [0.0, 2.0, 1.7][round % 3],
                kl_coef: [0.0, 0.04][round % 2],
                // TRL's entropy bonus is a mean over tokens for every loss type; ours follows the reduction.
                entropy_coef: if reduction == LossReduction::Token { 0.02 } else { 0.0 },
                ..Objective::surrogate(0.2, 0.28)
            };
            let correction = match objective.importance {
                Importance::Truncate => "token_truncate",
                Importance::Mask => "token_mask",
                _ => "none",
            };
            // In its CISPO, `epsilon_high` is the largest weight itself.
            let epsilon_high = objective.clip.high + if name == CISPO { 1.0 } else { 0.0 };
            let settings = json!({
                "lengths": batch.layout.lengths(), "loss_type": name, "epsilon_low": objective.clip.low,
                "epsilon_high": epsilon_high, "delta": objective.clip.dual, "beta": objective.kl_coef,
                "entropy_coef": objective.entropy_coef, "level": format!("{:?}", objective.ratio).to_lowercase(),
                "correction": correction, "cap": objective.importance_cap, "max_completion_length": objective.max_length,
            });
            let case = format!("{name}-{round}");
            cases.add(&case, settings, batch.tensors());
            ours.push((case, objective, batch));
        }
    }
    let want = cases.run("trl_losses.py");
    for (case, objective, batch) in &ours {
        let (parts, gradients) = batch.loss(objective, &batch.counts()).unwrap();
        want.assert_close(case, "loss", &parts.loss, DOUBLE);
        want.assert_close(case, "grad_logprobs", &gradients[0], DOUBLE);
        want.assert_close(case, "grad_entropy", &gradients[1], DOUBLE);
    }
}
