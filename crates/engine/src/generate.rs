//! The generation loop: admit groups into free slots, feed one token per row, sample one token per row, hand out groups that
//! are done.

use std::borrow::Borrow;

use tch::Tensor;
use unveil_model::{CacheShape, Prompt, Vlm};

use crate::batch::{Batch, Running};
use crate::engine::{Ticket, Waiting, host};
use crate::request::{GroupInput, GroupOutput};
use crate::sample::{Draw, draw};
use crate::{Engine, EngineError, Longest, Result, random};

impl<V: Borrow<Vlm>> Engine<V> {
    /// Admits what fits and makes one token for every response under way. Returns the groups that are done.
    ///
    /// # Errors
    /// The model cannot go on; everything that was under way or waiting is lost then.
    pub fn step(&mut self) -> Result<Vec<(Ticket, GroupOutput)>> {
        let _guard = tch::no_grad_guard();
        let mut done = Vec::new();
        let outcome = self.advance(&mut done);
        if outcome.is_err() {
            self.waiting.clear();
            self.batch = None;
        }
        outcome.map(|()| done)
    }

    fn advance(&mut self, done: &mut Vec<(Ticket, GroupOutput)>) -> Result<()> {
        self.admit_waiting()?;
        self.retire(done)?;
        self.decode()?;
        self.retire(done)
    }

    /// Puts groups that wait into slots, as many as the plan and the rows allow. Groups of another number of responses wait
    /// until the batch is empty.
    fn admit_waiting(&mut self) -> Result<()> {
        let Some(first) = self.waiting.front() else { return Ok(()) };
        let n = first.request.sampling.n;
        if self.batch.as_ref().is_some_and(|b| b.n != n) {
            return Ok(());
        }
        let alike = self.waiting.iter().take_while(|w| w.request.sampling.n == n);
        let mut longest = self.batch.as_ref().map_or(Longest { n, ..Longest::default() }, |b| {
            let shape = b.cache.shape();
            Longest { n, prompt: shape.prompt, images: shape.images, response: shape.response }
        });
        let mut count = 0;
        for w in alike {
            let images =
                w.request.input.prompt.grids.iter().map(|g| self.vlm().config().merged_tokens(*g).unwrap_or(0));
            longest.images = longest.images.max(images.sum());
            longest.prompt = longest.prompt.max(w.request.input.prompt.tokens.len());
            longest.response = longest.response.max(w.request.sampling.max_new_tokens);
            count += 1;
        }
        let taken = self.batch.as_ref().map_or(0, |b| b.slots.len() - b.free().len());
        // What runs may have been planned for shorter groups: it stays, and others join when the longest of all fit.
        let fit = match self.plan(&first.request.input.id, &longest) {
            Ok(plan) => plan.slots,
            Err(_) if taken > 0 => return Ok(()),
            Err(e) => return Err(e),
        };
        let count = count.min(fit.saturating_sub(taken));
        if count == 0 {
            return Ok(());
        }
        let mut admitted: Vec<Waiting> = self.waiting.drain(..count).collect();
        self.make_room(taken + count, &longest)?;
        while !admitted.is_empty() {
            let part = self.share(&admitted, |w| w.request.input.prompt.tokens.len());
            let rest = admitted.split_off(part);
            self.prefill(std::mem::replace(&mut admitted, rest))?;
        }
        Ok(())
    }

    /// How many of `items`, padded to the longest, one pass takes; at least one.
    pub(crate) fn share<T>(&self, items: &[T], length: impl Fn(&T) -> usize) -> usize {
        let mut longest = 0;
        let fits = items.iter().enumerate().take_while(|(i, item)| {
            longest = longest.max(length(item));
            *i == 0 || (i + 1) * longest <= self.options.prefill_tokens
        });
        fits.count()
    }

    fn make_room(&mut self, slots: usize, longest: &Longest) -> Result<()> {
        if let Some(batch) = &mut self.batch {
            batch.cache.extend(slots, longest.response)?;
            batch.slots.resize_with(batch.cache.shape().slots, || None);
            return Ok(());
        }
        let Longest { n, prompt, images, response } = *longest;
        let shape = CacheShape { slots, n, prompt, response, images };
        self.batch = Some(Batch::new(n, self.vlm.borrow().cache(shape, self.options.capture.clone(), self.steady())?));
        Ok(())
    }

    /// Encodes, prefills and samples the first tokens of `admitted`.
    fn prefill(&mut self, admitted: Vec<Waiting>) -> Result<()> {
        let features = self.encode(admitted.iter().map(|w| &w.request.input))?;
        let vlm = self.vlm.borrow();
        let prompts: Vec<Prompt> = admitted.iter().map(|w| w.request.input.prompt.clone()).collect();
        let prefill = vlm.prefill(&prompts, features.as_ref())?;
        self.stats.prompts_prefilled += prompts.len() as u64;
        let Some(batch) = self.batch.as_mut() else { return Ok(()) };
        let n = batch.n;
        let slots: Vec<usize> = batch.free().into_iter().take(admitted.len()).collect();
        batch.cache.admit(&prefill, &slots)?;
        for ((slot, waiting), images) in slots.iter().zip(admitted).zip(&prefill.image_tokens) {
            batch.slots[*slot] = Some(Running::new(waiting, *images));
        }
        // One row of logits per group serves its n first tokens.
        let logits = vlm.lm_head(&prefill.last_hidden).f_repeat_interleave_self_int(n as i64, 0, None)?;
        let rows: Vec<(usize, usize)> = slots.iter().flat_map(|s| (0..n).map(move |r| (*s, r))).collect();
        self.sample(&logits, &rows)
    }

    /// One token for each of `rows` (slot, response) from its row of `logits`.
    fn sample(&mut self, logits: &Tensor, rows: &[(usize, usize)]) -> Result<()> {
        let Some(batch) = self.batch.as_mut() else { return Ok(()) };
        let mut draws = Vec::with_capacity(rows.len());
        for &(s, r) in rows {
            let Some(running) = &batch.slots[s] else { continue };
            let sampling = running.request.sampling;
            let uniform = random::uniform(sampling.seed, running.request.key, r as u32, running.position(r));
            draws.push(Draw { sampling, uniform });
        }
        let (tokens, logprobs) = draw(logits, &self.banned, &draws)?;
        let capture = self.options.capture.is_some();
        for ((&(s, r), token), logprob) in rows.iter().zip(tokens).zip(logprobs) {
            let Some(running) = &mut batch.slots[s] else { continue };
            if !logprob.is_finite() {
                return Err(EngineError::NotANumber { group: running.request.input.id.clone() });
            }
            let fed_again = capture && running.image_tokens > 0;
            running.push(r, token, logprob, self.version, self.ends.contains(&token), fed_again);
        }
        self.stats.tokens += rows.len() as u64;
        Ok(())
    }

    /// Feeds the last token of every response that goes on, keeps its attention row, samples its next token.
    fn decode(&mut self) -> Result<()> {
        let Some(batch) = self.batch.as_mut() else { return Ok(()) };
        let (rows, tokens) = batch.next();
        if rows.is_empty() {
            return Ok(());
        }
        let vlm = self.vlm.borrow();
        let out = vlm.decode_step(&mut batch.cache, &Tensor::f_from_slice(&tokens)?, &rows)?;
        self.stats.decode_steps += 1;
        let (graph_steps, fault) = batch.cache.graph_steps();
        self.stats.graph_steps += graph_steps - std::mem::replace(&mut batch.graph_steps, graph_steps);
        if self.graph_fault.as_deref() != fault {
            self.graph_fault = fault.map(str::to_owned);
        }
        self.stats.tokens_fed += rows.len() as u64;
        let width = |a: &Tensor| a.size().last().copied().unwrap_or(0) as usize;
        let attention = out.attention.map(|a| host(&a).map(|values| (width(&a), values))).transpose()?;
        let on = batch.fed(&rows, attention);
        if on.is_empty() {
            return Ok(());
        }
        let hidden = if on.len() == rows.len() {
            out.hidden
        } else {
            let index: Vec<i64> = on.iter().map(|(i, _)| *i as i64).collect();
            out.hidden.f_index_select(0, &Tensor::f_from_slice(&index)?.f_to_device(vlm.device())?)?
        };
        let logits = vlm.step_logits(&hidden);
        let rows: Vec<(usize, usize)> = on.into_iter().map(|(_, row)| row).collect();
        self.sample(&logits, &rows)
    }

    /// Hands out groups that are done; gives memory back when nobody waits for it and most of it is free.
    fn retire(&mut self, done: &mut Vec<(Ticket, GroupOutput)>) -> Result<()> {
        let Some(batch) = self.batch.as_mut() else { return Ok(()) };
        let out = batch.retire();
        if out.is_empty() {
            return Ok(());
        }
        done.extend(out);
        let taken: Vec<usize> = (0..batch.slots.len()).filter(|s| batch.slots[*s].is_some()).collect();
        if taken.is_empty() {
            self.batch = None;
        } else if self.waiting.is_empty() && !batch.cache.steady() && taken.len() * 2 <= batch.slots.len() {
            batch.cache.keep(&taken)?;
            batch.slots.retain(Option::is_some);
        }
        Ok(())
    }

    /// Makes the caches of groups under way again, with the present weights.
    pub(crate) fn refill(&mut self) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let Some(batch) = &self.batch else { return Ok(()) };
        let mut held = batch.held();
        while !held.is_empty() {
            let length = |(_, g): &(usize, unveil_model::PackedGroup)| {
                g.prompt.tokens.len() + g.responses.iter().map(Vec::len).sum::<usize>()
            };
            let rest = held.split_off(self.share(&held, length));
            let (slots, groups): (Vec<usize>, Vec<_>) = held.into_iter().unzip();
            held = rest;
            let Some(batch) = &self.batch else { return Ok(()) };
            let inputs: Vec<GroupInput> =
                slots.iter().filter_map(|s| Some(batch.slots[*s].as_ref()?.request.input.clone())).collect();
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
