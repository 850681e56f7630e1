//! The generation loop: admit groups, feed one token per row, sample one token per row, retire finished groups.

use std::borrow::Borrow;
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};

use tch::{Kind, Tensor};
use unveil_core::{Finish, Sampling};
use unveil_model::{GroupCache, Prompt, Vlm};

use crate::engine::host;
use crate::request::{AttentionRows, GroupOutput, GroupRequest, RawResponse};
use crate::{Engine, EngineError, Result, random, sample};

/// One response under way.
#[derive(Default)]
struct Row {
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    attention: Vec<f32>,
    finish: Option<Finish>,
    /// Nothing is left to feed.
    done: bool,
}

/// One group under way; its rows are `slot * n ..` in the cache.
struct Slot {
    request: usize,
    image_tokens: usize,
    rows: Vec<Row>,
}

impl Slot {
    fn done(&self) -> bool {
        self.rows.iter().all(|r| r.done)
    }
}

impl<V: Borrow<Vlm>> Engine<V> {
    /// Generates the responses of every group, in the order of `requests`.
    ///
    /// Each image is encoded once and each prompt prefilled once. When `cancel` becomes true, what is under way ends with
    /// [`Finish::Cancelled`] after the present step, and groups that wait end with no tokens.
    ///
    /// Errors before any step when a request cannot run; the message names the group.
    pub fn generate(&mut self, requests: &[GroupRequest], cancel: Option<&AtomicBool>) -> Result<Vec<GroupOutput>> {
        let _guard = tch::no_grad_guard();
        for r in requests {
            self.check(&r.input, r.sampling.max_new_tokens)?;
            let Sampling { n, temperature, max_new_tokens, .. } = r.sampling;
            if n == 0 || max_new_tokens == 0 {
                return Err(EngineError::request(&r.input.id, "n and max_new_tokens must be at least 1"));
            }
            if !(temperature >= 0.0 && temperature.is_finite()) {
                return Err(EngineError::request(&r.input.id, format!("temperature {temperature} must be 0 or more")));
            }
        }
        // Rows of one batch share n (the cache's shape) and the temperature (one softmax for all).
        let mut buckets: BTreeMap<(usize, u64), VecDeque<usize>> = BTreeMap::new();
        for (i, r) in requests.iter().enumerate() {
            buckets.entry((r.sampling.n, r.sampling.temperature.to_bits())).or_default().push_back(i);
        }
        let mut out: Vec<Option<GroupOutput>> = requests.iter().map(|_| None).collect();
        for ((n, _), waiting) in buckets {
            self.run(requests, n, waiting, cancel, &mut out)?;
        }
        Ok(out.into_iter().map(|o| o.unwrap_or(GroupOutput { responses: Vec::new() })).collect())
    }

    fn run(
        &mut self,
        requests: &[GroupRequest],
        n: usize,
        mut waiting: VecDeque<usize>,
        cancel: Option<&AtomicBool>,
        out: &mut [Option<GroupOutput>],
    ) -> Result<()> {
        let capacity = (self.options.max_rows / n).max(1);
        let longest = waiting.iter().map(|&i| requests[i].sampling.max_new_tokens).max().unwrap_or(1);
        let mut slots: Vec<Slot> = Vec::new();
        let mut cache: Option<GroupCache> = None;
        while !cancel.is_some_and(|c| c.load(Ordering::Relaxed)) {
            let free = capacity - slots.len();
            if !waiting.is_empty() && (slots.is_empty() || free * 4 >= capacity) {
                let count = free.min(self.options.prefill_groups.max(1)).min(waiting.len());
                let admitted: Vec<usize> = waiting.drain(..count).collect();
                self.admit(requests, n, longest, &admitted, &mut slots, &mut cache)?;
                continue;
            }
            self.retire(requests, &mut slots, &mut cache, !waiting.is_empty(), out)?;
            let Some(cache) = cache.as_mut() else {
                if waiting.is_empty() {
                    return Ok(());
                }
                continue;
            };
            self.step(requests, n, &mut slots, cache)?;
        }
        let rest = waiting.into_iter().map(|request| Slot {
            request,
            image_tokens: 0,
            rows: (0..n).map(|_| Row::default()).collect(),
        });
        for slot in slots.into_iter().chain(rest) {
            let request = slot.request;
            out[request] = Some(self.finished(&requests[request], slot));
        }
        Ok(())
    }

    /// Encodes, prefills and samples the first tokens of `admitted`.
    fn admit(
        &mut self,
        requests: &[GroupRequest],
        n: usize,
        longest: usize,
        admitted: &[usize],
        slots: &mut Vec<Slot>,
        cache: &mut Option<GroupCache>,
    ) -> Result<()> {
        let features = self.encode(admitted.iter().map(|&i| &requests[i].input))?;
        let vlm = self.vlm.borrow();
        let prompts: Vec<Prompt> = admitted.iter().map(|&i| requests[i].input.prompt.clone()).collect();
        let prefill = vlm.prefill(&prompts, features.as_ref())?;
        self.stats.prompts_prefilled += prompts.len() as u64;
        // One row of logits per group serves its n first tokens.
        let logits = vlm.lm_head(&prefill.last_hidden).f_repeat_interleave_self_int(n as i64, 0, None)?;
        let first = slots.len();
        for (&request, &image_tokens) in admitted.iter().zip(&prefill.image_tokens) {
            slots.push(Slot { request, image_tokens, rows: (0..n).map(|_| Row::default()).collect() });
        }
        match cache {
            Some(cache) => cache.append(prefill)?,
            None => *cache = Some(GroupCache::new(prefill, n, longest)?),
        }
        let rows: Vec<(usize, usize)> = (first..slots.len()).flat_map(|s| (0..n).map(move |r| (s, r))).collect();
        self.sample(requests, &logits, &rows, slots)
    }

    /// One token for each of `rows` from its row of `logits`.
    fn sample(
        &mut self,
        requests: &[GroupRequest],
        logits: &Tensor,
        rows: &[(usize, usize)],
        slots: &mut [Slot],
    ) -> Result<()> {
        let Some(&(s, _)) = rows.first() else { return Ok(()) };
        let temperature = requests[slots[s].request].sampling.temperature;
        let uniforms: Vec<f64> = if temperature > 0.0 {
            let one = |&(s, r): &(usize, usize)| {
                let request = &requests[slots[s].request];
                random::uniform(request.sampling.seed, request.key, r as u32, slots[s].rows[r].tokens.len() as u32)
            };
            rows.iter().map(one).collect()
        } else {
            Vec::new()
        };
        let (tokens, logprobs) = sample::draw(logits, temperature, &self.banned, &uniforms)?;
        let ends = self.vlm.borrow().config().eos_token_ids();
        for ((&(s, r), token), logprob) in rows.iter().zip(tokens).zip(logprobs) {
            let request = &requests[slots[s].request];
            if !logprob.is_finite() {
                return Err(EngineError::NotANumber { group: request.input.id.clone() });
            }
            let capture = self.options.capture_layer.is_some() && slots[s].image_tokens > 0;
            let row = &mut slots[s].rows[r];
            row.tokens.push(token);
            row.logprobs.push(logprob);
            if ends.contains(&token) {
                (row.finish, row.done) = (Some(Finish::Stop), true);
            } else if row.tokens.len() >= request.sampling.max_new_tokens {
                // With capture its last token is fed once more, for its attention row.
                (row.finish, row.done) = (Some(Finish::Length), !capture);
            }
        }
        self.stats.tokens += rows.len() as u64;
        Ok(())
    }

    /// Feeds the last token of every row that is not done, keeps its attention row, samples its next token.
    fn step(&mut self, requests: &[GroupRequest], n: usize, slots: &mut [Slot], cache: &mut GroupCache) -> Result<()> {
        let vlm = self.vlm.borrow();
        let mut fed: Vec<i64> = Vec::with_capacity(slots.len() * n);
        let mut active: Vec<bool> = Vec::with_capacity(slots.len() * n);
        for row in slots.iter().flat_map(|s| &s.rows) {
            fed.push(row.tokens.last().map_or(0, |&t| i64::from(t)));
            active.push(!row.done);
        }
        let fed = Tensor::f_from_slice(&fed)?.f_to_device(vlm.device())?;
        let mask = active.iter().any(|a| !a).then_some(active.as_slice());
        let out = vlm.decode_step(cache, &fed, mask, self.options.capture_layer)?;
        self.stats.decode_steps += 1;
        let width = |a: &Tensor| a.size().last().copied().unwrap_or(0) as usize;
        let attention = out.attention.map(|a| host(&a).map(|values| (width(&a), values))).transpose()?;
        let mut rows = Vec::new();
        for (flat, _) in active.iter().enumerate().filter(|(_, a)| **a) {
            let (s, r) = (flat / n, flat % n);
            let image_tokens = slots[s].image_tokens;
            let row = &mut slots[s].rows[r];
            if let Some((width, values)) = &attention {
                row.attention.extend_from_slice(&values[flat * width..flat * width + image_tokens]);
            }
            if row.finish.is_some() {
                row.done = true;
            } else {
                rows.push((s, r));
            }
        }
        if rows.is_empty() {
            return Ok(());
        }
        let hidden = if rows.len() == active.len() {
            out.hidden
        } else {
            let index: Vec<i64> = rows.iter().map(|&(s, r)| (s * n + r) as i64).collect();
            out.hidden.f_index_select(0, &Tensor::f_from_slice(&index)?.f_to_device(vlm.device())?)?
        };
        let logits = vlm.lm_head(&hidden).f_to_kind(Kind::Float)?;
        self.sample(requests, &logits, &rows, slots)
    }

    /// Hands out finished groups and gives their memory back, when there are enough of them to pay for moving the others.
    fn retire(
        &mut self,
        requests: &[GroupRequest],
        slots: &mut Vec<Slot>,
        cache: &mut Option<GroupCache>,
        others_wait: bool,
        out: &mut [Option<GroupOutput>],
    ) -> Result<()> {
        let keep: Vec<usize> = (0..slots.len()).filter(|&i| !slots[i].done()).collect();
        let finished = slots.len() - keep.len();
        if finished == 0 || (!keep.is_empty() && !others_wait && finished * 8 < slots.len()) {
            return Ok(());
        }
        if keep.is_empty() {
            *cache = None;
        } else if let Some(cache) = cache {
            cache.keep_groups(&keep)?;
        }
        for slot in std::mem::take(slots) {
            if slot.done() {
                let request = slot.request;
                out[request] = Some(self.finished(&requests[request], slot));
            } else {
                slots.push(slot);
            }
        }
        Ok(())
    }

    fn finished(&self, request: &GroupRequest, slot: Slot) -> GroupOutput {
        let capture = self.options.capture_layer.is_some() && !request.input.prompt.grids.is_empty();
        let cells = slot.image_tokens;
        let response = |(index, row): (usize, Row)| RawResponse {
            index,
            versions: vec![self.version; row.tokens.len()],
            tokens: row.tokens,
            logprobs: row.logprobs,
            finish: row.finish.unwrap_or(Finish::Cancelled),
            attention: (capture && cells > 0).then_some(AttentionRows { cells, values: row.attention }),
        };
        GroupOutput { responses: slot.rows.into_iter().enumerate().map(response).collect() }
    }
}
