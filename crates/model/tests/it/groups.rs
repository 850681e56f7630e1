//! Packed groups equal separate sequences, decoding equals teacher forcing, caches can shrink and grow.

use tch::{Device, Kind, Tensor};
use unveil_core::{Family, Prompt};
use unveil_model::{
    AttentionSet, CacheShape, CaptureSpec, ModelError, PackedBatch, PackedGroup, PackedOut, Tape, TapeMode, Var, Vlm,
    logprobs, logprobs_entropy,
};

use crate::common::{lively, lively_of, max_diff};

const VOCAB: u32 = 300;

fn prompt(lead: u32, grids: &[[i64; 3]]) -> Prompt {
    let mut tokens = vec![lead, lead + 1];
    for [t, h, w] in grids {
        tokens.push(5);
        tokens.extend(std::iter::repeat_n(3, (t * h * w / 4) as usize));
        tokens.extend([6, lead + 2]);
    }
    tokens.extend([lead + 3, 20, 21]);
    Prompt { tokens, grids: grids.to_vec() }
}

fn groups() -> Vec<PackedGroup> {
    let response =
        |seed: u32, len: u32| (0..len).map(|i| 10 + (seed * 37 + i * i * 13) % (VOCAB - 10)).collect::<Vec<u32>>();
    vec![
        PackedGroup {
            prompt: prompt(100, &[[1, 12, 12]]),
            responses: (0..4).map(|i| response(i, 5 + 3 * i)).collect(),
        },
        PackedGroup {
            prompt: prompt(120, &[[1, 8, 10], [1, 12, 12]]),
            responses: vec![response(9, 11), response(10, 1)],
        },
        PackedGroup { prompt: prompt(140, &[]), responses: vec![response(20, 7)] },
    ]
}

fn pixels(vlm: &Vlm, groups: &[PackedGroup]) -> (Vec<[i64; 3]>, Tensor) {
    let grids: Vec<[i64; 3]> = groups.iter().flat_map(|g| g.prompt.grids.iter().copied()).collect();
    let rows: i64 = grids.iter().map(|g| g.iter().product::<i64>()).sum();
    tch::manual_seed(5);
    (grids, Tensor::randn([rows, vlm.config().vision.patch_len()], (Kind::Float, Device::Cpu)))
}

/// Runs `check` on a tiny model of each family.
fn for_each_family(check: impl Fn(&Vlm)) {
    for family in Family::ALL {
        let dir = tempfile::tempdir().expect("temporary directory");
        check(&lively_of(family, dir.path()));
    }
}

/// Runs packed groups with the attention of layer 2. Returns the image features, the batch and the result.
fn run_packed(vlm: &Vlm, groups: &[PackedGroup], differentiable: bool) -> (Tensor, PackedBatch, PackedOut) {
    let (grids, pixels) = pixels(vlm, groups);
    let features = vlm.encode_images(&pixels, &grids).expect("features");
    let batch = PackedBatch::build(groups, vlm.config(), Device::Cpu).expect("packs");
    let spec = CaptureSpec { set: AttentionSet::layer(2), differentiable };
    let out = vlm.forward_packed(&batch, Some(&features), Some(spec)).expect("runs");
    (features, batch, out)
}

/// Runs each response in a separate pass. Returns log-probabilities and attention rows in flat order.
fn separately(vlm: &Vlm, groups: &[PackedGroup], pixels: &Tensor, layer: usize) -> (Tensor, Vec<Tensor>) {
    let mut lps = Vec::new();
    let mut rows = Vec::new();
    let mut start = 0;
    for group in groups {
        let count: i64 = group.prompt.grids.iter().map(|g| g.iter().product::<i64>()).sum();
        let features = (count > 0)
            .then(|| vlm.encode_images(&pixels.narrow(0, start, count), &group.prompt.grids).expect("features"));
        start += count;
        for response in &group.responses {
            let single = PackedGroup { prompt: group.prompt.clone(), responses: vec![response.clone()] };
            let batch = PackedBatch::build(&[single], vlm.config(), Device::Cpu).expect("packs");
            let spec = CaptureSpec { set: AttentionSet::layer(layer), differentiable: false };
            let out = vlm.forward_packed(&batch, features.as_ref(), Some(spec)).expect("runs");
            lps.push(logprobs(&vlm.lm_head(&out.hidden), &batch.targets, 0.7, &[3, 4]));
            rows.push(out.attention.expect("captured"));
        }
    }
    (Tensor::cat(&lps, 0), rows)
}

#[test]
fn packed_equals_separate() {
    for_each_family(check_packed);
}

fn check_packed(vlm: &Vlm) {
    let groups = groups();
    let (_, pixels) = pixels(vlm, &groups);
    tch::no_grad(|| {
        let (_, batch, out) = run_packed(vlm, &groups, false);
        let together = logprobs(&vlm.lm_head(&out.hidden), &batch.targets, 0.7, &[3, 4]);
        let (separate, rows) = separately(vlm, &groups, &pixels, 2);
        assert_eq!(batch.len() as i64, separate.size()[0]);
        let diff = max_diff(&together, &separate);
        assert!(diff < 1e-5, "log-probabilities differ by {diff}");
        let attention = out.attention.expect("captured");
        let ranges = batch.ranges.iter().flatten();
        for (range, alone) in ranges.zip(rows) {
            let packed = attention.narrow(0, range.start as i64, range.len() as i64).narrow(1, 0, alone.size()[1]);
            let diff = max_diff(&packed, &alone);
            assert!(diff < 1e-5, "attention differs by {diff}");
        }
    });
}

/// Groups that share a row without padding have the log-probabilities of groups with a padded row each. Attention is not captured.
#[test]
fn shared_row_equals_padded_rows() {
    for_each_family(|vlm| {
        let groups = groups();
        let (grids, pixels) = pixels(vlm, &groups);
        tch::no_grad(|| {
            let features = vlm.encode_images(&pixels, &grids).expect("features");
            let run = |batch: &PackedBatch| {
                let out = vlm.forward_packed(batch, Some(&features), None).expect("runs");
                logprobs(&vlm.lm_head(&out.hidden), &batch.targets, 0.7, &[3, 4])
            };
            let padded = PackedBatch::build(&groups, vlm.config(), Device::Cpu).expect("packs");
            let row = PackedBatch::build_row(&groups, vlm.config(), Device::Cpu).expect("packs");
            let total = groups.iter().map(|g| g.prompt.tokens.len() + g.responses.iter().map(Vec::len).sum::<usize>());
            assert_eq!(row.tokens.size(), [1, total.sum::<usize>() as i64]);
            assert_eq!(
                (row.len(), &row.ranges, &row.image_tokens),
                (padded.len(), &padded.ranges, &padded.image_tokens)
            );
            let diff = max_diff(&run(&row), &run(&padded));
            assert!(diff < 1e-5, "log-probabilities differ by {diff}");
            let spec = CaptureSpec { set: AttentionSet::layer(2), differentiable: false };
            let e = vlm.forward_packed(&row, Some(&features), Some(spec)).expect_err("refused").to_string();
            assert!(e.contains("share a row"), "{e}");
        });
    });
    let empty = PackedGroup { prompt: prompt(100, &[]), responses: vec![Vec::new()] };
    let dir = tempfile::tempdir().expect("temporary directory");
    let vlm = lively(dir.path());
    let e = PackedBatch::build_row(&[empty], vlm.config(), Device::Cpu).expect_err("refused").to_string();
    assert!(e.contains("response 0 is empty"), "{e}");
}

/// Decoding responses of different lengths, with rows that stop, groups that are admitted late and slots that are freed, reused and
/// removed, has the log-probabilities and attention of the packed pass.
#[test]
fn decoding_equals_packed() {
    for_each_family(check_decoding);
}

fn check_decoding(vlm: &Vlm) {
    let mut groups = groups();
    for (g, group) in groups.iter_mut().enumerate() {
        while group.responses.len() < 4 {
            let n = group.responses.len() as u32;
            group.responses.push((0..4 + n).map(|i| 30 + (g as u32 * 50 + n * 11 + i * 7) % 200).collect());
        }
    }
    tch::no_grad(|| {
        let (features, batch, out) = run_packed(vlm, &groups, false);
        let expected = logprobs(&vlm.lm_head(&out.hidden), &batch.targets, 1.0, &[3, 4]);
        let expected_rows = out.attention.expect("captured");

        // Group 1 starts in slot 2 of 3; 0 and 2 join after two steps; slots of finished groups are freed, then removed.
        let feature_rows = |g: usize| groups[g].prompt.grids.iter().map(|x| x.iter().product::<i64>() / 4).sum::<i64>();
        let a = feature_rows(0);
        let b = feature_rows(1);
        let first = vlm.prefill(&[groups[1].prompt.clone()], Some(&features.narrow(0, a, b))).expect("prefill");
        let rest = vlm
            .prefill(&[groups[0].prompt.clone(), groups[2].prompt.clone()], Some(&features.narrow(0, 0, a)))
            .expect("prefill");
        let shape = CacheShape { slots: 3, n: 4, prompt: 10, response: 14, images: 1 };
        let mut cache = vlm.cache(shape, Some(AttentionSet::layer(2)), false).expect("cache");
        cache.admit(&first, &[2]).expect("admits");
        // Hidden states that predict the next token of each (group, response).
        let mut hidden: std::collections::BTreeMap<(usize, usize), Tensor> = Default::default();
        let mut slots: Vec<Option<usize>> = vec![None, None, Some(1)];
        (0..4).for_each(|r| drop(hidden.insert((1, r), first.last_hidden.get(0))));
        for step in 0..40 {
            if step == 2 {
                cache.admit(&rest, &[1, 0]).expect("admits");
                slots = vec![Some(2), Some(0), Some(1)];
                for r in 0..4 {
                    hidden.insert((0, r), rest.last_hidden.get(0));
                    hidden.insert((2, r), rest.last_hidden.get(1));
                }
            }
            let length = |row: usize| cache.lengths()[row] as usize;
            let response_of = |row: usize| slots[row / 4].map(|g| (g, row % 4));
            let rows: Vec<usize> = (0..cache.rows())
                .filter(|row| response_of(*row).is_some_and(|(g, r)| length(*row) < groups[g].responses[r].len()))
                .collect();
            if rows.is_empty() {
                assert!(step > 2 && slots.len() < 3, "slots were removed");
                return;
            }
            let active = |row: usize| response_of(row).expect("in use");
            let tokens: Vec<i64> = rows
                .iter()
                .map(|row| i64::from(groups[active(*row).0].responses[active(*row).1][length(*row)]))
                .collect();
            let flat: Vec<i64> = rows
                .iter()
                .map(|row| (batch.ranges[active(*row).0][active(*row).1].start + length(*row)) as i64)
                .collect();
            let tokens = Tensor::from_slice(&tokens);
            let before: Vec<&Tensor> = rows.iter().map(|row| &hidden[&active(*row)]).collect();
            let actual = logprobs(&vlm.lm_head(&Tensor::stack(&before, 0)), &tokens, 1.0, &[3, 4]);
            let out = vlm.decode_step(&mut cache, &tokens, &rows).expect("step");
            let attention = out.attention.expect("captured");
            let width = attention.size()[1];
            for (i, (row, index)) in rows.iter().zip(&flat).enumerate() {
                let diff = (actual.double_value(&[i as i64]) - expected.double_value(&[*index])).abs();
                assert!(diff < 2e-5, "row {row} at step {step} differs by {diff}");
                let both = width.min(expected_rows.size()[1]);
                let diff = max_diff(
                    &attention.get(i as i64).narrow(0, 0, both),
                    &expected_rows.get(*index).narrow(0, 0, both),
                );
                assert!(diff < 1e-5, "attention of row {row} at step {step} differs by {diff}");
                hidden.insert(active(*row), out.hidden.get(i as i64));
            }
            let done = |cache: &unveil_model::GroupCache, slot: usize| {
                slots[slot].is_none_or(|g| {
                    (0..4).all(|r| cache.lengths()[slot * 4 + r] as usize >= groups[g].responses[r].len())
                })
            };
            if step > 2 {
                let finished: Vec<usize> =
                    (0..slots.len()).filter(|s| slots[*s].is_some() && done(&cache, *s)).collect();
                finished.iter().for_each(|s| cache.free_slot(*s));
                finished.iter().for_each(|s| slots[*s] = None);
                let keep: Vec<usize> = (0..slots.len()).filter(|s| slots[*s].is_some()).collect();
                if step % 5 == 0 && !keep.is_empty() && keep.len() < slots.len() {
                    cache.retain_slots(&keep).expect("keeps");
                    slots = keep.iter().map(|s| slots[*s]).collect();
                }
            }
        }
        panic!("the groups never finished");
    });
}

/// Caches that are refilled in the middle of responses, as after a weight swap, equal those that grew token by token.
#[test]
fn refilled_caches_continue() {
    for_each_family(|vlm| {
        let groups: Vec<PackedGroup> = groups()
            .into_iter()
            .map(|mut g| {
                g.responses.resize(2, vec![40, 41, 42]);
                g
            })
            .collect();
        let (grids, pixels) = pixels(vlm, &groups);
        tch::no_grad(|| {
            let features = vlm.encode_images(&pixels, &grids).expect("features");
            let fed = |g: &PackedGroup| PackedGroup {
                prompt: g.prompt.clone(),
                responses: g
                    .responses
                    .iter()
                    .enumerate()
                    .map(|(r, x)| x[..(2 * r).min(x.len() - 1)].to_vec())
                    .collect(),
            };
            let part: Vec<PackedGroup> = groups.iter().map(fed).collect();
            let refilled = vlm.refill(&part, Some(&features)).expect("refills");
            let shape = CacheShape { slots: 3, n: 2, prompt: 0, response: 20, images: 0 };
            let mut refilled_cache = vlm.cache(shape, Some(AttentionSet::layer(1)), false).expect("cache");
            refilled_cache.admit(&refilled, &[0, 1, 2]).expect("admits");
            let prompts: Vec<Prompt> = groups.iter().map(|g| g.prompt.clone()).collect();
            let prefill = vlm.prefill(&prompts, Some(&features)).expect("prefill");
            let mut grown_cache = vlm.cache(shape, Some(AttentionSet::layer(1)), false).expect("cache");
            grown_cache.admit(&prefill, &[0, 1, 2]).expect("admits");
            let token = |row: usize, at: usize| i64::from(groups[row / 2].responses[row % 2][at]);
            for at in 0..2 {
                let rows: Vec<usize> = (0..6).filter(|r| part[r / 2].responses[r % 2].len() > at).collect();
                let tokens: Vec<i64> = rows.iter().map(|r| token(*r, at)).collect();
                vlm.decode_step(&mut grown_cache, &Tensor::from_slice(&tokens), &rows).expect("step");
            }
            assert_eq!(refilled_cache.lengths(), grown_cache.lengths());
            let rows: Vec<usize> = (0..6).collect();
            let tokens: Vec<i64> = rows.iter().map(|r| token(*r, refilled_cache.lengths()[*r] as usize)).collect();
            let next = |cache: &mut unveil_model::GroupCache| {
                let out = vlm.decode_step(cache, &Tensor::from_slice(&tokens), &rows).expect("step");
                (vlm.lm_head(&out.hidden), out.attention.expect("captured"))
            };
            let (a, rows_a) = next(&mut refilled_cache);
            let (b, rows_b) = next(&mut grown_cache);
            assert!(max_diff(&a, &b) < 1e-4, "{}", max_diff(&a, &b));
            assert!(max_diff(&rows_a, &rows_b) < 1e-5);
        });
    });
}

#[test]
fn gradients_reach_all_parameters_within_the_mask() {
    for_each_family(check_gradients);
}

fn check_gradients(vlm: &Vlm) {
    let count = vlm.set_trainable(|_| true);
    assert_eq!(count, vlm.named_parameters().len());
    let groups = groups();
    let (features, batch, out) = run_packed(vlm, &groups, true);
    let (lp, ent) = logprobs_entropy(&vlm.lm_head(&out.hidden), &batch.targets, 1.0, &[3, 4]);
    let attention = out.attention.expect("captured");
    assert!(attention.requires_grad());
    (lp.mean(Kind::Float) + ent.mean(Kind::Float) + attention.select(1, 3).sum(Kind::Float)).backward();
    for (name, tensor) in vlm.named_parameters() {
        let grad = tensor.grad();
        assert!(grad.defined() && grad.isfinite().all().int64_value(&[]) == 1, "{name}");
        // The bias of keys shifts all scores of a query equally: its gradient is zero up to rotation and rounding.
        assert!(grad.abs().max().double_value(&[]) > 0.0, "{name} has no gradient");
    }
    let merger = if vlm.config().family == Family::Qwen2_5Vl { 5 } else { 6 };
    assert_eq!(vlm.set_trainable(|n| n.starts_with("visual.merger")), merger);

    // Changing one response does not affect the other responses of its group.
    tch::no_grad(|| {
        let mut other = groups.clone();
        other[0].responses[1][0] += 1;
        let changed = PackedBatch::build(&other, vlm.config(), Device::Cpu).expect("packs");
        let h = |b: &PackedBatch| vlm.forward_packed(b, Some(&features), None).expect("runs").hidden;
        let delta = (h(&changed) - h(&batch)).abs().amax([1i64].as_slice(), false);
        let changed_range = &batch.ranges[0][1];
        for n in 0..batch.len() {
            let moved = delta.double_value(&[n as i64]) > 0.0;
            // The prompt predicts the first token, so only the tokens after it change.
            assert_eq!(moved, changed_range.contains(&n) && n > changed_range.start, "token {n}");
        }
    });
}

#[test]
fn mismatched_counts_are_refused() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let vlm = lively(dir.path());
    let group = &groups()[0];
    let batch = PackedBatch::build(std::slice::from_ref(group), vlm.config(), Device::Cpu).expect("packs");
    let few = Tensor::zeros([35, vlm.config().text.hidden_size], (Kind::Float, Device::Cpu));
    match vlm.forward_packed(&batch, Some(&few), None) {
        Err(ModelError::ImageTokens { tokens: 36, features: 35 }) => {}
        other => panic!("expected a mismatch, got {:?}", other.map(|t| t.hidden.size())),
    }
    let mut wrong = group.clone();
    wrong.prompt.grids = vec![[1, 12, 10]];
    let message = PackedBatch::build(&[wrong], vlm.config(), Device::Cpu).expect_err("mismatch").to_string();
    assert!(message.contains("group 0") && message.contains("36") && message.contains("30"), "{message}");
    let mut wrong = group.clone();
    wrong.responses[2][1] = 3;
    let message = PackedBatch::build(&[wrong], vlm.config(), Device::Cpu).expect_err("placeholder").to_string();
    assert!(message.contains("response 2"), "{message}");
    let pixels = Tensor::zeros([143, 384], (Kind::Float, Device::Cpu));
    let message = vlm.encode_images(&pixels, &[[1, 12, 12]]).expect_err("short").to_string();
    assert!(message.contains("[143, 384]") && message.contains("[144, 384]"), "{message}");
}

/// A backward pass in segments with recomputed activations has the gradients of one graph: with all parameters trainable, and with frozen
/// parts.
#[test]
fn segments_equal_one_graph() {
    for_each_family(|vlm| {
        let family = vlm.config().family.name();
        let groups = groups();
        let (grids, pixels) = pixels(vlm, &groups);
        let batch = PackedBatch::build(&groups, vlm.config(), Device::Cpu).expect("packs");
        let gradients = |mode: TapeMode, frozen: &str| -> Vec<(String, Tensor)> {
            vlm.set_trainable(|name| !name.starts_with(frozen));
            for (_, t) in vlm.named_parameters() {
                t.shallow_clone().zero_grad();
            }
            let spec = CaptureSpec { set: AttentionSet::new(&[1, 2], &[]), differentiable: true };
            let mut tape = Tape::new(mode);
            let (hidden, rows) =
                vlm.train_packed(&mut tape, &batch, Some((&pixels, &grids)), Some(spec)).expect("runs");
            let chunks = tape.call(&[&hidden], |t| t[0].split(9, 0));
            let mut start = 0;
            let parts: Vec<Var> = chunks
                .iter()
                .map(|chunk| {
                    let targets = batch.targets.narrow(0, start, chunk.tensor.size()[0]);
                    start += chunk.tensor.size()[0];
                    tape.call1(&[chunk], move |t| logprobs(&vlm.lm_head(&t[0]), &targets, 0.7, &[3]))
                })
                .collect();
            let logp = Tensor::cat(&parts.iter().map(|v| tape.leaf(v)).collect::<Vec<_>>(), 0);
            let rows = tape.leaf(&rows.expect("captured"));
            (logp.sin().sum(Kind::Float) + rows.square().sum(Kind::Float) * 10.0).backward();
            tape.backward().expect("backward pass");
            let trained = vlm.named_parameters().iter().filter(|(_, t)| t.requires_grad());
            trained.map(|(n, t)| (n.clone(), t.grad().copy())).collect()
        };
        for frozen in ["nothing", "visual.", "model.embed_tokens"] {
            let whole = gradients(TapeMode::Graph, frozen);
            assert!(whole.len() > 20);
            for ((name, a), (_, b)) in whole.iter().zip(gradients(TapeMode::Recompute, frozen)) {
                let norm = |t: &Tensor| t.norm().double_value(&[]);
                assert!(norm(a) > 0.0, "{family}: no gradient of {name}");
                assert!(norm(&(a - b)) <= 1e-5 * norm(a) + 1e-7, "{family}: {name}, {frozen} frozen");
            }
        }
    });
}
