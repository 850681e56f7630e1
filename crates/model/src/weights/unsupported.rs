//! Recognition of unsupported weights by the names of their tensors: quantised weights, and names with the prefix of a wrapper.

use std::collections::HashSet;

use safetensors::tensor::Dtype;

use crate::config::parameters::{TensorSpec, canonical_name};
use crate::error::name_list;

/// Name prefixes that wrappers add to the state of a model, and what to do about them. A prefix that is the end of another follows it.
const WRAPPERS: [(&str, &str); 5] = [
    ("_orig_mod.", "torch.compile: save `model._orig_mod`"),
    ("_fsdp_wrapped_module.", "torch's FSDP: save a full state dict"),
    ("_checkpoint_wrapped_module.", "torch's activation checkpointing: save the module inside"),
    (
        "base_model.model.",
        "peft: merge the adapters (`merge_and_unload`) before saving, or save base model and adapters separately",
    ),
    ("module.", "torch's DataParallel: save `model.module`"),
];

/// Name suffixes that only tensors of quantised weights have.
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

/// Returns whether a tensor belongs to quantised weights.
pub(crate) fn is_quantised_tensor(name: &str, dtype: Dtype) -> bool {
    let float8 = matches!(dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2);
    float8 || QUANTISED.iter().any(|end| name.ends_with(end)) || name.contains(".weight.quant_state.")
}

/// Describes the tensors of a directory that are not in `specs`, as the end of a message about missing ones.
pub(crate) fn describe_other_tensors<'a>(specs: &[TensorSpec], found: impl Iterator<Item = &'a str>) -> String {
    let known: HashSet<&str> = specs.iter().map(|s| s.name.as_str()).collect();
    let mut unknown: Vec<&str> = found.filter(|n| !known.contains(n)).collect();
    unknown.sort_unstable();
    let bare = |name: &str| WRAPPERS.iter().fold(name.to_owned(), |n, (part, _)| n.replace(part, ""));
    // In a layer wrapped by peft the weights are one level deeper.
    let inner = |name: &str| canonical_name(&bare(name)).replace(".base_layer.", ".");
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
    format!("; the names there have the prefix {}: found `{first}`", parts.join(" and "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantised_tensors_are_recognised() {
        for name in ["a.q_proj.qweight", "a.q_proj.weight.quant_state.bitsandbytes__nf4", "a.SCB", "a.weight_scale_inv"]
        {
            assert!(is_quantised_tensor(name, Dtype::F32), "{name}");
        }
        assert!(is_quantised_tensor("a.weight", Dtype::F8_E4M3) && !is_quantised_tensor("a.weight", Dtype::BF16));
    }
}
