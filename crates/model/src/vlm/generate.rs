//! Generation with a model: prefill of prompts, refill after a weight swap, decode steps.

use tch::{Device, Kind, Tensor};
use unveil_core::Prompt;

use crate::decoder::{AttentionMask, SequenceOptions};
use crate::generation::cache::{CacheShape, DecodeOut, GroupCache, Prefill};
use crate::generation::decode_slots::StepTensors;
use crate::generation::decode_step::replayed_step;
use crate::layers::attention::AttentionSet;
use crate::layers::rope::rope_positions;
use crate::training::packed::{PackedBatch, PackedGroup, image_positions, padding_token};
use crate::vlm::Vlm;
use crate::{ModelError, Result};

impl Vlm {
    /// Runs prompts and returns their keys and values. `image_features` are those of all images of all prompts, in order.
    ///
    /// # Errors
    /// Returns [`ModelError::Input`], with the prompt, if a prompt is empty or its placeholders and grids do not match.
    pub fn prefill(&self, prompts: &[Prompt], image_features: Option<&Tensor>) -> Result<Prefill> {
        let l = prompts.iter().map(|p| p.tokens.len()).max().unwrap_or(0);
        if let Some(empty) = prompts.iter().position(|p| p.tokens.is_empty()) {
            return Err(ModelError::input(format!("prompt {empty} is empty")));
        }
        if l == 0 {
            return Err(ModelError::input("prefill needs at least one prompt"));
        }
        let filler = padding_token(&self.config);
        let mut tokens = Vec::new();
        let mut positions = Vec::new();
        let mut next = Vec::new();
        for (index, prompt) in prompts.iter().enumerate() {
            let (prompt_positions, after) = rope_positions(&prompt.tokens, &prompt.grids, &self.config)
                .map_err(|e| ModelError::input(format!("prompt {index}: {e}")))?;
            tokens.extend(prompt.tokens.iter().map(|t| i64::from(*t)).chain(std::iter::repeat(filler)).take(l));
            positions.extend(prompt_positions.into_iter().chain(std::iter::repeat([0; 3])).take(l).flatten());
            next.push(after);
        }
        let g = prompts.len() as i64;
        let device = self.device();
        let tokens = Tensor::from_slice(&tokens).view([g, l as i64]).to_device(device);
        let positions = Tensor::from_slice(&positions).view([g, l as i64, 3]).to_device(device).permute([2, 0, 1]);
        let lengths: Vec<i64> = prompts.iter().map(|p| p.tokens.len() as i64).collect();
        let options = self.cache_options(&lengths, l as i64);
        let out = self.infer(&tokens, image_features, &positions, AttentionMask::Causal, options)?;
        let images: Vec<Vec<i64>> = prompts.iter().map(|p| image_positions(&p.tokens, &self.config)).collect();
        Ok(Prefill {
            last_hidden: out.hidden.tensor,
            image_tokens: images.iter().map(Vec::len).collect(),
            layers: out.kv,
            lengths,
            next,
            images,
            responses: Vec::new(),
        })
    }

    /// Runs prompts and the fed parts of their responses (which may be empty) with the current weights, for caches that were filled with
    /// others. All groups must have the same number of responses.
    ///
    /// # Errors
    /// Returns the same errors as [`PackedBatch::build`] and [`Vlm::forward`].
    pub fn refill(&self, groups: &[PackedGroup], image_features: Option<&Tensor>) -> Result<Prefill> {
        let batch = PackedBatch::pack(groups, &self.config, self.device())?;
        let lengths: Vec<i64> = groups.iter().map(|g| g.prompt.tokens.len() as i64).collect();
        let options = self.cache_options(&lengths, batch.tokens.size()[1]);
        let out = self.infer_packed(&batch, image_features, options)?;
        let ranges = |g: &PackedGroup| {
            let mut end = g.prompt.tokens.len() as i64;
            let next_range = |r: &Vec<u32>| {
                end += r.len() as i64;
                end - r.len() as i64..end
            };
            g.responses.iter().map(next_range).collect()
        };
        let images: Vec<Vec<i64>> = groups.iter().map(|g| image_positions(&g.prompt.tokens, &self.config)).collect();
        Ok(Prefill {
            last_hidden: out.hidden.tensor,
            image_tokens: batch.image_tokens,
            layers: out.kv,
            lengths,
            next: batch.next,
            images,
            responses: groups.iter().map(ranges).collect(),
        })
    }

    /// Returns the options of a pass that fills caches: keys and values are kept, and hidden states are returned for the last token of each
    /// prompt only. The prompts have these `lengths` and begin every `width` tokens.
    fn cache_options(&self, lengths: &[i64], width: i64) -> SequenceOptions {
        let last: Vec<i64> = lengths.iter().enumerate().map(|(row, len)| row as i64 * width + len - 1).collect();
        let rows = Some(Tensor::from_slice(&last).to_device(self.device()));
        SequenceOptions { rows, keep_kv: true, ..SequenceOptions::default() }
    }

    /// Creates empty KV caches for this model; see [`GroupCache::new`].
    ///
    /// # Errors
    /// Returns the same errors as [`GroupCache::new`].
    pub fn cache(&self, shape: CacheShape, capture: Option<AttentionSet>, fixed_shapes: bool) -> Result<GroupCache> {
        GroupCache::new(&self.config.text, shape, capture, fixed_shapes, (self.cache_kind(), self.device()))
    }

    /// Feeds one token `[A]` to each of `rows` (ascending) and returns the hidden states that predict the next ones. Call it without
    /// gradients: caches are written in place.
    ///
    /// # Errors
    /// Returns [`ModelError::Input`] if the number of tokens is wrong, or a row does not exist or is full.
    pub fn decode_step(&self, cache: &mut GroupCache, tokens: &Tensor, rows: &[usize]) -> Result<DecodeOut> {
        if tokens.size() != [rows.len() as i64] || rows.is_empty() || !rows.is_sorted_by(|a, b| a < b) {
            return Err(ModelError::input(format!("tokens of shape {:?} do not match rows {rows:?}", tokens.size())));
        }
        cache.check_capacity(rows)?;
        let tokens = tokens.f_to_device(self.device())?;
        let (hidden, attention) = if cache.fixed_shapes() && rows.len() < cache.rows() {
            let index: Vec<i64> = rows.iter().map(|r| *r as i64).collect();
            let index = Tensor::from_slice(&index).to_device(self.device());
            let all = Tensor::zeros([cache.rows() as i64], (Kind::Int64, self.device())).index_copy(0, &index, &tokens);
            let (hidden, attention) = self.run_decode_step(cache, &all, &(0..cache.rows()).collect::<Vec<_>>())?;
            (hidden.index_select(0, &index), attention.map(|a| a.index_select(0, &index)))
        } else {
            self.run_decode_step(cache, &tokens, rows)?
        };
        cache.advance(rows);
        Ok(DecodeOut { hidden, attention })
    }

    fn run_decode_step(
        &self,
        cache: &mut GroupCache,
        tokens: &Tensor,
        rows: &[usize],
    ) -> Result<(Tensor, Option<Tensor>)> {
        let _guard = tch::no_grad_guard();
        if self.decoder.has_cpu_kernels() && self.adapters.as_ref().is_none_or(|a| !a.enabled()) {
            return self.decoder.cpu_step(&self.try_embed_tokens(tokens)?, cache, &cache.step_slots(rows));
        }
        let inputs = cache.step_tensors(rows);
        match self.device() {
            Device::Cuda(gpu) if cache.fixed_shapes() => {
                replayed_step(cache, gpu, tokens, inputs, &|tokens, cache, inputs| self.step(tokens, cache, inputs))
            }
            _ => self.step(tokens, cache, &inputs),
        }
    }

    /// Does the tensor work of a decode step. Only the values in `tokens` and `inputs` change between steps of one shape.
    pub(crate) fn step(
        &self,
        tokens: &Tensor,
        cache: &GroupCache,
        inputs: &StepTensors,
    ) -> Result<(Tensor, Option<Tensor>)> {
        Ok(self.decoder.step(&self.try_embed_tokens(tokens)?, cache, inputs))
    }
}
