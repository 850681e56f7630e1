//! A worker against an experience and a reward service in the same process, over real sockets.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio_stream::Stream;
use tonic::{Request, Response, Status};
use unveil_config::Config;
use unveil_core::{Breakdown, Component};
use unveil_proto::v1::experience_server::{Experience, ExperienceServer};
use unveil_proto::v1::reward_server::{Reward, RewardServer};
use unveil_proto::v1::submit_response::Verdict;
use unveil_proto::{attention_from_wire, breakdown_to_wire, v1};
use unveil_service::{CancellationToken, Routes, RoutesBuilder, Running, ServeOptions, start};

use crate::{RolloutError, WorkerOptions, WorkerReport, fixture, run};

#[derive(Default)]
struct State {
    /// What the next lease calls answer; afterwards `finished`, or nothing when `endless`.
    leases: VecDeque<v1::LeaseResponse>,
    endless: bool,
    /// Served weights, and which byte of the first chunk is damaged.
    weights: Option<(u64, Vec<u8>)>,
    damage: bool,
    weights_calls: Vec<Option<u64>>,
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

#[tonic::async_trait]
impl Experience for Fake {
    type WeightsStream = Pin<Box<dyn Stream<Item = Result<v1::WeightsChunk, Status>> + Send>>;

    async fn lease(&self, _: Request<v1::LeaseRequest>) -> Result<Response<v1::LeaseResponse>, Status> {
        let next = self.with(|s| s.leases.pop_front());
        let endless = self.with(|s| s.endless);
        Ok(Response::new(next.unwrap_or(v1::LeaseResponse { groups: vec![], version: 0, finished: !endless })))
    }

    async fn submit(&self, r: Request<v1::SubmitRequest>) -> Result<Response<v1::SubmitResponse>, Status> {
        self.with(|s| s.submitted.push(r.into_inner()));
        Ok(Response::new(v1::SubmitResponse { verdict: Verdict::Accepted.into() }))
    }

    async fn release(&self, r: Request<v1::ReleaseRequest>) -> Result<Response<v1::ReleaseResponse>, Status> {
        self.with(|s| s.released.extend(r.into_inner().leases));
        Ok(Response::new(v1::ReleaseResponse {}))
    }

    async fn weights(&self, r: Request<v1::WeightsRequest>) -> Result<Response<Self::WeightsStream>, Status> {
        let have = r.into_inner().have_version;
        let (weights, damage) = self.with(|s| {
            s.weights_calls.push(have);
            (s.weights.clone(), s.damage)
        });
        let mut chunks = Vec::new();
        if let Some((version, bytes)) = weights.filter(|(v, _)| have != Some(*v)) {
            for part in bytes.chunks(1 << 20) {
                let crc32c = crc32c::crc32c(part) ^ u32::from(damage && chunks.is_empty());
                chunks.push(Ok(v1::WeightsChunk {
                    version,
                    total_bytes: bytes.len() as u64,
                    data: part.to_vec().into(),
                    crc32c,
                }));
            }
        }
        Ok(Response::new(Box::pin(tokio_stream::iter(chunks))))
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
    v1::LeaseResponse { groups: ks.iter().map(|&k| lease(k, version)).collect(), version, finished: false }
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
    // Nothing newer than version 0 at first; version 4 and work for it once two groups are in.
    let fake = stage.fake.clone();
    tokio::spawn(async move {
        while fake.with(|s| s.submitted.len()) < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        fake.with(|s| {
            s.weights = Some((4, weights(2)));
            s.leases.push_back(answer(&[2], 4));
            s.endless = false;
        });
    });
    let report = stage.run().await.unwrap();
    assert_eq!((report.accepted, report.refused, report.weights, report.finished), (3, 0, 1, true));
    stage.fake.with(|s| {
        assert_eq!(s.weights_calls, [None, Some(0)]);
        assert!(s.released.is_empty());
        s.submitted.sort_by_key(|g| g.lease.clone());
        for (k, g) in s.submitted.iter().enumerate() {
            let version = if k == 2 { 4 } else { 0 };
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
async fn damaged_weights_are_refused() {
    let stage = stage().await;
    stage.fake.with(|s| {
        s.leases = [answer(&[0], 1)].into();
        s.weights = Some((1, weights(2)));
        s.damage = true;
    });
    let e = stage.run().await.unwrap_err();
    let address = stage.experience.address.to_string();
    assert!(matches!(e, RolloutError::Weights { .. }));
    let text = e.to_string();
    assert!(text.contains("CRC-32C") && text.contains(&address), "{text}");
    stage.fake.with(|s| {
        assert_eq!((s.weights_calls.len(), s.submitted.len()), (3, 0));
        assert_eq!(s.released, ["lease-0"]);
    });
    // Whole, but not this model's.
    stage.fake.with(|s| {
        s.leases = [answer(&[0], 1)].into();
        s.weights = Some((1, b"no safetensors".to_vec()));
        s.damage = false;
    });
    let text = stage.run().await.unwrap_err().to_string();
    assert!(text.contains("safetensors") && text.contains(&address), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_reward_service_groups_are_masked() {
    let stage = stage().await;
    stage.fake.with(|s| s.leases = [answer(&[0, 1], 0)].into());
    let mut options = stage.options();
    options.config.reward.deadline_s = 0.3;
    options.reward = "http://127.0.0.1:9".into();
    let report = run(options.clone(), CancellationToken::new()).await.unwrap();
    assert_eq!(report.accepted, 2);
    stage.fake.with(|s| {
        for b in s.submitted.iter().flat_map(|g| &g.breakdowns) {
            assert_eq!(b.total, None);
            assert!(
                b.components.len() == 4
                    && b.components.values().all(|c| c.masked && c.value.is_none() && c.reason.contains("failed"))
            );
        }
    });
    options.reward = "nowhere".into();
    let text = run(options, CancellationToken::new()).await.unwrap_err().to_string();
    assert!(text.contains("reward") && text.contains("nowhere"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_hands_leases_back_and_is_no_error() {
    let stage = stage().await;
    let mut slow = answer(&[0, 1], 0);
    slow.groups.iter_mut().for_each(|g| (g.n, g.max_new_tokens) = (8, 1800));
    stage.fake.with(|s| {
        s.leases = [slow].into();
        s.endless = true;
    });
    let stop = CancellationToken::new();
    let worker = tokio::spawn(run(stage.options(), stop.clone()));
    while stage.fake.with(|s| s.weights_calls.is_empty()) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    stop.cancel();
    let started = std::time::Instant::now();
    let report = worker.await.unwrap().unwrap();
    assert!(started.elapsed() < Duration::from_secs(4) && !report.finished && report.accepted == 0);
    stage.fake.with(|s| {
        s.released.sort();
        assert_eq!(s.released, ["lease-0", "lease-1"]);
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unreachable_experience_service_is_named() {
    let stage = stage().await;
    let mut options = stage.options();
    options.experience = "http://127.0.0.1:9".into();
    options.patience = Duration::from_millis(400);
    let text = run(options, CancellationToken::new()).await.unwrap_err().to_string();
    assert!(text.contains("experience") && text.contains("127.0.0.1:9"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_image_names_the_record_and_goes_back() {
    let stage = stage().await;
    let mut broken = answer(&[0], 0);
    broken.groups[0].image = vec![1, 2, 3].into();
    stage.fake.with(|s| s.leases = [broken].into());
    let text = stage.run().await.unwrap_err().to_string();
    assert!(text.contains("r0"), "{text}");
    stage.fake.with(|s| assert_eq!(s.released, ["lease-0"]));
}
