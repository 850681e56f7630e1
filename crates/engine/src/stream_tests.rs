//! What an engine promises to a stream of groups: refill, cancelling, swaps of weights, memory, images that come again.

use std::collections::BTreeMap;
use std::sync::Arc;

use tch::Tensor;
use unveil_core::{Finish, Logprobs, Sampling};
use unveil_model::{AttentionSet, Family, LoraSpec, Merger, Vlm};

use crate::fixture::{EOS, input, model, model_of, request};
use crate::{Engine, EngineError, EngineOptions, GroupOutput, GroupRequest, ScoreRequest, Ticket};

fn options() -> EngineOptions {
    EngineOptions { capture: Some(AttentionSet::layer(2)), ..Default::default() }
}

/// No response ends by itself.
fn endless() -> EngineOptions {
    EngineOptions { banned: vec![EOS], ..options() }
}

fn weights(vlm: &Vlm) -> Vec<(String, Tensor)> {
    vlm.named_parameters().iter().map(|(n, t)| (n.clone(), t.copy())).collect()
}

fn finish(engine: &mut Engine, done: &mut BTreeMap<Ticket, GroupOutput>) {
    while !engine.idle() {
        done.extend(engine.step().unwrap());
    }
}

fn near(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

/// Adapters come in in the middle of responses: what is generated is that of the weights with them merged, whose features of images
/// are kept unless the vision tower is among them.
#[test]
fn adapters_are_merged_between_steps() {
    let targets = |list: &[&str]| list.iter().map(|t| (*t).to_owned()).collect();
    for family in Family::ALL {
        let made = |list: &[&str], seed: i64| -> Vec<(String, Tensor)> {
            let mut vlm = model_of(family, 21);
            let spec = LoraSpec { rank: 2, alpha: 2.0, rank_stabilised: false, targets: targets(list) };
            vlm.adapt(&spec, 0).unwrap();
            tch::manual_seed(seed);
            let own = vlm.adapters().unwrap().named_parameters();
            own.iter().map(|(n, t)| (n.clone(), t.randn_like() * 0.1)).collect()
        };
        let (decoder, tower) = (made(&["q_proj", "down_proj"], 1), made(&["q_proj", "visual.merger.*"], 2));
        let merged = |adapters: &[(String, Tensor)]| {
            let mut vlm = model_of(family, 21);
            Merger::default().merge(&mut vlm, adapters, 0.5).unwrap();
            vlm
        };
        let mut engine = Engine::new(model_of(family, 20), endless()).unwrap();
        engine.load_adapted(4, Some(&weights(&model_of(family, 21))), &made(&["q_proj", "o_proj"], 3), 0.5).unwrap();
        let mut asked = request(engine.vlm(), 0, 1.0);
        asked.input.hashes = vec![[7; 32]];
        let mut done = BTreeMap::new();
        let ticket = engine.submit(asked.clone()).unwrap();
        for _ in 0..4 {
            assert!(engine.step().unwrap().is_empty());
        }
        engine.load_adapted(5, None, &decoder, 0.5).unwrap();
        assert_eq!((engine.stats().groups_refilled, engine.stats().images_encoded), (1, 1));
        finish(&mut engine, &mut done);
        let made_now = &done[&ticket].responses;
        let given =
            ScoreRequest { input: asked.input.clone(), responses: made_now.iter().map(|r| r.tokens.clone()).collect() };
        let other = merged(&decoder);
        let scores = Engine::new(&other, endless()).unwrap().score(&[given], 1.0).unwrap();
        for (r, score) in made_now.iter().zip(&scores[0]) {
            let from = r.versions.iter().position(|v| *v == 5).unwrap();
            assert!(r.versions[..from].iter().all(|v| *v == 4) && from > 0);
            let off = near(&r.logprobs[from..], &score.logprobs[from..]);
            assert!(off < 1e-5, "{family:?}: {off}");
        }
        engine.load_adapted(6, None, &tower, 0.5).unwrap();
        assert_eq!(weights(engine.vlm()), weights(&merged(&tower)), "nothing of earlier adapters is left");
        engine.generate(std::slice::from_ref(&asked), None).unwrap();
        assert_eq!(engine.stats().images_encoded, 2);
        let e = engine.load_adapted(7, None, &tower[1..], 0.5).unwrap_err().to_string();
        assert!(e.contains("missing") && engine.version() == 6, "{e}");
        // A matrix that is loaded anew is what adapters are merged into from there on.
        let name = "model.layers.0.self_attn.q_proj.weight";
        let new: Vec<_> = weights(&model_of(family, 33)).into_iter().filter(|(n, _)| n == name).collect();
        engine.load_changed(8, &new).unwrap();
        engine.load_adapted(9, None, &[], 0.5).unwrap();
        assert_eq!(engine.vlm().parameter(name), Some(&new[0].1));
        engine.load_weights(10, &weights(&model_of(family, 21))).unwrap();
        engine.load_adapted(11, None, &decoder, 0.5).unwrap();
        assert_eq!(weights(engine.vlm()), weights(&other));
    }
}

/// In the middle of responses the weights change: each token's version is recorded, and its log-probability is the one that
/// teacher forcing under that version gives.
#[test]
fn weights_change_between_steps() {
    for family in Family::ALL {
        let (old, new) = (model_of(family, 21), model_of(family, 22));
        let mut engine = Engine::new(model_of(family, 21), endless()).unwrap();
        engine.set_version(4);
        let requests: Vec<GroupRequest> = (0..3).map(|k| request(&old, k, 1.0)).collect();
        let mut done = BTreeMap::new();
        let mut tickets: Vec<Ticket> = requests[..2].iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
        for _ in 0..4 {
            assert!(engine.step().unwrap().is_empty());
        }
        engine.load_weights(5, &weights(&new)).unwrap();
        assert_eq!(engine.stats().groups_refilled, 2);
        tickets.push(engine.submit(requests[2].clone()).unwrap());
        finish(&mut engine, &mut done);
        for (k, ticket) in tickets.iter().enumerate() {
            let given = ScoreRequest {
                input: requests[k].input.clone(),
                responses: done[ticket].responses.iter().map(|r| r.tokens.clone()).collect(),
            };
            let score = |vlm: &Vlm| {
                Engine::new(vlm, endless()).unwrap().score(std::slice::from_ref(&given), 1.0).unwrap().remove(0)
            };
            let (before, after) = (score(&old), score(&new));
            for (r, response) in done[ticket].responses.iter().enumerate() {
                let cut = response.versions.iter().filter(|v| **v == 4).count();
                assert_eq!(cut, if k < 2 { 5 } else { 0 });
                assert!(response.versions[cut..].iter().all(|v| *v == 5) && response.tokens.len() == 12);
                assert!(near(&response.logprobs[..cut], &before[r].logprobs[..cut]) < 1e-5);
                assert!(near(&response.logprobs[cut..], &after[r].logprobs[cut..]) < 1e-5);
                let (mine, theirs) = (response.attention.as_ref().unwrap(), after[r].attention.as_ref().unwrap());
                // Token cut - 1 was the last that was sampled before, and the first that was fed after.
                let first = cut.saturating_sub(1) * mine.cells;
                assert!(near(&mine.values[first..], &theirs.values[first..]) < 1e-5);
            }
        }
        // Weights that do not fit change nothing, and what runs goes on.
        let ticket = engine.submit(requests[0].clone()).unwrap();
        engine.step().unwrap();
        assert!(engine.load_weights(6, &weights(&new)[1..]).is_err());
        finish(&mut engine, &mut done);
        assert!(done[&ticket].responses.iter().all(|r| r.versions.iter().all(|v| *v == 5)));
    }
}

/// Groups that come later, into slots that others left, and with another number of responses, are as if alone.
#[test]
fn a_stream_equals_groups_alone() {
    let vlm = model(23);
    for steady in [false, true] {
        check_stream(&vlm, Engine::new(model(23), EngineOptions { max_rows: 8, steady, ..options() }).unwrap());
    }
}

fn check_stream(vlm: &Vlm, mut engine: Engine) {
    let mut requests: Vec<GroupRequest> = (0..7).map(|k| request(vlm, k, 1.0)).collect();
    (requests[3].sampling.n, requests[5].sampling.n) = (2, 2);
    requests[1].sampling.max_new_tokens = 3;
    requests[4].sampling.max_new_tokens = 25;
    let mut done = BTreeMap::new();
    let mut tickets = Vec::new();
    for (k, r) in requests.iter().enumerate() {
        tickets.push(engine.submit(r.clone()).unwrap());
        for _ in 0..k % 3 * 2 {
            done.extend(engine.step().unwrap());
        }
    }
    finish(&mut engine, &mut done);
    assert_eq!(engine.cache_bytes(), 0);
    for (ticket, r) in tickets.iter().zip(&requests) {
        let alone = Engine::new(vlm, options()).unwrap().generate(std::slice::from_ref(r), None).unwrap().remove(0);
        assert_eq!(done[ticket].responses.len(), r.sampling.n);
        for (a, b) in done[ticket].responses.iter().zip(&alone.responses) {
            assert_eq!((&a.tokens, a.finish), (&b.tokens, b.finish));
            assert!(near(&a.logprobs, &b.logprobs) < 1e-5);
            assert!(near(&a.attention.as_ref().unwrap().values, &b.attention.as_ref().unwrap().values) < 1e-5);
        }
    }
    // Responses that have ended are not fed any more.
    let stats = engine.stats();
    let fed: usize =
        done.values().flat_map(|g| &g.responses).map(|r| r.tokens.len() - usize::from(r.finish == Finish::Stop)).sum();
    assert_eq!(stats.tokens_fed, fed as u64);
}

#[test]
fn a_cancelled_group_gives_its_memory_back() {
    let vlm = model(24);
    let mut engine = Engine::new(model(24), endless()).unwrap();
    let mut long = request(&vlm, 0, 1.0);
    long.sampling.max_new_tokens = 1000;
    let (first, second) = (engine.submit(long.clone()).unwrap(), engine.submit(request(&vlm, 1, 1.0)).unwrap());
    let third = engine.submit(long.clone()).unwrap();
    for _ in 0..3 {
        engine.step().unwrap();
    }
    let held = engine.cache_bytes();
    assert!(held > 0);
    let out = engine.cancel(first).unwrap();
    assert!(
        out.responses.iter().all(|r| r.finish == Finish::Cancelled && r.tokens.len() == 4 && r.logprobs.len() == 4)
    );
    assert!(engine.cancel(first).is_none());
    // The freed slot serves the next group: nothing grows.
    let fourth = engine.submit(long).unwrap();
    engine.step().unwrap();
    assert_eq!(engine.cache_bytes(), held);
    let mut done = BTreeMap::new();
    for _ in 0..20 {
        done.extend(engine.step().unwrap());
    }
    let alone = Engine::new(&vlm, endless()).unwrap().generate(&[request(&vlm, 1, 1.0)], None).unwrap();
    assert_eq!(done[&second].responses[3].tokens, alone[0].responses[3].tokens);
    engine.cancel(third).unwrap();
    engine.cancel(fourth).unwrap();
    assert!(engine.idle() && engine.cache_bytes() == 0);
}

#[test]
fn memory_is_planned_before_the_start() {
    let vlm = model(25);
    let requests: Vec<GroupRequest> = (0..4).map(|k| request(&vlm, k, 1.0)).collect();
    let with = |memory: u64| EngineOptions { memory: Some(memory), prefill_tokens: 64, ..options() };
    let mut engine = Engine::new(&vlm, with(1 << 16)).unwrap();
    let message = engine.generate(&requests, None).unwrap_err().to_string();
    for word in ["g0", "4 response(s)", "12 tokens", "MiB", "max_new_tokens", "image size"] {
        assert!(message.contains(word), "{message}");
    }
    assert!(matches!(engine.submit(requests[0].clone()), Err(EngineError::Memory { n: 4, new: 12, .. })));
    // Room for one group at a time: the others wait, and nothing else changes.
    let longest = crate::Longest { n: 4, prompt: 20, images: 12, response: 12 };
    assert!(engine.plan("x", &longest).is_err());
    let roomy = Engine::new(&vlm, with(1 << 34)).unwrap().plan("x", &longest).unwrap();
    assert_eq!(roomy.slots, 64);
    let narrow = with(roomy.work + roomy.per_group * 3 / 2);
    let mut engine = Engine::new(&vlm, narrow).unwrap();
    assert_eq!(engine.plan("x", &longest).unwrap().slots, 1);
    let some = engine.generate(&requests, None).unwrap();
    let all = Engine::new(&vlm, options()).unwrap().generate(&requests, None).unwrap();
    for (a, b) in some.iter().zip(&all) {
        assert!(a.responses.iter().zip(&b.responses).all(|(a, b)| a.tokens == b.tokens));
    }
    assert!(engine.stats().decode_steps > 30, "{} steps", engine.stats().decode_steps);
}

#[test]
fn an_image_is_encoded_once_by_content() {
    for family in Family::ALL {
        let vlm = model_of(family, 26);
        let mut engine = Engine::new(model_of(family, 26), options()).unwrap();
        // Three questions about one image, one about another, and one image of unknown content.
        let mut requests: Vec<GroupRequest> = (0..5).map(|k| request(&vlm, k / 3, 1.0)).collect();
        for (k, r) in requests.iter_mut().enumerate().take(4) {
            r.input.hashes = vec![[k as u8 / 3; 32]];
            r.input.prompt.tokens.insert(0, 20 + k as u32);
            r.key = k as u64;
        }
        let first = engine.generate(&requests, None).unwrap();
        assert_eq!((engine.stats().images_encoded, engine.stats().prompts_prefilled), (3, 5));
        let again = engine.generate(&requests, None).unwrap();
        assert_eq!(engine.stats().images_encoded, 4);
        for ((a, b), r) in first.iter().zip(&again).zip(&requests) {
            let plain = GroupRequest { input: crate::GroupInput { hashes: vec![], ..r.input.clone() }, ..r.clone() };
            let alone = Engine::new(&vlm, options()).unwrap().generate(&[plain], None).unwrap();
            for other in [b, &alone[0]] {
                assert!(a.responses.iter().zip(&other.responses).all(|(a, b)| a.tokens == b.tokens));
            }
        }
        engine.load_weights(1, &weights(&vlm)).unwrap();
        engine.generate(&requests[..1], None).unwrap();
        assert_eq!(engine.stats().images_encoded, 5);
        // A part of the weights: the others stay, and features are kept unless the vision tower is among it.
        let part = |prefix: &str| {
            let named = weights(&model_of(family, 33)).into_iter().filter(|(n, _)| n.starts_with(prefix));
            named.collect::<Vec<_>>()
        };
        for (version, prefix, encoded) in [(2, "model.layers.1.", 5), (3, "visual.merger.", 6)] {
            engine.load_changed(version, &part(prefix)).unwrap();
            let changed = engine.generate(&requests[..1], None).unwrap();
            assert_eq!(engine.stats().images_encoded, encoded);
            let mut other = model_of(family, 26);
            let both = ["model.layers.1.", "visual.merger."].into_iter().filter(|p| version == 3 || *p == prefix);
            both.for_each(|p| other.load_some(&part(p)).unwrap());
            let fresh = Engine::new(other, options()).unwrap().generate(&requests[..1], None).unwrap();
            for (a, b) in changed[0].responses.iter().zip(&fresh[0].responses) {
                assert_eq!((&a.tokens, a.versions.iter().all(|v| *v == version)), (&b.tokens, true));
            }
        }
        let strange = [("model.nothing".to_owned(), part("visual.merger.").remove(0).1)];
        assert!(engine.load_changed(4, &strange).unwrap_err().to_string().contains("model.nothing"));
        assert_eq!(engine.version(), 3);
        // A cache without room keeps nothing.
        let mut engine = Engine::new(&vlm, EngineOptions { image_memory: 10, ..options() }).unwrap();
        engine.generate(&requests[..3], None).unwrap();
        engine.generate(&requests[..1], None).unwrap();
        assert_eq!(engine.stats().images_encoded, 2);
        requests[0].input.hashes.push([9; 32]);
        assert!(engine.generate(&requests[..1], None).unwrap_err().to_string().contains("2 hashes for 1 images"));
    }
}

#[test]
fn stop_rules_end_single_responses() {
    let vlm = model(27);
    let mut r = request(&vlm, 0, 1.0);
    r.sampling.max_new_tokens = 40;
    let free = Engine::new(&vlm, endless()).unwrap().generate(&[r.clone()], None).unwrap();
    // Ends with the second even token.
    r.stop = Some(Arc::new(|| {
        let mut even = 0;
        Box::new(move |token| {
            even += u32::from(token % 2 == 0);
            even == 2
        })
    }));
    let out = Engine::new(&vlm, endless()).unwrap().generate(&[r], None).unwrap();
    for (a, b) in out[0].responses.iter().zip(&free[0].responses) {
        let end = b.tokens.iter().enumerate().filter(|(_, t)| *t % 2 == 0).nth(1).map_or(40, |(i, _)| i + 1);
        assert_eq!(
            (a.tokens.as_slice(), a.finish),
            (&b.tokens[..end], if end < 40 { Finish::Stop } else { Finish::Length })
        );
        // It is no end token, so it is fed for its attention row.
        assert_eq!(a.attention.as_ref().unwrap().len(), end);
    }
    assert!(out[0].responses.iter().any(|r| r.finish == Finish::Stop));
}

#[test]
fn settings_differ_within_a_batch() {
    let vlm = model(28);
    let s = |f: &dyn Fn(&mut Sampling)| {
        let mut r = request(&vlm, 0, 1.3);
        f(&mut r.sampling);
        r
    };
    let requests = vec![
        s(&|_| ()),
        s(&|s| s.top_k = 1),
        s(&|s| s.temperature = 0.0),
        s(&|s| s.top_p = 1e-9),
        s(&|s| s.min_p = 1.0),
        s(&|s| s.logprobs = Logprobs::Untempered),
    ];
    let out = Engine::new(&vlm, options()).unwrap().generate(&requests, None).unwrap();
    // Whatever leaves one token only is greedy.
    for k in [1, 3, 4] {
        assert!(out[k].responses.iter().zip(&out[2].responses).all(|(a, b)| a.tokens == b.tokens), "{k}");
    }
    assert_eq!(out[0].responses[0].tokens, out[5].responses[0].tokens);
    let given = |k: usize| ScoreRequest {
        input: requests[k].input.clone(),
        responses: out[k].responses.iter().map(|r| r.tokens.clone()).collect(),
    };
    let mut engine = Engine::new(&vlm, options()).unwrap();
    for (k, temperature) in [(0, 1.3), (1, 1.3), (2, 1.0), (5, 1.0)] {
        for (a, b) in out[k].responses.iter().zip(&engine.score(&[given(k)], temperature).unwrap()[0]) {
            assert!(near(&a.logprobs, &b.logprobs) < 1e-5, "{k}");
        }
    }
    for (change, word) in [
        (&(|s: &mut Sampling| s.top_p = 0.0) as &dyn Fn(&mut Sampling), "top_p"),
        (&|s: &mut Sampling| s.top_p = f64::NAN, "top_p"),
        (&|s: &mut Sampling| s.min_p = 1.1, "min_p"),
    ] {
        assert!(engine.generate(&[s(change)], None).unwrap_err().to_string().contains(word));
    }
}

/// Weights that give no numbers end everything under way with an error, and the engine can be used again.
#[test]
fn a_failure_leaves_the_engine_usable() {
    let vlm = model(29);
    let mut engine = Engine::new(model(29), options()).unwrap();
    engine.submit(request(&vlm, 0, 1.0)).unwrap();
    engine.step().unwrap();
    let broken: Vec<(String, Tensor)> = weights(&vlm).into_iter().map(|(n, t)| (n, t * f64::NAN)).collect();
    engine.load_weights(1, &broken).unwrap();
    assert!(matches!(engine.step(), Err(EngineError::NotANumber { .. })));
    assert!(engine.idle() && engine.cache_bytes() == 0);
    engine.load_weights(2, &weights(&vlm)).unwrap();
    assert!(engine.generate(&[GroupRequest { input: input(&vlm, 1), ..request(&vlm, 1, 1.0) }], None).is_ok());
}
