//! Lease calls: groups are prepared in parallel before they are handed out, so that no lease waits for an image and a call that ends
//! early takes nothing with it. An answer has a bounded size: images that do not fit are left out and fetched one by one. Must not
//! know: what becomes of groups afterwards.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message;
use tonic::Status;
use unveil_core::{GroupId, Logprobs, WeightVersion};
use unveil_experience::{Ask, Lease};
use unveil_proto::{group_to_wire, v1};
use unveil_service::{MESSAGE_LIMIT, Place, context, span};

use super::{Leased, Shared, State};
use crate::error::{LearnerError, Result};

/// How often a waiting call looks for leases that ran out.
const LOOK: Duration = Duration::from_millis(500);
/// How long a call waits for the preparation of what it could have, where it would not wait otherwise. Callers allow for more.
const PREPARING: Duration = Duration::from_secs(5);
/// Bytes of images in one answer; those beyond are fetched one by one.
const IMAGES: usize = MESSAGE_LIMIT / 2;
/// Bytes of all else in one answer; groups beyond stay in the queue.
const TEXTS: usize = MESSAGE_LIMIT / 4;
/// Bytes of an image that travel in one message.
const CHUNK: usize = 1 << 20;

/// A group in a worker's hands, and what goes with it.
type Taken = (Lease, Leased, tracing::Span);

/// What a call takes, the newest version, and whether the run is over.
type Answer = (Vec<Taken>, WeightVersion, bool);

impl Shared {
    /// Has groups prepared that are not, each once, whoever asks for it.
    fn prepare(self: &Arc<Self>, state: &mut State, groups: Vec<GroupId>) {
        for group in groups {
            if state.inputs.contains_key(&group) || state.preparing.contains(&group) {
                continue;
            }
            let Some(index) = state.machine.index_of(&group) else { continue };
            state.preparing.insert(group.clone());
            tokio::spawn(self.clone().prepare_one(group, index));
        }
    }

    async fn prepare_one(self: Arc<Self>, group: GroupId, index: usize) {
        let Ok(_place) = self.places.acquire().await else { return };
        let (source, id) = (self.source.clone(), group.clone());
        let made = tokio::task::spawn_blocking(move || source.lease(index, &id)).await;
        let made = made.unwrap_or(Err(LearnerError::Lost("the preparation of an image")));
        let mut state = self.lock();
        state.preparing.remove(&group);
        match made {
            Ok(made) => drop(state.inputs.insert(group, made)),
            Err(error) => {
                drop(state);
                self.fail(error);
            }
        }
        self.prepared.notify_waiters();
    }

    /// Takes leases, waiting until `until` for some. Nothing is taken before all of it is at hand, and nothing waits after that: a
    /// call that is given up meanwhile takes nothing.
    pub(super) async fn take(self: &Arc<Self>, ask: Ask<'_>, session: u64, until: Instant) -> Result<Answer, Status> {
        let until_prepared = until.max(Instant::now() + PREPARING);
        loop {
            let (work, prepared) = (self.work.notified(), self.prepared.notified());
            tokio::pin!(work, prepared);
            work.as_mut().enable();
            prepared.as_mut().enable();
            let end = {
                let mut state = self.lock();
                let now = self.now();
                state.is_one(ask.worker, session)?;
                state.hear(ask.worker, now);
                if let Some(what) = &state.broken {
                    return Err(Status::internal(what.clone()));
                }
                let version = state.machine.version();
                if state.finished || state.machine.finished() {
                    state.told.insert(ask.worker.to_owned());
                    return Ok((Vec::new(), version, true));
                }
                state.machine.expire(now);
                let again = !state.machine.answered(ask.worker, ask.call).is_empty();
                let most = if again {
                    ask.max
                } else if state.checksums.is_empty() {
                    0
                } else {
                    state.share(ask.worker, ask.max, self.fixed, now)
                };
                let whole = again || self.all_prepared(&mut state, ask.worker, most);
                let end = if whole { until } else { until_prepared };
                let over = Instant::now() >= end;
                if whole || (over && self.fixed.is_none()) {
                    let State { machine, inputs, .. } = &mut *state;
                    let leases = machine.lease(Ask { max: most, ..ask }, now, |g| inputs.contains_key(g));
                    if !leases.is_empty() {
                        return Ok((state.taken(ask.worker, leases), version, false));
                    }
                }
                if over {
                    return Ok((Vec::new(), version, false));
                }
                end
            };
            let wait = end.saturating_duration_since(Instant::now()).min(LOOK);
            tokio::select! {
                () = work => {}
                () = prepared => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Whether all that a worker would get of `most` groups is prepared; has it prepared, and as much again for who comes next.
    fn all_prepared(self: &Arc<Self>, state: &mut State, worker: &str, most: usize) -> bool {
        let groups = state.machine.candidates(worker, most.saturating_mul(2));
        let whole = groups.iter().take(most).all(|g| state.inputs.contains_key(g));
        self.prepare(state, groups);
        whole
    }

    /// What goes to the worker: at least one group, and as many as fit in one message. Others stay in the queue.
    pub(super) fn answer(&self, worker: &str, taken: Vec<Taken>) -> Result<Vec<v1::LeasedGroup>, Status> {
        let (mut groups, mut images, mut texts) = (Vec::with_capacity(taken.len()), 0, 0);
        let mut beyond = Vec::new();
        for (lease, made, span) in taken {
            let id = lease.id.clone();
            let mut group = self.group_to_wire(lease, &made, &span)?;
            texts += group.encoded_len();
            if texts > TEXTS && !groups.is_empty() {
                beyond.push(id);
                continue;
            }
            if texts > MESSAGE_LIMIT - IMAGES {
                let what = format!(
                    "record `{}` has {texts} bytes besides its image: {} can be sent to a worker",
                    made.input.record.id,
                    MESSAGE_LIMIT - IMAGES
                );
                return Err(self.fail(LearnerError::Setting(what)));
            }
            if images + made.image.len() <= IMAGES {
                images += made.image.len();
                group.image = made.image;
            } else {
                group.image_bytes = made.image.len() as u64;
            }
            groups.push(group);
        }
        if !beyond.is_empty() {
            self.lock().machine.release(worker, &beyond, self.now());
            self.work.notify_waiters();
        }
        Ok(groups)
    }

    /// A lease as it travels, without its image.
    fn group_to_wire(&self, lease: Lease, made: &Leased, span: &tracing::Span) -> Result<v1::LeasedGroup, Status> {
        let s = &self.sampling;
        Ok(v1::LeasedGroup {
            lease: lease.id,
            group: Some(group_to_wire(&lease.group)),
            record_json: serde_json::to_string(&made.input.record).map_err(|e| Status::internal(e.to_string()))?,
            image: Bytes::new(),
            image_hash: made.image_hash.clone(),
            min_version: lease.min_version,
            n: s.n as u32,
            temperature: s.temperature,
            max_new_tokens: s.max_new_tokens as u32,
            seed: s.seed,
            top_k: s.top_k as u32,
            top_p: s.top_p,
            min_p: s.min_p,
            untempered: s.logprobs == Logprobs::Untempered,
            stop: self.stop.clone(),
            traceparent: context(span),
            image_bytes: 0,
        })
    }

    /// The image of a lease that holds, in parts; `place` is kept until the last one is sent.
    pub(super) fn image(
        &self,
        r: &v1::ImageRequest,
        place: Option<Place>,
    ) -> Result<impl Iterator<Item = Result<v1::ImageChunk, Status>> + Send + use<>, Status> {
        let mut state = self.lock();
        state.hear(&r.worker, self.now());
        let group = state.machine.group_of(&r.worker, &r.lease);
        let Some(image) = group.and_then(|g| state.inputs.get(&g)).map(|made| made.image.clone()) else {
            return Err(Status::not_found(format!("lease `{}` is not worker `{}`'s any more", r.lease, r.worker)));
        };
        let parts = (0..image.len()).step_by(CHUNK);
        Ok(parts.map(move |at| {
            let _place = &place;
            Ok(v1::ImageChunk { data: image.slice(at..image.len().min(at + CHUNK)) })
        }))
    }
}

impl State {
    /// Leases with what was prepared for them, each with a span in the trace of its group.
    fn taken(&mut self, worker: &str, leases: Vec<Lease>) -> Vec<Taken> {
        let Self { inputs, traces, .. } = self;
        let one = |lease: Lease| {
            let made = inputs.get(&lease.group)?.clone();
            let span = span!(parent: &traces.group(&lease.group), "lease", worker, lease = lease.id);
            Some((lease, made, span))
        };
        leases.into_iter().filter_map(one).collect()
    }
}
