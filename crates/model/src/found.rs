//! What lies in a model directory in place of the weights that were expected, told by its names and first bytes: quantised weights,
//! names that a wrapper has prefixed, pointers of Git LFS.

use std::collections::HashSet;
use std::path::Path;

use safetensors::tensor::Dtype;

use crate::error::name_list;
use crate::spec::{TensorSpec, own_name};
use crate::{ModelError, Result};

/// How a Git LFS pointer begins.
const POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// Parts of names that wrappers around a model leave in its state, and what to do; one that ends another stands behind it.
const WRAPPERS: [(&str, &str); 5] = [
    ("_orig_mod.", "torch.compile: save `model._orig_mod`"),
    ("_fsdp_wrapped_module.", "torch's FSDP: save a full state dict"),
    ("_checkpoint_wrapped_module.", "torch's activation checkpointing: save the module inside"),
    (
        "base_model.model.",
        "peft: merge the adapters (`merge_and_unload`) and save that, or keep base model and adapters apart",
    ),
    ("module.", "torch's DataParallel: save `model.module`"),
];

/// Ends of the names of tensors that only quantised weights have.
const QUANTISED: [&str; 11] = [
    ".qweight",
    ".qzeros",
    ".scales",
    ".g_idx",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight.absmax",
    ".weight.quant_map",
    ".SCB",
    ".weight_format",
];

/// Refuses the few lines that Git LFS leaves in place of a file that was not fetched.
pub(crate) fn not_a_pointer(path: &Path, bytes: &[u8]) -> Result<()> {
    if !bytes.starts_with(POINTER) {
        return Ok(());
    }
    Err(ModelError::corrupt(path, "it is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"))
}

/// Whether a tensor is one that only quantised weights have.
pub(crate) fn is_quantised(name: &str, dtype: Dtype) -> bool {
    let float8 = matches!(dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2);
    float8 || QUANTISED.iter().any(|end| name.ends_with(end)) || name.contains(".weight.quant_state.")
}

/// Why quantised weights are not taken; `how` says how they are quantised.
pub(crate) fn not_quantised(how: &str) -> String {
    format!(
        "the weights are quantised ({how}), which is not supported: take the model as it was before, or save it dequantised \
         (transformers: model.dequantize())"
    )
}

/// What a directory that lacks tensors of `specs` holds instead, as the end of a message.
pub(crate) fn instead<'a>(specs: &[TensorSpec], found: impl Iterator<Item = &'a str>) -> String {
    let known: HashSet<&str> = specs.iter().map(|s| s.name.as_str()).collect();
    let mut unknown: Vec<&str> = found.filter(|n| !known.contains(n)).collect();
    unknown.sort_unstable();
    let bare = |name: &str| WRAPPERS.iter().fold(name.to_owned(), |n, (part, _)| n.replace(part, ""));
    // The layer that peft wraps keeps its weights one level deeper.
    let inner = |name: &str| own_name(&bare(name)).replace(".base_layer.", ".");
    let wrapped =
        |name: &&&str| WRAPPERS.iter().any(|(part, _)| name.contains(part)) && known.contains(inner(name).as_str());
    let Some(first) = unknown.iter().find(wrapped) else {
        return match unknown.is_empty() {
            true => String::new(),
            false => format!("; found instead: {}", name_list(unknown.into_iter())),
        };
    };
    let parts = WRAPPERS.iter().filter(|(part, _)| first.contains(part));
    let parts: Vec<String> = parts.map(|(part, what)| format!("`{part}` ({what})")).collect();
    format!("; the names there carry {}: found `{first}`", parts.join(" and "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Fill;

    fn told(found: &[&str]) -> String {
        let spec = |name: &str| TensorSpec { name: name.to_owned(), shape: vec![2], fill: Fill::Ones };
        let names = ["model.layers.0.self_attn.q_proj.weight", "visual.merger.ln_q.weight", "lm_head.weight"];
        instead(&names.map(spec), found.iter().copied())
    }

    #[test]
    fn wrappers_are_named() {
        for (name, part) in [
            ("module.model.layers.0.self_attn.q_proj.weight", "`module.`"),
            ("_orig_mod.model.visual.merger.ln_q.weight", "torch.compile"),
            ("model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.weight", "activation checkpointing"),
            ("base_model.model.model.language_model.layers.0.self_attn.q_proj.base_layer.weight", "merge_and_unload"),
            ("_fsdp_wrapped_module.lm_head.weight", "FSDP"),
        ] {
            let text = told(&[name, "a.b"]);
            assert!(text.contains(part) && text.contains(&format!("`{name}`")), "{text}");
        }
        let both = told(&["_orig_mod.module.lm_head.weight"]);
        assert!(both.contains("`_orig_mod.`") && both.contains("`module.`"), "{both}");
    }

    #[test]
    fn other_names_are_listed() {
        assert_eq!(told(&["lm_head.weight"]), "");
        assert_eq!(told(&["transformer.h.0.weight", "lm_head.weight"]), "; found instead: `transformer.h.0.weight`");
        // A wrapper's word in a name of another model says nothing.
        assert!(told(&["module.transformer.weight"]).starts_with("; found instead"));
    }

    #[test]
    fn quantised_tensors_are_known() {
        for name in ["a.q_proj.qweight", "a.q_proj.weight.quant_state.bitsandbytes__nf4", "a.SCB", "a.weight_scale_inv"]
        {
            assert!(is_quantised(name, Dtype::F32), "{name}");
        }
        assert!(is_quantised("a.weight", Dtype::F8_E4M3) && !is_quantised("a.weight", Dtype::BF16));
    }
}
