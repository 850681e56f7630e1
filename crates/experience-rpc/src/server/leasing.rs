//! Lease calls. Groups are prepared concurrently before they are leased, so that no lease waits for an image and an
//! abandoned call takes no leases. Responses have a bounded size: images that do not fit are left out and fetched
//! separately.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message;
use tonic::Status;
use unveil_core::{GroupId, WeightVersion};
use unveil_experience::{Lease, LeaseCall};
use unveil_proto::{group_to_wire, sampling_to_wire, v1};
use unveil_service::{CallPermit, MAX_MESSAGE_BYTES, span, traceparent};

use super::error::{Result, ServerError};
use super::{PreparedGroup, ServerState, Shared};

/// Interval at which a waiting call checks for expired leases.
const POLL_INTERVAL: Duration = Duration::from_millis(500);
/// Minimum time that a call waits for the preparation of available groups. Clients allow for more.
const PREPARATION_WAIT: Duration = Duration::from_secs(5);
/// Bytes of images in one response; further images are fetched separately.
const IMAGE_BYTES: usize = MAX_MESSAGE_BYTES / 2;
/// Bytes of everything else in one response; further groups stay in the queue.
const TEXT_BYTES: usize = MAX_MESSAGE_BYTES / 4;
/// Bytes of an image per message of a stream.
const CHUNK_BYTES: usize = 1 << 20;

/// A lease with its prepared group and its span.
type TakenLease = (Lease, PreparedGroup, tracing::Span);

/// Leases of a call, the newest weight version, and whether the run has ended.
type TakeResult = (Vec<TakenLease>, WeightVersion, bool);

impl Shared {
    /// Starts the preparation of groups that are neither prepared nor being prepared.
    fn prepare(self: &Arc<Self>, state: &mut ServerState, groups: Vec<GroupId>) {
        for group in groups {
            if state.inputs.contains_key(&group) || state.preparing.contains(&group) {
                continue;
            }
            let Some(index) = state.machine.record_index(&group) else { continue };
            state.preparing.insert(group.clone());
            tokio::spawn(self.clone().prepare_one(group, index));
        }
    }

    async fn prepare_one(self: Arc<Self>, group: GroupId, index: usize) {
        let Ok(_slot) = self.preparation_slots.acquire().await else { return };
        let source = self.source.clone();
        let id = group.clone();
        let prepared = tokio::task::spawn_blocking(move || source.prepare(index, &id)).await;
        let prepared = match prepared {
            Ok(prepared) => prepared.map_err(ServerError::Record),
            Err(_) => Err(ServerError::ThreadEnded("the preparation of an image")),
        };
        let mut state = self.lock();
        state.preparing.remove(&group);
        match prepared {
            Ok(prepared) => drop(state.inputs.insert(group, prepared)),
            Err(error) => {
                drop(state);
                self.fail(error);
            }
        }
        self.prepared.notify_waiters();
    }

    /// Takes leases, waiting until `until` for available groups. Groups are leased only once all of them are prepared,
    /// without awaiting anything afterwards: an abandoned call takes no leases.
    pub(super) async fn take(
        self: &Arc<Self>,
        ask: LeaseCall<'_>,
        session: u64,
        until: Instant,
    ) -> Result<TakeResult, Status> {
        let until_prepared = until.max(Instant::now() + PREPARATION_WAIT);
        loop {
            let work = self.work.notified();
            let prepared = self.prepared.notified();
            tokio::pin!(work, prepared);
            work.as_mut().enable();
            prepared.as_mut().enable();
            let end = {
                let mut state = self.lock();
                let now = self.now();
                state.check_session(ask.worker, session)?;
                state.mark_alive(ask.worker, now);
                if let Some(why) = &state.refusal {
                    return Err(Status::internal(why.clone()));
                }
                let version = state.machine.version();
                if state.finished || state.machine.is_finished() {
                    state.notified_of_end.insert(ask.worker.to_owned());
                    return Ok((Vec::new(), version, true));
                }
                state.machine.expire(now);
                let is_retry = !state.machine.leases_of_call(ask.worker, ask.call).is_empty();
                let most = if is_retry {
                    ask.max
                } else if state.checksums.is_empty() {
                    0
                } else {
                    state.lease_quota(ask.worker, ask.max, self.fixed_lease_size, now)
                };
                let all_prepared = is_retry || self.all_prepared(&mut state, ask.worker, most);
                let end = if all_prepared { until } else { until_prepared };
                let timed_out = Instant::now() >= end;
                if all_prepared || (timed_out && self.fixed_lease_size.is_none()) {
                    let ServerState { machine, inputs, .. } = &mut *state;
                    let leases = machine.lease(LeaseCall { max: most, ..ask }, now, |g| inputs.contains_key(g));
                    if !leases.is_empty() {
                        return Ok((state.taken(ask.worker, leases), version, false));
                    }
                }
                if timed_out {
                    return Ok((Vec::new(), version, false));
                }
                end
            };
            let wait = end.saturating_duration_since(Instant::now()).min(POLL_INTERVAL);
            tokio::select! {
                () = work => {}
                () = prepared => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Returns whether the next `most` groups for a worker are prepared; starts their preparation, and that of as many
    /// for the next call.
    fn all_prepared(self: &Arc<Self>, state: &mut ServerState, worker: &str, most: usize) -> bool {
        let groups = state.machine.candidates(worker, most.saturating_mul(2));
        let all_prepared = groups.iter().take(most).all(|g| state.inputs.contains_key(g));
        self.prepare(state, groups);
        all_prepared
    }

    /// Builds the response: at least one group, and as many as fit in one message. Leases of the others return to the
    /// queue.
    pub(super) fn lease_response(&self, worker: &str, taken: Vec<TakenLease>) -> Result<Vec<v1::LeasedGroup>, Status> {
        let mut groups = Vec::with_capacity(taken.len());
        let mut image_bytes = 0;
        let mut text_bytes = 0;
        let mut excess = Vec::new();
        for (lease, prepared, span) in taken {
            let id = lease.id.clone();
            let mut group = self.group_to_wire(lease, &prepared, &span)?;
            text_bytes += group.encoded_len();
            if text_bytes > TEXT_BYTES && !groups.is_empty() {
                excess.push(id);
                continue;
            }
            if text_bytes > MAX_MESSAGE_BYTES - IMAGE_BYTES {
                let what = format!(
                    "record `{}` has {text_bytes} bytes besides its image, but at most {} can be sent to a worker",
                    prepared.input.record.id,
                    MAX_MESSAGE_BYTES - IMAGE_BYTES
                );
                return Err(self.fail(ServerError::Unsendable(what)));
            }
            if image_bytes + prepared.image.len() <= IMAGE_BYTES {
                image_bytes += prepared.image.len();
                group.image = prepared.image;
            } else {
                group.image_bytes = prepared.image.len() as u64;
            }
            groups.push(group);
        }
        if !excess.is_empty() {
            self.lock().machine.release(worker, &excess, self.now());
            self.work.notify_waiters();
        }
        Ok(groups)
    }

    /// Converts a lease to its wire type, without its image.
    fn group_to_wire(
        &self,
        lease: Lease,
        prepared: &PreparedGroup,
        span: &tracing::Span,
    ) -> Result<v1::LeasedGroup, Status> {
        Ok(v1::LeasedGroup {
            lease: lease.id,
            group: Some(group_to_wire(&lease.group)),
            record_json: serde_json::to_string(&prepared.input.record).map_err(|e| Status::internal(e.to_string()))?,
            image: Bytes::new(),
            image_hash: prepared.image_hash.clone(),
            min_version: lease.min_version,
            stop: self.stop.clone(),
            traceparent: traceparent(span),
            image_bytes: 0,
            sampling: Some(sampling_to_wire(&self.sampling)),
        })
    }

    /// Returns the image of a valid lease in chunks; `permit` is held until the last chunk is sent.
    pub(super) fn image(
        &self,
        r: &v1::ImageRequest,
        permit: Option<CallPermit>,
    ) -> Result<impl Iterator<Item = Result<v1::ImageChunk, Status>> + Send + use<>, Status> {
        let mut state = self.lock();
        state.mark_alive(&r.worker, self.now());
        let group = state.machine.group_of(&r.worker, &r.lease);
        let Some(image) = group.and_then(|g| state.inputs.get(&g)).map(|prepared| prepared.image.clone()) else {
            return Err(Status::not_found(format!("lease `{}` no longer belongs to worker `{}`", r.lease, r.worker)));
        };
        let offsets = (0..image.len()).step_by(CHUNK_BYTES);
        Ok(offsets.map(move |offset| {
            let _permit = &permit;
            Ok(v1::ImageChunk { data: image.slice(offset..image.len().min(offset + CHUNK_BYTES)) })
        }))
    }
}

impl ServerState {
    /// Adds to leases their prepared groups and a span in the trace of each group.
    fn taken(&mut self, worker: &str, leases: Vec<Lease>) -> Vec<TakenLease> {
        let Self { inputs, traces, .. } = self;
        let take = |lease: Lease| {
            let prepared = inputs.get(&lease.group)?.clone();
            let span = span!(parent: &traces.group(&lease.group), "lease", worker, lease = lease.id);
            Some((lease, prepared, span))
        };
        leases.into_iter().filter_map(take).collect()
    }
}
