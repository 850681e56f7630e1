//! Precision modes: generation and training agree within the limit of the mode, rounding happens where it should, gradients are fp32.

use tch::{Device, Kind, Tensor};
use tempfile::TempDir;
use unveil_core::{Compute, Prompt};
use unveil_model::{CacheShape, GroupCache, PackedBatch, PackedGroup, Vlm, agreement_limit, logprobs};

use crate::common::{lively, max_diff};

const RESPONSES: usize = 4;
const TOKENS: usize = 14;

/// Writes a lively tiny model whose weights are bf16 numbers, so that modes differ by their computation alone.
fn directory() -> TempDir {
    let first = tempfile::tempdir().unwrap();
    let dir = tempfile::tempdir().unwrap();
    lively(first.path()).save_as(dir.path(), Kind::BFloat16).unwrap();
    dir
}

/// Loads a model with weights of dtype `kind`.
fn load(dir: &TempDir, kind: Kind, compute: Compute) -> Vlm {
    let mut vlm = Vlm::load(dir.path(), Device::Cpu, kind).unwrap();
    vlm.set_compute(compute).unwrap();
    vlm
}

fn group() -> PackedGroup {
    let token = |i: usize| 10 + (i * i * 7 + i * 31) as u32 % 280;
    PackedGroup {
        prompt: Prompt { tokens: (0..23).map(token).collect(), grids: Vec::new() },
        responses: (1..=RESPONSES).map(|r| (0..TOKENS).map(|i| token(100 * r + i)).collect()).collect(),
    }
}

/// Returns the log-probabilities `[N]` of a teacher-forced pass.
fn forced(vlm: &Vlm) -> Tensor {
    let batch = PackedBatch::build(&[group()], vlm.config(), Device::Cpu).unwrap();
    let out = vlm.forward_packed(&batch, None, None).unwrap();
    logprobs(&vlm.lm_head(&out.hidden), &batch.targets, 1.0, &[])
}

/// Returns the same log-probabilities, from decoding step by step.
fn decoded(vlm: &Vlm) -> Tensor {
    let _guard = tch::no_grad_guard();
    let group = group();
    let prefill = vlm.prefill(std::slice::from_ref(&group.prompt), None).unwrap();
    let shape = CacheShape { slots: 1, n: RESPONSES, prompt: 23, response: TOKENS, images: 0 };
    let mut cache = vlm.cache(shape, None, false).unwrap();
    cache.admit(&prefill, &[0]).unwrap();
    let rows: Vec<usize> = (0..RESPONSES).collect();
    let mut hidden = prefill.last_hidden.expand([RESPONSES as i64, -1], false);
    let mut columns = Vec::new();
    for step in 0..TOKENS {
        let tokens: Vec<i64> = group.responses.iter().map(|r| i64::from(r[step])).collect();
        let tokens = Tensor::from_slice(&tokens);
        columns.push(logprobs(&vlm.lm_head(&hidden), &tokens, 1.0, &[]));
        if step + 1 < TOKENS {
            hidden = vlm.decode_step(&mut cache, &tokens, &rows).unwrap().hidden;
        }
    }
    Tensor::stack(&columns, 1).reshape([-1])
}

fn mean_gap(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().mean(Kind::Double).double_value(&[])
}

#[test]
fn decoding_agrees_with_teacher_forcing_in_every_mode() {
    let dir = directory();
    let exact = tch::no_grad(|| forced(&load(&dir, Kind::Float, Compute::Exact)));
    for kind in [Kind::Float, Kind::BFloat16] {
        for compute in [Compute::Exact, Compute::Fast] {
            let vlm = load(&dir, kind, compute);
            let learner = tch::no_grad(|| forced(&vlm));
            let mean = mean_gap(&decoded(&vlm), &learner);
            let off = mean_gap(&learner, &exact);
            println!("{kind:?} {compute:?}: agreement {mean:.1e}, distance from fp32 {off:.1e}");
            assert!(mean < agreement_limit(compute, kind), "{kind:?} {compute:?}: {mean:.1e}");
            // The weights are bf16 numbers: only the rounding of the operands changes the result, by 2^-9 each at most.
            match compute {
                Compute::Fast => assert!((1e-4..0.3).contains(&off), "{kind:?}: {off:.1e}"),
                _ => assert!(off < 1e-5, "{kind:?}: {off:.1e}"),
            }
        }
    }
}

/// The shorter mantissa of a cache is that of both sides: a learner that did not round keys and values would disagree more.
#[test]
fn fast_mode_has_a_bf16_cache() {
    let dir = directory();
    let vlm = load(&dir, Kind::Float, Compute::Fast);
    let shape = CacheShape { slots: 2, n: 3, prompt: 32, response: 16, images: 0 };
    let cache = vlm.cache(shape, None, false).unwrap();
    assert_eq!((cache.kind(), vlm.cache_kind()), (Kind::BFloat16, Kind::BFloat16));
    let bytes = |kind| GroupCache::bytes(&vlm.config().text, &shape, kind);
    assert_eq!(bytes(Kind::Float), 2 * bytes(cache.kind()));
    let exact = load(&dir, Kind::BFloat16, Compute::Exact);
    assert_eq!(exact.cache(shape, None, false).unwrap().kind(), Kind::Float);
    let fast = tch::no_grad(|| forced(&vlm));
    let generated = decoded(&vlm);
    assert!(mean_gap(&generated, &fast) < mean_gap(&generated, &tch::no_grad(|| forced(&exact))));
}

/// Gradients of bf16 matrices are fp32 numbers that no rounding to bf16 has touched; those of norms and embeddings pass through a bf16
/// tensor. In the fast mode they differ from those of the exact mode by the rounding of operands.
#[test]
fn gradients_of_bf16_weights_are_fp32() {
    let dir = directory();
    let gradients = |kind: Kind, compute: Compute| -> Vec<(String, Tensor)> {
        let vlm = load(&dir, kind, compute);
        vlm.set_trainable(|name| !name.starts_with("visual."));
        forced(&vlm).mean(Kind::Float).backward();
        let trained = vlm.named_parameters().iter().filter(|(_, t)| t.requires_grad());
        trained.map(|(name, t)| (name.clone(), t.grad().copy())).collect()
    };
    let expected = gradients(Kind::Float, Compute::Exact);
    assert!(expected.len() > 10);
    for (compute, limit) in [(Compute::Exact, 1e-4f64), (Compute::Fast, 0.5)] {
        for ((name, expected), (_, found)) in expected.iter().zip(gradients(Kind::BFloat16, compute)) {
            assert_eq!(found.kind(), Kind::Float, "{name}");
            let norm = expected.norm().double_value(&[]);
            let off = (&found - expected).norm().double_value(&[]) / norm.max(1e-6);
            let matrix = found.dim() == 2 && !name.contains("embed_tokens");
            let limit = if matrix { limit } else { limit.max(5e-3) };
            assert!(off < limit, "{name}, {compute:?}: {off:.1e}");
            let rounded = found.to_kind(Kind::BFloat16).to_kind(Kind::Float);
            assert!(!matrix || max_diff(&rounded, &found) > 0.0, "{name} was rounded to bf16");
        }
    }
}

#[test]
fn tf32_without_a_gpu_is_refused() {
    let mut vlm = load(&directory(), Kind::Float, Compute::Fast);
    let e = vlm.set_compute(Compute::Tf32).unwrap_err().to_string();
    assert!(e.contains("tf32") && e.contains("needs a GPU"), "{e}");
    assert_eq!(vlm.compute(), Compute::Fast);
}
