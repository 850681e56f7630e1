//! A learner and a reward service that answer as they are told, and note what they hear.

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

/// How the stream of weights goes wrong.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Damage {
    /// A bit of this chunk is flipped.
    Bit(usize),
    /// It ends after so many chunks.
    Cut(usize),
    /// It breaks off after so many chunks: who sent it is gone.
    Broken(usize),
}

#[derive(Default)]
pub(super) struct State {
    /// What the next lease calls answer; afterwards `finished`, or nothing when `endless`.
    pub leases: VecDeque<v1::LeaseResponse>,
    pub endless: bool,
    /// Served weights: version and safetensors file; none are published yet where that is empty.
    pub weights: (u64, Vec<u8>),
    /// What happens to the next streams; one that is `None` goes well, and so do those that follow.
    pub damage: VecDeque<Option<Damage>>,
    /// Lease calls and submissions that are refused for the weights that they tell of.
    pub distrust: (usize, usize),
    /// The same, where the weights are another learner's.
    pub foreign: (usize, usize),
    /// A lease call with groups was answered, and so often.
    pub leased: usize,
    /// Heartbeats, and the leases that are lost.
    pub beats: Vec<v1::HeartbeatRequest>,
    pub lost: Vec<String>,
    /// Images that are fetched, by lease; parts in which they come, call by call, each but the last one broken off.
    pub images: HashMap<String, VecDeque<Vec<Vec<u8>>>>,
    /// Calls for weights, and those that were answered with some.
    pub asked: usize,
    pub weights_calls: Vec<Option<u64>>,
    pub told: Vec<Option<v1::HeldWeights>>,
    pub submitted: Vec<v1::SubmitRequest>,
    pub released: Vec<String>,
    /// Calls that handed groups back for a reason.
    pub given_back: Vec<v1::ReleaseRequest>,
    /// What the reward service answers to the next calls instead of scores.
    pub unscored: VecDeque<Status>,
    /// Calls that are answered without any score, since those who make them are away themselves.
    pub out_of_reach: usize,
    /// What the answer to the next submissions is instead of `accepted`.
    pub rejected: VecDeque<String>,
    pub scored: Vec<v1::ScoreRequest>,
}

#[derive(Clone, Default)]
pub(super) struct Fake(Arc<Mutex<State>>);

impl Fake {
    pub fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.0.lock().unwrap())
    }
}

/// A weights stream of all tensors of a safetensors file, in chunks of 64 KiB, and the checksum of the whole.
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
            s.told.push(held);
            if s.foreign.0 > 0 {
                s.foreign.0 -= 1;
                return Err(Status::not_found("this learner has not published that version"));
            }
            if s.distrust.0 > 0 {
                s.distrust.0 -= 1;
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
            s.beats.push(r.into_inner());
            Ok(Response::new(v1::HeartbeatResponse { lost: s.lost.clone(), finished: false }))
        })
    }

    type ImageStream = Pin<Box<dyn Stream<Item = Result<v1::ImageChunk, Status>> + Send>>;

    async fn image(&self, r: Request<v1::ImageRequest>) -> Result<Response<Self::ImageStream>, Status> {
        self.with(|s| {
            let calls = s.images.get_mut(&r.into_inner().lease).ok_or_else(|| Status::not_found("lost"))?;
            let parts = calls.pop_front().unwrap_or_default().into_iter();
            let mut all: Vec<_> = parts.map(|part| Ok(v1::ImageChunk { data: part.into() })).collect();
            if !calls.is_empty() {
                all.push(Err(Status::unavailable("the learner is gone")));
            }
            Ok(Response::new(Box::pin(tokio_stream::iter(all)) as Self::ImageStream))
        })
    }

    async fn submit(&self, r: Request<v1::SubmitRequest>) -> Result<Response<v1::SubmitResponse>, Status> {
        self.with(|s| {
            if s.foreign.1 > 0 {
                s.foreign.1 -= 1;
                return Err(Status::not_found("this learner has not published that version"));
            }
            if s.distrust.1 > 0 {
                s.distrust.1 -= 1;
                return Err(Status::failed_precondition("worker `w0` holds weights with another CRC-32C"));
            }
            if let Some(why) = s.rejected.pop_front() {
                return Ok(Response::new(v1::SubmitResponse { verdict: Verdict::Rejected.into(), why }));
            }
            s.submitted.push(r.into_inner());
            Ok(Response::new(v1::SubmitResponse { verdict: Verdict::Accepted.into(), why: String::new() }))
        })
    }

    type FollowStream = Pin<Box<dyn Stream<Item = Result<v1::FollowResponse, Status>> + Send>>;

    async fn follow(&self, _: Request<v1::FollowRequest>) -> Result<Response<Self::FollowStream>, Status> {
        Err(Status::unimplemented("nothing is broadcast"))
    }

    async fn release(&self, r: Request<v1::ReleaseRequest>) -> Result<Response<v1::ReleaseResponse>, Status> {
        let r = r.into_inner();
        self.with(|s| {
            s.released.extend(r.leases.clone());
            if r.cause() != Cause::Unspecified {
                s.given_back.push(r);
            }
        });
        Ok(Response::new(v1::ReleaseResponse {}))
    }

    async fn weights(&self, r: Request<v1::WeightsRequest>) -> Result<Response<Self::WeightsStream>, Status> {
        let r = r.into_inner();
        let have = r.holds.map(|h| h.version);
        let none = self.with(|s| {
            s.asked += 1;
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
                broken = Some(Err(Status::unavailable("the learner is gone")));
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
        let away = self.with(|s| {
            let away = s.out_of_reach > 0;
            s.out_of_reach = s.out_of_reach.saturating_sub(1);
            away
        });
        let one = |r: &v1::Response| {
            let masked = || Component::masked(MaskReason::Unavailable("the judge: 503".into()));
            let (total, format) = if away { (None, masked()) } else { (Some(0.25), Component::value(0.25)) };
            let components = [("format".to_owned(), format)].into();
            breakdown_to_wire(&Breakdown { id: String::new(), index: r.index as usize, total, components })
        };
        let breakdowns = request.responses.iter().map(one).collect();
        self.with(|s| s.scored.push(request));
        Ok(Response::new(v1::ScoreResponse { breakdowns, scorer_version: "fake".into() }))
    }
}
