//! Decode steps on the CPU with this project's own kernels: the same work as [`Decoder::step`] without the cost of starting some forty
//! operations per layer. For fp32 weights without active adapters.

use tch::{Device, Kind, Tensor};
use unveil_torch_ext::{DecodeLayer, DecodeStep};

use crate::decoder::{Decoder, Layer};
use crate::generation::cache::GroupCache;
use crate::generation::decode_slots::StepSlots;
use crate::layers::ops::rms_norm;
use crate::{ModelError, Result};

impl Decoder {
    /// Returns whether the kernels support this decoder.
    pub(crate) fn has_cpu_kernels(&self) -> bool {
        self.norm.device() == Device::Cpu && self.norm.kind() == Kind::Float
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

#[cfg(test)]
mod tests {
    use unveil_core::Prompt;

    use crate::{AttentionSet, CacheShape, Family, InitSpec, SpecialIds, Vlm, init};

    use super::*;

    const IMAGE: u32 = 61;

    fn model(family: Family, seed: u64) -> Vlm {
        let dir = tempfile::tempdir().unwrap();
        let special = SpecialIds {
            image_pad: IMAGE,
            video_pad: 62,
            vision_start: 58,
            vision_end: 59,
            bos: None,
            eos: 60,
            pad: 63,
        };
        let spec = InitSpec { family: family.name().into(), preset: "tiny".into(), vocab_size: 64, seed, special };
        init(&spec, dir.path()).unwrap();
        Vlm::load(dir.path(), Device::Cpu, Kind::Float).unwrap()
    }

    /// Steps of rows and prefixes of different lengths, with and without an image, equal [`Decoder::step`], and the result of a row does not
    /// depend on the other fed rows, on every instruction set that this machine supports.
    #[test]
    fn kernels_equal_the_plain_step() {
        for (i, set) in unveil_torch_ext::instruction_sets().into_iter().enumerate() {
            // Waiting threads are slow on a busy machine; testing them with the first instruction set is enough.
            if i > 0 {
                tch::set_num_threads(1);
            }
            for (family, seed) in [(Family::Qwen2_5Vl, 3), (Family::Qwen3Vl, 4)] {
                unveil_torch_ext::with_instruction_set(set, || steps(set, &model(family, seed))).unwrap();
            }
        }
    }

    /// Runs all unit tests of this crate with each instruction set of libtorch, too.
    #[test]
    fn numbers_hold_under_every_dispatch() {
        unveil_testkit::under_every_dispatch(&[]);
    }

    /// More rows than the kernels for few rows accept in one call.
    #[test]
    fn logits_are_independent_of_the_number_of_rows() {
        let vlm = model(Family::Qwen3Vl, 5);
        let hidden = Tensor::randn([131, vlm.config().text.hidden_size], (Kind::Float, Device::Cpu));
        let _guard = tch::no_grad_guard();
        let rows: Vec<Tensor> = (0..131).map(|i| vlm.step_logits(&hidden.narrow(0, i, 1))).collect();
        for count in [1, 2, 63, 64, 65, 100, 128, 131] {
            let together = vlm.step_logits(&hidden.narrow(0, 0, count));
            assert_eq!(together, Tensor::cat(&rows[..count as usize], 0), "{count} rows");
        }
    }

    fn steps(set: &str, vlm: &Vlm) {
        let m = vlm.config().vision.spatial_merge_size;
        let grids = [[1, 2 * m, 3 * m], [1, 2 * m, 2 * m]];
        let prompt = |before: u32, grid: Option<[i64; 3]>| {
            let cells = grid.map_or(0, |g| vlm.config().merged_tokens(g).unwrap());
            let tokens = [vec![58; before as usize], vec![IMAGE; cells], vec![59, before % 50, 7]].concat();
            Prompt { tokens, grids: grid.into_iter().collect() }
        };
        let prompts = [prompt(2, Some(grids[0])), prompt(71, None), prompt(1, Some(grids[1]))];
        let patches: i64 = grids.iter().map(|g| g.iter().product::<i64>()).sum();
        let pixels = Tensor::randn([patches, vlm.config().vision.patch_len()], (Kind::Float, Device::Cpu));
        let _guard = tch::no_grad_guard();
        let features = vlm.encode_images(&pixels, &grids).unwrap();
        let prefill = vlm.prefill(&prompts, Some(&features)).unwrap();
        let shape = CacheShape { slots: 4, n: 3, prompt: 1, response: 70, images: 1 };
        let cache = || {
            let mut cache = vlm.cache(shape, Some(AttentionSet::new(&[1], &[[0, 1], [0, 2]])), false).unwrap();
            cache.admit(&prefill, &[0, 3, 2]).unwrap();
            cache
        };
        let mut a = cache();
        let mut b = cache();
        let mut alone = cache();
        let mut worst = 0.0f64;
        for step in 0..68i64 {
            let all = [0usize, 1, 2, 6, 7, 8, 9, 10, 11];
            let rows: Vec<usize> = all.into_iter().filter(|r| !(r + step as usize).is_multiple_of(4)).collect();
            let tokens: Vec<i64> = rows.iter().map(|r| (*r as i64 * 5 + step * 3) % 57).collect();
            let ids = Tensor::from_slice(&tokens);
            let out = vlm.decode_step(&mut a, &ids, &rows).unwrap();
            let (hidden, attention) = vlm.step(&ids, &b, &b.step_tensors(&rows)).unwrap();
            b.advance(&rows);
            let difference = |x: &Tensor, y: &Tensor| (x - y).abs().max().double_value(&[]);
            worst = worst.max(difference(&out.hidden, &hidden));
            worst = worst.max(difference(out.attention.as_ref().unwrap(), attention.as_ref().unwrap()));
            if let Some(index) = rows.iter().position(|r| *r == 10) {
                let index = index as i64;
                let single = vlm.decode_step(&mut alone, &ids.narrow(0, index, 1), &[10]).unwrap();
                assert_eq!(
                    single.hidden,
                    out.hidden.narrow(0, index, 1),
                    "{set}, {}, step {step}",
                    vlm.config().family.name()
                );
                assert_eq!(single.attention.unwrap(), out.attention.unwrap().narrow(0, index, 1), "{set}, step {step}");
            }
        }
        assert!(worst < 2e-5, "{set}, {}: {worst}", vlm.config().family.name());
    }
}
