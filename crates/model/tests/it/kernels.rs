//! Decode steps with the CPU kernels.

use tch::{Device, Kind, Tensor};
use unveil_core::{Family, Prompt};
use unveil_model::{AttentionSet, CacheShape, LoraSpec, Vlm};

use crate::common::{fresh, max_diff};

/// Steps of rows and prefixes of different lengths, with and without an image, equal those of libtorch's operations, and the result of a
/// row does not depend on the other fed rows, on every instruction set that this machine supports.
#[test]
fn kernels_equal_the_plain_step() {
    for (i, set) in unveil_torch_ext::instruction_sets().into_iter().enumerate() {
        // Waiting threads are slow on a busy machine; testing them with the first instruction set is enough.
        if i > 0 {
            tch::set_num_threads(1);
        }
        for (family, seed) in [(Family::Qwen2_5Vl, 3), (Family::Qwen3Vl, 4)] {
            unveil_torch_ext::with_instruction_set(set, || check_steps(set, family, seed)).expect("a known set");
        }
    }
}

/// More rows than the kernels for few rows accept in one call.
#[test]
fn logits_are_independent_of_the_number_of_rows() {
    let vlm = fresh(Family::Qwen3Vl, 5);
    let hidden = Tensor::randn([131, vlm.config().text.hidden_size], (Kind::Float, Device::Cpu));
    let _guard = tch::no_grad_guard();
    let rows: Vec<Tensor> = (0..131).map(|i| vlm.step_logits(&hidden.narrow(0, i, 1))).collect();
    for count in [1, 2, 63, 64, 65, 100, 128, 131] {
        let together = vlm.step_logits(&hidden.narrow(0, 0, count));
        assert_eq!(together, Tensor::cat(&rows[..count as usize], 0), "{count} rows");
    }
}

fn check_steps(set: &str, family: Family, seed: u64) {
    let vlm = fresh(family, seed);
    let plain = without_kernels(family, seed);
    let m = vlm.config().vision.spatial_merge_size;
    let grids = [[1, 2 * m, 3 * m], [1, 2 * m, 2 * m]];
    let prompt = |before: u32, grid: Option<[i64; 3]>| {
        let cells = grid.map_or(0, |g| vlm.config().merged_tokens(g).expect("fits"));
        let image = vec![vlm.config().image_token_id; cells];
        let tokens = [vec![58; before as usize], image, vec![59, 10 + before % 50, 7]].concat();
        Prompt { tokens, grids: grid.into_iter().collect() }
    };
    let prompts = [prompt(2, Some(grids[0])), prompt(71, None), prompt(1, Some(grids[1]))];
    let patches: i64 = grids.iter().map(|g| g.iter().product::<i64>()).sum();
    let pixels = Tensor::randn([patches, vlm.config().vision.patch_len()], (Kind::Float, Device::Cpu));
    let _guard = tch::no_grad_guard();
    let features = vlm.encode_images(&pixels, &grids).expect("features");
    let prefill = vlm.prefill(&prompts, Some(&features)).expect("prefill");
    let shape = CacheShape { slots: 4, n: 3, prompt: 1, response: 70, images: 1 };
    let cache = || {
        let mut cache = vlm.cache(shape, Some(AttentionSet::new(&[1], &[[0, 1], [0, 2]])), false).expect("cache");
        cache.admit(&prefill, &[0, 3, 2]).expect("admits");
        cache
    };
    let mut a = cache();
    let mut b = cache();
    let mut alone = cache();
    let mut worst = 0.0f64;
    for step in 0..68i64 {
        let all = [0usize, 1, 2, 6, 7, 8, 9, 10, 11];
        let rows: Vec<usize> = all.into_iter().filter(|r| !(r + step as usize).is_multiple_of(4)).collect();
        let tokens: Vec<i64> = rows.iter().map(|r| 10 + (*r as i64 * 5 + step * 3) % 57).collect();
        let ids = Tensor::from_slice(&tokens);
        let out = vlm.decode_step(&mut a, &ids, &rows).expect("step");
        let attention = out.attention.expect("captured");
        let expected = plain.decode_step(&mut b, &ids, &rows).expect("step");
        worst = worst.max(max_diff(&out.hidden, &expected.hidden));
        worst = worst.max(max_diff(&attention, &expected.attention.expect("captured")));
        if let Some(index) = rows.iter().position(|r| *r == 10) {
            let index = index as i64;
            let single = vlm.decode_step(&mut alone, &ids.narrow(0, index, 1), &[10]).expect("step");
            let place = format!("{set}, {}, step {step}", family.name());
            assert_eq!(single.hidden, out.hidden.narrow(0, index, 1), "{place}");
            assert_eq!(single.attention.expect("captured"), attention.narrow(0, index, 1), "{place}");
        }
    }
    assert!(worst > 0.0, "{set}, {}: both models ran the same code", family.name());
    assert!(worst < 2e-5, "{set}, {}: {worst}", family.name());
}

/// Creates the model that [`fresh`] creates, with an adapter that adds 0: the kernels are for models without adapters.
fn without_kernels(family: Family, seed: u64) -> Vlm {
    let mut vlm = fresh(family, seed);
    let spec = LoraSpec { rank: 1, alpha: 1.0, rank_stabilised: false, targets: vec!["o_proj".into()] };
    vlm.init_adapters(&spec, 0).expect("adapts");
    vlm
}
