//! The model equals transformers: logits, greedy tokens, attention rows, and directories in both directions.

mod common;

use std::path::Path;

use common::{max_diff, python};
use serde_json::Value;
use tch::{Device, Kind, Tensor};
use unveil_model::{
    CaptureSpec, GridThw, GroupCache, PackedBatch, PackedGroup, Prompt, Vlm, init, masked_logits, read_safetensors,
    rope_positions,
};

struct Case {
    prompt: Prompt,
    response: Vec<u32>,
    tokens: Vec<u32>,
    pixels: Option<Tensor>,
    logits: Tensor,
    attention: Option<Tensor>,
}

fn cases(dir: &Path, gold: &Value) -> Vec<Case> {
    let tensors = read_safetensors(&dir.join("golden.st")).expect("golden numbers");
    let find =
        |i: usize, key: &str| tensors.iter().find(|(n, _)| *n == format!("{i}.{key}")).map(|(_, t)| t.shallow_clone());
    let listed = gold["cases"].as_array().expect("cases");
    let case = |(i, case): (usize, &Value)| {
        let tokens: Vec<i64> = Vec::try_from(find(i, "tokens").expect("tokens")).expect("ids");
        let tokens: Vec<u32> = tokens.into_iter().map(|t| t as u32).collect();
        let grids: Vec<GridThw> = serde_json::from_value(case["grids"].clone()).expect("grids");
        let (prompt, response) = tokens.split_at(case["prompt"].as_u64().expect("length") as usize);
        Case {
            prompt: Prompt { tokens: prompt.to_vec(), grids },
            response: response.to_vec(),
            tokens: tokens.clone(),
            pixels: find(i, "pixels"),
            logits: find(i, "logits").expect("logits"),
            attention: find(i, "attention"),
        }
    };
    listed.iter().enumerate().map(case).collect()
}

fn check_teacher_forced(vlm: &Vlm, case: &Case, layer: usize) {
    let features = case.pixels.as_ref().map(|p| vlm.encode_images(p, &case.prompt.grids).expect("features"));
    let ids: Vec<i64> = case.tokens.iter().map(|t| i64::from(*t)).collect();
    let embeds = vlm.embed(&Tensor::from_slice(&ids).unsqueeze(0), features.as_ref()).expect("embeds");
    let (positions, _) = rope_positions(&case.tokens, &case.prompt.grids, vlm.config()).expect("positions");
    let flat: Vec<i64> = positions.iter().flatten().copied().collect();
    let positions = Tensor::from_slice(&flat).view([1, -1, 3]).permute([2, 0, 1]);
    let out = vlm.forward(&embeds, &positions, None, None).expect("forward");
    let diff = max_diff(&vlm.lm_head(&out.hidden).squeeze_dim(0), &case.logits);
    assert!(diff < 1e-4, "logits differ by {diff}");

    let group = PackedGroup { prompt: case.prompt.clone(), responses: vec![case.response.clone()] };
    let batch = PackedBatch::build(&[group], vlm.config(), Device::Cpu).expect("packs");
    let spec = CaptureSpec { layer, differentiable: false };
    let out = vlm.forward_packed(&batch, features.as_ref(), Some(spec)).expect("packed");
    let n = case.response.len() as i64;
    let expected = case.logits.narrow(0, case.prompt.tokens.len() as i64 - 1, n);
    let diff = max_diff(&vlm.lm_head(&out.hidden), &expected);
    assert!(diff < 1e-4, "packed logits differ by {diff}");
    if let Some(attention) = &case.attention {
        let diff = max_diff(&out.attention.expect("captured"), attention);
        assert!(diff < 1e-4, "attention differs by {diff}");
    }
}

/// Greedy decoding of all cases of a model as one batch of groups, two responses each.
fn check_greedy(vlm: &Vlm, cases: &[Case], layer: usize, banned: &[u32]) {
    let prompts: Vec<Prompt> = cases.iter().map(|c| c.prompt.clone()).collect();
    let grids: Vec<GridThw> = prompts.iter().flat_map(|p| p.grids.iter().copied()).collect();
    let pixels: Vec<Tensor> = cases.iter().filter_map(|c| c.pixels.as_ref().map(Tensor::shallow_clone)).collect();
    let features = vlm.encode_images(&Tensor::cat(&pixels, 0), &grids).expect("features");
    let prefill = vlm.prefill(&prompts, Some(&features)).expect("prefill");
    let n = 2;
    let greedy = |hidden: &Tensor| masked_logits(&vlm.lm_head(hidden), 0.0, banned).argmax(-1, false);
    let mut next = greedy(&prefill.last_hidden.repeat_interleave_self_int(n, 0, None));
    let steps = cases[0].response.len();
    let mut cache = GroupCache::new(prefill, n as usize, steps).expect("cache");
    let mut tokens: Vec<Vec<i64>> = vec![Vec::new(); cases.len() * n as usize];
    for step in 0..steps {
        let fed: Vec<i64> = Vec::try_from(&next).expect("ids");
        tokens.iter_mut().zip(&fed).for_each(|(list, t)| list.push(*t));
        let out = vlm.decode_step(&mut cache, &next, None, Some(layer)).expect("step");
        let rows = out.attention.expect("captured");
        for (g, case) in cases.iter().enumerate() {
            let row = rows.get(g as i64 * n + 1);
            match &case.attention {
                Some(gold) => {
                    let v = gold.size()[1];
                    let diff = max_diff(&row.narrow(0, 0, v), &gold.get(step as i64));
                    assert!(diff < 1e-4, "attention of group {g} at {step} differs by {diff}");
                    assert!(row.narrow(0, v, row.size()[0] - v).count_nonzero(None::<i64>).int64_value(&[]) == 0);
                }
                None => assert_eq!(row.count_nonzero(None::<i64>).int64_value(&[]), 0),
            }
        }
        next = greedy(&out.hidden);
    }
    for (row, list) in tokens.iter().enumerate() {
        let expected: Vec<i64> = cases[row / n as usize].response.iter().map(|t| i64::from(*t)).collect();
        assert_eq!(list, &expected, "greedy tokens of row {row}");
    }
}

#[test]
fn equals_transformers() {
    tch::set_num_threads(1);
    let dir = tempfile::tempdir().expect("temporary directory");
    let root = dir.path().to_string_lossy().into_owned();
    python("golden.py", &["make", &root]);
    let names: Vec<String> =
        serde_json::from_slice(&std::fs::read(dir.path().join("models.json")).expect("list")).expect("names");
    assert!(names.len() >= 4);
    for name in &names {
        let model = dir.path().join(name);
        let gold: Value =
            serde_json::from_slice(&std::fs::read(model.join("golden.json")).expect("gold")).expect("JSON");
        let layer = gold["layer"].as_u64().expect("layer") as usize;
        let banned: Vec<u32> = serde_json::from_value(gold["suppress"].clone()).expect("ids");
        let vlm = Vlm::load(&model, Device::Cpu, Kind::Float).expect("loads");
        assert_eq!(vlm.config().default_capture_layer(), layer);
        let cases = cases(&model, &gold);
        tch::no_grad(|| {
            for case in &cases {
                check_teacher_forced(&vlm, case, layer);
            }
            check_greedy(&vlm, &cases, layer, &banned);
        });
        vlm.save(&model.join("rust")).expect("saves");
        // Half precision: same path, rough numbers.
        let half = Vlm::load(&model, Device::Cpu, Kind::BFloat16).expect("loads");
        tch::no_grad(|| {
            let features = half
                .encode_images(cases[0].pixels.as_ref().expect("pixels"), &cases[0].prompt.grids)
                .expect("features");
            let pre = half.prefill(std::slice::from_ref(&cases[0].prompt), Some(&features)).expect("prefill");
            let mut cache = GroupCache::new(pre, 1, 2).expect("cache");
            let first = Tensor::from_slice(&[i64::from(cases[0].response[0])]);
            let out = half.decode_step(&mut cache, &first, None, Some(layer)).expect("step");
            let rows = out.attention.expect("captured");
            assert!((rows.sum(Kind::Float).double_value(&[]) - 1.0).abs() < 1e-5);
            let logits = half.lm_head(&out.hidden).to_kind(Kind::Float).squeeze_dim(0);
            let gold = cases[0].logits.get(cases[0].prompt.tokens.len() as i64);
            let cosine = Tensor::cosine_similarity(&logits, &gold, 0, 1e-8).double_value(&[]);
            assert!(cosine > 0.99, "bf16 logits have cosine {cosine}");
        });
    }
    init(&common::spec(1), &dir.path().join("fresh")).expect("init");
    let report: Value = serde_json::from_str(&python("golden.py", &["check", &root])).expect("report");
    for name in &names {
        let worst = report[name].as_f64().expect("number");
        assert!(worst < 1e-6, "{name}: transformers on our directory differs by {worst}");
    }
    assert_eq!(report["fresh"], serde_json::json!({}), "transformers complains about a fresh model");
}
