//! Joins matrices that meet the same input, so that one product serves them. Knows names, no arithmetic.

use std::collections::HashMap;

use tch::{Device, Tensor};

use crate::{Result, VlmConfig};

/// Largest matrices, in bytes, that are joined on the CPU. Larger ones are limited by reading them, not by the number of products,
/// and stay where the file's map has them.
const JOINED: usize = 32 << 20;

/// Makes parameters that one product serves rows of one tensor (queries, keys and values, their biases, gate and up), and returns
/// those tensors by the name of their first part.
pub(crate) fn fuse(
    config: &VlmConfig,
    parameters: &mut [(String, Tensor)],
    place: &dyn Fn(&str) -> Result<usize>,
) -> Result<HashMap<String, Tensor>> {
    let mut out = HashMap::new();
    for layer in 0..config.text.num_hidden_layers {
        let qkv =
            |kind: &str| ["q", "k", "v"].map(|x| format!("model.layers.{layer}.self_attn.{x}_proj.{kind}")).to_vec();
        let gate_up = ["gate", "up"].map(|x| format!("model.layers.{layer}.mlp.{x}_proj.weight")).to_vec();
        let bias = config.text.qkv_bias.then(|| qkv("bias"));
        for names in [qkv("weight"), gate_up].into_iter().chain(bias) {
            let places = names.iter().map(|n| place(n)).collect::<Result<Vec<_>>>()?;
            let bytes = |p: &usize| parameters[*p].1.numel() * parameters[*p].1.kind().elt_size_in_bytes();
            let on_cpu = places.iter().all(|p| parameters[*p].1.device() == Device::Cpu);
            if on_cpu && places.iter().map(bytes).sum::<usize>() > JOINED {
                continue;
            }
            let whole = Tensor::f_cat(&places.iter().map(|p| &parameters[*p].1).collect::<Vec<_>>(), 0)?;
            let mut at = 0;
            for p in places {
                let rows = parameters[p].1.size()[0];
                parameters[p].1 = whole.f_narrow(0, at, rows)?.f_detach()?;
                at += rows;
            }
            out.extend(names.into_iter().next().map(|first| (first, whole)));
        }
    }
    Ok(out)
}
