//! Decode steps on the CPU with this project's own kernels: the same work as [`Decoder::step`] without the cost of starting some forty
//! operations per layer. For fp32 weights in the exact mode without active adapters.

use tch::{Device, Kind, Tensor};
use unveil_core::Compute;
use unveil_torch_ext::{DecodeLayer, DecodeStep};

use crate::decoder::{Decoder, Layer};
use crate::generation::cache::GroupCache;
use crate::generation::decode_slots::StepSlots;
use crate::layers::ops::rms_norm;
use crate::{ModelError, Result};

impl Decoder {
    /// Returns whether the kernels support this decoder.
    pub(crate) fn has_cpu_kernels(&self) -> bool {
        self.norm.device() == Device::Cpu && self.norm.kind() == Kind::Float && self.compute == Compute::Exact
    }

    /// [`Decoder::step`] with the kernels, for embeddings `[A, D]` of the rows in `slots`.
    pub(crate) fn cpu_step(
        &self,
        embeds: &Tensor,
        cache: &GroupCache,
        slots: &StepSlots,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let c = &self.config;
        let (cos, sin) = self.rotary.text_tables(&Tensor::from_slice(&slots.positions));
        let (prefix, images): (Vec<_>, Vec<_>) = cache.slots.iter().map(|s| (s.prefix, s.images as i64)).unzip();
        let step = DecodeStep {
            heads: (c.num_attention_heads, c.num_key_value_heads),
            n: cache.n() as i64,
            eps: c.rms_norm_eps,
            x: embeds,
            rotary: [&cos, &sin],
            rows: &slots.rows,
            lengths: &slots.offsets,
            prefix: &prefix,
            images: &images,
            head_weight: cache.capture().map_or(0.0, |set| set.head_weight(c.num_attention_heads)),
        };
        let layers: Vec<DecodeLayer<'_>> =
            self.layers.iter().enumerate().map(|(i, layer)| layer.kernel_layer(cache, i)).collect();
        let (x, rows) = unveil_torch_ext::decode(&step, &layers).map_err(|e| ModelError::input(e.to_string()))?;
        // Head by head: the order of libtorch's own sum depends on the position of an element.
        let rows = rows.map(|by_head| by_head.unbind(0).into_iter().reduce(|sum, head| sum + head));
        Ok((rms_norm(&x, &self.norm, c.rms_norm_eps), rows.flatten()))
    }
}

impl Layer {
    /// Returns the tensors of this layer and of its cache for the kernels.
    fn kernel_layer<'a>(&'a self, cache: &'a GroupCache, index: usize) -> DecodeLayer<'a> {
        let store = cache.layer(index);
        let [q, k, v] = [0, 1, 2].map(|i| &self.qkv.parts[i]);
        let bias = q.bias.as_ref().zip(k.bias.as_ref()).zip(v.bias.as_ref());
        DecodeLayer {
            norm1: &self.norm1,
            qkv: [&q.weight, &k.weight, &v.weight],
            qkv_bias: bias.map(|((q, k), v)| [q, k, v]),
            qk_norm: self.qk_norm.as_ref().map(|(q, k)| (q, k)),
            o: &self.o.weight,
            norm2: &self.norm2,
            gate_up: [&self.gate_up.parts[0].weight, &self.gate_up.parts[1].weight],
            down: &self.down.weight,
            prefix: [&store.prefix_k, &store.prefix_v],
            suffix: [&store.suffix_k, &store.suffix_v],
            capture: store.captured.as_ref().map(|c| (&c.image_k, c.flags.as_deref())),
        }
    }
}
