//! Calls of rollout workers: leases, submissions, weights. What comes in is checked here. Must not know: tensors, losses.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_stream::Stream;
use tonic::{Code, Request, Response as Answer, Status};
use unveil_core::{Breakdown, GroupId, MaskReason, WeightVersion};
use unveil_experience::{Ask, Heartbeat, InHand, Return, Submission, Verdict, VersionSpan};
use unveil_proto::v1::experience_server::Experience as Service;
use unveil_proto::weights::chunk;
use unveil_proto::{attention_from_wire, breakdown_from_wire, group_from_wire, response_from_wire, v1};
use unveil_service::{Place, carried, continues, span};

use super::following::Following;
use super::rounds::Ticket;
use super::{Shared, State, limits};
use crate::batch::{GroupInput, TrainGroup};
use crate::error::Result;

/// Longest time that one call waits for work or weights.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// How much longer a worker waits for the learner to come to the place of a broadcast that it has a part in. Callers allow for more.
const MEETING: Duration = Duration::from_secs(5);

pub(super) struct Handler {
    pub shared: Arc<Shared>,
}

impl State {
    /// Refuses a worker whose weights are not what was published: `NOT_FOUND` where this process has not sent them, so that they are
    /// another learner's, `FAILED_PRECONDITION` where it has.
    fn trust(&self, worker: &str, held: &v1::HeldWeights) -> Result<(), Status> {
        let v1::HeldWeights { version, checksum } = held;
        let ours = self.sent.get(worker).is_some_and(|sent| sent.contains(&Some(*version)));
        let why = match self.checksums.get(version) {
            Some(known) if known == checksum => return Ok(()),
            Some(known) if ours => {
                format!("version {version} has {known:08x}: they were damaged on the way or in memory")
            }
            Some(known) => format!("version {version} of this learner has {known:08x}, and it has not sent them"),
            None => "this learner has not published that version".to_owned(),
        };
        let what =
            format!("worker `{worker}` holds weights of version {version} with CRC-32C {checksum:08x}, but {why}");
        tracing::warn!("{what}");
        let code = if ours { Code::FailedPrecondition } else { Code::NotFound };
        Err(Status::new(code, format!("{what}. Fetch them again")))
    }

    /// Notes that a version is on its way to a worker.
    fn sends(&mut self, worker: &str, version: WeightVersion) {
        let sent = self.sent.entry(worker.to_owned()).or_default();
        if sent[0] != Some(version) {
            *sent = [Some(version), sent[0]];
        }
    }
}

impl Handler {
    fn group(
        &self,
        request: v1::SubmitRequest,
        id: GroupId,
        worker: &str,
        input: Arc<GroupInput>,
    ) -> Result<TrainGroup, Status> {
        let bad = |what: String| Status::invalid_argument(format!("group {} of pass {}: {what}", id.record, id.pass));
        let n = self.shared.sampling.n;
        let (responses, breakdowns) = (request.responses.len(), request.breakdowns.len());
        if responses != n || breakdowns != n {
            return Err(bad(format!("{responses} responses and {breakdowns} breakdowns where {n} of each are needed")));
        }
        let (mut out, mut spans, mut attention) = (Vec::with_capacity(n), Vec::with_capacity(n), Vec::with_capacity(n));
        for (at, mut r) in request.responses.into_iter().enumerate() {
            if r.index as usize != at || request.breakdowns[at].index as usize != at {
                return Err(bad(format!("response or breakdown {at} carries another index")));
            }
            let own: Vec<(usize, usize)> = r.spans.iter().map(|s| (s.begin as usize, s.end as usize)).collect();
            let length = r.tokens.len();
            if !own.is_empty() && own.len() != length {
                return Err(bad(format!("response {at} has {} spans for {length} tokens", own.len())));
            }
            if length > self.shared.sampling.max_new_tokens {
                return Err(bad(format!("response {at} has {length} tokens, more than it may")));
            }
            if let Some(t) = r.tokens.iter().find(|t| **t >= self.shared.vocab) {
                return Err(bad(format!(
                    "response {at} has token {t}, outside the vocabulary of {}",
                    self.shared.vocab
                )));
            }
            let rows = r.attention.take().map(attention_from_wire).transpose();
            attention.push(rows.map_err(|e| bad(format!("response {at}: {e}")))?);
            spans.push(own);
            out.push(response_from_wire(r).map_err(|e| bad(e.to_string()))?);
        }
        let breakdowns = request.breakdowns.into_iter().map(|b| told(breakdown_from_wire(&id.record, b))).collect();
        let (generate_ms, reward_ms) = (request.generate_ms, request.reward_ms);
        let worker = worker.to_owned();
        Ok(TrainGroup { id, worker, input, responses: out, spans, breakdowns, attention, generate_ms, reward_ms })
    }
}

/// A breakdown whose texts can be shown.
fn told(mut b: Breakdown) -> Breakdown {
    for c in b.components.values_mut() {
        c.version = limits::readable(&c.version).into();
        if let Some(MaskReason::Failed(why) | MaskReason::Unavailable(why)) = &mut c.reason {
            *why = limits::readable(why);
        }
    }
    b
}

impl Handler {
    /// Refuses a submission for what it holds: the group is made again, and the worker is told.
    fn reject(&self, worker: &str, lease: &str, id: &GroupId, why: &str) -> v1::SubmitResponse {
        tracing::error!(
            worker,
            record = id.record,
            pass = id.pass,
            "a submission is refused, its group is made again: {why}"
        );
        let mut state = self.shared.lock();
        let quarantined = state.machine.rejected(worker, lease, id, why, self.shared.now());
        *state.rejected.entry(worker.to_owned()).or_default() += 1;
        drop(state);
        self.shared.work.notify_waiters();
        let mut why = format!("worker `{worker}`: {why}");
        if let Some(quarantined) = quarantined {
            why = format!("{why}; it gets no more groups: {quarantined}");
        }
        v1::SubmitResponse { verdict: v1::submit_response::Verdict::Rejected.into(), why }
    }

    /// Checks the weights that made a group. Where they are not what was published, the group returns to the queue; versions
    /// that this learner does not know are left to the accounting.
    fn made_by(&self, worker: &str, lease: &str, group: &TrainGroup, told: &[v1::HeldWeights]) -> Result<(), Status> {
        let versions = group.responses.iter().flat_map(|r| &r.versions);
        if let Some(v) = versions.into_iter().find(|v| told.iter().all(|t| t.version != **v)) {
            let id = &group.id.record;
            return Err(Status::invalid_argument(format!(
                "group {id} has tokens of version {v}, whose checksum is not told"
            )));
        }
        let mut state = self.shared.lock();
        let known: Vec<_> = told.iter().filter(|t| state.checksums.contains_key(&t.version)).collect();
        let trusted = known.into_iter().try_for_each(|held| state.trust(worker, held));
        if trusted.is_err() {
            state.machine.release(worker, &[lease.to_owned()], self.shared.now());
            self.shared.work.notify_waiters();
        }
        trusted
    }
}

#[tonic::async_trait]
impl Service for Handler {
    async fn lease(&self, request: Request<v1::LeaseRequest>) -> Result<Answer<v1::LeaseResponse>, Status> {
        let r = request.into_inner();
        limits::lease(&r)?;
        if let Some(held) = &r.weights {
            self.shared.lock().trust(&r.worker, held)?;
        }
        {
            let mut state = self.shared.lock();
            state.welcome(&r.worker, r.session, self.shared.now());
            state.admit(&r.worker)?;
        }
        let wait = Duration::from_millis(u64::from(r.wait_ms)).min(LONGEST_WAIT);
        let ask = Ask { worker: &r.worker, call: r.call, max: r.max_groups as usize };
        let (taken, version, finished) = self.shared.take(ask, r.session, Instant::now() + wait).await?;
        let groups = self.shared.answer(&r.worker, taken)?;
        let renew_ms = self.shared.renew_ms;
        Ok(Answer::new(v1::LeaseResponse { groups, version, finished, renew_ms }))
    }

    async fn heartbeat(&self, request: Request<v1::HeartbeatRequest>) -> Result<Answer<v1::HeartbeatResponse>, Status> {
        let r = request.into_inner();
        limits::heartbeat(&r)?;
        let one = |h: v1::InHand| InHand { lease: h.lease, progress: h.progress };
        let in_hand: Vec<InHand> = r.in_hand.into_iter().map(one).collect();
        let beat = Heartbeat { worker: &r.worker, done: r.done, in_hand: &in_hand };
        let mut state = self.shared.lock();
        let now = self.shared.now();
        state.welcome(&r.worker, r.session, now);
        state.admit(&r.worker)?;
        let held = state.machine.leased_by(&r.worker);
        let lost = state.machine.heartbeat(&beat, now);
        if state.machine.leased_by(&r.worker) < held {
            self.shared.work.notify_waiters();
        }
        let finished = state.finished || state.machine.finished();
        Ok(Answer::new(v1::HeartbeatResponse { lost, finished }))
    }

    type ImageStream = Pin<Box<dyn Stream<Item = Result<v1::ImageChunk, Status>> + Send>>;

    async fn image(&self, request: Request<v1::ImageRequest>) -> Result<Answer<Self::ImageStream>, Status> {
        let place = request.extensions().get::<Place>().cloned();
        let r = request.into_inner();
        limits::image(&r)?;
        Ok(Answer::new(Box::pin(tokio_stream::iter(self.shared.image(&r, place)?))))
    }

    async fn submit(&self, request: Request<v1::SubmitRequest>) -> Result<Answer<v1::SubmitResponse>, Status> {
        let span = span!(parent: None, "take", verdict = tracing::field::Empty);
        continues(&span, &carried(&request));
        let mut r = request.into_inner();
        limits::submit(&r)?;
        let id = group_from_wire(r.group.take()).map_err(|e| Status::invalid_argument(e.to_string()))?;
        let (worker, lease) = (std::mem::take(&mut r.worker), std::mem::take(&mut r.lease));
        let told = std::mem::take(&mut r.weights);
        let known = self.shared.lock().inputs.get(&id).map(|made| made.input.clone());
        // A group that is not under way here was trained already, or leased by a learner that is gone: the machine says which.
        let nothing = || {
            let record = serde_json::from_value(serde_json::json!({"id": id.record}))
                .map_err(|e| Status::internal(e.to_string()));
            record.map(|record| GroupInput {
                record,
                image_size: (0, 0),
                prompt: unveil_model::Prompt::default(),
                patches: Vec::new(),
                merged: unveil_core::Grid { rows: 0, cols: 0 },
                encoded: Default::default(),
            })
        };
        let orphan = known.is_none();
        let input = match known {
            Some(input) => input,
            None => Arc::new(nothing()?),
        };
        if let Err(why) = limits::numbers(&r) {
            span.record("verdict", v1::submit_response::Verdict::Rejected.as_str_name());
            return Ok(Answer::new(self.reject(&worker, &lease, &id, &why)));
        }
        let group = self.group(r, id.clone(), &worker, input)?;
        let versions = VersionSpan::of(&group.responses)
            .ok_or_else(|| Status::invalid_argument(format!("group {} has not one token", id.record)))?;
        self.made_by(&worker, &lease, &group, &told)?;
        let verdict = {
            let mut state = self.shared.lock();
            let now = self.shared.now();
            let submission = Submission { worker: &worker, lease: &lease, group: &id, versions };
            if orphan && state.machine.index_of(&id).is_none() {
                Verdict::Expired
            } else {
                state.machine.submit(&submission, group, now)
            }
        };
        if verdict == Verdict::Accepted {
            self.shared.ready.notify_all();
        }
        // A group may be free again, or a worker may have become free.
        self.shared.work.notify_waiters();
        let verdict = match verdict {
            Verdict::Accepted => v1::submit_response::Verdict::Accepted,
            Verdict::Duplicate => v1::submit_response::Verdict::Duplicate,
            Verdict::Stale => v1::submit_response::Verdict::Stale,
            Verdict::Expired => v1::submit_response::Verdict::Expired,
        };
        span.record("verdict", verdict.as_str_name());
        Ok(Answer::new(v1::SubmitResponse { verdict: verdict.into(), why: String::new() }))
    }

    async fn release(&self, request: Request<v1::ReleaseRequest>) -> Result<Answer<v1::ReleaseResponse>, Status> {
        let r = request.into_inner();
        limits::release(&r)?;
        let now = self.shared.now();
        let cause = match r.cause() {
            v1::release_request::Cause::Unspecified => Return::Handed,
            v1::release_request::Cause::Unscored => Return::Unscored,
            v1::release_request::Cause::Failed => Return::Failed,
        };
        let why = limits::readable(&r.why);
        if cause != Return::Handed {
            tracing::warn!(worker = r.worker, groups = r.leases.len(), "groups came back unfinished: {why}");
        }
        let released = self.shared.lock().machine.give_back_for(&r.worker, &r.leases, cause, &why, now);
        if released > 0 {
            self.shared.work.notify_waiters();
        }
        Ok(Answer::new(v1::ReleaseResponse {}))
    }

    type WeightsStream = Pin<Box<dyn Stream<Item = Result<v1::WeightsChunk, Status>> + Send>>;

    async fn weights(&self, request: Request<v1::WeightsRequest>) -> Result<Answer<Self::WeightsStream>, Status> {
        let local = request.local_addr().map(|a| a.ip().to_canonical());
        let r = request.into_inner();
        limits::weights(&r)?;
        let wait = Duration::from_millis(u64::from(r.wait_ms)).min(LONGEST_WAIT);
        let mut until = Instant::now() + wait;
        let until_met = until + MEETING;
        let shared = &self.shared;
        let mut noted = false;
        let mut place = None;
        loop {
            let told = shared.work.notified();
            tokio::pin!(told);
            told.as_mut().enable();
            let full = {
                let mut state = shared.lock();
                // Weights of a learner that is gone, or damaged ones, are no base to build on.
                let base = r.holds.filter(|h| state.checksums.get(&h.version) == Some(&h.checksum));
                let newest = base.is_some_and(|b| b.version == state.machine.version());
                let mut ticket = Ticket::None;
                if let Some(rounds) = &mut state.rounds {
                    if !noted {
                        rounds.note(&r.worker, r.joins.as_ref(), base, local, shared.now() + wait);
                        noted = true;
                    }
                    ticket = rounds.ticket(&r.worker, base);
                }
                if let Ticket::Head(head) = ticket {
                    state.sends(&r.worker, head.version);
                    let head = chunk(prost::Message::encode_to_vec(&*head).into());
                    return Ok(Answer::new(Box::pin(tokio_stream::once(Ok(head)))));
                }
                if matches!(ticket, Ticket::Soon) {
                    until = until.max(until_met);
                }
                let newest = newest || (matches!(ticket, Ticket::Soon) && Instant::now() < until);
                let sent = state.weights.as_ref().filter(|_| !newest);
                let full = sent.is_some();
                if let Some(weights) = sent
                    && let Some(place) = place.take().or_else(|| shared.streams.try_place())
                {
                    let version = weights.version;
                    let (bytes, chunks) = weights.stream(base);
                    state.sends(&r.worker, version);
                    return Ok(Answer::new(Box::pin(shared.streams.begin(version, bytes, place, chunks))));
                }
                if state.finished || Instant::now() >= until {
                    if full {
                        return Err(Status::resource_exhausted(
                            "too many workers fetch weights already: try again later",
                        ));
                    }
                    if newest || base.is_some() {
                        return Ok(Answer::new(Box::pin(tokio_stream::empty())));
                    }
                    return Err(Status::unavailable("no weights are published yet"));
                }
                full
            };
            let left = until.saturating_duration_since(Instant::now());
            if full {
                place = tokio::time::timeout(left, shared.streams.place()).await.ok().flatten();
            } else {
                let _ = tokio::time::timeout(left, told).await;
            }
        }
    }

    type FollowStream = Following;

    async fn follow(&self, request: Request<v1::FollowRequest>) -> Result<Answer<Following>, Status> {
        let r = request.into_inner();
        limits::follow(&r)?;
        Ok(Answer::new(Following::open(&self.shared, r.worker)))
    }
}
