//! What an engine promises, on a random tiny model.

use std::sync::atomic::AtomicBool;

use tch::Tensor;
use unveil_core::{Finish, Grid};
use unveil_model::{AttentionSet, Family, Vlm};

use crate::fixture::{EOS, IMAGE, input, model, model_of, request};
use crate::{Engine, EngineError, EngineOptions, GroupOutput, GroupRequest, ScoreRequest};

fn options() -> EngineOptions {
    EngineOptions { capture: Some(AttentionSet::layer(2)), ..Default::default() }
}

fn score_of(requests: &[GroupRequest], outputs: &[GroupOutput]) -> Vec<ScoreRequest> {
    let one = |(r, o): (&GroupRequest, &GroupOutput)| ScoreRequest {
        input: r.input.clone(),
        responses: o.responses.iter().map(|x| x.tokens.clone()).collect(),
    };
    requests.iter().zip(outputs).map(one).collect()
}

fn near(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

#[test]
fn generation_agrees_with_teacher_forcing() {
    let two = AttentionSet::new(&[0, 3], &[[1, 2]]);
    check_agreement(&model(1), options());
    check_agreement(&model(1), EngineOptions { capture: Some(two), ..options() });
    check_agreement(&model_of(Family::Qwen3Vl, 1), options());
}

fn check_agreement(vlm: &Vlm, options: EngineOptions) {
    let mut engine = Engine::new(vlm, options).unwrap();
    let requests: Vec<_> = (0..4).map(|k| request(vlm, k, 0.8)).collect();
    let outputs = engine.generate(&requests, None).unwrap();
    assert_eq!((engine.stats().images_encoded, engine.stats().prompts_prefilled), (4, 4));
    let scored = engine.score(&score_of(&requests, &outputs), 0.8).unwrap();
    let mut kinds = std::collections::HashSet::new();
    for (k, (out, scored)) in outputs.iter().zip(&scored).enumerate() {
        assert_eq!(out.responses.len(), 4);
        for (r, s) in out.responses.iter().zip(scored) {
            assert!(near(&r.logprobs, &s.logprobs) < 1e-5, "group {k}: {:?} {:?}", r.logprobs, s.logprobs);
            assert_eq!(r.finish == Finish::Stop, r.tokens.last() == Some(&EOS));
            assert!(!r.tokens[..r.tokens.len() - 1].contains(&EOS) && !r.tokens.contains(&IMAGE));
            assert_eq!(r.versions, vec![0; r.tokens.len()]);
            kinds.insert(r.tokens.clone());
            let (mine, theirs) = (r.attention.as_ref().unwrap(), s.attention.as_ref().unwrap());
            let fed = r.tokens.len() - usize::from(r.finish == Finish::Stop);
            assert_eq!((mine.len(), theirs.len()), (fed, r.tokens.len()));
            assert!(near(&mine.values, &theirs.values[..mine.values.len()]) < 1e-5);
            for i in 0..mine.len() {
                assert!((mine.row(i).unwrap().iter().sum::<f32>() - 1.0).abs() < 1e-4);
            }
            let grid = input(vlm, k).prompt.grids[0];
            let grid = Grid { rows: grid[1] as usize / 2, cols: grid[2] as usize / 2 };
            assert_eq!(mine.to_attention(grid).unwrap().rows.len(), fed);
            assert!(mine.to_attention(Grid { rows: 1, cols: 1 }).is_none());
        }
    }
    assert!(kinds.len() > 8, "responses should differ, {} do", kinds.len());
}

#[test]
fn a_group_does_not_depend_on_its_company() {
    let vlm = model(2);
    let requests: Vec<_> = (0..5).map(|k| request(&vlm, k, 1.0)).collect();
    let whole = Engine::new(&vlm, options()).unwrap().generate(&requests, None).unwrap();
    // Few slots: groups are admitted into a running batch.
    let narrow = EngineOptions { max_rows: 8, prefill_tokens: 1, ..options() };
    let refilled = Engine::new(&vlm, narrow.clone()).unwrap().generate(&requests, None).unwrap();
    let steady = EngineOptions { steady: true, ..narrow };
    let steady = Engine::new(&vlm, steady).unwrap().generate(&requests, None).unwrap();
    for (k, request) in requests.iter().enumerate() {
        let alone = Engine::new(&vlm, options()).unwrap().generate(std::slice::from_ref(request), None).unwrap();
        for other in [&alone[0], &refilled[k], &steady[k]] {
            for (a, b) in whole[k].responses.iter().zip(&other.responses) {
                assert_eq!((a.index, &a.tokens, a.finish), (b.index, &b.tokens, b.finish), "group {k}");
                let off = near(&a.logprobs, &b.logprobs);
                assert!(off < 1e-5, "group {k}: {off}");
                assert!(near(&a.attention.as_ref().unwrap().values, &b.attention.as_ref().unwrap().values) < 1e-5);
            }
        }
    }
    // Another seed and another key give other responses; fewer responses are the first of more.
    let tokens = |r: GroupRequest| -> Vec<Vec<u32>> {
        let out = Engine::new(&vlm, options()).unwrap().generate(&[r], None).unwrap();
        out[0].responses.iter().map(|r| r.tokens.clone()).collect()
    };
    let base = tokens(requests[0].clone());
    let mut seed = requests[0].clone();
    seed.sampling.seed += 1;
    let mut key = requests[0].clone();
    key.key += 1;
    let mut fewer = requests[0].clone();
    fewer.sampling.n = 2;
    assert_ne!(tokens(seed), base);
    assert_ne!(tokens(key), base);
    assert_eq!(tokens(fewer), base[..2]);
}

#[test]
fn greedy_is_the_argmax_and_settings_mix() {
    let vlm = model(3);
    let mut requests: Vec<_> = (0..3).map(|k| request(&vlm, k, 0.0)).collect();
    requests[0].sampling.n = 1;
    requests[1].sampling.max_new_tokens = 5;
    requests[2].sampling.temperature = 1.0;
    let mut engine = Engine::new(&vlm, EngineOptions::default()).unwrap();
    let outputs = engine.generate(&requests, None).unwrap();
    assert_eq!(outputs.iter().map(|o| o.responses.len()).collect::<Vec<_>>(), [1, 4, 4]);
    let scored = engine.score(&score_of(&requests[..2], &outputs[..2]), 0.0).unwrap();
    for (out, scored) in outputs.iter().zip(&scored) {
        for (r, s) in out.responses.iter().zip(scored) {
            assert_eq!(r.tokens, s.greedy);
            assert!(near(&r.logprobs, &s.logprobs) < 1e-5);
            assert!(r.attention.is_none() && s.attention.is_none());
        }
    }
    assert!(outputs[1].responses.iter().all(|r| r.tokens.len() <= 5));
}

#[test]
fn the_length_cap_ends_a_response() {
    let vlm = model(4);
    let mut r = request(&vlm, 0, 1.0);
    r.sampling.max_new_tokens = 1;
    let out = Engine::new(&vlm, options()).unwrap().generate(&[r.clone()], None).unwrap();
    for x in &out[0].responses {
        assert_eq!(x.tokens.len(), 1);
        let stop = x.tokens[0] == EOS;
        assert_eq!(x.finish, if stop { Finish::Stop } else { Finish::Length });
        assert_eq!(x.attention.as_ref().unwrap().len(), usize::from(!stop));
    }
    // The end token banned: every response runs to the cap, its last token has a row too.
    r.sampling.max_new_tokens = 30;
    let mut engine = Engine::new(&vlm, EngineOptions { banned: vec![EOS], ..options() }).unwrap();
    let out = engine.generate(&[r], None).unwrap();
    for x in &out[0].responses {
        assert_eq!((x.tokens.len(), x.finish), (30, Finish::Length));
        assert_eq!(x.attention.as_ref().unwrap().len(), 30);
    }
}

#[test]
fn cancelling_ends_what_runs_and_what_waits() {
    let vlm = model(5);
    let requests: Vec<_> = (0..3).map(|k| request(&vlm, k, 1.0)).collect();
    let mut engine = Engine::new(&vlm, options()).unwrap();
    let out = engine.generate(&requests, Some(&AtomicBool::new(true))).unwrap();
    assert_eq!(engine.stats().decode_steps, 0);
    for x in out.iter().flat_map(|o| &o.responses) {
        assert_eq!((x.tokens.len(), x.finish), (0, Finish::Cancelled));
    }
    let flag = AtomicBool::new(false);
    let slow: Vec<_> = (0..3)
        .map(|k| {
            let mut r = request(&vlm, k, 1.0);
            r.sampling.max_new_tokens = 1500;
            r
        })
        .collect();
    let mut engine = Engine::new(&vlm, EngineOptions { banned: vec![EOS], ..options() }).unwrap();
    let out = std::thread::scope(|s| {
        s.spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(300));
            flag.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        engine.generate(&slow, Some(&flag)).unwrap()
    });
    for x in out.iter().flat_map(|o| &o.responses) {
        assert_eq!(x.finish, Finish::Cancelled);
        assert!(x.tokens.len() < 1500 && x.tokens.len() == x.logprobs.len());
    }
}

#[test]
fn weights_are_swapped_and_versioned() {
    let mut engine = Engine::new(model(6), options()).unwrap();
    let r = vec![request(engine.vlm(), 0, 1.0)];
    let before = engine.generate(&r, None).unwrap();
    let other = model(7);
    let named: Vec<(String, Tensor)> = other.named_parameters().iter().map(|(n, t)| (n.clone(), t.copy())).collect();
    engine.load_weights(9, &named).unwrap();
    let after = engine.generate(&r, None).unwrap();
    assert_eq!(engine.version(), 9);
    assert!(after[0].responses.iter().all(|x| x.versions.iter().all(|&v| v == 9)));
    assert_ne!(before[0].responses[0].logprobs, after[0].responses[0].logprobs);
    let fresh = Engine::new(&other, options()).unwrap().generate(&r, None).unwrap();
    assert_eq!(fresh[0].responses[0].tokens, after[0].responses[0].tokens);
    let e = engine.load_weights(10, &named[1..]).unwrap_err().to_string();
    assert!(e.contains(&named[0].0), "{e}");
    assert_eq!(engine.version(), 9);
}

#[test]
fn what_cannot_run_is_refused_by_name() {
    let vlm = model(8);
    let mut engine = Engine::new(&vlm, options()).unwrap();
    let mut refuse = |change: &dyn Fn(&mut GroupRequest), words: &[&str]| {
        let mut r = request(&vlm, 1, 1.0);
        change(&mut r);
        let e = engine.generate(&[r], None).unwrap_err().to_string();
        assert!(e.contains("g1") && words.iter().all(|w| e.contains(w)), "{e}");
    };
    refuse(&|r| r.input.prompt.tokens.push(IMAGE), &["image token(s)", "do not belong together"]);
    refuse(&|r| r.input.patches = vec![0.0; r.input.patches.len() - 1].into(), &["patch values"]);
    refuse(&|r| r.input.prompt.tokens.clear(), &["no tokens"]);
    refuse(&|r| r.input.prompt.tokens.push(9999), &["9999", "vocabulary of 64"]);
    refuse(&|r| r.input.prompt.grids[0] = [1, 3, 4], &["grid"]);
    refuse(&|r| r.sampling.n = 0, &["at least 1"]);
    refuse(&|r| r.sampling.temperature = f64::NAN, &["temperature"]);
    refuse(&|r| r.sampling.max_new_tokens = 5000, &["5000", "2048"]);
    for token in [77, IMAGE] {
        let bad = ScoreRequest { input: input(&vlm, 0), responses: vec![vec![1], vec![token]] };
        assert!(matches!(engine.score(&[bad], 1.0), Err(EngineError::Request { .. })));
    }
    assert!(Engine::new(&vlm, EngineOptions { capture: Some(AttentionSet::layer(99)), ..options() }).is_err());
}

#[test]
fn scoring_takes_empty_responses_and_no_image() {
    let vlm = model(9);
    let mut engine = Engine::new(&vlm, options()).unwrap();
    let mut plain = input(&vlm, 0);
    plain.prompt = unveil_model::Prompt { tokens: vec![1, 2, 3], grids: vec![] };
    plain.patches = Default::default();
    let requests = vec![
        ScoreRequest { input: input(&vlm, 0), responses: vec![vec![], vec![5, EOS], vec![]] },
        ScoreRequest { input: plain.clone(), responses: vec![vec![5, 6, 7]] },
        ScoreRequest { input: input(&vlm, 1), responses: vec![vec![]] },
    ];
    let out = engine.score(&requests, 1.0).unwrap();
    assert_eq!(out[0].iter().map(|s| s.logprobs.len()).collect::<Vec<_>>(), [0, 2, 0]);
    assert_eq!((out[1][0].logprobs.len(), &out[1][0].attention), (3, &None));
    assert!(out[2][0].logprobs.is_empty());
    let text = GroupRequest { input: plain, ..request(&vlm, 0, 1.0) };
    let made = engine.generate(&[text, request(&vlm, 1, 1.0)], None).unwrap();
    assert!(made[0].responses.iter().all(|r| r.attention.is_none()));
    assert!(made[1].responses.iter().all(|r| r.attention.is_some()));
}

#[test]
fn damaged_weights_are_noticed() {
    let mut engine = Engine::new(model(10), options()).unwrap();
    let named: Vec<(String, Tensor)> =
        engine.vlm().named_parameters().iter().map(|(n, t)| (n.clone(), t * f64::NAN)).collect();
    engine.load_weights(1, &named).unwrap();
    let r = vec![request(engine.vlm(), 0, 1.0)];
    assert!(matches!(engine.generate(&r, None), Err(EngineError::NotANumber { .. })));
}

/// Other rounding than this machine's own.
#[test]
fn numbers_hold_under_every_dispatch() {
    unveil_testkit::under_every_dispatch(&[]);
}
