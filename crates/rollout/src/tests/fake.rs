//! A fake learner and reward service: they answer as scripted and record the calls.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use safetensors::SafeTensors;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};
use unveil_core::{Breakdown, Component, MaskReason};
use unveil_proto::v1::experience_server::Experience;
use unveil_proto::v1::release_request::Cause;
use unveil_proto::v1::reward_server::Reward;
use unveil_proto::v1::submit_response::Verdict;
use unveil_proto::{breakdown_to_wire, v1};

/// Damage to a stream of weights.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Damage {
    /// Flips a bit of this chunk.
    Bit(usize),
    /// Ends the stream after this many chunks.
    Cut(usize),
    /// Interrupts the stream with an error after this many chunks.
    Broken(usize),
}

/// Script and record of the fake services.
#[derive(Default)]
pub(super) struct FakeState {
    /// Answers to the next lease calls; afterwards `finished`, or no groups if `endless`.
    pub leases: VecDeque<v1::LeaseResponse>,
    pub endless: bool,
    /// Published weights: version and safetensors file; nothing is published while the file is empty.
    pub weights: (u64, Vec<u8>),
    /// Damage to the next streams; `None`, like an exhausted queue, leaves a stream intact.
    pub damage: VecDeque<Option<Damage>>,
    /// Numbers of lease calls and submissions that are refused because of the worker's weights.
    pub reject_weights: (usize, usize),
    /// Numbers of lease calls and submissions that are refused because the weights come from another learner.
    pub foreign: (usize, usize),
    /// Number of lease calls that were answered with groups.
    pub leased: usize,
    /// Heartbeats, and the leases that are reported lost.
    pub heartbeats: Vec<v1::HeartbeatRequest>,
    pub lost: Vec<String>,
    /// Images fetched by lease: the chunks of each call; every call but the last is interrupted.
    pub images: HashMap<String, VecDeque<Vec<Vec<u8>>>>,
    /// Number of calls for weights, and the versions held at the calls that were answered with weights.
    pub weight_requests: usize,
    pub weights_calls: Vec<Option<u64>>,
    /// Weights held at each lease call.
    pub held_at_lease: Vec<Option<v1::HeldWeights>>,
    pub submitted: Vec<v1::SubmitRequest>,
    pub released: Vec<String>,
    /// Release calls with a cause.
    pub released_with_cause: Vec<v1::ReleaseRequest>,
    /// Errors that the reward service returns to the next calls.
    pub unscored: VecDeque<Status>,
    /// Number of calls that are answered without scores because the scorers are unavailable.
    pub unavailable_scorers: usize,
    /// Reasons with which the next submissions are rejected.
    pub rejected: VecDeque<String>,
    pub scored: Vec<v1::ScoreRequest>,
}

#[derive(Clone, Default)]
pub(super) struct Fake(Arc<Mutex<FakeState>>);

impl Fake {
    pub(super) fn with<T>(&self, f: impl FnOnce(&mut FakeState) -> T) -> T {
        f(&mut self.0.lock().unwrap())
    }
}

/// Returns a weight stream of all tensors of a safetensors file, in chunks of 64 KiB, and the checksum of the whole.
pub(super) fn stream(version: u64, file: &[u8]) -> (Vec<v1::WeightsChunk>, u32) {
    let file = SafeTensors::deserialize(file).unwrap();
    let mut named: Vec<_> = file.iter().collect();
    named.sort_by_key(|(name, _)| *name);
    let mut whole = Vec::new();
    named.iter().for_each(|(_, view)| whole.extend_from_slice(view.data()));
    let tensors = named.iter().map(|(name, view)| v1::WeightsTensor {
        name: (*name).to_owned(),
        dtype: format!("{:?}", view.dtype()),
        shape: view.shape().iter().map(|n| *n as u64).collect(),
    });
    let checksum = crc32c::crc32c(&whole);
    let head = v1::WeightsHead { version, checksum, tensors: tensors.collect(), ..Default::default() };
    let chunk = |data: Vec<u8>| v1::WeightsChunk { crc32c: crc32c::crc32c(&data), data: data.into() };
    let mut chunks = vec![chunk(prost::Message::encode_to_vec(&head))];
    chunks.extend(named.iter().flat_map(|(_, view)| view.data().chunks(1 << 16)).map(|part| chunk(part.to_vec())));
    (chunks, checksum)
}

#[tonic::async_trait]
impl Experience for Fake {
    type WeightsStream = Pin<Box<dyn Stream<Item = Result<v1::WeightsChunk, Status>> + Send>>;

    async fn lease(&self, r: Request<v1::LeaseRequest>) -> Result<Response<v1::LeaseResponse>, Status> {
        let v1::LeaseRequest { weights: held, .. } = r.into_inner();
        self.with(|s| {
            s.held_at_lease.push(held);
            if s.foreign.0 > 0 {
                s.foreign.0 -= 1;
                return Err(Status::not_found("this learner has not published that version"));
            }
            if s.reject_weights.0 > 0 {
                s.reject_weights.0 -= 1;
                return Err(Status::failed_precondition("worker `w0` holds weights with another CRC-32C"));
            }
            let next = s.leases.pop_front();
            s.leased += usize::from(next.is_some());
            let nothing = v1::LeaseResponse { finished: !s.endless, ..Default::default() };
            Ok(Response::new(next.unwrap_or(nothing)))
        })
    }

    async fn heartbeat(&self, r: Request<v1::HeartbeatRequest>) -> Result<Response<v1::HeartbeatResponse>, Status> {
        self.with(|s| {
            s.heartbeats.push(r.into_inner());
            Ok(Response::new(v1::HeartbeatResponse { lost: s.lost.clone(), finished: false }))
        })
    }

    type ImageStream = Pin<Box<dyn Stream<Item = Result<v1::ImageChunk, Status>> + Send>>;

    async fn image(&self, r: Request<v1::ImageRequest>) -> Result<Response<Self::ImageStream>, Status> {
        self.with(|s| {
            let calls = s.images.get_mut(&r.into_inner().lease).ok_or_else(|| Status::not_found("lost"))?;
            let chunks = calls.pop_front().unwrap_or_default().into_iter();
            let mut messages: Vec<_> = chunks.map(|chunk| Ok(v1::ImageChunk { data: chunk.into() })).collect();
            if !calls.is_empty() {
                messages.push(Err(Status::unavailable("the learner has stopped")));
            }
            Ok(Response::new(Box::pin(tokio_stream::iter(messages)) as Self::ImageStream))
        })
    }

    async fn submit(&self, r: Request<v1::SubmitRequest>) -> Result<Response<v1::SubmitResponse>, Status> {
        self.with(|s| {
            if s.foreign.1 > 0 {
                s.foreign.1 -= 1;
                return Err(Status::not_found("this learner has not published that version"));
            }
            if s.reject_weights.1 > 0 {
                s.reject_weights.1 -= 1;
                return Err(Status::failed_precondition("worker `w0` holds weights with another CRC-32C"));
            }
            if let Some(why) = s.rejected.pop_front() {
                return Ok(Response::new(v1::SubmitResponse { verdict: Verdict::Rejected.into(), why }));
            }
            s.submitted.push(r.into_inner());
            Ok(Response::new(v1::SubmitResponse { verdict: Verdict::Accepted.into(), why: String::new() }))
        })
    }

    type SubscribeStream = Pin<Box<dyn Stream<Item = Result<v1::SubscribeResponse, Status>> + Send>>;

    async fn subscribe(&self, _: Request<v1::SubscribeRequest>) -> Result<Response<Self::SubscribeStream>, Status> {
        Err(Status::unimplemented("nothing is broadcast"))
    }

    async fn release(&self, r: Request<v1::ReleaseRequest>) -> Result<Response<v1::ReleaseResponse>, Status> {
        let r = r.into_inner();
        self.with(|s| {
            s.released.extend(r.leases.clone());
            if r.cause() != Cause::Unspecified {
                s.released_with_cause.push(r);
            }
        });
        Ok(Response::new(v1::ReleaseResponse {}))
    }

    async fn weights(&self, r: Request<v1::WeightsRequest>) -> Result<Response<Self::WeightsStream>, Status> {
        let r = r.into_inner();
        let have = r.holds.map(|h| h.version);
        let none = self.with(|s| {
            s.weight_requests += 1;
            s.weights.1.is_empty()
        });
        if none {
            return Err(Status::unavailable("no weights are published yet"));
        }
        let until = Instant::now() + Duration::from_millis(r.wait_ms.into());
        while Instant::now() < until && self.with(|s| have == Some(s.weights.0)) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let (weights, damage) = self.with(|s| {
            if have == Some(s.weights.0) {
                return (None, None);
            }
            s.weights_calls.push(have);
            (Some(s.weights.clone()), s.damage.pop_front().flatten())
        });
        let mut chunks = weights.map_or(vec![], |(version, file)| stream(version, &file).0);
        let mut broken = None;
        match damage {
            None => {}
            Some(Damage::Broken(at)) => {
                chunks.truncate(at);
                broken = Some(Err(Status::unavailable("the learner has stopped")));
            }
            Some(Damage::Cut(at)) => chunks.truncate(at),
            Some(Damage::Bit(at)) => {
                let mut data = chunks[at].data.to_vec();
                data[1] ^= 4;
                chunks[at].data = data.into();
            }
        }
        Ok(Response::new(Box::pin(tokio_stream::iter(chunks.into_iter().map(Ok).chain(broken)))))
    }
}

#[tonic::async_trait]
impl Reward for Fake {
    async fn score(&self, r: Request<v1::ScoreRequest>) -> Result<Response<v1::ScoreResponse>, Status> {
        let request = r.into_inner();
        if let Some(status) = self.with(|s| s.unscored.pop_front()) {
            return Err(status);
        }
        let unavailable = self.with(|s| {
            let unavailable = s.unavailable_scorers > 0;
            s.unavailable_scorers = s.unavailable_scorers.saturating_sub(1);
            unavailable
        });
        let breakdown = |r: &v1::Response| {
            let masked = || Component::masked(MaskReason::Unavailable("the judge: 503".into()));
            let (total, format) = if unavailable { (None, masked()) } else { (Some(0.25), Component::value(0.25)) };
            let components = [("format".to_owned(), format)].into();
            breakdown_to_wire(&Breakdown { id: String::new(), index: r.index as usize, total, components })
        };
        let breakdowns = request.responses.iter().map(breakdown).collect();
        self.with(|s| s.scored.push(request));
        Ok(Response::new(v1::ScoreResponse { breakdowns, scorer_version: "fake".into() }))
    }
}
