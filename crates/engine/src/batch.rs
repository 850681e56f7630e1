//! The running batch: groups in the slots of one KV cache, the state of each response, and the next tokens to feed. Bookkeeping only;
//! it computes nothing.

use unveil_core::{Finish, WeightVersion};
use unveil_model::{GroupCache, PackedGroup, TextConfig};

use crate::queue::{QueuedGroup, Ticket};
use crate::request::{AttentionRows, GroupOutput, GroupRequest, RawResponse};

/// State of one response.
struct ResponseState {
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    versions: Vec<WeightVersion>,
    attention: Vec<f32>,
    finish: Option<Finish>,
    /// No token is left to feed.
    done: bool,
    stop: Option<Box<dyn FnMut(u32) -> bool + Send>>,
}

impl std::fmt::Debug for ResponseState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ResponseState")
            .field("tokens", &self.tokens)
            .field("finish", &self.finish)
            .finish_non_exhaustive()
    }
}

/// A running group; in the cache its rows are `slot * n ..`.
#[derive(Debug)]
pub(crate) struct RunningGroup {
    pub ticket: Ticket,
    pub request: GroupRequest,
    pub image_tokens: usize,
    /// Version of the weights that filled the KV cache, if they are not the current ones.
    pub cached_with: Option<WeightVersion>,
    responses: Vec<ResponseState>,
}

/// Groups that share a cache and therefore have the same number of responses.
#[derive(Debug)]
pub(crate) struct Batch {
    pub n: usize,
    pub cache: GroupCache,
    pub slots: Vec<Option<RunningGroup>>,
    /// Graph steps that the engine's counters already include.
    pub graph_steps: u64,
}

impl RunningGroup {
    pub(crate) fn new(queued: QueuedGroup, image_tokens: usize) -> Self {
        let QueuedGroup { ticket, request } = queued;
        let response = || ResponseState {
            tokens: Vec::new(),
            logprobs: Vec::new(),
            versions: Vec::new(),
            attention: Vec::new(),
            finish: None,
            done: false,
            stop: request.stop.as_ref().map(|rule| rule()),
        };
        let responses = (0..request.sampling.n).map(|_| response()).collect();
        Self { ticket, request, image_tokens, cached_with: None, responses }
    }

    fn is_done(&self) -> bool {
        self.responses.iter().all(|r| r.done)
    }

    /// Returns the position of the next token of response `r`.
    pub(crate) fn position(&self, r: usize) -> u32 {
        self.responses[r].tokens.len() as u32
    }

    /// Appends a sampled token to response `r`. `is_end`: it is an end token. `feed_last`: the last token is still fed, for its
    /// attention row.
    pub(crate) fn push(
        &mut self,
        r: usize,
        token: u32,
        logprob: f32,
        version: WeightVersion,
        is_end: bool,
        feed_last: bool,
    ) {
        let response = &mut self.responses[r];
        response.tokens.push(token);
        response.logprobs.push(logprob);
        response.versions.push(version);
        let stopped = response.stop.as_mut().is_some_and(|stop| stop(token));
        if is_end {
            response.finish = Some(Finish::Stop);
            response.done = true;
        } else if stopped {
            response.finish = Some(Finish::Stop);
            response.done = !feed_last;
        } else if response.tokens.len() >= self.request.sampling.max_new_tokens {
            response.finish = Some(Finish::Length);
            response.done = !feed_last;
        }
    }

    /// Returns the tokens in the cache as a packed group; `lengths` are the numbers of cached tokens of the responses.
    fn cached_tokens(&self, lengths: &[i64]) -> PackedGroup {
        let states = self.responses.iter().zip(lengths);
        let responses = states.map(|(r, length)| r.tokens[..(*length).max(0) as usize].to_vec()).collect();
        PackedGroup { prompt: self.request.input.prompt.clone(), responses }
    }

    fn into_output(self, capture: bool) -> GroupOutput {
        let capture = capture && self.image_tokens > 0;
        let cells = self.image_tokens;
        let response = |(index, state): (usize, ResponseState)| RawResponse {
            index,
            tokens: state.tokens,
            logprobs: state.logprobs,
            versions: state.versions,
            finish: state.finish.unwrap_or(Finish::Cancelled),
            attention: capture.then_some(AttentionRows { cells, values: state.attention }),
        };
        GroupOutput { responses: self.responses.into_iter().enumerate().map(response).collect() }
    }
}

impl Batch {
    pub(crate) fn new(n: usize, cache: GroupCache) -> Self {
        let slots = (0..cache.shape().slots).map(|_| None).collect();
        Self { n, cache, slots, graph_steps: 0 }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.slots.iter().all(Option::is_none)
    }

    /// Returns the free slots.
    pub(crate) fn free_slots(&self) -> Vec<usize> {
        (0..self.slots.len()).filter(|s| self.slots[*s].is_none()).collect()
    }

    /// Returns the size of the KV cache in bytes.
    pub(crate) fn cache_bytes(&self, config: &TextConfig) -> u64 {
        GroupCache::bytes(config, &self.cache.shape(), self.cache.kind())
    }

    /// Returns the cache rows to feed next, ascending, and their tokens.
    pub(crate) fn next_inputs(&self) -> (Vec<usize>, Vec<i64>) {
        let mut rows = Vec::new();
        let mut tokens = Vec::new();
        for (slot, group) in self.slots.iter().enumerate() {
            let responses = group.iter().flat_map(|g| g.responses.iter().enumerate());
            for (r, response) in responses.filter(|(_, response)| !response.done) {
                rows.push(slot * self.n + r);
                tokens.push(response.tokens.last().map_or(0, |&t| i64::from(t)));
            }
        }
        (rows, tokens)
    }

    /// Records the attention rows (width, then `[rows, width]`) of a step, and marks responses that were only fed for them as done.
    /// Returns the responses that continue, as (index in `rows`, (slot, response)).
    pub(crate) fn finish_step(
        &mut self,
        rows: &[usize],
        attention: Option<(usize, Vec<f32>)>,
    ) -> Vec<(usize, (usize, usize))> {
        let mut continuing = Vec::with_capacity(rows.len());
        for (i, row) in rows.iter().enumerate() {
            let slot = row / self.n;
            let r = row % self.n;
            let Some(group) = self.slots[slot].as_mut() else { continue };
            let response = &mut group.responses[r];
            if let Some((width, values)) = &attention {
                response.attention.extend_from_slice(&values[i * width..i * width + group.image_tokens]);
            }
            if response.finish.is_some() {
                response.done = true;
            } else {
                continuing.push((i, (slot, r)));
            }
        }
        continuing
    }

    /// Removes the groups that are done, frees their slots and returns their outputs.
    pub(crate) fn retire(&mut self) -> Vec<(Ticket, GroupOutput)> {
        let capture = self.cache.capture().is_some();
        let mut outputs = Vec::new();
        for slot in 0..self.slots.len() {
            if let Some(group) = self.slots[slot].take_if(|g| g.is_done()) {
                self.cache.free_slot(slot);
                outputs.push((group.ticket, group.into_output(capture)));
            }
        }
        outputs
    }

    /// Removes a group and returns its output so far; `None` if it is not in the batch.
    pub(crate) fn cancel(&mut self, ticket: Ticket) -> Option<GroupOutput> {
        let slot = self.slots.iter().position(|g| g.as_ref().is_some_and(|g| g.ticket == ticket))?;
        let group = self.slots[slot].take()?;
        self.cache.free_slot(slot);
        Some(group.into_output(self.cache.capture().is_some()))
    }

    /// Returns the occupied slots and the tokens in their caches.
    pub(crate) fn cached_groups(&self) -> Vec<(usize, PackedGroup)> {
        let lengths = self.cache.lengths();
        let occupied = self.slots.iter().enumerate().filter_map(|(slot, group)| Some((slot, group.as_ref()?)));
        let n = self.n;
        occupied.map(|(slot, group)| (slot, group.cached_tokens(&lengths[slot * n..(slot + 1) * n]))).collect()
    }
}
