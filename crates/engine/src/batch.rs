//! The batch that runs: groups in slots of one cache, what each response has so far, and what is fed next. Plain bookkeeping
//! around the cache; it computes nothing.

use unveil_core::{Finish, WeightVersion};
use unveil_model::{GroupCache, PackedGroup, TextConfig};

use crate::engine::{Ticket, Waiting};
use crate::request::{AttentionRows, GroupOutput, GroupRequest, RawResponse};

/// One response under way.
pub(crate) struct Row {
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    versions: Vec<WeightVersion>,
    attention: Vec<f32>,
    finish: Option<Finish>,
    /// Nothing is left to feed.
    done: bool,
    stop: Option<Box<dyn FnMut(u32) -> bool + Send>>,
}

/// One group under way; its rows are `slot * n ..` in the cache.
pub(crate) struct Running {
    pub ticket: Ticket,
    pub request: GroupRequest,
    pub image_tokens: usize,
    rows: Vec<Row>,
}

/// Groups that share a cache, and so the number of responses.
pub(crate) struct Batch {
    pub n: usize,
    pub cache: GroupCache,
    pub slots: Vec<Option<Running>>,
    /// Recorded steps that are counted already.
    pub graph_steps: u64,
}

impl Running {
    pub(crate) fn new(waiting: Waiting, image_tokens: usize) -> Self {
        let Waiting { ticket, request } = waiting;
        let row = || Row {
            tokens: Vec::new(),
            logprobs: Vec::new(),
            versions: Vec::new(),
            attention: Vec::new(),
            finish: None,
            done: false,
            stop: request.stop.as_ref().map(|rule| rule()),
        };
        let rows = (0..request.sampling.n).map(|_| row()).collect();
        Self { ticket, request, image_tokens, rows }
    }

    fn done(&self) -> bool {
        self.rows.iter().all(|r| r.done)
    }

    /// Position of the next token of response `r`.
    pub(crate) fn position(&self, r: usize) -> u32 {
        self.rows[r].tokens.len() as u32
    }

    /// Takes a sampled token. `fed_again`: the last token is fed for its attention row.
    pub(crate) fn push(
        &mut self,
        r: usize,
        token: u32,
        logprob: f32,
        version: WeightVersion,
        end: bool,
        fed_again: bool,
    ) {
        let row = &mut self.rows[r];
        row.tokens.push(token);
        row.logprobs.push(logprob);
        row.versions.push(version);
        let stopped = row.stop.as_mut().is_some_and(|stop| stop(token));
        if end {
            (row.finish, row.done) = (Some(Finish::Stop), true);
        } else if stopped {
            (row.finish, row.done) = (Some(Finish::Stop), !fed_again);
        } else if row.tokens.len() >= self.request.sampling.max_new_tokens {
            (row.finish, row.done) = (Some(Finish::Length), !fed_again);
        }
    }

    /// What was fed of each response, as a packed group.
    fn fed(&self, lengths: &[i64]) -> PackedGroup {
        let responses =
            self.rows.iter().zip(lengths).map(|(row, fed)| row.tokens[..(*fed).max(0) as usize].to_vec()).collect();
        PackedGroup { prompt: self.request.input.prompt.clone(), responses }
    }

    fn output(self, capture: bool) -> GroupOutput {
        let capture = capture && self.image_tokens > 0;
        let cells = self.image_tokens;
        let response = |(index, row): (usize, Row)| RawResponse {
            index,
            tokens: row.tokens,
            logprobs: row.logprobs,
            versions: row.versions,
            finish: row.finish.unwrap_or(Finish::Cancelled),
            attention: capture.then_some(AttentionRows { cells, values: row.attention }),
        };
        GroupOutput { responses: self.rows.into_iter().enumerate().map(response).collect() }
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

    /// Slots that are free.
    pub(crate) fn free(&self) -> Vec<usize> {
        (0..self.slots.len()).filter(|s| self.slots[*s].is_none()).collect()
    }

    /// Bytes of keys and values.
    pub(crate) fn bytes(&self, config: &TextConfig) -> u64 {
        GroupCache::bytes(config, &self.cache.shape())
    }

    /// The rows that are fed next, ascending, and their tokens.
    pub(crate) fn next(&self) -> (Vec<usize>, Vec<i64>) {
        let mut rows = Vec::new();
        let mut tokens = Vec::new();
        for (s, running) in self.slots.iter().enumerate() {
            for (r, row) in running.iter().flat_map(|g| g.rows.iter().enumerate()).filter(|(_, row)| !row.done) {
                rows.push(s * self.n + r);
                tokens.push(row.tokens.last().map_or(0, |&t| i64::from(t)));
            }
        }
        (rows, tokens)
    }

    /// Takes the attention rows `[rows, width]` of a step and marks rows that were fed for them alone as done. Returns which of
    /// `rows` go on, by place, as (slot, response).
    pub(crate) fn fed(&mut self, rows: &[usize], attention: Option<(usize, Vec<f32>)>) -> Vec<(usize, (usize, usize))> {
        let mut on = Vec::with_capacity(rows.len());
        for (i, flat) in rows.iter().enumerate() {
            let (s, r) = (flat / self.n, flat % self.n);
            let Some(running) = self.slots[s].as_mut() else { continue };
            let row = &mut running.rows[r];
            if let Some((width, values)) = &attention {
                row.attention.extend_from_slice(&values[i * width..i * width + running.image_tokens]);
            }
            if row.finish.is_some() {
                row.done = true;
            } else {
                on.push((i, (s, r)));
            }
        }
        on
    }

    /// Hands out groups that are done and frees their slots.
    pub(crate) fn retire(&mut self) -> Vec<(Ticket, GroupOutput)> {
        let capture = self.cache.capture().is_some();
        let mut out = Vec::new();
        for s in 0..self.slots.len() {
            if let Some(running) = self.slots[s].take_if(|g| g.done()) {
                self.cache.free(s);
                out.push((running.ticket, running.output(capture)));
            }
        }
        out
    }

    /// Takes one group out, as far as it has come.
    pub(crate) fn cancel(&mut self, ticket: Ticket) -> Option<GroupOutput> {
        let slot = self.slots.iter().position(|g| g.as_ref().is_some_and(|g| g.ticket == ticket))?;
        let running = self.slots[slot].take()?;
        self.cache.free(slot);
        Some(running.output(self.cache.capture().is_some()))
    }

    /// Slots that are taken, and what their caches hold.
    pub(crate) fn held(&self) -> Vec<(usize, PackedGroup)> {
        let lengths = self.cache.lengths();
        let taken = self.slots.iter().enumerate().filter_map(|(s, g)| Some((s, g.as_ref()?)));
        taken.map(|(s, g)| (s, g.fed(&lengths[s * self.n..(s + 1) * self.n]))).collect()
    }
}
