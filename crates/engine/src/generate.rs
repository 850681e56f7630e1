//! The generation loop: admits groups into free slots, feeds and samples one token per row, and returns the groups that are done.

use std::borrow::Borrow;

use tch::Tensor;
use unveil_core::{Prompt, WeightVersion};
use unveil_model::{CacheShape, Vlm};

use crate::batch::{Batch, RunningGroup};
use crate::engine::to_host;
use crate::queue::{QueuedGroup, Ticket};
use crate::request::{GroupOutput, PromptInput};
use crate::sample::{RowSampler, sample_rows};
use crate::{Engine, EngineError, MaxSizes, Result, random};

impl<V: Borrow<Vlm>> Engine<V> {
    /// Admits the groups that fit and generates one token for every running response. Returns the groups that are done.
    ///
    /// # Errors
    /// Returns [`EngineError::NonFinite`] if the weights are damaged, and [`EngineError::Model`] or [`EngineError::Torch`] if the model
    /// fails. All running and queued groups are discarded then.
    pub fn step(&mut self) -> Result<Vec<(Ticket, GroupOutput)>> {
        let _guard = tch::no_grad_guard();
        let mut outputs = Vec::new();
        let result = self.advance(&mut outputs);
        if result.is_err() {
            self.waiting.clear();
            self.batch = None;
        }
        result.map(|()| outputs)
    }

    fn advance(&mut self, outputs: &mut Vec<(Ticket, GroupOutput)>) -> Result<()> {
        self.admit_waiting()?;
        self.retire(outputs)?;
        self.decode()?;
        self.retire(outputs)
    }

    /// Admits queued groups, as many as the memory plan allows. Groups with another number of responses wait until the batch is empty.
    fn admit_waiting(&mut self) -> Result<()> {
        let Some(first) = self.waiting.front() else { return Ok(()) };
        let n = first.request.sampling.n;
        if self.batch.as_ref().is_some_and(|b| b.n != n) {
            return Ok(());
        }
        let compatible = self.waiting.iter().take_while(|w| w.request.sampling.n == n);
        let mut max = self.batch.as_ref().map_or(MaxSizes { n, ..MaxSizes::default() }, |b| {
            let shape = b.cache.shape();
            MaxSizes { n, prompt: shape.prompt, images: shape.images, response: shape.response }
        });
        let mut count = 0;
        for w in compatible {
            let images =
                w.request.input.prompt.grids.iter().map(|g| self.vlm().config().merged_tokens(*g).unwrap_or(0));
            max.images = max.images.max(images.sum());
            max.prompt = max.prompt.max(w.request.input.prompt.tokens.len());
            max.response = max.response.max(w.request.sampling.max_new_tokens);
            count += 1;
        }
        let occupied = self.batch.as_ref().map_or(0, |b| b.slots.len() - b.free_slots().len());
        // The running groups may have been planned for smaller sizes: others join them only if all fit at the maximum sizes.
        let slots = match self.plan_memory(&first.request.input.id, &max) {
            Ok(plan) => plan.slots,
            Err(_) if occupied > 0 => return Ok(()),
            Err(e) => return Err(e),
        };
        let count = count.min(slots.saturating_sub(occupied));
        if count == 0 {
            return Ok(());
        }
        let mut admitted: Vec<QueuedGroup> = self.waiting.drain(..count).collect();
        self.reserve_slots(occupied + count, &max)?;
        while !admitted.is_empty() {
            let count = self.count_per_pass(&admitted, |w| w.request.input.prompt.tokens.len());
            let rest = admitted.split_off(count);
            self.prefill(std::mem::replace(&mut admitted, rest))?;
        }
        Ok(())
    }

    /// Returns how many of the first `items`, padded to the longest, fit one forward pass; at least one.
    pub(crate) fn count_per_pass<T>(&self, items: &[T], length: impl Fn(&T) -> usize) -> usize {
        let mut longest = 0;
        let fitting = items.iter().enumerate().take_while(|(i, item)| {
            longest = longest.max(length(item));
            *i == 0 || (i + 1) * longest <= self.options.prefill_tokens
        });
        fitting.count()
    }

    /// Creates or extends the batch's KV cache.
    fn reserve_slots(&mut self, slots: usize, max: &MaxSizes) -> Result<()> {
        if let Some(batch) = &mut self.batch {
            batch.cache.reserve(slots, max.response)?;
            batch.slots.resize_with(batch.cache.shape().slots, || None);
            return Ok(());
        }
        let MaxSizes { n, prompt, images, response } = *max;
        let Some(shape) = self.reuse_cache(&CacheShape { slots, n, prompt, response, images }) else { return Ok(()) };
        let cache = self.vlm.borrow().cache(shape, self.options.capture.clone(), self.fixed_shapes())?;
        self.batch = Some(Batch::new(n, cache));
        Ok(())
    }

    /// Encodes the images and prefills the prompts of `admitted`, and samples the first tokens.
    fn prefill(&mut self, admitted: Vec<QueuedGroup>) -> Result<()> {
        let features = self.encode(admitted.iter().map(|w| &w.request.input))?;
        let vlm = self.vlm.borrow();
        let prompts: Vec<Prompt> = admitted.iter().map(|w| w.request.input.prompt.clone()).collect();
        let prefill = vlm.prefill(&prompts, features.as_ref())?;
        self.stats.prompts_prefilled += prompts.len() as u64;
        let Some(batch) = self.batch.as_mut() else { return Ok(()) };
        let n = batch.n;
        let slots: Vec<usize> = batch.free_slots().into_iter().take(admitted.len()).collect();
        batch.cache.admit(&prefill, &slots)?;
        for ((slot, queued), image_tokens) in slots.iter().zip(admitted).zip(&prefill.image_tokens) {
            batch.slots[*slot] = Some(RunningGroup::new(queued, *image_tokens));
        }
        // The n first tokens of a group are sampled from one row of logits.
        let logits = vlm.lm_head(&prefill.last_hidden).f_repeat_interleave_self_int(n as i64, 0, None)?;
        let rows: Vec<(usize, usize)> = slots.iter().flat_map(|slot| (0..n).map(move |r| (*slot, r))).collect();
        self.sample(&logits, &rows)
    }

    /// Samples one token for each of `rows` (slot, response) from its row of `logits`.
    fn sample(&mut self, logits: &Tensor, rows: &[(usize, usize)]) -> Result<()> {
        let Some(batch) = self.batch.as_mut() else { return Ok(()) };
        let mut samplers = Vec::with_capacity(rows.len());
        for &(slot, r) in rows {
            let Some(group) = &batch.slots[slot] else { continue };
            let sampling = group.request.sampling;
            let uniform = random::uniform(sampling.seed, group.request.key, r as u32, group.position(r));
            samplers.push(RowSampler { sampling, uniform });
        }
        let (tokens, logprobs) = sample_rows(logits, &self.banned, &samplers)?;
        let capture = self.options.capture.is_some();
        for ((&(slot, r), token), logprob) in rows.iter().zip(tokens).zip(logprobs) {
            let Some(group) = &mut batch.slots[slot] else { continue };
            if !logprob.is_finite() {
                return Err(EngineError::NonFinite { group: group.request.input.id.clone() });
            }
            let feed_last = capture && group.image_tokens > 0;
            let version = group.cached_with.unwrap_or(self.version);
            group.push(r, token, logprob, version, self.end_tokens.contains(&token), feed_last);
        }
        self.stats.tokens += rows.len() as u64;
        Ok(())
    }

    /// Feeds the last token of every running response, records its attention row and samples its next token.
    fn decode(&mut self) -> Result<()> {
        let Some(batch) = self.batch.as_mut() else { return Ok(()) };
        let (rows, tokens) = batch.next_inputs();
        if rows.is_empty() {
            return Ok(());
        }
        let vlm = self.vlm.borrow();
        let step = vlm.decode_step(&mut batch.cache, &Tensor::f_from_slice(&tokens)?, &rows)?;
        self.stats.decode_steps += 1;
        let (graph_steps, graph_error) = batch.cache.graph_steps();
        self.stats.graph_steps += graph_steps - std::mem::replace(&mut batch.graph_steps, graph_steps);
        if self.graph_error.as_deref() != graph_error {
            self.graph_error = graph_error.map(str::to_owned);
        }
        self.stats.tokens_fed += rows.len() as u64;
        let width = |a: &Tensor| a.size().last().copied().unwrap_or(0) as usize;
        let attention = step.attention.map(|a| to_host(&a).map(|values| (width(&a), values))).transpose()?;
        let continuing = batch.finish_step(&rows, attention);
        if continuing.is_empty() {
            return Ok(());
        }
        let hidden = if continuing.len() == rows.len() {
            step.hidden
        } else {
            let index: Vec<i64> = continuing.iter().map(|(i, _)| *i as i64).collect();
            step.hidden.f_index_select(0, &Tensor::f_from_slice(&index)?.f_to_device(vlm.device())?)?
        };
        let logits = vlm.step_logits(&hidden);
        let rows: Vec<(usize, usize)> = continuing.into_iter().map(|(_, row)| row).collect();
        self.sample(&logits, &rows)
    }

    /// Moves the groups that are done to `outputs`; frees memory if no group is queued and at least half of the slots are free.
    fn retire(&mut self, outputs: &mut Vec<(Ticket, GroupOutput)>) -> Result<()> {
        let Some(batch) = self.batch.as_mut() else { return Ok(()) };
        let retired = batch.retire();
        if retired.is_empty() {
            return Ok(());
        }
        outputs.extend(retired);
        let occupied: Vec<usize> = (0..batch.slots.len()).filter(|s| batch.slots[*s].is_some()).collect();
        if occupied.is_empty() {
            self.end_batch();
        } else if self.waiting.is_empty() && !batch.cache.fixed_shapes() && occupied.len() * 2 <= batch.slots.len() {
            batch.cache.retain_slots(&occupied)?;
            batch.slots.retain(Option::is_some);
        }
        Ok(())
    }

    /// Sets the version of weights that have been loaded, and brings running groups up to date with them.
    pub(crate) fn change_version(&mut self, version: WeightVersion) -> Result<()> {
        let before = std::mem::replace(&mut self.version, version);
        if !self.options.keep_cache {
            return self.recompute_caches();
        }
        for group in self.batch.iter_mut().flat_map(|batch| &mut batch.slots).flatten() {
            group.cached_with.get_or_insert(before);
        }
        Ok(())
    }

    /// Recomputes the KV caches of running groups with the current weights.
    pub(crate) fn recompute_caches(&mut self) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let Some(batch) = &self.batch else { return Ok(()) };
        let mut remaining = batch.cached_groups();
        while !remaining.is_empty() {
            let length = |(_, g): &(usize, unveil_model::PackedGroup)| {
                g.prompt.tokens.len() + g.responses.iter().map(Vec::len).sum::<usize>()
            };
            let rest = remaining.split_off(self.count_per_pass(&remaining, length));
            let (slots, groups): (Vec<usize>, Vec<_>) = remaining.into_iter().unzip();
            remaining = rest;
            let Some(batch) = &self.batch else { return Ok(()) };
            let inputs: Vec<PromptInput> =
                slots.iter().filter_map(|slot| Some(batch.slots[*slot].as_ref()?.request.input.clone())).collect();
            let features = self.encode(inputs.iter())?;
            let prefill = self.vlm.borrow().refill(&groups, features.as_ref())?;
            if let Some(batch) = &mut self.batch {
                batch.cache.admit(&prefill, &slots)?;
            }
            self.stats.groups_refilled += slots.len() as u64;
        }
        Ok(())
    }
}
