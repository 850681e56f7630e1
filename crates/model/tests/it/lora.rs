//! Adapters against peft: logits, files in both directions, and merged weights, in every way of running the model. Relative differences
//! are ratios of norms, within 1e-5 in fp32. `UNVEIL_SEED` selects other inputs and adapters.

use std::path::Path;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;
use tch::{Device, Kind, Tensor};
use unveil_core::{Family, GridThw, Prompt};
use unveil_model::{
    CacheShape, LoraSpec, PackedBatch, PackedGroup, Tape, TapeMode, Vlm, export, fingerprint, read_adapters,
    read_safetensors, rope_positions, write_safetensors,
};

use crate::common::{lively_of, python};

const TOLERANCE: f64 = 1e-5;

fn seed() -> u64 {
    std::env::var("UNVEIL_SEED").map_or(0, |s| s.parse().expect("UNVEIL_SEED is a number"))
}

fn gap(a: &Tensor, b: &Tensor) -> f64 {
    let a = a.detach().to_kind(Kind::Double);
    let b = b.detach().to_kind(Kind::Double);
    assert_eq!(a.size(), b.size());
    (a - &b).norm().double_value(&[]) / b.norm().double_value(&[])
}

/// A prompt with an image, two responses, and the patches of the image.
struct Input {
    group: PackedGroup,
    pixels: Tensor,
}

impl Input {
    fn new(vlm: &Vlm, rng: &mut ChaCha8Rng) -> Self {
        let m = vlm.config().vision.spatial_merge_size;
        let grid = [1, m * rng.random_range(1..5), m * rng.random_range(1..5)];
        let cells = vlm.config().merged_tokens(grid).expect("fits");
        let mut text = |n: usize| -> Vec<u32> { (0..n).map(|_| rng.random_range(10..300)).collect() };
        let tokens = [text(3), vec![5], vec![3; cells], vec![6], text(4)].concat();
        let responses = vec![text(7), text(3)];
        let patches = grid.iter().product::<i64>();
        tch::manual_seed(rng.random_range(0..1 << 30));
        let pixels = Tensor::randn([patches, vlm.config().vision.patch_len()], (Kind::Float, Device::Cpu));
        Self { group: PackedGroup { prompt: Prompt { tokens, grids: vec![grid] }, responses }, pixels }
    }

    fn tokens(&self) -> Vec<u32> {
        [self.group.prompt.tokens.clone(), self.group.responses[0].clone()].concat()
    }

    fn grids(&self) -> &[GridThw] {
        &self.group.prompt.grids
    }

    fn write(&self, path: &Path) {
        let ids: Vec<i64> = self.tokens().iter().map(|t| i64::from(*t)).collect();
        let grids: Vec<i64> = self.grids().iter().flatten().copied().collect();
        let named = [
            ("input_ids".to_owned(), Tensor::from_slice(&ids).unsqueeze(0)),
            ("image_grid_thw".to_owned(), Tensor::from_slice(&grids).view([-1, 3])),
            ("pixel_values".to_owned(), self.pixels.shallow_clone()),
        ];
        write_safetensors(path, &named).expect("writes");
    }

    /// Returns the logits `[L, V]` of the teacher-forced pass over prompt and first response.
    fn logits(&self, vlm: &Vlm) -> Tensor {
        let _guard = tch::no_grad_guard();
        let features = vlm.encode_images(&self.pixels, self.grids()).expect("features");
        let tokens = self.tokens();
        let ids: Vec<i64> = tokens.iter().map(|t| i64::from(*t)).collect();
        let (positions, _) = rope_positions(&tokens, self.grids(), vlm.config()).expect("positions");
        let flat: Vec<i64> = positions.iter().flatten().copied().collect();
        let positions = Tensor::from_slice(&flat).view([1, -1, 3]).permute([2, 0, 1]);
        let ids = Tensor::from_slice(&ids).unsqueeze(0);
        let out = vlm.forward(&ids, Some(&features), &positions, None, None).expect("forward");
        vlm.lm_head(&out.hidden).squeeze_dim(0)
    }

    /// Returns the hidden states `[N, D]` that predict the responses, from the packed pass, on a tape.
    fn packed<'a>(&self, vlm: &'a Vlm, tape: &mut Tape<'a>) -> unveil_model::Var {
        let batch = PackedBatch::build(std::slice::from_ref(&self.group), vlm.config(), vlm.device()).expect("packs");
        vlm.train_packed(tape, &batch, Some((&self.pixels, self.grids())), None).expect("packed").0
    }

    /// Returns the hidden states that predict the first response, decoded token by token after a prefill.
    fn decoded(&self, vlm: &Vlm) -> Tensor {
        let _guard = tch::no_grad_guard();
        let features = vlm.encode_images(&self.pixels, self.grids()).expect("features");
        let prefill = vlm.prefill(std::slice::from_ref(&self.group.prompt), Some(&features)).expect("prefill");
        let response = &self.group.responses[0];
        let shape = CacheShape { slots: 1, n: 1, prompt: 0, response: response.len(), images: 0 };
        let mut cache = vlm.cache(shape, None, false).expect("cache");
        cache.admit(&prefill, &[0]).expect("admitted");
        let mut hidden = vec![prefill.last_hidden];
        for token in &response[..response.len() - 1] {
            let fed = Tensor::from_slice(&[i64::from(*token)]);
            hidden.push(vlm.decode_step(&mut cache, &fed, &[0]).expect("step").hidden);
        }
        Tensor::cat(&hidden, 0)
    }
}

fn spec(rank: i64, targets: &[&str]) -> LoraSpec {
    LoraSpec { rank, alpha: 6.0, rank_stabilised: false, targets: targets.iter().map(|t| (*t).to_owned()).collect() }
}

/// Sets every adapter to noise, so that B A is not 0.
fn randomise_adapters(vlm: &mut Vlm, seed: u64) {
    tch::manual_seed(seed as i64);
    let current = vlm.adapters().expect("has adapters").named_parameters();
    let noise: Vec<(String, Tensor)> = current.iter().map(|(n, t)| (n.clone(), t.randn_like() * 0.1)).collect();
    vlm.load_adapters(&noise).expect("fits");
}

const DECODER: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

#[test]
fn equals_peft_in_both_directions() {
    tch::set_num_threads(1);
    let root = tempfile::tempdir().expect("temporary directory");
    let mut rng = ChaCha8Rng::seed_from_u64(seed());
    let mut inputs = Vec::new();
    for family in Family::ALL {
        let dir = root.path().join(family.name());
        let mut vlm = lively_of(family, &dir.join("base"));
        vlm.save(&dir.join("base")).expect("saves");
        let input = Input::new(&vlm, &mut rng);
        input.write(&dir.join("inputs.st"));
        let mut targets: Vec<&str> = DECODER.to_vec();
        targets.extend(["visual.blocks.*.attn.proj", "visual.merger.*"]);
        vlm.init_adapters(&spec(3, &targets), seed()).expect("adapts");
        randomise_adapters(&mut vlm, rng.random());
        let logits = input.logits(&vlm);
        vlm.adapters().expect("there").save(&dir.join("ours"), "base").expect("saves");
        write_safetensors(&dir.join("ours.st"), &[("logits".into(), logits)]).expect("writes");
        export(&dir.join("base"), &dir.join("merged"), None, Some(&dir.join("ours"))).expect("exports");
        inputs.push((family, input));
    }
    let path = root.path().to_string_lossy().into_owned();
    python("lora.py", &["make", &path, &seed().to_string()]);
    let report: Value = serde_json::from_str(&python("lora.py", &["check", &path])).expect("report");
    for (family, input) in inputs {
        let gaps = &report[family.name()];
        let number = |key: &str| gaps[key].as_f64().expect("number");
        assert!(number("moved") > 1e-2, "the adapters have no effect: {gaps}");
        assert!(number("peft") < TOLERANCE && number("merged") < TOLERANCE, "{}: {gaps}", family.name());
        // Adapters made by peft: random layers of decoder and vision tower, random rank and scale.
        let dir = root.path().join(family.name());
        let mut vlm = Vlm::load(&dir.join("base"), Device::Cpu, Kind::Float).expect("loads");
        let base = input.logits(&vlm);
        let (spec, named) = read_adapters(&dir.join("peft")).expect("reads");
        assert_eq!((named.len(), spec.targets.len()), (18, 9));
        vlm.attach_adapters(&dir.join("peft"), spec, &named).expect("fits");
        let expected = read_safetensors(&dir.join("peft.st")).expect("logits").remove(0).1;
        let difference = gap(&input.logits(&vlm), &expected);
        println!("{}: {gaps}, peft's adapters in our model {difference:.1e}", family.name());
        assert!(difference < TOLERANCE && gap(&base, &expected) > 1e-3, "{}: {difference}", family.name());
        let merged = vlm.merged(|vlm| input.logits(vlm)).expect("merges");
        assert!(gap(&merged, &expected) < TOLERANCE);
        assert_eq!(
            vlm.without_adapters(|vlm| input.logits(vlm)),
            base,
            "without adapters it is the base model, bit for bit"
        );
    }
}

/// With adapters in the decoder or the vision tower, every way of running the model has the same result.
#[test]
fn all_ways_of_running_agree() {
    let mut rng = ChaCha8Rng::seed_from_u64(seed() + 1);
    for family in Family::ALL {
        let dir = tempfile::tempdir().expect("temporary directory");
        let vlm = lively_of(family, dir.path());
        let input = Input::new(&vlm, &mut rng);
        let before = input.logits(&vlm);
        let base_hidden = input.decoded(&vlm);
        vlm.set_trainable(|_| false);
        // In the second round only some parts of fused products have an adapter.
        for (round, targets) in [(0, vec!["visual.*"]), (1, vec!["k_proj", "up_proj", "down_proj"])] {
            let mut adapted = lively_of(family, dir.path());
            adapted.init_adapters(&spec(4, &targets), 9).expect("adapts");
            assert_eq!(input.logits(&adapted), before, "B is 0: nothing changes yet");
            randomise_adapters(&mut adapted, rng.random());
            let logits = input.logits(&adapted);
            let n = input.group.responses[0].len() as i64;
            let from = input.group.prompt.tokens.len() as i64 - 1;
            let expected = logits.narrow(0, from, n);
            assert!(gap(&logits, &before) > 1e-3, "round {round}");
            let packed = tch::no_grad(|| input.packed(&adapted, &mut Tape::new(TapeMode::Graph)).tensor);
            let assert_close = |what: &str, hidden: &Tensor| {
                let difference = gap(&adapted.lm_head(hidden), &expected);
                assert!(difference < TOLERANCE, "{what}, {family:?}, round {round}: {difference}");
            };
            assert_close("packed", &packed.narrow(0, 0, n));
            assert_close("decoded with separate adapters", &input.decoded(&adapted));
            // Merged weights use the CPU kernels.
            let merged = adapted.merged(|vlm| input.decoded(vlm)).expect("merges");
            let difference = gap(&adapted.lm_head(&merged), &expected);
            assert!(difference < TOLERANCE, "decoded with merged weights, {family:?}: {difference}");
            let without = adapted.without_adapters(|vlm| input.decoded(vlm));
            assert!(gap(&without, &base_hidden) < TOLERANCE);
            assert_eq!(input.logits(&adapted), logits, "adapters are enabled again, and the weights are unchanged");
        }
    }
}

/// Gradients with and without recomputation agree within 1e-10 in fp64; frozen weights have none.
#[test]
fn recomputed_gradients_are_equal() {
    let mut rng = ChaCha8Rng::seed_from_u64(seed() + 2);
    for family in Family::ALL {
        let dir = tempfile::tempdir().expect("temporary directory");
        lively_of(family, dir.path()).save(dir.path()).expect("saves");
        let mut vlm = Vlm::load(dir.path(), Device::Cpu, Kind::Double).expect("loads");
        let input = Input::new(&vlm, &mut rng);
        let targets: Vec<&str> = DECODER.into_iter().chain(["visual.blocks.*"]).collect();
        vlm.init_adapters(&spec(2, &targets), 1).expect("adapts");
        randomise_adapters(&mut vlm, rng.random());
        vlm.set_trainable(|_| false);
        let adapters = vlm.adapters().expect("there");
        adapters.set_trainable(true);
        let gradients = |mode: TapeMode| {
            for (_, t) in adapters.named_parameters() {
                t.shallow_clone().zero_grad();
            }
            let mut tape = Tape::new(mode);
            let hidden = input.packed(&vlm, &mut tape);
            let leaf = tape.leaf(&hidden);
            leaf.square().sum(Kind::Double).backward();
            tape.backward().expect("backward pass");
            adapters.named_parameters().iter().map(|(_, t)| t.grad().copy()).collect::<Vec<_>>()
        };
        let plain = gradients(TapeMode::Graph);
        let recomputed = gradients(TapeMode::Recompute);
        for ((name, _), (a, b)) in adapters.named_parameters().iter().zip(plain.iter().zip(&recomputed)) {
            assert!(a.norm().double_value(&[]) > 0.0 && gap(b, a) < 1e-10, "{name}: {}", gap(b, a));
        }
        assert!(vlm.named_parameters().iter().all(|(_, t)| !t.grad().defined()));
    }
}

/// fp32 adapters of bf16 weights are merged in fp32 and rounded once.
#[test]
fn adapters_of_half_precision_weights() {
    let dir = tempfile::tempdir().expect("temporary directory");
    lively_of(Family::Qwen3Vl, dir.path()).save(dir.path()).expect("saves");
    let mut rng = ChaCha8Rng::seed_from_u64(seed() + 3);
    let mut half = Vlm::load(dir.path(), Device::Cpu, Kind::BFloat16).expect("loads");
    let input = Input::new(&half, &mut rng);
    half.init_adapters(&spec(4, &DECODER), 5).expect("adapts");
    randomise_adapters(&mut half, 6);
    let adapters = half.adapters().expect("there").named_parameters();
    assert!(adapters.iter().all(|(_, t)| t.kind() == Kind::Float));
    // The same weights in fp32 have the same result.
    let mut full = Vlm::load(dir.path(), Device::Cpu, Kind::Float).expect("loads");
    let state: Vec<_> = half.named_parameters().iter().map(|(n, t)| (n.clone(), t.to_kind(Kind::Float))).collect();
    full.load_state(&state).expect("fits");
    full.attach_adapters(Path::new("ours"), half.adapters().expect("there").spec().clone(), adapters).expect("fits");
    assert!(gap(&input.logits(&half), &input.logits(&full)) < TOLERANCE);
    let name = "model.layers.1.mlp.down_proj.weight";
    let rounded = full.merged(|v| v.parameter(name).expect("there").to_kind(Kind::BFloat16)).expect("merges");
    let merged = half.merged(|v| v.parameter(name).expect("there").copy()).expect("merges");
    assert_eq!((merged.kind(), merged), (Kind::BFloat16, rounded));
}

#[test]
fn initial_adapters_depend_only_on_seed_and_name() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let make = |seed: u64, targets: &[&str]| {
        let mut vlm = lively_of(Family::Qwen2_5Vl, dir.path());
        vlm.init_adapters(&spec(8, targets), seed).expect("adapts");
        let adapters = vlm.adapters().expect("there").named_parameters();
        adapters.iter().map(|(n, t)| (n.clone(), t.copy())).collect::<Vec<_>>()
    };
    let all = make(3, &DECODER);
    let some = make(3, &["model.layers.1.*.up_proj"]);
    let other = make(4, &DECODER);
    let find = |list: &[(String, Tensor)], name: &str| list.iter().find(|(n, _)| n == name).expect("there").1.copy();
    let name = "model.layers.1.mlp.up_proj.lora_A.weight";
    assert_eq!((some.len(), find(&some, name)), (2, find(&all, name)));
    assert_ne!(find(&all, name), find(&other, name));
    for (name, t) in &all {
        let size = t.size();
        let bound = (size[1] as f64).powf(-0.5);
        if name.ends_with("lora_B.weight") {
            assert_eq!(t.abs().max().double_value(&[]), 0.0);
        } else {
            // Uniform: the variance is bound^2 / 3, and the largest value is close to the bound.
            let largest = t.abs().max().double_value(&[]);
            let variance = t.var(true).double_value(&[]);
            assert!(largest <= bound && largest > 0.9 * bound, "{name}: {largest} of {bound}");
            assert!((variance / (bound * bound / 3.0) - 1.0).abs() < 0.35, "{name}: {variance}");
        }
    }
}

#[test]
fn invalid_targets_and_ranks_are_refused() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let e = |spec: LoraSpec| lively_of(Family::Qwen2_5Vl, dir.path()).init_adapters(&spec, 0).unwrap_err().to_string();
    let text = e(spec(2, &["q_proj", "qproj"]));
    assert!(
        ["`qproj`", "`q_proj`", "`down_proj`", "`visual.blocks.*.attn.qkv`"].iter().all(|w| text.contains(w)),
        "{text}"
    );
    assert!(e(spec(2, &["visual.q_proj"])).contains("`visual.q_proj`"));
    assert!(e(spec(2, &["qkv"])).contains("`qkv`"), "without `visual.` a name selects layers of the decoder");
    let text = e(spec(4096, &["q_proj"]));
    assert!(text.contains("rank 4096") && text.contains("`model.layers.0.self_attn.q_proj`"), "{text}");
    assert!(e(spec(0, &["q_proj"])).contains("rank 0"));
    assert!(e(LoraSpec { alpha: f64::NAN, ..spec(2, &["q_proj"]) }).contains("alpha NaN"));
    assert!(e(spec(2, &[])).contains("target"));
    let mut vlm = lively_of(Family::Qwen2_5Vl, dir.path());
    assert!(vlm.load_adapters(&[]).unwrap_err().to_string().contains("no adapters"));
    vlm.init_adapters(&spec(2, &["q_proj"]), 0).expect("adapts");
    assert!(vlm.init_adapters(&spec(2, &["q_proj"]), 0).unwrap_err().to_string().contains("already"));
    let adapters = vlm.adapters().expect("there").named_parameters();
    let most: Vec<_> = adapters.iter().skip(1).map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
    let text = vlm.load_adapters(&most).unwrap_err().to_string();
    assert!(text.contains("missing") && text.contains("layers.0.self_attn.q_proj.lora_A"), "{text}");
}

#[test]
fn invalid_adapter_files_are_refused() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let base = dir.path().join("base");
    let ours = dir.path().join("ours");
    let mut vlm = lively_of(Family::Qwen2_5Vl, &base);
    vlm.init_adapters(&spec(2, &["q_proj"]), 0).expect("adapts");
    vlm.adapters().expect("there").save(&ours, "base").expect("saves");
    let config = ours.join("adapter_config.json");
    let text = std::fs::read_to_string(&config).expect("written");
    let with = |key: &str, value: Value| {
        let mut map: Value = serde_json::from_str(&text).expect("JSON");
        map[key] = value;
        std::fs::write(&config, map.to_string()).expect("writes");
        let read = read_adapters(&ours).map(|_| ()).map_err(|e| e.to_string());
        std::fs::write(&config, &text).expect("writes");
        read
    };
    for (key, value) in [
        ("peft_type", "IA3".into()),
        ("use_dora", true.into()),
        ("bias", "all".into()),
        ("modules_to_save", serde_json::json!(["lm_head"])),
        ("rank_pattern", serde_json::json!({"q_proj": 3})),
        ("init_lora_weights", "pissa".into()),
        ("init_lora_weights", "pissa_niter_16".into()),
        ("init_lora_weights", "olora".into()),
        ("init_lora_weights", "corda".into()),
        ("init_lora_weights", "loftq".into()),
        ("init_lora_weights", "lora_ga".into()),
        ("r", 0.into()),
        ("lora_alpha", "much".into()),
    ] {
        let named = value.to_string();
        let e = with(key, value).unwrap_err();
        assert!(e.contains("adapter_config.json") && e.contains(key), "{e}");
        assert!(key != "init_lora_weights" || e.contains(&named), "{e}");
    }
    // These leave the weights of the base model unchanged.
    for plain in ["gaussian", "orthogonal", "eva"] {
        assert_eq!(with("init_lora_weights", plain.into()), Ok(()));
    }
    assert_eq!(with("init_lora_weights", false.into()), Ok(()));
    let e = with("r", 3.into()).unwrap_err();
    assert!(e.contains("rank 3") && e.contains("q_proj"), "{e}");
    let weights = ours.join("adapter_model.safetensors");
    let named = read_safetensors(&weights).expect("reads");
    let write = |change: &dyn Fn(usize, &str) -> String| {
        let named: Vec<_> = named.iter().enumerate().map(|(i, (n, t))| (change(i, n), t.shallow_clone())).collect();
        write_safetensors(&weights, &named).expect("writes");
        export(&base, &dir.path().join("out"), None, Some(&ours)).unwrap_err().to_string()
    };
    let e = write(&|i, n| if i == 0 { format!("{n}.more") } else { n.to_owned() });
    assert!(e.contains(".more"), "{e}");
    let e = write(&|i, n| if i == 0 { "x.lora_A.weight".into() } else { n.to_owned() });
    assert!(e.contains("`x.lora_A.weight` does not begin with `base_model.model.`"), "{e}");
    let e = write(&|_, n| n.replace("layers.0", "layers.77"));
    assert!(e.contains("layers.77"), "{e}");
    std::fs::remove_file(&weights).expect("removes");
    assert!(read_adapters(&ours).unwrap_err().to_string().contains("adapter_model.safetensors"));
    assert!(!dir.path().join("out").exists());
}

#[test]
fn fingerprints_depend_on_the_weights() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let a = dir.path().join("a");
    let b = dir.path().join("b");
    let vlm = lively_of(Family::Qwen2_5Vl, &a);
    vlm.save(&a).expect("saves");
    vlm.save(&b).expect("saves");
    let hash = |p: &Path| fingerprint(p).expect("reads");
    assert_eq!((hash(&a), hash(&a).len()), (hash(&b), 64));
    let mut bytes = std::fs::read(b.join("model.safetensors")).expect("reads");
    *bytes.last_mut().expect("not empty") ^= 1;
    std::fs::write(b.join("model.safetensors"), bytes).expect("writes");
    assert_ne!(hash(&a), hash(&b));
}
