//! Adapters against peft: logits, files in both directions, merged weights; in every way of running the model. Relative gaps are norms
//! over norms, within 1e-5 in fp32. `UNVEIL_SEED` makes other inputs and adapters.

mod common;

use std::path::Path;

use common::{lively_of, python};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;
use tch::{Device, Kind, Tensor};
use unveil_model::{
    CacheShape, Family, GridThw, LoraSpec, Mode, PackedBatch, PackedGroup, Prompt, Tape, Vlm, export, fingerprint,
    read_adapters, read_safetensors, rope_positions, write_safetensors,
};

const TOLERANCE: f64 = 1e-5;

fn seed() -> u64 {
    std::env::var("UNVEIL_SEED").map_or(0, |s| s.parse().expect("UNVEIL_SEED is a number"))
}

fn gap(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.detach().to_kind(Kind::Double), b.detach().to_kind(Kind::Double));
    assert_eq!(a.size(), b.size());
    (a - &b).norm().double_value(&[]) / b.norm().double_value(&[])
}

/// A prompt with an image, a response, and the image's patches.
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

    /// Logits `[L, V]` of the teacher-forced pass over prompt and first response.
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

    /// Hidden states that predict the responses, from packed groups `[N, D]`, on a tape.
    fn packed<'a>(&self, vlm: &'a Vlm, tape: &mut Tape<'a>) -> unveil_model::Var {
        let batch = PackedBatch::build(std::slice::from_ref(&self.group), vlm.config(), vlm.device()).expect("packs");
        vlm.train_packed(tape, &batch, Some((&self.pixels, self.grids())), None).expect("packed").0
    }

    /// Hidden states that predict the first response, token by token behind a prefilled prompt.
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
fn stir(vlm: &mut Vlm, seed: u64) {
    tch::manual_seed(seed as i64);
    let own = vlm.adapters().expect("has adapters").named_parameters();
    let noise: Vec<(String, Tensor)> = own.iter().map(|(n, t)| (n.clone(), t.randn_like() * 0.1)).collect();
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
        let at = root.path().join(family.name());
        let mut vlm = lively_of(family, &at.join("base"));
        vlm.save(&at.join("base")).expect("saves");
        let input = Input::new(&vlm, &mut rng);
        input.write(&at.join("inputs.st"));
        let mut targets: Vec<&str> = DECODER.to_vec();
        targets.extend(["visual.blocks.*.attn.proj", "visual.merger.*"]);
        vlm.adapt(&spec(3, &targets), seed()).expect("adapts");
        stir(&mut vlm, rng.random());
        let logits = input.logits(&vlm);
        vlm.adapters().expect("there").save(&at.join("ours"), "base").expect("saves");
        write_safetensors(&at.join("ours.st"), &[("logits".into(), logits)]).expect("writes");
        export(&at.join("base"), &at.join("merged"), None, Some(&at.join("ours"))).expect("exports");
        inputs.push((family, input));
    }
    let place = root.path().to_string_lossy().into_owned();
    python("lora.py", &["make", &place, &seed().to_string()]);
    let report: Value = serde_json::from_str(&python("lora.py", &["check", &place])).expect("report");
    for (family, input) in inputs {
        let found = &report[family.name()];
        let number = |key: &str| found[key].as_f64().expect("number");
        assert!(number("moved") > 1e-2, "the adapters say nothing: {found}");
        assert!(number("peft") < TOLERANCE && number("merged") < TOLERANCE, "{}: {found}", family.name());
        // What peft made: random layers of both towers, random rank and form of the scale.
        let at = root.path().join(family.name());
        let mut vlm = Vlm::load(&at.join("base"), Device::Cpu, Kind::Float).expect("loads");
        let plain = input.logits(&vlm);
        let (spec, named) = read_adapters(&at.join("peft")).expect("reads");
        assert_eq!((named.len(), spec.targets.len()), (18, 9));
        vlm.adapt_with(&at.join("peft"), spec, &named).expect("fits");
        let gold = read_safetensors(&at.join("peft.st")).expect("gold").remove(0).1;
        let off = gap(&input.logits(&vlm), &gold);
        println!("{}: {found}, their adapter in ours {off:.1e}", family.name());
        assert!(off < TOLERANCE && gap(&plain, &gold) > 1e-3, "{}: {off}", family.name());
        let merged = vlm.merged(|vlm| input.logits(vlm)).expect("merges");
        assert!(gap(&merged, &gold) < TOLERANCE);
        assert_eq!(vlm.without_adapters(|vlm| input.logits(vlm)), plain, "adapters off is the base, bit for bit");
    }
}

/// One model, adapters on all layers of both towers: every way of running it says the same.
#[test]
fn every_way_of_running_agrees() {
    let mut rng = ChaCha8Rng::seed_from_u64(seed() + 1);
    for family in Family::ALL {
        let dir = tempfile::tempdir().expect("temporary directory");
        let vlm = lively_of(family, dir.path());
        let input = Input::new(&vlm, &mut rng);
        let (before, base_hidden) = (input.logits(&vlm), input.decoded(&vlm));
        vlm.set_trainable(|_| false);
        // Of joined products only one part has an adapter in the second round.
        for (round, targets) in [(0, vec!["visual.*"]), (1, vec!["k_proj", "up_proj", "down_proj"])] {
            let mut own = lively_of(family, dir.path());
            own.adapt(&spec(4, &targets), 9).expect("adapts");
            assert_eq!(input.logits(&own), before, "B is 0: nothing changes yet");
            stir(&mut own, rng.random());
            let (whole, n) = (input.logits(&own), input.group.responses[0].len() as i64);
            let from = input.group.prompt.tokens.len() as i64 - 1;
            let expected = whole.narrow(0, from, n);
            assert!(gap(&whole, &before) > 1e-3, "round {round}");
            let packed = tch::no_grad(|| input.packed(&own, &mut Tape::new(Mode::Graph)).tensor);
            let close = |what: &str, hidden: &Tensor| {
                let off = gap(&own.lm_head(hidden), &expected);
                assert!(off < TOLERANCE, "{what}, {family:?}, round {round}: {off}");
            };
            close("packed", &packed.narrow(0, 0, n));
            close("decoded beside the weights", &input.decoded(&own));
            // Merged weights run through the CPU's own kernels.
            let merged = own.merged(|own| input.decoded(own)).expect("merges");
            let off = gap(&own.lm_head(&merged), &expected);
            assert!(off < TOLERANCE, "decoded with merged weights, {family:?}: {off}");
            let off = own.without_adapters(|own| input.decoded(own));
            assert!(gap(&off, &base_hidden) < TOLERANCE);
            assert_eq!(input.logits(&own), whole, "they are on again, and no weight has moved");
        }
    }
}

/// Gradients in both modes of the tape, in fp64 within 1e-10; the frozen weights get none.
#[test]
fn recomputed_gradients_are_the_same() {
    let mut rng = ChaCha8Rng::seed_from_u64(seed() + 2);
    for family in Family::ALL {
        let dir = tempfile::tempdir().expect("temporary directory");
        lively_of(family, dir.path()).save(dir.path()).expect("saves");
        let mut vlm = Vlm::load(dir.path(), Device::Cpu, Kind::Double).expect("loads");
        let input = Input::new(&vlm, &mut rng);
        let targets: Vec<&str> = DECODER.into_iter().chain(["visual.blocks.*"]).collect();
        vlm.adapt(&spec(2, &targets), 1).expect("adapts");
        stir(&mut vlm, rng.random());
        vlm.set_trainable(|_| false);
        let adapters = vlm.adapters().expect("there");
        adapters.set_trainable(true);
        let gradients = |mode: Mode| {
            for (_, t) in adapters.named_parameters() {
                t.shallow_clone().zero_grad();
            }
            let mut tape = Tape::new(mode);
            let hidden = input.packed(&vlm, &mut tape);
            let leaf = tape.leaf(&hidden);
            leaf.square().sum(Kind::Double).backward();
            tape.backward();
            adapters.named_parameters().iter().map(|(_, t)| t.grad().copy()).collect::<Vec<_>>()
        };
        let (plain, again) = (gradients(Mode::Graph), gradients(Mode::Recompute));
        for ((name, _), (a, b)) in adapters.named_parameters().iter().zip(plain.iter().zip(&again)) {
            assert!(a.norm().double_value(&[]) > 0.0 && gap(b, a) < 1e-10, "{name}: {}", gap(b, a));
        }
        assert!(vlm.named_parameters().iter().all(|(_, t)| !t.grad().defined()));
    }
}

/// fp32 adapters beside bf16 weights, merged in fp32 and rounded once.
#[test]
fn adapters_lie_beside_weights_of_any_kind() {
    let dir = tempfile::tempdir().expect("temporary directory");
    lively_of(Family::Qwen3Vl, dir.path()).save(dir.path()).expect("saves");
    let mut rng = ChaCha8Rng::seed_from_u64(seed() + 3);
    let mut half = Vlm::load(dir.path(), Device::Cpu, Kind::BFloat16).expect("loads");
    let input = Input::new(&half, &mut rng);
    half.adapt(&spec(4, &DECODER), 5).expect("adapts");
    stir(&mut half, 6);
    let own = half.adapters().expect("there").named_parameters();
    assert!(own.iter().all(|(_, t)| t.kind() == Kind::Float));
    // The same numbers in fp32 say the same.
    let mut full = Vlm::load(dir.path(), Device::Cpu, Kind::Float).expect("loads");
    let state: Vec<_> = half.named_parameters().iter().map(|(n, t)| (n.clone(), t.to_kind(Kind::Float))).collect();
    full.load_state(&state).expect("fits");
    full.adapt_with(Path::new("ours"), half.adapters().expect("there").spec().clone(), own).expect("fits");
    assert!(gap(&input.logits(&half), &input.logits(&full)) < TOLERANCE);
    let name = "model.layers.1.mlp.down_proj.weight";
    let rounded = full.merged(|v| v.parameter(name).expect("there").to_kind(Kind::BFloat16)).expect("merges");
    let merged = half.merged(|v| v.parameter(name).expect("there").copy()).expect("merges");
    assert_eq!((merged.kind(), merged), (Kind::BFloat16, rounded));
}

#[test]
fn fresh_adapters_depend_on_seed_and_name_alone() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let make = |seed: u64, targets: &[&str]| {
        let mut vlm = lively_of(Family::Qwen2_5Vl, dir.path());
        vlm.adapt(&spec(8, targets), seed).expect("adapts");
        let own = vlm.adapters().expect("there").named_parameters();
        own.iter().map(|(n, t)| (n.clone(), t.copy())).collect::<Vec<_>>()
    };
    let (all, some, other) = (make(3, &DECODER), make(3, &["model.layers.1.*.up_proj"]), make(4, &DECODER));
    let of = |list: &[(String, Tensor)], name: &str| list.iter().find(|(n, _)| n == name).expect("there").1.copy();
    let name = "model.layers.1.mlp.up_proj.lora_A.weight";
    assert_eq!((some.len(), of(&some, name)), (2, of(&all, name)));
    assert_ne!(of(&all, name), of(&other, name));
    for (name, t) in &all {
        let size = t.size();
        let bound = (size[1] as f64).powf(-0.5);
        if name.ends_with("lora_B.weight") {
            assert_eq!(t.abs().max().double_value(&[]), 0.0);
        } else {
            // Uniform: variance bound^2 / 3, and near its ends.
            let (most, var) = (t.abs().max().double_value(&[]), t.var(true).double_value(&[]));
            assert!(most <= bound && most > 0.9 * bound, "{name}: {most} of {bound}");
            assert!((var / (bound * bound / 3.0) - 1.0).abs() < 0.35, "{name}: {var}");
        }
    }
}

#[test]
fn what_cannot_be_adapted_is_named() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let e = |spec: LoraSpec| lively_of(Family::Qwen2_5Vl, dir.path()).adapt(&spec, 0).unwrap_err().to_string();
    let text = e(spec(2, &["q_proj", "qproj"]));
    assert!(
        ["`qproj`", "`q_proj`", "`down_proj`", "`visual.blocks.*.attn.qkv`"].iter().all(|w| text.contains(w)),
        "{text}"
    );
    assert!(e(spec(2, &["visual.q_proj"])).contains("`visual.q_proj`"));
    assert!(e(spec(2, &["qkv"])).contains("`qkv`"), "without `visual.` a name means the decoder");
    let text = e(spec(4096, &["q_proj"]));
    assert!(text.contains("rank 4096") && text.contains("`model.layers.0.self_attn.q_proj`"), "{text}");
    assert!(e(spec(0, &["q_proj"])).contains("rank 0"));
    assert!(e(LoraSpec { alpha: f64::NAN, ..spec(2, &["q_proj"]) }).contains("alpha NaN"));
    assert!(e(spec(2, &[])).contains("target"));
    let mut vlm = lively_of(Family::Qwen2_5Vl, dir.path());
    assert!(vlm.load_adapters(&[]).unwrap_err().to_string().contains("no adapters"));
    vlm.adapt(&spec(2, &["q_proj"]), 0).expect("adapts");
    assert!(vlm.adapt(&spec(2, &["q_proj"]), 0).unwrap_err().to_string().contains("already"));
    let own = vlm.adapters().expect("there").named_parameters();
    let most: Vec<_> = own.iter().skip(1).map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
    let text = vlm.load_adapters(&most).unwrap_err().to_string();
    assert!(text.contains("missing") && text.contains("layers.0.self_attn.q_proj.lora_A"), "{text}");
}

#[test]
fn files_that_do_not_fit_are_named() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (base, ours) = (dir.path().join("base"), dir.path().join("ours"));
    let mut vlm = lively_of(Family::Qwen2_5Vl, &base);
    vlm.adapt(&spec(2, &["q_proj"]), 0).expect("adapts");
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
    // These leave the weights of the base model as they are.
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
fn a_fingerprint_names_what_is_in_a_directory() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let vlm = lively_of(Family::Qwen2_5Vl, &a);
    vlm.save(&a).expect("saves");
    vlm.save(&b).expect("saves");
    let of = |p: &Path| fingerprint(p).expect("reads");
    assert_eq!((of(&a), of(&a).len()), (of(&b), 64));
    let mut bytes = std::fs::read(b.join("model.safetensors")).expect("reads");
    *bytes.last_mut().expect("not empty") ^= 1;
    std::fs::write(b.join("model.safetensors"), bytes).expect("writes");
    assert_ne!(of(&a), of(&b));
}

/// Other rounding than this machine's own. What is bit-equal by one code of libtorch need not be by another.
#[test]
fn numbers_hold_under_every_dispatch() {
    unveil_testkit::under_every_dispatch(&["equals_peft_in_both_directions", "recomputed_gradients_are_the_same"]);
}
