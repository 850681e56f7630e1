//! Tests of streams of groups: refill, cancellation, weight swaps, memory, cached images.

use std::collections::BTreeMap;
use std::sync::Arc;

use tch::Tensor;
use unveil_core::{Family, Finish, LogprobKind, Sampling};
use unveil_model::{AdapterMerger, AttentionSet, LoraSpec, Vlm};
use unveil_testkit_model::{EOS, model, model_of};

use crate::fixture::{input, request};
use crate::{Engine, EngineError, EngineOptions, GroupOutput, GroupRequest, ScoreRequest, Ticket};

fn options() -> EngineOptions {
    EngineOptions { capture: Some(AttentionSet::layer(2)), ..Default::default() }
}

/// Options with which no response ends before the length limit.
fn endless_options() -> EngineOptions {
    EngineOptions { banned: vec![EOS], ..options() }
}

fn copied_weights(vlm: &Vlm) -> Vec<(String, Tensor)> {
    vlm.named_parameters().iter().map(|(n, t)| (n.clone(), t.copy())).collect()
}

fn run_to_end(engine: &mut Engine, outputs: &mut BTreeMap<Ticket, GroupOutput>) {
    while !engine.is_idle() {
        outputs.extend(engine.step().unwrap());
    }
}

fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

/// Adapters loaded during generation take effect as merged weights; image features stay cached unless the vision tower is adapted.
#[test]
fn adapters_are_merged_between_steps() {
    let targets = |list: &[&str]| list.iter().map(|t| (*t).to_owned()).collect();
    for family in Family::ALL {
        let random_adapters = |list: &[&str], seed: i64| -> Vec<(String, Tensor)> {
            let mut vlm = model_of(family, 21);
            let spec = LoraSpec { rank: 2, alpha: 2.0, rank_stabilised: false, targets: targets(list) };
            vlm.init_adapters(&spec, 0).unwrap();
            tch::manual_seed(seed);
            let parameters = vlm.adapters().unwrap().named_parameters();
            parameters.iter().map(|(n, t)| (n.clone(), t.randn_like() * 0.1)).collect()
        };
        let decoder = random_adapters(&["q_proj", "down_proj"], 1);
        let with_vision = random_adapters(&["q_proj", "visual.merger.*"], 2);
        let merged_model = |adapters: &[(String, Tensor)]| {
            let mut vlm = model_of(family, 21);
            AdapterMerger::default().merge(&mut vlm, adapters, 0.5).unwrap();
            vlm
        };
        let mut engine = Engine::new(model_of(family, 20), endless_options()).unwrap();
        let base = copied_weights(&model_of(family, 21));
        engine.load_with_adapters(4, Some(&base), &random_adapters(&["q_proj", "o_proj"], 3), 0.5).unwrap();
        let mut group = request(engine.vlm(), 0, 1.0);
        group.input.hashes = vec![[7; 32]];
        let mut outputs = BTreeMap::new();
        let ticket = engine.submit(group.clone()).unwrap();
        for _ in 0..4 {
            assert!(engine.step().unwrap().is_empty());
        }
        engine.load_with_adapters(5, None, &decoder, 0.5).unwrap();
        assert_eq!((engine.stats().groups_refilled, engine.stats().images_encoded), (1, 1));
        run_to_end(&mut engine, &mut outputs);
        let responses = &outputs[&ticket].responses;
        let score_request = ScoreRequest {
            input: group.input.clone(),
            responses: responses.iter().map(|r| r.tokens.clone()).collect(),
        };
        let merged = merged_model(&decoder);
        let scores = Engine::new(&merged, endless_options()).unwrap().score(&[score_request], 1.0).unwrap();
        for (r, score) in responses.iter().zip(&scores[0]) {
            let from = r.versions.iter().position(|v| *v == 5).unwrap();
            assert!(r.versions[..from].iter().all(|v| *v == 4) && from > 0);
            let difference = max_difference(&r.logprobs[from..], &score.logprobs[from..]);
            assert!(difference < 1e-5, "{family:?}: {difference}");
        }
        engine.load_with_adapters(6, None, &with_vision, 0.5).unwrap();
        let expected = copied_weights(&merged_model(&with_vision));
        assert_eq!(copied_weights(engine.vlm()), expected, "earlier adapters are removed completely");
        engine.generate(std::slice::from_ref(&group), None).unwrap();
        assert_eq!(engine.stats().images_encoded, 2);
        let e = engine.load_with_adapters(7, None, &with_vision[1..], 0.5).unwrap_err().to_string();
        assert!(e.contains("missing") && engine.version() == 6, "{e}");
        // After a matrix has been loaded, adapters are merged into the new one.
        let name = "model.layers.0.self_attn.q_proj.weight";
        let new: Vec<_> = copied_weights(&model_of(family, 33)).into_iter().filter(|(n, _)| n == name).collect();
        engine.load_partial_weights(8, &new).unwrap();
        engine.load_with_adapters(9, None, &[], 0.5).unwrap();
        assert_eq!(engine.vlm().parameter(name), Some(&new[0].1));
        engine.load_weights(10, &base).unwrap();
        engine.load_with_adapters(11, None, &decoder, 0.5).unwrap();
        assert_eq!(copied_weights(engine.vlm()), copied_weights(&merged));
    }
}

/// Running groups keep their caches on request: nothing is recomputed, and their later tokens have the version of their caches, whose
/// log-probabilities no single version of the weights yields.
#[test]
fn caches_are_kept_over_a_weight_swap_on_request() {
    let options = EngineOptions { keep_cache: true, ..endless_options() };
    let mut engine = Engine::new(model(21), options).unwrap();
    engine.set_version(4);
    let vlm = model(21);
    let running = engine.submit(request(&vlm, 0, 1.0)).unwrap();
    for _ in 0..4 {
        assert!(engine.step().unwrap().is_empty());
    }
    engine.load_weights(5, &copied_weights(&model(22))).unwrap();
    engine.load_weights(6, &copied_weights(&model(23))).unwrap();
    let later = engine.submit(request(&vlm, 1, 1.0)).unwrap();
    let mut outputs = BTreeMap::new();
    run_to_end(&mut engine, &mut outputs);
    assert_eq!(engine.stats().groups_refilled, 0);
    let versions =
        |ticket: Ticket| outputs[&ticket].responses.iter().flat_map(|r| r.versions.clone()).collect::<Vec<_>>();
    assert!(versions(running).iter().all(|v| *v == 4) && versions(later).iter().all(|v| *v == 6));
    // The weights did change under the running group.
    let mut unchanged = Engine::new(&vlm, endless_options()).unwrap();
    let before = unchanged.generate(&[request(&vlm, 0, 1.0)], None).unwrap();
    let differs = before[0].responses.iter().zip(&outputs[&running].responses);
    assert!(differs.clone().all(|(a, b)| max_difference(&a.logprobs[..5], &b.logprobs[..5]) < 1e-5));
    assert!(differs.clone().any(|(a, b)| a.tokens != b.tokens));
}

/// Weights are swapped during generation: each token's version is recorded, and its log-probability equals that of teacher forcing with
/// that version.
#[test]
fn weights_change_between_steps() {
    for family in Family::ALL {
        let old = model_of(family, 21);
        let new = model_of(family, 22);
        let mut engine = Engine::new(model_of(family, 21), endless_options()).unwrap();
        engine.set_version(4);
        let requests: Vec<GroupRequest> = (0..3).map(|k| request(&old, k, 1.0)).collect();
        let mut outputs = BTreeMap::new();
        let mut tickets: Vec<Ticket> = requests[..2].iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
        for _ in 0..4 {
            assert!(engine.step().unwrap().is_empty());
        }
        engine.load_weights(5, &copied_weights(&new)).unwrap();
        assert_eq!(engine.stats().groups_refilled, 2);
        tickets.push(engine.submit(requests[2].clone()).unwrap());
        run_to_end(&mut engine, &mut outputs);
        for (k, ticket) in tickets.iter().enumerate() {
            let score_request = ScoreRequest {
                input: requests[k].input.clone(),
                responses: outputs[ticket].responses.iter().map(|r| r.tokens.clone()).collect(),
            };
            let score = |vlm: &Vlm| {
                let mut engine = Engine::new(vlm, endless_options()).unwrap();
                engine.score(std::slice::from_ref(&score_request), 1.0).unwrap().remove(0)
            };
            let before = score(&old);
            let after = score(&new);
            for (r, response) in outputs[ticket].responses.iter().enumerate() {
                let swap = response.versions.iter().filter(|v| **v == 4).count();
                assert_eq!(swap, if k < 2 { 5 } else { 0 });
                assert!(response.versions[swap..].iter().all(|v| *v == 5) && response.tokens.len() == 12);
                assert!(max_difference(&response.logprobs[..swap], &before[r].logprobs[..swap]) < 1e-5);
                assert!(max_difference(&response.logprobs[swap..], &after[r].logprobs[swap..]) < 1e-5);
                let generated = response.attention.as_ref().unwrap();
                let teacher_forced = after[r].attention.as_ref().unwrap();
                // Token swap - 1 was the last one sampled before the swap, and the first one fed after it.
                let first = swap.saturating_sub(1) * generated.cells;
                assert!(max_difference(&generated.values[first..], &teacher_forced.values[first..]) < 1e-5);
            }
        }
        // Mismatched weights change nothing, and running groups continue.
        let ticket = engine.submit(requests[0].clone()).unwrap();
        engine.step().unwrap();
        assert!(engine.load_weights(6, &copied_weights(&new)[1..]).is_err());
        run_to_end(&mut engine, &mut outputs);
        assert!(outputs[&ticket].responses.iter().all(|r| r.versions.iter().all(|v| *v == 5)));
    }
}

/// Groups that are submitted later, into freed slots and with other numbers of responses, generate the same responses as alone.
#[test]
fn stream_equals_groups_alone() {
    let vlm = model(23);
    for fixed_shapes in [false, true] {
        check_stream(&vlm, Engine::new(model(23), EngineOptions { max_rows: 8, fixed_shapes, ..options() }).unwrap());
    }
}

fn check_stream(vlm: &Vlm, mut engine: Engine) {
    let mut requests: Vec<GroupRequest> = (0..7).map(|k| request(vlm, k, 1.0)).collect();
    requests[3].sampling.n = 2;
    requests[5].sampling.n = 2;
    requests[1].sampling.max_new_tokens = 3;
    requests[4].sampling.max_new_tokens = 25;
    let mut outputs = BTreeMap::new();
    let mut tickets = Vec::new();
    for (k, r) in requests.iter().enumerate() {
        tickets.push(engine.submit(r.clone()).unwrap());
        for _ in 0..k % 3 * 2 {
            outputs.extend(engine.step().unwrap());
        }
    }
    run_to_end(&mut engine, &mut outputs);
    // Fixed shapes keep the cache for the next batch.
    assert_eq!(engine.cache_bytes() > 0, engine.options.fixed_shapes);
    for (ticket, r) in tickets.iter().zip(&requests) {
        let alone = Engine::new(vlm, options()).unwrap().generate(std::slice::from_ref(r), None).unwrap().remove(0);
        assert_eq!(outputs[ticket].responses.len(), r.sampling.n);
        for (a, b) in outputs[ticket].responses.iter().zip(&alone.responses) {
            assert_eq!((&a.tokens, a.finish), (&b.tokens, b.finish));
            assert!(max_difference(&a.logprobs, &b.logprobs) < 1e-5);
            let rows = [a, b].map(|r| &r.attention.as_ref().unwrap().values);
            assert!(max_difference(rows[0], rows[1]) < 1e-5);
        }
    }
    // Ended responses are not fed.
    let responses = outputs.values().flat_map(|g| &g.responses);
    let fed: usize = responses.map(|r| r.tokens.len() - usize::from(r.finish == Finish::Stop)).sum();
    assert_eq!(engine.stats().tokens_fed, fed as u64);
}

#[test]
fn cancelled_group_frees_its_memory() {
    let vlm = model(24);
    let mut engine = Engine::new(model(24), endless_options()).unwrap();
    let mut long = request(&vlm, 0, 1.0);
    long.sampling.max_new_tokens = 1000;
    let first = engine.submit(long.clone()).unwrap();
    let second = engine.submit(request(&vlm, 1, 1.0)).unwrap();
    let third = engine.submit(long.clone()).unwrap();
    for _ in 0..3 {
        engine.step().unwrap();
    }
    let bytes = engine.cache_bytes();
    assert!(bytes > 0);
    let output = engine.cancel(first).unwrap();
    assert!(
        output.responses.iter().all(|r| r.finish == Finish::Cancelled && r.tokens.len() == 4 && r.logprobs.len() == 4)
    );
    assert!(engine.cancel(first).is_none());
    // The next group reuses the freed slot, and the cache does not grow.
    let fourth = engine.submit(long).unwrap();
    engine.step().unwrap();
    assert_eq!(engine.cache_bytes(), bytes);
    let mut outputs = BTreeMap::new();
    for _ in 0..20 {
        outputs.extend(engine.step().unwrap());
    }
    let alone = Engine::new(&vlm, endless_options()).unwrap().generate(&[request(&vlm, 1, 1.0)], None).unwrap();
    assert_eq!(outputs[&second].responses[3].tokens, alone[0].responses[3].tokens);
    engine.cancel(third).unwrap();
    engine.cancel(fourth).unwrap();
    assert!(engine.is_idle() && engine.cache_bytes() == 0);
}

#[test]
fn memory_is_planned_before_generation() {
    let vlm = model(25);
    let requests: Vec<GroupRequest> = (0..4).map(|k| request(&vlm, k, 1.0)).collect();
    let with_limit = |limit: u64| EngineOptions { memory_limit: Some(limit), prefill_tokens: 64, ..options() };
    let mut engine = Engine::new(&vlm, with_limit(1 << 16)).unwrap();
    let message = engine.generate(&requests, None).unwrap_err().to_string();
    for word in ["g0", "4 response(s)", "12 tokens", "MiB", "max_new_tokens", "image size"] {
        assert!(message.contains(word), "{message}");
    }
    assert!(matches!(engine.submit(requests[0].clone()), Err(EngineError::Memory { n: 4, new: 12, .. })));
    // With memory for one group at a time, the others wait and generate the same responses.
    let max = crate::MaxSizes { n: 4, prompt: 20, images: 12, response: 12 };
    assert!(engine.plan_memory("x", &max).is_err());
    let ample = Engine::new(&vlm, with_limit(1 << 34)).unwrap().plan_memory("x", &max).unwrap();
    assert_eq!(ample.slots, 64);
    let one_group = with_limit(ample.activations + ample.per_group * 3 / 2);
    let mut engine = Engine::new(&vlm, one_group).unwrap();
    assert_eq!(engine.plan_memory("x", &max).unwrap().slots, 1);
    let one_by_one = engine.generate(&requests, None).unwrap();
    let together = Engine::new(&vlm, options()).unwrap().generate(&requests, None).unwrap();
    for (a, b) in one_by_one.iter().zip(&together) {
        assert!(a.responses.iter().zip(&b.responses).all(|(a, b)| a.tokens == b.tokens));
    }
    assert!(engine.stats().decode_steps > 30, "{} steps", engine.stats().decode_steps);
}

#[test]
fn images_are_encoded_once_by_content() {
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
            let without_hash =
                GroupRequest { input: crate::PromptInput { hashes: vec![], ..r.input.clone() }, ..r.clone() };
            let alone = Engine::new(&vlm, options()).unwrap().generate(&[without_hash], None).unwrap();
            for other in [b, &alone[0]] {
                assert!(a.responses.iter().zip(&other.responses).all(|(a, b)| a.tokens == b.tokens));
            }
        }
        engine.load_weights(1, &copied_weights(&vlm)).unwrap();
        engine.generate(&requests[..1], None).unwrap();
        assert_eq!(engine.stats().images_encoded, 5);
        // With some of the weights, the others stay, and features stay cached unless the vision tower has changed.
        let weights_with = |prefix: &str| {
            let named = copied_weights(&model_of(family, 33)).into_iter().filter(|(n, _)| n.starts_with(prefix));
            named.collect::<Vec<_>>()
        };
        for (version, prefix, encoded) in [(2, "model.layers.1.", 5), (3, "visual.merger.", 6)] {
            engine.load_partial_weights(version, &weights_with(prefix)).unwrap();
            let changed = engine.generate(&requests[..1], None).unwrap();
            assert_eq!(engine.stats().images_encoded, encoded);
            let mut expected = model_of(family, 26);
            let loaded = ["model.layers.1.", "visual.merger."].into_iter().filter(|p| version == 3 || *p == prefix);
            loaded.for_each(|p| expected.load_partial(&weights_with(p)).unwrap());
            let fresh = Engine::new(expected, options()).unwrap().generate(&requests[..1], None).unwrap();
            for (a, b) in changed[0].responses.iter().zip(&fresh[0].responses) {
                assert_eq!((&a.tokens, a.versions.iter().all(|v| *v == version)), (&b.tokens, true));
            }
        }
        let unknown = [("model.nothing".to_owned(), weights_with("visual.merger.").remove(0).1)];
        assert!(engine.load_partial_weights(4, &unknown).unwrap_err().to_string().contains("model.nothing"));
        assert_eq!(engine.version(), 3);
        // A cache that is too small stores nothing.
        let mut engine = Engine::new(&vlm, EngineOptions { image_cache_bytes: 10, ..options() }).unwrap();
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
    let without_rule = Engine::new(&vlm, endless_options()).unwrap().generate(&[r.clone()], None).unwrap();
    // Ends a response with its second even token.
    r.stop = Some(Arc::new(|| {
        let mut even = 0;
        Box::new(move |token| {
            even += u32::from(token % 2 == 0);
            even == 2
        })
    }));
    let outputs = Engine::new(&vlm, endless_options()).unwrap().generate(&[r], None).unwrap();
    for (a, b) in outputs[0].responses.iter().zip(&without_rule[0].responses) {
        let end = b.tokens.iter().enumerate().filter(|(_, t)| *t % 2 == 0).nth(1).map_or(40, |(i, _)| i + 1);
        assert_eq!(
            (a.tokens.as_slice(), a.finish),
            (&b.tokens[..end], if end < 40 { Finish::Stop } else { Finish::Length })
        );
        // The last token is not an end token, so it is fed for its attention row.
        assert_eq!(a.attention.as_ref().unwrap().len(), end);
    }
    assert!(outputs[0].responses.iter().any(|r| r.finish == Finish::Stop));
}

#[test]
fn settings_differ_within_a_batch() {
    let vlm = model(28);
    let with = |change: &dyn Fn(&mut Sampling)| {
        let mut r = request(&vlm, 0, 1.3);
        change(&mut r.sampling);
        r
    };
    let requests = vec![
        with(&|_| ()),
        with(&|s| s.top_k = 1),
        with(&|s| s.temperature = 0.0),
        with(&|s| s.top_p = 1e-9),
        with(&|s| s.min_p = 1.0),
        with(&|s| s.logprobs = LogprobKind::Untempered),
    ];
    let outputs = Engine::new(&vlm, options()).unwrap().generate(&requests, None).unwrap();
    // Filters that leave a single token are greedy.
    for k in [1, 3, 4] {
        assert!(outputs[k].responses.iter().zip(&outputs[2].responses).all(|(a, b)| a.tokens == b.tokens), "{k}");
    }
    assert_eq!(outputs[0].responses[0].tokens, outputs[5].responses[0].tokens);
    let score_request = |k: usize| ScoreRequest {
        input: requests[k].input.clone(),
        responses: outputs[k].responses.iter().map(|r| r.tokens.clone()).collect(),
    };
    let mut engine = Engine::new(&vlm, options()).unwrap();
    for (k, temperature) in [(0, 1.3), (1, 1.3), (2, 1.0), (5, 1.0)] {
        for (a, b) in outputs[k].responses.iter().zip(&engine.score(&[score_request(k)], temperature).unwrap()[0]) {
            assert!(max_difference(&a.logprobs, &b.logprobs) < 1e-5, "{k}");
        }
    }
    for (change, word) in [
        (&(|s: &mut Sampling| s.top_p = 0.0) as &dyn Fn(&mut Sampling), "top_p"),
        (&|s: &mut Sampling| s.top_p = f64::NAN, "top_p"),
        (&|s: &mut Sampling| s.min_p = 1.1, "min_p"),
    ] {
        assert!(engine.generate(&[with(change)], None).unwrap_err().to_string().contains(word));
    }
}

/// NaN weights end all running groups with an error, and the engine stays usable.
#[test]
fn engine_is_usable_after_a_failure() {
    let vlm = model(29);
    let mut engine = Engine::new(model(29), options()).unwrap();
    engine.submit(request(&vlm, 0, 1.0)).unwrap();
    engine.step().unwrap();
    let broken: Vec<(String, Tensor)> = copied_weights(&vlm).into_iter().map(|(n, t)| (n, t * f64::NAN)).collect();
    engine.load_weights(1, &broken).unwrap();
    assert!(matches!(engine.step(), Err(EngineError::NonFinite { .. })));
    assert!(engine.is_idle() && engine.cache_bytes() == 0);
    engine.load_weights(2, &copied_weights(&vlm)).unwrap();
    assert!(engine.generate(&[GroupRequest { input: input(&vlm, 1), ..request(&vlm, 1, 1.0) }], None).is_ok());
}
