//! Configurations: published `config.json` files of both families, invalid values, names of tensors, and presets.

use serde_json::{Map, Value, json};
use tch::Kind;
use unveil_model::{Adapters, VlmConfig, canonical_name, preset, presets};

/// The flat layout of published checkpoints.
fn qwen2_5_vl() -> Map<String, Value> {
    object(json!({
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "torch_dtype": "bfloat16",
        "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 11008,
        "max_position_embeddings": 128000, "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true,
        "use_sliding_window": false, "vocab_size": 151936,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
            "in_chans": 3, "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2, "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2}
    }))
}

fn qwen3_vl() -> Map<String, Value> {
    object(json!({
        "architectures": ["Qwen3VLForConditionalGeneration"], "image_token_id": 151655, "model_type": "qwen3_vl",
        "text_config": {"attention_bias": false, "bos_token_id": 151643, "dtype": "bfloat16", "eos_token_id": 151645,
            "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560, "intermediate_size": 9728,
            "max_position_embeddings": 262144, "model_type": "qwen3_vl_text", "num_attention_heads": 32,
            "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_theta": 5000000,
            "rope_scaling": {"mrope_interleaved": true, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "tie_word_embeddings": true, "vocab_size": 151936},
        "tie_word_embeddings": true, "video_token_id": 151656, "vision_end_token_id": 151653, "vision_start_token_id": 151652,
        "vision_config": {"deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 1024, "in_channels": 3, "intermediate_size": 4096, "model_type": "qwen3_vl", "num_heads": 16,
            "num_position_embeddings": 2304, "out_hidden_size": 2560, "patch_size": 16, "spatial_merge_size": 2,
            "temporal_patch_size": 2}
    }))
}

fn object(value: Value) -> Map<String, Value> {
    value.as_object().cloned().expect("an object")
}

#[test]
fn published_layouts_are_read() {
    let config = VlmConfig::from_json(&qwen2_5_vl()).expect("parses");
    assert_eq!((config.text.hidden_size, config.text.head_dim, config.text.mrope_section), (2048, 128, [16, 24, 24]));
    assert!(config.tie_word_embeddings);
    assert_eq!(config.dtype, Kind::BFloat16);
    assert_eq!(config.default_capture_layer(), 24);
    assert_eq!(config.merged_tokens([1, 8, 12]).expect("fits"), 24);
    assert!(config.merged_tokens([1, 7, 12]).is_err());

    let config = VlmConfig::from_json(&qwen3_vl()).expect("parses");
    let t = &config.text;
    assert_eq!((t.head_dim, t.num_attention_heads, t.rope_theta), (128, 32, 5e6));
    assert!(t.qk_norm && !t.qkv_bias && t.mrope_interleaved && config.tie_word_embeddings);
    assert_eq!(config.vision.deepstack(), [5, 11, 17]);
    assert_eq!(config.dtype, Kind::BFloat16);
}

#[test]
fn written_configurations_are_read_back() {
    for published in [qwen2_5_vl(), qwen3_vl()] {
        let dir = tempfile::tempdir().expect("temporary directory");
        let config = VlmConfig::from_json(&published).expect("parses");
        config.save(dir.path()).expect("saves");
        let mut read = VlmConfig::load(dir.path()).expect("loads");
        assert!(read.generation.take().is_some(), "generation_config.json was written, too");
        assert_eq!(read, config);
    }
}

#[test]
fn errors_of_invalid_values_name_the_key() {
    for (key, value, word) in [
        ("hidden_size", json!(2050), "hidden_size"),
        ("hidden_act", json!("gelu"), "hidden_act"),
        ("model_type", json!("llava"), "llava"),
        ("num_hidden_layers", json!("many"), "num_hidden_layers"),
        ("rope_scaling", json!({"type": "mrope", "mrope_section": [1, 2, 3]}), "mrope_section"),
        ("rope_scaling", json!({"type": "yarn"}), "yarn"),
    ] {
        let mut map = qwen2_5_vl();
        map.insert(key.into(), value);
        let message = VlmConfig::from_json(&map).expect_err("must fail");
        assert!(message.contains(word), "{message}");
    }
    let mut map = qwen2_5_vl();
    map["vision_config"]["window_size"] = json!(27);
    assert!(VlmConfig::from_json(&map).expect_err("must fail").contains("window_size 27"));
    for (section, key, value) in [
        ("vision_config", "num_position_embeddings", json!(2305)),
        ("vision_config", "deepstack_visual_indexes", json!([5, 5])),
        ("vision_config", "deepstack_visual_indexes", json!([24])),
        ("vision_config", "hidden_act", json!("silu")),
        ("text_config", "attention_bias", json!(true)),
        ("text_config", "head_dim", json!(64)),
    ] {
        let mut map = qwen3_vl();
        map[section][key] = value;
        let message = VlmConfig::from_json(&map).expect_err("must fail");
        assert!(message.contains(if key == "head_dim" { "mrope_section" } else { key }), "{message}");
    }
}

#[test]
fn names_of_transformers_map_both_ways() {
    for (ours, theirs) in [
        ("model.norm.weight", "model.language_model.norm.weight"),
        ("visual.pos_embed.weight", "model.visual.pos_embed.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ] {
        assert_eq!(Adapters::peft_name(ours), format!("base_model.model.{theirs}"));
        assert_eq!(canonical_name(theirs), ours);
    }
}

/// Expected sizes are from the published model cards.
#[test]
fn published_shapes_have_their_sizes() {
    for (family, name, billions) in [
        ("qwen2_5_vl", "3b", 3.75),
        ("qwen2_5_vl", "7b", 8.29),
        ("qwen3_vl", "2b", 2.13),
        ("qwen3_vl", "4b", 4.44),
        ("qwen3_vl", "8b", 8.77),
    ] {
        let (count, bytes) = preset(family, name).expect("exists").size(1400);
        let actual = count as f64 / 1e9;
        assert_eq!(bytes, 2 * count, "bf16");
        assert!(presets(family).contains(&name), "{family}/{name}");
        assert!((actual - billions).abs() < 0.01, "{family}/{name} has {actual} billion parameters");
    }
    assert!(preset("qwen3_vl", "70b").unwrap_err().to_string().contains("qwen3_vl/8b"));
}

#[test]
fn banned_ids_are_sorted_unique_and_within_the_vocabulary() {
    let config = preset("qwen2_5_vl", "3b").expect("exists").config();
    let vision = [151_652, 151_653, 151_655, 151_656];
    assert_eq!(config.banned_ids(&[]), vision);
    let outside = config.text.vocab_size as u32;
    assert_eq!(config.banned_ids(&[151_655, 7, outside, 7, u32::MAX]), [&[7], &vision[..]].concat());
}
