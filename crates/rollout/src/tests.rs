//! A worker against an experience and a reward service in the same process, over real sockets.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use tokio_stream::Stream;
use tonic::{Request, Response, Status};
use unveil_config::Config;
use unveil_core::{Breakdown, Component};
use unveil_proto::v1::experience_server::{Experience, ExperienceServer};
use unveil_proto::v1::reward_server::{Reward, RewardServer};
use unveil_proto::v1::submit_response::Verdict;
use unveil_proto::{attention_from_wire, breakdown_to_wire, v1};
use unveil_service::{CancellationToken, Routes, RoutesBuilder, Running, ServeOptions, start};
use unveil_testkit::MetricsPage;

use crate::{RolloutError, WorkerOptions, WorkerReport, fixture, run};

mod back;
mod ends;
mod lease;
mod order;

/// How the stream of weights goes wrong.
#[derive(Clone, Copy, PartialEq)]
enum Damage {
    /// A bit of this chunk is flipped.
    Bit(usize),
    /// It ends after so many chunks.
    Cut(usize),
    /// It breaks off after so many chunks: who sent it is gone.
    Broken(usize),
}

#[derive(Default)]
struct State {
    /// What the next lease calls answer; afterwards `finished`, or nothing when `endless`.
    leases: VecDeque<v1::LeaseResponse>,
    endless: bool,
    /// Served weights: version and safetensors file; none are published yet where that is empty.
    weights: (u64, Vec<u8>),
    /// What happens to the next streams; one that is `None` goes well, and so do those that follow.
    damage: VecDeque<Option<Damage>>,
    /// Lease calls and submissions that are refused for the weights that they tell of.
    distrust: (usize, usize),
    /// The same, where the weights are another learner's.
    foreign: (usize, usize),
    /// A lease call with groups was answered, and so often.
    leased: usize,
    /// Heartbeats, and the leases that are lost.
    beats: Vec<v1::HeartbeatRequest>,
    lost: Vec<String>,
    /// Images that are fetched, by lease; parts in which they come, call by call, each but the last one broken off.
    images: HashMap<String, VecDeque<Vec<Vec<u8>>>>,
    /// Calls for weights, and those that were answered with some.
    asked: usize,
    weights_calls: Vec<Option<u64>>,
    told: Vec<Option<v1::HeldWeights>>,
    submitted: Vec<v1::SubmitRequest>,
    released: Vec<String>,
    scored: Vec<v1::ScoreRequest>,
}

#[derive(Clone, Default)]
struct Fake(Arc<Mutex<State>>);

impl Fake {
    fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.0.lock().unwrap())
    }
}

/// A weights stream of all tensors of a safetensors file, in chunks of 64 KiB, and the checksum of the whole.
fn stream(version: u64, file: &[u8]) -> (Vec<v1::WeightsChunk>, u32) {
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
            Ok(Response::new(v1::HeartbeatResponse { lost: s.lost.clone() }))
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
            s.submitted.push(r.into_inner());
            Ok(Response::new(v1::SubmitResponse { verdict: Verdict::Accepted.into() }))
        })
    }

    type FollowStream = Pin<Box<dyn Stream<Item = Result<v1::FollowResponse, Status>> + Send>>;

    async fn follow(&self, _: Request<v1::FollowRequest>) -> Result<Response<Self::FollowStream>, Status> {
        Err(Status::unimplemented("nothing is broadcast"))
    }

    async fn release(&self, r: Request<v1::ReleaseRequest>) -> Result<Response<v1::ReleaseResponse>, Status> {
        self.with(|s| s.released.extend(r.into_inner().leases));
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
        let one = |r: &v1::Response| {
            let components = [("format".to_owned(), Component::value(0.25))].into();
            breakdown_to_wire(&Breakdown { id: String::new(), index: r.index as usize, total: Some(0.25), components })
        };
        let breakdowns = request.responses.iter().map(one).collect();
        self.with(|s| s.scored.push(request));
        Ok(Response::new(v1::ScoreResponse { breakdowns, scorer_version: "fake".into() }))
    }
}

struct Stage {
    fake: Fake,
    model: tempfile::TempDir,
    experience: Running,
    reward: Running,
    stop: CancellationToken,
}

async fn stage() -> Stage {
    let fake = Fake::default();
    let model = tempfile::tempdir().unwrap();
    fixture::model_dir(model.path(), 1);
    fake.with(|s| s.weights = (0, weights(1)));
    let stop = CancellationToken::new();
    let serve =
        async |routes: Routes| start("127.0.0.1:0", routes, ServeOptions::default(), stop.clone()).await.unwrap();
    let routes = |f: &dyn Fn(&mut RoutesBuilder)| {
        let mut b = RoutesBuilder::default();
        f(&mut b);
        b.routes()
    };
    let experience = serve(routes(&|b| {
        b.add_service(ExperienceServer::new(fake.clone()));
    }))
    .await;
    let reward = serve(routes(&|b| {
        b.add_service(RewardServer::new(fake.clone()));
    }))
    .await;
    Stage { fake, model, experience, reward, stop }
}

impl Stage {
    fn options(&self) -> WorkerOptions {
        let mut config = Config::default();
        config.run.device = "cpu".into();
        config.rollout.threads = 1;
        config.reward.deadline_s = 5.0;
        let at = |r: &Running| format!("http://{}", r.address);
        let mut o = WorkerOptions::new(
            config,
            self.model.path().to_owned(),
            at(&self.experience),
            at(&self.reward),
            "w0".into(),
        );
        o.patience = Duration::from_secs(3);
        o
    }

    async fn run(&self) -> Result<WorkerReport, RolloutError> {
        tokio::time::timeout(Duration::from_secs(120), run(self.options(), CancellationToken::new())).await.unwrap()
    }
}

/// A port that nobody has.
fn free() -> std::net::SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn lease(k: u32, min_version: u64) -> v1::LeasedGroup {
    v1::LeasedGroup {
        lease: format!("lease-{k}"),
        group: Some(v1::GroupKey { pass: 0, position: u64::from(k), record: format!("r{k}") }),
        record_json: serde_json::to_string(&fixture::record(k)).unwrap(),
        image: fixture::picture(k).to_png().unwrap().into(),
        image_hash: String::new(),
        min_version,
        n: 3,
        temperature: 1.0,
        max_new_tokens: 6,
        seed: 7,
        ..Default::default()
    }
}

fn answer(ks: &[u32], version: u64) -> v1::LeaseResponse {
    let groups = ks.iter().map(|&k| lease(k, version)).collect();
    v1::LeaseResponse { groups, version, finished: false, renew_ms: 300 }
}

/// Weights of another seed as the service would send them.
fn weights(seed: u64) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    fixture::model_dir(dir.path(), seed);
    std::fs::read(dir.path().join("model.safetensors")).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_generates_scores_submits_and_takes_new_weights() {
    let stage = stage().await;
    stage.fake.with(|s| {
        s.leases = [answer(&[0, 1], 0)].into();
        s.endless = true;
    });
    // Version 0 at first; version 4 and work for it once two groups are in.
    let fake = stage.fake.clone();
    tokio::spawn(async move {
        while fake.with(|s| s.submitted.len()) < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        fake.with(|s| {
            s.weights = (4, weights(2));
            s.leases.push_back(answer(&[2], 4));
            s.endless = false;
        });
    });
    let (mut options, page) = (stage.options(), free());
    options.config.rollout.metrics_listen = page.to_string();
    let report = tokio::time::timeout(Duration::from_secs(120), run(options, CancellationToken::new())).await.unwrap();
    let report = report.unwrap();
    assert_eq!((report.accepted, report.refused, report.weights, report.finished), (3, 0, 2, true));
    let page = tokio::task::spawn_blocking(move || MetricsPage::get(page)).await.unwrap();
    page.is_listed("rollout");
    assert_eq!(page.of("unveil_rollout_groups_total{verdict=\"accepted\"}"), 3.0);
    assert_eq!(page.of("unveil_rollout_tokens_total"), report.tokens as f64);
    assert_eq!((page.of("unveil_rollout_weight_version"), page.of("unveil_rollout_weight_lag_versions")), (4.0, 0.0));
    let told: f64 = stage.fake.with(|s| s.submitted.iter().map(|g| g.generate_ms / 1e3).sum());
    assert!((page.of("unveil_rollout_generate_seconds_sum") - told).abs() < 1e-9, "the very numbers that it submits");
    stage.fake.with(|s| {
        assert_eq!(s.weights_calls, [None, Some(0)]);
        assert!(!s.beats.is_empty(), "it says that it lives");
        assert!(s.released.is_empty());
        s.submitted.sort_by_key(|g| g.lease.clone());
        for (k, g) in s.submitted.iter().enumerate() {
            let version = if k == 2 { 4 } else { 0 };
            let checksum = stream(0, &weights(if k == 2 { 2 } else { 1 })).1;
            assert_eq!(g.weights, [v1::HeldWeights { version, checksum }]);
            assert_eq!((g.lease.as_str(), g.worker.as_str()), (format!("lease-{k}").as_str(), "w0"));
            assert_eq!(g.group.as_ref().unwrap().record, format!("r{k}"));
            assert_eq!(g.responses.iter().map(|r| r.index).collect::<Vec<_>>(), [0, 1, 2]);
            for r in &g.responses {
                assert!(r.attention.is_none() && r.tokens.len() <= 6 && r.logprobs.len() == r.tokens.len());
                assert!(r.versions.iter().all(|&v| v == version));
                assert!(r.spans.iter().all(|x| r.text.get(x.begin as usize..x.end as usize).is_some()));
            }
            assert!(g.breakdowns.iter().all(|b| b.total == Some(0.25)) && g.breakdowns.len() == 3);
            assert!(g.generate_ms > 0.0 && g.reward_ms > 0.0);
        }
        assert_eq!(s.scored.len(), 3);
        for score in &s.scored {
            assert_eq!((score.image_width, score.resized_height), (96, 96));
            for r in &score.responses {
                let a = attention_from_wire(r.attention.clone().unwrap()).unwrap();
                assert_eq!(a.grid, [6, 6]);
                let fed = r.tokens.len() - usize::from(r.finish == "stop");
                assert_eq!((a.rows.len(), r.spans.len()), (fed, r.tokens.len()));
                assert!(a.rows.iter().all(|row| (row.iter().sum::<f32>() - 1.0).abs() < 1e-4));
            }
        }
    });
    stage.stop.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_weights_are_fetched_again_and_then_refused() {
    let stage = stage().await;
    let address = stage.experience.address.to_string();
    // Damaged twice, and then well.
    stage.fake.with(|s| {
        s.leases = [answer(&[0], 0)].into();
        s.damage = [Some(Damage::Bit(3)), Some(Damage::Cut(5)), None].into();
    });
    assert_eq!(stage.run().await.unwrap().accepted, 1);
    assert_eq!(stage.fake.with(|s| std::mem::take(&mut s.weights_calls)), [None; 3]);
    // Damaged each time: a flipped bit, a stream that ends early.
    for (damage, words) in [(Damage::Bit(2), ["version 0", "CRC-32C"]), (Damage::Cut(4), ["version 0", "ended early"])]
    {
        stage.fake.with(|s| s.damage = [Some(damage); 3].into());
        let e = stage.run().await.unwrap_err();
        assert!(matches!(e, RolloutError::Weights { .. }));
        let text = e.to_string();
        assert!(words.iter().all(|w| text.contains(w)) && text.contains(&address), "{text}");
        let calls = stage.fake.with(|s| std::mem::take(&mut s.weights_calls));
        assert_eq!(calls.len(), 3);
    }
    // Whole, but not this model's.
    let view = TensorView::new(Dtype::F32, vec![1], &[0; 4]).unwrap();
    let file = safetensors::serialize([("strange", view)], None).unwrap();
    stage.fake.with(|s| s.weights = (0, file));
    let text = stage.run().await.unwrap_err().to_string();
    assert!(text.contains("refused") && text.contains("missing") && text.contains(&address), "{text}");
    assert_eq!(stage.fake.with(|s| s.submitted.len()), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn distrusted_weights_are_fetched_again_whole_and_then_given_up() {
    let stage = stage().await;
    let held = v1::HeldWeights { version: 0, checksum: stream(0, &weights(1)).1 };
    // Refused once with a lease, once with a group: such a group does not count, the next one does.
    stage.fake.with(|s| {
        s.leases = [answer(&[0], 0), answer(&[1], 0)].into();
        s.distrust = (1, 1);
        s.endless = true;
    });
    let fake = stage.fake.clone();
    tokio::spawn(async move {
        while fake.with(|s| s.submitted.is_empty()) {
            tokio::time::sleep(Duration::from_millis(5)).await;
            fake.with(|s| {
                if s.weights_calls.len() == 3 && s.leases.is_empty() && s.submitted.is_empty() && s.leased == 2 {
                    s.leases.push_back(answer(&[2], 0));
                }
            });
        }
        fake.with(|s| s.endless = false);
    });
    let report = stage.run().await.unwrap();
    assert!(report.accepted >= 1 && report.refused >= 1 && report.finished && report.weights == 3, "{report:?}");
    stage.fake.with(|s| {
        assert_eq!(std::mem::take(&mut s.weights_calls), [None; 3]);
        assert!(std::mem::take(&mut s.told).iter().all(|t| *t == Some(held)));
    });
    // Refused for ever.
    stage.fake.with(|s| s.distrust = (usize::MAX, 0));
    let text = stage.run().await.unwrap_err().to_string();
    assert!(text.contains("another CRC-32C") && text.contains(&stage.experience.address.to_string()), "{text}");
    assert_eq!(stage.fake.with(|s| s.told.len()), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_and_weights_come_in_while_responses_are_made() {
    let stage = stage().await;
    let mut options = stage.options();
    options.config.rollout.max_staleness = 1;
    let mut long = answer(&[0, 1], 0);
    long.groups.iter_mut().for_each(|g| (g.n, g.max_new_tokens) = (8, 600));
    stage.fake.with(|s| {
        s.leases = [long].into();
        s.endless = true;
    });
    let fake = stage.fake.clone();
    let next = tokio::spawn(async move {
        // The first batch is under way: new weights, and more work that they are not needed for.
        while fake.with(|s| s.leased == 0) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tokio::time::sleep(Duration::from_millis(40)).await;
        fake.with(|s| {
            s.weights = (1, weights(2));
            s.leases.push_back(answer(&[2], 0));
        });
        while fake.with(|s| s.leased < 2) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let early = fake.with(|s| s.submitted.is_empty());
        while fake.with(|s| s.submitted.len() < 3) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        fake.with(|s| s.endless = false);
        early
    });
    let report = tokio::time::timeout(Duration::from_secs(120), run(options, CancellationToken::new())).await.unwrap();
    let report = report.unwrap();
    assert_eq!((report.accepted, report.weights), (3, 2));
    assert!(next.await.unwrap(), "the next lease was taken before the first batch was in");
    let sums: Vec<u32> = [1, 2].map(|seed| stream(0, &weights(seed)).1).into();
    stage.fake.with(|s| {
        let mut mixed = 0;
        for g in &s.submitted {
            let mut seen: Vec<u64> = g.responses.iter().flat_map(|r| r.versions.clone()).collect();
            seen.sort_unstable();
            seen.dedup();
            let told: Vec<_> = seen.iter().map(|v| (*v, sums[*v as usize])).collect();
            assert_eq!(g.weights.iter().map(|h| (h.version, h.checksum)).collect::<Vec<_>>(), told);
            for r in &g.responses {
                assert!(r.versions.is_sorted() && r.versions.len() == r.tokens.len());
                mixed += usize::from(r.versions.first() != r.versions.last());
            }
        }
        assert!(mixed > 0, "no response went on across the change of weights");
    });
}
