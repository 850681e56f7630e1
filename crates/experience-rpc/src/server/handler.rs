//! Handlers of the calls of rollout workers (leases, submissions, weights), which validate all input.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_stream::Stream;
use tonic::{Code, Request, Response as GrpcResponse, Status};
use unveil_core::{Breakdown, GroupId, GroupInput, MaskReason, TrainGroup, WeightVersion};
use unveil_experience::{Heartbeat, HeldLease, LeaseCall, ReturnReason, Submission, Verdict, VersionSpan};
use unveil_proto::v1::experience_server::Experience as Service;
use unveil_proto::{attention_from_wire, breakdown_from_wire, group_from_wire, response_from_wire, v1, verdict_name};
use unveil_service::{CallPermit, extract, set_remote_parent, span};

use super::broadcast_groups::BroadcastOffer;
use super::error::Result;
use super::subscription::Subscription;
use super::{ServerState, Shared, limits};
use crate::checksum::chunk;

/// Longest time that a call waits for work or weights.
const MAX_WAIT: Duration = Duration::from_secs(30);
/// Additional time that a worker waits for rank 0 to reach the rendezvous of its broadcast. Clients allow for more.
const RENDEZVOUS_WAIT: Duration = Duration::from_secs(5);

/// The gRPC service.
pub(super) struct Handler {
    pub shared: Arc<Shared>,
}

impl ServerState {
    /// Refuses a worker whose weights differ from the published ones: `NOT_FOUND` if this process has not sent them, so
    /// that they come from another learner, `FAILED_PRECONDITION` if it has.
    fn check_weights(&self, worker: &str, held: &v1::HeldWeights) -> Result<(), Status> {
        let v1::HeldWeights { version, checksum } = held;
        let was_sent = self.sent.get(worker).is_some_and(|sent| sent.contains(&Some(*version)));
        let why = match self.checksums.get(version) {
            Some(known) if known == checksum => return Ok(()),
            Some(known) if was_sent => {
                format!("version {version} has {known:08x}: they were damaged in transit or in memory")
            }
            Some(known) => format!("version {version} of this learner has {known:08x} and has not been sent to it"),
            None => "this learner has not published that version".to_owned(),
        };
        let what =
            format!("worker `{worker}` holds weights of version {version} with CRC-32C {checksum:08x}, but {why}");
        tracing::warn!("{what}");
        let code = if was_sent { Code::FailedPrecondition } else { Code::NotFound };
        Err(Status::new(code, format!("{what}. Fetch them again")))
    }

    /// Records that a version is being sent to a worker.
    fn record_sent(&mut self, worker: &str, version: WeightVersion) {
        let sent = self.sent.entry(worker.to_owned()).or_default();
        if sent[0] != Some(version) {
            *sent = [Some(version), sent[0]];
        }
    }
}

impl Handler {
    /// Validates a submission and converts it to a trajectory group.
    fn group_from_request(
        &self,
        request: v1::SubmitRequest,
        id: GroupId,
        worker: &str,
        input: Arc<GroupInput>,
    ) -> Result<TrainGroup, Status> {
        let invalid =
            |what: String| Status::invalid_argument(format!("group {} of pass {}: {what}", id.record, id.pass));
        let n = self.shared.sampling.n;
        let responses = request.responses.len();
        let breakdowns = request.breakdowns.len();
        if responses != n || breakdowns != n {
            return Err(invalid(format!(
                "{responses} responses and {breakdowns} breakdowns, but {n} of each are needed"
            )));
        }
        let mut out = Vec::with_capacity(n);
        let mut spans = Vec::with_capacity(n);
        let mut attention = Vec::with_capacity(n);
        for (i, mut r) in request.responses.into_iter().enumerate() {
            if r.index as usize != i || request.breakdowns[i].index as usize != i {
                return Err(invalid(format!("response or breakdown {i} has another index")));
            }
            let token_spans: Vec<(usize, usize)> = r.spans.iter().map(|s| (s.begin as usize, s.end as usize)).collect();
            let length = r.tokens.len();
            if !token_spans.is_empty() && token_spans.len() != length {
                return Err(invalid(format!("response {i} has {} spans for {length} tokens", token_spans.len())));
            }
            if length > self.shared.sampling.max_new_tokens {
                return Err(invalid(format!("response {i} has {length} tokens, more than allowed")));
            }
            if let Some(t) = r.tokens.iter().find(|t| **t >= self.shared.vocab) {
                return Err(invalid(format!(
                    "response {i} has token {t}, outside the vocabulary of {}",
                    self.shared.vocab
                )));
            }
            let rows = r.attention.take().map(attention_from_wire).transpose();
            attention.push(rows.map_err(|e| invalid(format!("response {i}: {e}")))?);
            spans.push(token_spans);
            out.push(response_from_wire(r).map_err(|e| invalid(e.to_string()))?);
        }
        let breakdowns =
            request.breakdowns.into_iter().map(|b| printable(breakdown_from_wire(&id.record, b))).collect();
        Ok(TrainGroup {
            id,
            worker: worker.to_owned(),
            input,
            responses: out,
            spans,
            breakdowns,
            attention,
            generate_ms: request.generate_ms,
            reward_ms: request.reward_ms,
        })
    }
}

/// Replaces control characters in the texts of a breakdown.
fn printable(mut b: Breakdown) -> Breakdown {
    for c in b.components.values_mut() {
        c.version = limits::readable(&c.version).into();
        if let Some(MaskReason::Failed(why) | MaskReason::Unavailable(why)) = &mut c.reason {
            *why = limits::readable(why);
        }
    }
    b
}

impl Handler {
    /// Rejects a submission with invalid content: the group is leased again, and the response gives the reason.
    fn reject(&self, worker: &str, lease: &str, id: &GroupId, why: &str) -> v1::SubmitResponse {
        tracing::error!(
            worker,
            record = id.record,
            pass = id.pass,
            "submission rejected, its group is leased again: {why}"
        );
        let mut state = self.shared.lock();
        let quarantined = state.machine.reject(worker, lease, id, why, self.shared.now());
        *state.rejected.entry(worker.to_owned()).or_default() += 1;
        drop(state);
        self.shared.work.notify_waiters();
        let mut why = format!("worker `{worker}`: {why}");
        if let Some(quarantined) = quarantined {
            why = format!("{why}; it gets no more groups: {quarantined}");
        }
        v1::SubmitResponse { verdict: v1::submit_response::Verdict::Rejected.into(), why }
    }

    /// Checks the weights that generated a group. If they differ from the published ones, the group returns to the
    /// queue; versions unknown to this learner are handled by the state machine.
    fn check_provenance(
        &self,
        worker: &str,
        lease: &str,
        group: &TrainGroup,
        weights: &[v1::HeldWeights],
    ) -> Result<(), Status> {
        let versions = group.responses.iter().flat_map(|r| &r.versions);
        if let Some(v) = versions.into_iter().find(|v| weights.iter().all(|w| w.version != **v)) {
            let id = &group.id.record;
            return Err(Status::invalid_argument(format!(
                "group {id} has tokens of version {v}, whose checksum is missing"
            )));
        }
        let mut state = self.shared.lock();
        let known: Vec<_> = weights.iter().filter(|w| state.checksums.contains_key(&w.version)).collect();
        let result = known.into_iter().try_for_each(|held| state.check_weights(worker, held));
        if result.is_err() {
            state.machine.release(worker, &[lease.to_owned()], self.shared.now());
            self.shared.work.notify_waiters();
        }
        result
    }
}

#[tonic::async_trait]
impl Service for Handler {
    async fn lease(&self, request: Request<v1::LeaseRequest>) -> Result<GrpcResponse<v1::LeaseResponse>, Status> {
        let r = request.into_inner();
        limits::lease(&r)?;
        if let Some(held) = &r.weights {
            self.shared.lock().check_weights(&r.worker, held)?;
        }
        {
            let mut state = self.shared.lock();
            state.record_call(&r.worker, r.session, self.shared.now());
            state.check_quarantine(&r.worker)?;
        }
        let wait = Duration::from_millis(u64::from(r.wait_ms)).min(MAX_WAIT);
        let ask = LeaseCall { worker: &r.worker, call: r.call, max: r.max_groups as usize };
        let (taken, version, finished) = self.shared.take(ask, r.session, Instant::now() + wait).await?;
        let groups = self.shared.lease_response(&r.worker, taken)?;
        let renew_ms = self.shared.renew_ms;
        Ok(GrpcResponse::new(v1::LeaseResponse { groups, version, finished, renew_ms }))
    }

    async fn heartbeat(
        &self,
        request: Request<v1::HeartbeatRequest>,
    ) -> Result<GrpcResponse<v1::HeartbeatResponse>, Status> {
        let r = request.into_inner();
        limits::heartbeat(&r)?;
        let from_wire = |h: v1::InHand| HeldLease { lease: h.lease, progress: h.progress };
        let in_hand: Vec<HeldLease> = r.in_hand.into_iter().map(from_wire).collect();
        let heartbeat = Heartbeat { worker: &r.worker, answered_calls: r.done, held: &in_hand };
        let mut state = self.shared.lock();
        let now = self.shared.now();
        state.record_call(&r.worker, r.session, now);
        state.check_quarantine(&r.worker)?;
        let held = state.machine.leased_by(&r.worker);
        let lost = state.machine.heartbeat(&heartbeat, now);
        if state.machine.leased_by(&r.worker) < held {
            self.shared.work.notify_waiters();
        }
        let finished = state.finished || state.machine.is_finished();
        Ok(GrpcResponse::new(v1::HeartbeatResponse { lost, finished }))
    }

    type ImageStream = Pin<Box<dyn Stream<Item = Result<v1::ImageChunk, Status>> + Send>>;

    async fn image(&self, request: Request<v1::ImageRequest>) -> Result<GrpcResponse<Self::ImageStream>, Status> {
        let permit = request.extensions().get::<CallPermit>().cloned();
        let r = request.into_inner();
        limits::image(&r)?;
        Ok(GrpcResponse::new(Box::pin(tokio_stream::iter(self.shared.image(&r, permit)?))))
    }

    async fn submit(&self, request: Request<v1::SubmitRequest>) -> Result<GrpcResponse<v1::SubmitResponse>, Status> {
        let span = span!(parent: None, "take", verdict = tracing::field::Empty);
        set_remote_parent(&span, &extract(&request));
        let mut r = request.into_inner();
        limits::submit(&r)?;
        let id = group_from_wire(r.group.take()).map_err(|e| Status::invalid_argument(e.to_string()))?;
        let worker = std::mem::take(&mut r.worker);
        let lease = std::mem::take(&mut r.lease);
        let weights = std::mem::take(&mut r.weights);
        let known_input = self.shared.lock().inputs.get(&id).map(|prepared| prepared.input.clone());
        // A group that is not in progress was trained already or leased by an earlier learner; the state machine
        // decides.
        let empty_input = || {
            let record = serde_json::from_value(serde_json::json!({"id": id.record}))
                .map_err(|e| Status::internal(e.to_string()));
            record.map(|record| GroupInput {
                record,
                image_size: (0, 0),
                prompt: unveil_core::Prompt::default(),
                patches: Vec::new(),
                merged: unveil_core::Grid { rows: 0, cols: 0 },
                encoded: Default::default(),
            })
        };
        let is_orphan = known_input.is_none();
        let input = match known_input {
            Some(input) => input,
            None => Arc::new(empty_input()?),
        };
        if let Err(why) = limits::check_finite(&r) {
            span.record("verdict", verdict_name(v1::submit_response::Verdict::Rejected));
            return Ok(GrpcResponse::new(self.reject(&worker, &lease, &id, &why)));
        }
        let group = self.group_from_request(r, id.clone(), &worker, input)?;
        let versions = VersionSpan::of(&group.responses)
            .ok_or_else(|| Status::invalid_argument(format!("group {} has no tokens", id.record)))?;
        self.check_provenance(&worker, &lease, &group, &weights)?;
        let verdict = {
            let mut state = self.shared.lock();
            let now = self.shared.now();
            let submission = Submission { worker: &worker, lease: &lease, group: &id, versions };
            if is_orphan && state.machine.record_index(&id).is_none() {
                Verdict::Expired
            } else {
                state.machine.submit(&submission, group, now)
            }
        };
        if verdict == Verdict::Accepted {
            self.shared.ready.notify_all();
        }
        // A group may have returned to the queue, or a worker may have become idle.
        self.shared.work.notify_waiters();
        let verdict = match verdict {
            Verdict::Accepted => v1::submit_response::Verdict::Accepted,
            Verdict::Duplicate => v1::submit_response::Verdict::Duplicate,
            Verdict::Stale => v1::submit_response::Verdict::Stale,
            Verdict::Expired => v1::submit_response::Verdict::Expired,
        };
        span.record("verdict", verdict_name(verdict));
        Ok(GrpcResponse::new(v1::SubmitResponse { verdict: verdict.into(), why: String::new() }))
    }

    async fn release(&self, request: Request<v1::ReleaseRequest>) -> Result<GrpcResponse<v1::ReleaseResponse>, Status> {
        let r = request.into_inner();
        limits::release(&r)?;
        let now = self.shared.now();
        let cause = match r.cause() {
            v1::release_request::Cause::Unspecified => ReturnReason::Released,
            v1::release_request::Cause::Unscored => ReturnReason::Unscored,
            v1::release_request::Cause::Failed => ReturnReason::Failed,
        };
        let why = limits::readable(&r.why);
        if cause != ReturnReason::Released {
            tracing::warn!(worker = r.worker, groups = r.leases.len(), "groups were returned unfinished: {why}");
        }
        let released = self.shared.lock().machine.return_leases(&r.worker, &r.leases, cause, &why, now);
        if released > 0 {
            self.shared.work.notify_waiters();
        }
        Ok(GrpcResponse::new(v1::ReleaseResponse {}))
    }

    type WeightsStream = Pin<Box<dyn Stream<Item = Result<v1::WeightsChunk, Status>> + Send>>;

    async fn weights(&self, request: Request<v1::WeightsRequest>) -> Result<GrpcResponse<Self::WeightsStream>, Status> {
        let local = request.local_addr().map(|a| a.ip().to_canonical());
        let r = request.into_inner();
        limits::weights(&r)?;
        let wait = Duration::from_millis(u64::from(r.wait_ms)).min(MAX_WAIT);
        let mut until = Instant::now() + wait;
        let until_rendezvous = until + RENDEZVOUS_WAIT;
        let shared = &self.shared;
        let mut recorded = false;
        let mut permit = None;
        loop {
            let notified = shared.work.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            let full = {
                let mut state = shared.lock();
                // Damaged weights, or those of another learner, cannot serve as a base.
                let base = r.holds.filter(|h| state.checksums.get(&h.version) == Some(&h.checksum));
                let newest = base.is_some_and(|b| b.version == state.machine.version());
                let mut offer = BroadcastOffer::None;
                if let Some(groups) = &mut state.broadcast_groups {
                    if !recorded {
                        groups.record_request(
                            &r.worker,
                            r.broadcast_capability.as_ref(),
                            base,
                            local,
                            shared.now() + wait,
                        );
                        recorded = true;
                    }
                    offer = groups.offer(&r.worker, base);
                }
                if let BroadcastOffer::Head(head) = offer {
                    state.record_sent(&r.worker, head.version);
                    let head = chunk(prost::Message::encode_to_vec(&*head).into());
                    return Ok(GrpcResponse::new(Box::pin(tokio_stream::once(Ok(head)))));
                }
                if matches!(offer, BroadcastOffer::Pending) {
                    until = until.max(until_rendezvous);
                }
                let newest = newest || (matches!(offer, BroadcastOffer::Pending) && Instant::now() < until);
                let sent = state.weights.as_ref().filter(|_| !newest);
                let full = sent.is_some();
                if let Some(weights) = sent
                    && let Some(permit) = permit.take().or_else(|| shared.streams.try_permit())
                {
                    let version = weights.version;
                    let (bytes, chunks) = weights.stream(base);
                    state.record_sent(&r.worker, version);
                    return Ok(GrpcResponse::new(Box::pin(shared.streams.start(version, bytes, permit, chunks))));
                }
                if state.finished || Instant::now() >= until {
                    if full {
                        return Err(Status::resource_exhausted(
                            "too many workers are fetching weights: try again later",
                        ));
                    }
                    if newest || base.is_some() {
                        return Ok(GrpcResponse::new(Box::pin(tokio_stream::empty())));
                    }
                    return Err(Status::unavailable("no weights have been published yet"));
                }
                full
            };
            let left = until.saturating_duration_since(Instant::now());
            if full {
                permit = tokio::time::timeout(left, shared.streams.permit()).await.ok().flatten();
            } else {
                let _ = tokio::time::timeout(left, notified).await;
            }
        }
    }

    type SubscribeStream = Subscription;

    async fn subscribe(&self, request: Request<v1::SubscribeRequest>) -> Result<GrpcResponse<Subscription>, Status> {
        let r = request.into_inner();
        limits::subscribe(&r)?;
        Ok(GrpcResponse::new(Subscription::open(&self.shared, r.worker)))
    }
}
