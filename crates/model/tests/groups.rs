//! Packed groups equal separate sequences; decoding equals teacher forcing; caches can shrink and grow.

mod common;

use common::{lively, max_diff};
use tch::{Device, Kind, Tensor};
use unveil_model::{
    CaptureSpec, GroupCache, ModelError, PackedBatch, PackedGroup, Prompt, Vlm, logprobs, logprobs_entropy,
};

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

/// Each response in a pass of its own: log-probabilities and attention rows in flat order.
fn separately(vlm: &Vlm, groups: &[PackedGroup], pixels: &Tensor, layer: usize) -> (Tensor, Vec<Tensor>) {
    let (mut lps, mut rows, mut start) = (Vec::new(), Vec::new(), 0);
    for group in groups {
        let count: i64 = group.prompt.grids.iter().map(|g| g.iter().product::<i64>()).sum();
        let features = (count > 0)
            .then(|| vlm.encode_images(&pixels.narrow(0, start, count), &group.prompt.grids).expect("features"));
        start += count;
        for response in &group.responses {
            let one = PackedGroup { prompt: group.prompt.clone(), responses: vec![response.clone()] };
            let batch = PackedBatch::build(&[one], vlm.config(), Device::Cpu).expect("packs");
            let spec = CaptureSpec { layer, differentiable: false };
            let out = vlm.forward_packed(&batch, features.as_ref(), Some(spec)).expect("runs");
            lps.push(logprobs(&vlm.lm_head(&out.hidden), &batch.targets, 0.7, &[3, 4]));
            rows.push(out.attention.expect("captured"));
        }
    }
    (Tensor::cat(&lps, 0), rows)
}

#[test]
fn packed_equals_separate() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let vlm = lively(dir.path());
    let groups = groups();
    let (grids, pixels) = pixels(&vlm, &groups);
    tch::no_grad(|| {
        let features = vlm.encode_images(&pixels, &grids).expect("features");
        let batch = PackedBatch::build(&groups, vlm.config(), Device::Cpu).expect("packs");
        let spec = CaptureSpec { layer: 2, differentiable: false };
        let out = vlm.forward_packed(&batch, Some(&features), Some(spec)).expect("runs");
        let together = logprobs(&vlm.lm_head(&out.hidden), &batch.targets, 0.7, &[3, 4]);
        let (apart, rows) = separately(&vlm, &groups, &pixels, 2);
        assert_eq!(batch.len() as i64, apart.size()[0]);
        let diff = max_diff(&together, &apart);
        assert!(diff < 1e-5, "log-probabilities differ by {diff}");
        let attention = out.attention.expect("captured");
        let ranges = batch.ranges.iter().flatten();
        for (range, alone) in ranges.zip(rows) {
            let mine = attention.narrow(0, range.start as i64, range.len() as i64).narrow(1, 0, alone.size()[1]);
            let diff = max_diff(&mine, &alone);
            assert!(diff < 1e-5, "attention differs by {diff}");
        }
    });
}

/// Decoding responses of unequal length, with inactive rows, late admission and dropped groups, gives the
/// log-probabilities of the packed pass.
#[test]
fn decoding_equals_packed() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let vlm = lively(dir.path());
    let mut groups = groups();
    for (g, group) in groups.iter_mut().enumerate() {
        while group.responses.len() < 4 {
            let n = group.responses.len() as u32;
            group.responses.push((0..4 + n).map(|i| 30 + (g as u32 * 50 + n * 11 + i * 7) % 200).collect());
        }
    }
    let (grids, pixels) = pixels(&vlm, &groups);
    tch::no_grad(|| {
        let features = vlm.encode_images(&pixels, &grids).expect("features");
        let batch = PackedBatch::build(&groups, vlm.config(), Device::Cpu).expect("packs");
        let spec = CaptureSpec { layer: 2, differentiable: false };
        let out = vlm.forward_packed(&batch, Some(&features), Some(spec)).expect("runs");
        let expected = logprobs(&vlm.lm_head(&out.hidden), &batch.targets, 1.0, &[3, 4]);
        let expected_rows = out.attention.expect("captured");

        // Group 1 first; 0 and 2 join after two steps; 1 leaves when it is done.
        let feature_rows = |g: usize| groups[g].prompt.grids.iter().map(|x| x.iter().product::<i64>() / 4).sum::<i64>();
        let (a, b) = (feature_rows(0), feature_rows(1));
        let first = vlm.prefill(&[groups[1].prompt.clone()], Some(&features.narrow(0, a, b))).expect("prefill");
        let rest = vlm
            .prefill(&[groups[0].prompt.clone(), groups[2].prompt.clone()], Some(&features.narrow(0, 0, a)))
            .expect("prefill");
        let mut hidden = first.last_hidden.repeat_interleave_self_int(4, 0, None);
        let mut cache = GroupCache::new(first, 4, 14).expect("cache");
        let (mut order, mut rest) = (vec![1usize], Some(rest));
        for step in 0..40 {
            if step == 2
                && let Some(rest) = rest.take()
            {
                hidden = Tensor::cat(&[hidden, rest.last_hidden.repeat_interleave_self_int(4, 0, None)], 0);
                cache.append(rest).expect("appends");
                order.extend([0, 2]);
            }
            let responses: Vec<&Vec<u32>> = order.iter().flat_map(|g| &groups[*g].responses).collect();
            let at = |r: usize| cache.lengths()[r] as usize;
            let active: Vec<bool> = responses.iter().enumerate().map(|(r, x)| at(r) < x.len()).collect();
            let tokens: Vec<i64> =
                responses.iter().enumerate().map(|(r, x)| x.get(at(r)).map_or(0, |t| i64::from(*t))).collect();
            let flat: Vec<Option<i64>> = (0..responses.len())
                .map(|r| active[r].then(|| (batch.ranges[order[r / 4]][r % 4].start + at(r)) as i64))
                .collect();
            let tokens = Tensor::from_slice(&tokens);
            let got = logprobs(&vlm.lm_head(&hidden), &tokens, 1.0, &[3, 4]);
            let out = vlm.decode_step(&mut cache, &tokens, Some(&active), Some(2)).expect("step");
            let rows = out.attention.expect("captured");
            assert_eq!(out.hidden.isfinite().all().int64_value(&[]), 1);
            for (r, place) in flat.iter().enumerate().filter_map(|(r, p)| p.map(|p| (r as i64, p))) {
                let diff = (got.double_value(&[r]) - expected.double_value(&[place])).abs();
                assert!(diff < 2e-5, "row {r} at step {step} differs by {diff}");
                let width = rows.size()[1];
                let diff = max_diff(&rows.get(r), &expected_rows.get(place).narrow(0, 0, width));
                assert!(diff < 1e-5, "attention of row {r} at step {step} differs by {diff}");
            }
            // Finished rows keep their last hidden state out of the comparison; done groups leave.
            hidden = out.hidden;
            let done =
                |i: usize| (0..4).all(|k| cache.lengths()[i * 4 + k] as usize >= groups[order[i]].responses[k].len());
            let keep: Vec<usize> = (0..order.len()).filter(|i| !done(*i)).collect();
            if keep.is_empty() && rest.is_none() {
                return;
            }
            if keep.len() < order.len() && rest.is_none() {
                let index: Vec<i64> = keep.iter().flat_map(|g| (g * 4..g * 4 + 4).map(|r| r as i64)).collect();
                hidden = hidden.index_select(0, &Tensor::from_slice(&index));
                cache.keep_groups(&keep).expect("keeps");
                order = keep.iter().map(|i| order[*i]).collect();
            }
        }
        panic!("the groups never finished");
    });
}

#[test]
fn gradients_reach_every_parameter_and_the_tree_mask_holds() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let vlm = lively(dir.path());
    let count = vlm.set_trainable(|_| true);
    assert_eq!(count, vlm.named_parameters().len());
    let groups = groups();
    let (grids, pixels) = pixels(&vlm, &groups);
    let features = vlm.encode_images(&pixels, &grids).expect("features");
    let batch = PackedBatch::build(&groups, vlm.config(), Device::Cpu).expect("packs");
    let spec = CaptureSpec { layer: 2, differentiable: true };
    let out = vlm.forward_packed(&batch, Some(&features), Some(spec)).expect("runs");
    let (lp, ent) = logprobs_entropy(&vlm.lm_head(&out.hidden), &batch.targets, 1.0, &[3, 4]);
    let attention = out.attention.expect("captured");
    assert!(attention.requires_grad());
    (lp.mean(Kind::Float) + ent.mean(Kind::Float) + attention.select(1, 3).sum(Kind::Float)).backward();
    for (name, tensor) in vlm.named_parameters() {
        let grad = tensor.grad();
        assert!(grad.defined() && grad.isfinite().all().int64_value(&[]) == 1, "{name}");
        // The bias of keys shifts all scores of a query alike: its gradient is zero up to rotation and rounding.
        assert!(grad.abs().max().double_value(&[]) > 0.0, "{name} has no gradient");
    }
    assert_eq!(vlm.set_trainable(|n| n.starts_with("visual.merger")), 5);

    // Changing one response changes nothing of its siblings.
    tch::no_grad(|| {
        let mut other = groups.clone();
        other[0].responses[1][0] += 1;
        let changed = PackedBatch::build(&other, vlm.config(), Device::Cpu).expect("packs");
        let h = |b: &PackedBatch| vlm.forward_packed(b, Some(&features), None).expect("runs").hidden;
        let delta = (h(&changed) - h(&batch)).abs().amax([1i64].as_slice(), false);
        let mine = &batch.ranges[0][1];
        for n in 0..batch.len() {
            let moved = delta.double_value(&[n as i64]) > 0.0;
            // The first token is predicted by the prompt, so it is the tokens after it that move.
            assert_eq!(moved, mine.contains(&n) && n > mine.start, "token {n}");
        }
    });
}

#[test]
fn counts_are_checked() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let vlm = lively(dir.path());
    let group = &groups()[0];
    let batch = PackedBatch::build(std::slice::from_ref(group), vlm.config(), Device::Cpu).expect("packs");
    let few = Tensor::zeros([35, vlm.config().text.hidden_size], (Kind::Float, Device::Cpu));
    match vlm.embed(&batch.tokens, Some(&few)) {
        Err(ModelError::ImageTokens { tokens: 36, features: 35 }) => {}
        other => panic!("expected a mismatch, got {:?}", other.map(|t| t.size())),
    }
    let mut wrong = group.clone();
    wrong.prompt.grids = vec![[1, 12, 10]];
    let message = PackedBatch::build(&[wrong], vlm.config(), Device::Cpu).err().expect("mismatch").to_string();
    assert!(message.contains("group 0") && message.contains("36") && message.contains("30"), "{message}");
    let mut wrong = group.clone();
    wrong.responses[2][1] = 3;
    let message = PackedBatch::build(&[wrong], vlm.config(), Device::Cpu).err().expect("placeholder").to_string();
    assert!(message.contains("response 2"), "{message}");
    let pixels = Tensor::zeros([143, 384], (Kind::Float, Device::Cpu));
    let message = vlm.encode_images(&pixels, &[[1, 12, 12]]).expect_err("short").to_string();
    assert!(message.contains("[143, 384]") && message.contains("[144, 384]"), "{message}");
}
