//! Selection of a model's parameters and layers by name, as configurations write it.

/// Returns whether `selector` selects the parameter `name`: `vision_tower`, `merger` and `language_model` select a module, anything else is
/// a prefix of names.
pub fn selects_parameter(selector: &str, name: &str) -> bool {
    let merger = name.starts_with("visual.merger.") || name.starts_with("visual.deepstack_merger_list.");
    match selector {
        "merger" => merger,
        "vision_tower" => name.starts_with("visual.") && !merger,
        "language_model" => name.starts_with("model.") || name.starts_with("lm_head."),
        prefix => name.starts_with(prefix),
    }
}

/// Returns whether `target` selects the linear layer `name` for an adapter: by its full name or the last dot-separated parts of it, with `*`
/// matching any text. A target selects layers of the decoder, unless it begins with `visual.`.
pub fn selects_layer(target: &str, name: &str) -> bool {
    let starts = std::iter::once(0).chain(name.match_indices('.').map(|(dot, _)| dot + 1));
    name.starts_with("visual.") == target.starts_with("visual.")
        && starts.into_iter().any(|start| matches_glob(target, &name[start..]))
}

/// Returns whether the whole `text` matches `pattern`, in which `*` matches any text.
fn matches_glob(pattern: &str, text: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else { return pattern == text };
    let Some(mut text) = text.strip_prefix(first) else { return false };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let last = parts.pop().unwrap_or_default();
    for part in parts {
        let Some((_, after)) = text.split_once(part) else { return false };
        text = after;
    }
    text.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_and_prefixes_select_parameters() {
        for (selector, name, expected) in [
            ("merger", "visual.merger.mlp.0.weight", true),
            ("merger", "visual.deepstack_merger_list.0.norm.weight", true),
            ("merger", "visual.blocks.0.norm1.weight", false),
            ("vision_tower", "visual.blocks.0.norm1.weight", true),
            ("vision_tower", "visual.merger.mlp.0.weight", false),
            ("language_model", "lm_head.weight", true),
            ("language_model", "model.norm.weight", true),
            ("language_model", "visual.merger.mlp.0.weight", false),
            ("model.layers.1.", "model.layers.1.mlp.up_proj.weight", true),
            ("model.layers.1.", "model.layers.10.mlp.up_proj.weight", false),
            ("mlp", "model.layers.1.mlp.up_proj.weight", false),
        ] {
            assert_eq!(selects_parameter(selector, name), expected, "{selector} {name}");
        }
    }

    #[test]
    fn targets_select_layers_by_their_last_parts() {
        let layer = "model.layers.12.self_attn.q_proj";
        for target in [
            "q_proj",
            "self_attn.q_proj",
            layer,
            "*_proj",
            "layers.*.q_proj",
            "layers.1*.self_attn.*",
            "*",
            "12.*.q_proj",
        ] {
            assert!(selects_layer(target, layer), "{target}");
        }
        for target in
            ["proj", "q_pro", "attn.q_proj", "k_proj", "layers.2*.q_proj", "visual.*", "", "q_proj*x", "*q_proj*q_proj"]
        {
            assert!(!selects_layer(target, layer), "{target}");
        }
        assert!(selects_layer("visual.*.qkv", "visual.blocks.3.attn.qkv"));
        assert!(selects_layer("visual.blocks.3.attn.qkv", "visual.blocks.3.attn.qkv"));
        assert!(!selects_layer("qkv", "visual.blocks.3.attn.qkv") && !selects_layer("*", "visual.blocks.3.attn.qkv"));
    }
}
