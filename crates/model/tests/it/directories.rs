//! Model directories: broken ones are refused with the name of the tensor; shards, tied output matrices, presets and weight swaps.

use std::path::Path;

use serde_json::json;
use tch::{Device, Kind, Tensor};
use unveil_core::Family;
use unveil_model::{Vlm, init, init_with_number_tokens, preset, read_safetensors, write_safetensors};

use crate::common::{fresh, lively, max_diff, spec};

fn load_error(dir: &Path) -> String {
    Vlm::load(dir, Device::Cpu, Kind::Float).expect_err("must be refused").to_string()
}

fn edit(dir: &Path, change: impl Fn(&mut Vec<(String, Tensor)>)) {
    let path = dir.join("model.safetensors");
    let mut tensors = read_safetensors(&path).expect("reads");
    change(&mut tensors);
    write_safetensors(&path, &tensors).expect("writes");
}

#[test]
fn broken_directories_name_the_tensor() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path();
    let name = "model.layers.1.self_attn.k_proj.weight";
    let fresh = || init(&spec(1), path).map(|_| ()).expect("init");

    fresh();
    edit(path, |t| t.retain(|(n, _)| n != name));
    let message = load_error(path);
    assert!(message.contains("missing") && message.contains(name) && message.contains("[64, 128]"), "{message}");

    fresh();
    edit(path, |t| t.iter_mut().filter(|(n, _)| n == name).for_each(|(_, t)| *t = t.narrow(1, 0, 100).contiguous()));
    let message = load_error(path);
    assert!(message.contains(name) && message.contains("[64, 100]") && message.contains("[64, 128]"), "{message}");

    fresh();
    edit(path, |t| {
        t.push(("model.layers.9.mlp.up_proj.weight".into(), Tensor::zeros([2, 2], (Kind::Float, Device::Cpu))))
    });
    let message = load_error(path);
    assert!(message.contains("model.layers.9.mlp.up_proj.weight") && message.contains("[2, 2]"), "{message}");

    fresh();
    edit(path, |t| t.iter_mut().filter(|(n, _)| n == name).for_each(|(_, t)| *t = t.to_kind(Kind::Int64)));
    let message = load_error(path);
    assert!(message.contains(name) && message.contains("floating"), "{message}");

    fresh();
    let file = path.join("model.safetensors");
    let bytes = std::fs::read(&file).expect("reads");
    std::fs::write(&file, &bytes[..bytes.len() - 100]).expect("writes");
    let message = load_error(path);
    assert!(message.contains("truncated: tensor `"), "{message}");
    std::fs::write(&file, &bytes[..100]).expect("writes");
    assert!(load_error(path).contains("header"), "{}", load_error(path));
    std::fs::write(&file, b"").expect("writes");
    assert!(load_error(path).contains("model.safetensors"), "{}", load_error(path));

    std::fs::remove_file(&file).expect("removes");
    assert!(load_error(path).contains("no model.safetensors"), "{}", load_error(path));
    std::fs::write(path.join("config.json"), "{").expect("writes");
    assert!(load_error(path).contains("config.json"), "{}", load_error(path));
    assert!(load_error(&path.join("nowhere")).contains("nowhere"));
}

/// Errors for unsupported checkpoints say what they are.
#[test]
fn quantised_wrapped_and_unfetched_directories_are_named() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path();
    let fresh = || init(&spec(1), path).map(|_| ()).expect("init");
    let config = path.join("config.json");
    let configured = |pointer: &str, value: serde_json::Value| {
        fresh();
        let mut root: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&config).expect("reads")).expect("JSON");
        root.pointer_mut(pointer).expect("section")["quantization_config"] = value;
        std::fs::write(&config, root.to_string()).expect("writes");
        Vlm::load(path, Device::Cpu, Kind::Float).err().map(|e| e.to_string())
    };
    for (pointer, value, how) in [
        ("", json!({"quant_method": "awq", "bits": 4, "group_size": 128}), "awq, 4 bits"),
        ("", json!({"quant_method": "gptq", "bits": 8}), "gptq, 8 bits"),
        (
            "",
            json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "load_in_8bit": false}),
            "bitsandbytes, 4 bits",
        ),
        ("/text_config", json!({"quant_method": "fp8", "fmt": "e4m3"}), "(fp8)"),
        ("", json!({"quant_method": "compressed-tensors"}), "compressed-tensors"),
    ] {
        let message = configured(pointer, value).expect("must be refused");
        assert!(message.contains("config.json") && message.contains("quantised") && message.contains(how), "{message}");
    }
    assert_eq!(configured("", serde_json::Value::Null), None);
    // Quantisation that config.json does not mention is recognised by the tensors.
    for end in ["qweight", "weight.absmax", "SCB", "weight_scale_inv"] {
        fresh();
        edit(path, |t| {
            t.push((format!("model.layers.0.mlp.up_proj.{end}"), Tensor::zeros([2], (Kind::Float, Device::Cpu))))
        });
        let message = load_error(path);
        assert!(message.contains("quantised") && message.contains(end), "{message}");
    }
    for (prefix, what) in
        [("module.", "DataParallel"), ("_orig_mod.", "torch.compile"), ("base_model.model.", "merge the adapters")]
    {
        fresh();
        edit(path, |t| t.iter_mut().for_each(|(n, _)| *n = format!("{prefix}{n}")));
        let message = load_error(path);
        let found = format!("`{prefix}");
        assert!(message.contains("missing") && message.contains(&found) && message.contains(what), "{message}");
    }
    fresh();
    edit(path, |t| t.iter_mut().for_each(|(n, _)| *n = n.replace("model.layers", "transformer.h")));
    let message = load_error(path);
    assert!(message.contains("found instead: `transformer.h.0."), "{message}");
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 3962750768\n";
    for name in ["model.safetensors", "config.json"] {
        fresh();
        std::fs::write(path.join(name), pointer).expect("writes");
        let message = load_error(path);
        assert!(message.contains(name) && message.contains("Git LFS pointer"), "{message}");
    }
}

/// Prefixes of wrappers are recognised at any level of a name; names of other models are listed.
#[test]
fn unknown_names_are_described() {
    let mut vlm = fresh(Family::Qwen2_5Vl, 1);
    let mut refusal = |found: &[&str]| {
        let named: Vec<_> = found.iter().map(|name| ((*name).to_owned(), Tensor::from(0f32))).collect();
        vlm.load_state(&named).expect_err("tensors are missing").to_string()
    };
    for (name, part) in [
        ("module.model.layers.0.self_attn.q_proj.weight", "`module.`"),
        ("_orig_mod.model.visual.merger.ln_q.weight", "torch.compile"),
        ("model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.weight", "activation checkpointing"),
        ("base_model.model.model.language_model.layers.0.self_attn.q_proj.base_layer.weight", "merge_and_unload"),
        ("_fsdp_wrapped_module.model.norm.weight", "FSDP"),
    ] {
        let text = refusal(&[name, "a.b"]);
        assert!(text.contains(part) && text.contains(&format!("`{name}`")), "{text}");
    }
    let both = refusal(&["_orig_mod.module.model.norm.weight"]);
    assert!(both.contains("`_orig_mod.`") && both.contains("`module.`"), "{both}");
    let known = refusal(&["model.norm.weight"]);
    assert!(!known.contains("found instead") && !known.contains("prefix"), "{known}");
    let other = refusal(&["transformer.h.0.weight", "model.norm.weight"]);
    assert!(other.ends_with("; found instead: `transformer.h.0.weight`"), "{other}");
    // A wrapper's prefix in the names of another model means nothing.
    let other = refusal(&["module.transformer.weight"]);
    assert!(other.ends_with("; found instead: `module.transformer.weight`"), "{other}");
}

/// An output matrix that is stored in spite of a tied embedding: equal to it, without it, in another dtype, or different.
#[test]
fn stored_output_matrices_of_tied_models() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path();
    let fresh = |tied: bool| {
        init(&spec(1), path).expect("init");
        let vlm = Vlm::load(path, Device::Cpu, Kind::Float).expect("loads");
        let embedding = vlm.parameter("model.embed_tokens.weight").expect("there").copy();
        let config = path.join("config.json");
        let mut root: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&config).expect("reads")).expect("JSON");
        root["tie_word_embeddings"] = tied.into();
        root["text_config"]["tie_word_embeddings"] = tied.into();
        std::fs::write(&config, root.to_string()).expect("writes");
        embedding
    };
    let with_head = |head: Option<Tensor>| {
        edit(path, |t| {
            t.retain(|(n, _)| n != "lm_head.weight");
            t.extend(head.iter().map(|h| ("lm_head.weight".to_owned(), h.shallow_clone())));
        });
        Vlm::load(path, Device::Cpu, Kind::Float)
    };
    let embedding = fresh(true);
    let tied = with_head(Some(embedding.copy())).expect("loads");
    assert!(tied.config().tie_word_embeddings && tied.parameter("lm_head.weight").is_none());
    let different = &embedding + 0.5;
    let untied = with_head(Some(different.copy())).expect("loads");
    assert!(!untied.config().tie_word_embeddings);
    assert_eq!(max_diff(untied.parameter("lm_head.weight").expect("kept"), &different), 0.0);
    // In another dtype, with different and with equal numbers.
    let half = embedding.to_kind(Kind::BFloat16);
    assert!(!with_head(Some(half.copy())).expect("loads").config().tie_word_embeddings);
    edit(path, |t| {
        t.iter_mut().filter(|(n, _)| n.contains("embed_tokens")).for_each(|(_, t)| *t = half.to_kind(Kind::Float))
    });
    assert!(with_head(Some(half)).expect("loads").config().tie_word_embeddings);
    // Without an embedding it is used as the embedding.
    let embedding = fresh(true);
    edit(path, |t| {
        t.iter_mut().filter(|(n, _)| n.contains("embed_tokens")).for_each(|(n, _)| *n = "lm_head.weight".into())
    });
    let alone = Vlm::load(path, Device::Cpu, Kind::Float).expect("loads");
    assert_eq!(max_diff(alone.parameter("model.embed_tokens.weight").expect("there"), &embedding), 0.0);
    // An untied model without an output matrix is refused.
    drop(fresh(false));
    let message = with_head(None).expect_err("must be refused").to_string();
    assert!(message.contains("missing 1 tensor(s): `lm_head.weight`"), "{message}");
}

#[test]
fn shards_and_older_names_load() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let whole = lively(dir.path());
    let shards = tempfile::tempdir().expect("temporary directory");
    whole.config().save(shards.path()).expect("config");
    let rename = |n: &str| match n.strip_prefix("model.") {
        Some(rest) => format!("model.language_model.{rest}"),
        None => format!("model.{n}"),
    };
    let tensors: Vec<(String, Tensor)> =
        whole.named_parameters().iter().map(|(n, t)| (rename(n), t.shallow_clone())).collect();
    let mut map = serde_json::Map::new();
    for (i, part) in tensors.chunks(tensors.len().div_ceil(3)).enumerate() {
        let file = format!("model-{i}.safetensors");
        write_safetensors(&shards.path().join(&file), part).expect("writes");
        map.extend(part.iter().map(|(n, _)| (n.clone(), file.clone().into())));
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": map});
    std::fs::write(shards.path().join("model.safetensors.index.json"), index.to_string()).expect("writes");
    let sharded = Vlm::load(shards.path(), Device::Cpu, Kind::Float).expect("loads");
    for ((n, a), (m, b)) in whole.named_parameters().iter().zip(sharded.named_parameters()) {
        assert_eq!(n, m);
        assert_eq!(max_diff(a, b), 0.0);
    }
}

#[test]
fn weight_swaps_are_all_or_nothing() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut vlm = lively(dir.path());
    let state = |f: f64| -> Vec<(String, Tensor)> {
        Vlm::load(dir.path(), Device::Cpu, Kind::Float)
            .expect("loads")
            .named_parameters()
            .iter()
            .map(|(n, t)| (n.clone(), t * f))
            .collect()
    };
    let before = vlm.named_parameters()[3].1.copy();
    let mut short = state(2.0);
    let (missing, _) = short.pop().expect("some");
    let message = vlm.load_state(&short).expect_err("missing").to_string();
    assert!(message.contains(&missing), "{message}");
    assert_eq!(max_diff(&before, &vlm.named_parameters()[3].1), 0.0);
    vlm.set_trainable(|_| true);
    vlm.load_state(&state(2.0)).expect("fits");
    let (name, now) = &vlm.named_parameters()[3];
    assert!(now.is_leaf() && now.requires_grad());
    let expected = state(2.0).into_iter().find(|(n, _)| n == name).expect("is there").1;
    assert_eq!(max_diff(&expected, now), 0.0);
}

#[test]
fn tiny_preset_is_small_and_seeded() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut big = spec(3);
    big.vocab_size = 3000;
    let config = init(&big, dir.path()).expect("init");
    let sides = preset("qwen2_5_vl", "tiny").expect("exists");
    assert_eq!((sides.patch_size, sides.merge_size()), (config.vision.patch_size, config.vision.spatial_merge_size));
    let first = std::fs::read(dir.path().join("model.safetensors")).expect("reads");
    init(&big, dir.path()).expect("init");
    assert_eq!(first, std::fs::read(dir.path().join("model.safetensors")).expect("reads"));
    big.seed = 4;
    init(&big, dir.path()).expect("init");
    assert_ne!(first, std::fs::read(dir.path().join("model.safetensors")).expect("reads"));
    let vlm = Vlm::load(dir.path(), Device::Cpu, Kind::Float).expect("loads");
    let count: usize = vlm.named_parameters().iter().map(|(_, t)| t.numel()).sum();
    assert!((1_000_000..6_000_000).contains(&count), "{count} parameters");
    let side = 96 / config.vision.patch_size;
    assert!(config.merged_tokens([1, side, side]).expect("fits") >= 36);
    // Close numbers have close embeddings, distant ones do not.
    let numbers: Vec<u32> = (100..1124).collect();
    init_with_number_tokens(&big, &numbers, dir.path()).expect("init");
    let vlm = Vlm::load(dir.path(), Device::Cpu, Kind::Float).expect("loads");
    let table = vlm.parameter("model.embed_tokens.weight").expect("embedding");
    let similarity =
        |a: i64, b: i64| Tensor::cosine_similarity(&table.get(100 + a), &table.get(100 + b), 0, 1e-8).double_value(&[]);
    assert!(similarity(50, 51) > 0.9);
    assert!(similarity(50, 51) > similarity(50, 60) && similarity(50, 60) > similarity(50, 500));
    assert!(init_with_number_tokens(&big, &[3000], dir.path()).is_err());
    let message = preset("qwen2_5_vl", "huge").expect_err("unknown").to_string();
    assert!(message.contains("qwen2_5_vl/tiny"), "{message}");
}

/// A directory large enough to stay memory-mapped: weights have the stored values and change in place, the file never changes.
#[test]
fn large_files_stay_mapped_and_untouched() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let big = unveil_model::InitSpec { vocab_size: 140_000, ..spec(3) };
    init(&big, dir.path()).expect("init");
    let file = dir.path().join("model.safetensors");
    assert!(std::fs::metadata(&file).expect("there").len() > 64 << 20);
    let stored = read_safetensors(&file).expect("reads");
    let before = std::fs::read(&file).expect("reads");
    let mut vlm = Vlm::load(dir.path(), Device::Cpu, Kind::Float).expect("loads");
    for (name, tensor) in vlm.named_parameters() {
        let (_, gold) = stored.iter().find(|(n, _)| n == name).expect("stored");
        assert_eq!(max_diff(tensor, gold), 0.0, "{name}");
    }
    let doubled: Vec<(String, Tensor)> = vlm.named_parameters().iter().map(|(n, t)| (n.clone(), t * 2.0)).collect();
    vlm.load_state(&doubled).expect("fits");
    let kept = vlm.parameter("model.embed_tokens.weight").expect("there").shallow_clone();
    drop(vlm);
    let (_, gold) = stored.iter().find(|(n, _)| n == "model.embed_tokens.weight").expect("stored");
    assert_eq!(max_diff(&kept, &(gold * 2.0)), 0.0);
    assert!(std::fs::read(&file).expect("reads") == before, "the file has changed");
}
