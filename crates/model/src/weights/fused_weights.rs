//! Concatenation of matrices with the same input, so that one product computes all of them.

use std::collections::HashMap;

use tch::{Device, Tensor};

use crate::{Result, VlmConfig};

/// Size limit, in bytes, of concatenated matrices on the CPU. Products of larger ones are limited by reading the weights, not by their
/// number, so these stay in the memory map of the file.
const MAX_FUSED_BYTES: usize = 32 << 20;

/// Turns parameters with the same input (queries, keys and values, their biases, gate and up) into rows of one tensor. Returns these
/// tensors by the name of their first parameter. `index_of` returns the index of a parameter.
pub(crate) fn fuse_weights(
    config: &VlmConfig,
    parameters: &mut [(String, Tensor)],
    index_of: &dyn Fn(&str) -> Result<usize>,
) -> Result<HashMap<String, Tensor>> {
    let mut out = HashMap::new();
    for layer in 0..config.text.num_hidden_layers {
        let qkv =
            |kind: &str| ["q", "k", "v"].map(|x| format!("model.layers.{layer}.self_attn.{x}_proj.{kind}")).to_vec();
        let gate_up = ["gate", "up"].map(|x| format!("model.layers.{layer}.mlp.{x}_proj.weight")).to_vec();
        let bias = config.text.qkv_bias.then(|| qkv("bias"));
        for names in [qkv("weight"), gate_up].into_iter().chain(bias) {
            let indices = names.iter().map(|n| index_of(n)).collect::<Result<Vec<_>>>()?;
            let bytes = |p: &usize| parameters[*p].1.numel() * parameters[*p].1.kind().elt_size_in_bytes();
            let on_cpu = indices.iter().all(|p| parameters[*p].1.device() == Device::Cpu);
            if on_cpu && indices.iter().map(bytes).sum::<usize>() > MAX_FUSED_BYTES {
                continue;
            }
            let fused = Tensor::f_cat(&indices.iter().map(|p| &parameters[*p].1).collect::<Vec<_>>(), 0)?;
            let mut first_row = 0;
            for p in indices {
                let rows = parameters[p].1.size()[0];
                parameters[p].1 = fused.f_narrow(0, first_row, rows)?.f_detach()?;
                first_row += rows;
            }
            out.extend(names.into_iter().next().map(|first| (first, fused)));
        }
    }
    Ok(out)
}
