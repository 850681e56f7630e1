//! A worker with an experience service and a reward service in the same process, over real sockets.

use std::time::Duration;

use safetensors::tensor::{Dtype, TensorView};
use unveil_config::Config;
use unveil_core::mention::{find_mention, overlapping_tokens};
use unveil_experience_rpc::ClientError;
use unveil_proto::v1::experience_server::ExperienceServer;
use unveil_proto::v1::reward_server::RewardServer;
use unveil_proto::{attention_from_wire, v1};
use unveil_reward::vision::{VisionRule, rows_needed};
use unveil_service::{CancellationToken, Routes, RoutesBuilder, RunningServer, ServeOptions, start};
use unveil_testkit::{MetricsPage, free_address};
use unveil_testkit_model::write_model_directory;

use crate::{RolloutError, WorkerOptions, WorkerReport, fixture, run};
use fake::{Damage, Fake, stream};

mod failures;
mod fake;
mod lease;
mod offline;
mod older_learner;
mod readiness;

/// Services and the model directory of a test.
struct TestRun {
    fake: Fake,
    model: tempfile::TempDir,
    experience: RunningServer,
    reward: RunningServer,
    stop: CancellationToken,
}

async fn start_run() -> TestRun {
    let fake = Fake::default();
    let model = tempfile::tempdir().unwrap();
    write_model_directory(model.path(), 1);
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
    TestRun { fake, model, experience, reward, stop }
}

impl TestRun {
    fn options(&self) -> WorkerOptions {
        let mut config = Config::default();
        config.run.device = "cpu".into();
        config.rollout.threads = 1;
        config.reward.deadline_s = 5.0;
        let url = |r: &RunningServer| format!("http://{}", r.address);
        let mut o = WorkerOptions::new(
            config,
            self.model.path().to_owned(),
            url(&self.experience),
            url(&self.reward),
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
        sampling: Some(v1::Sampling { n: 3, temperature: 1.0, max_new_tokens: 6, seed: 7, ..Default::default() }),
        ..Default::default()
    }
}

/// Sets the number and the length of the responses of all leased groups.
fn set_size(leases: &mut v1::LeaseResponse, n: u32, max_new_tokens: u32) {
    for group in &mut leases.groups {
        let sampling = group.sampling.as_mut().unwrap();
        sampling.n = n;
        sampling.max_new_tokens = max_new_tokens;
    }
}

/// A class that answers of untrained weights sometimes name.
const CLASS: &str = "e";

/// Sets the class of the groups to [`CLASS`].
fn with_class(mut leases: v1::LeaseResponse) -> v1::LeaseResponse {
    for g in &mut leases.groups {
        let mut record: serde_json::Value = serde_json::from_str(&g.record_json).unwrap();
        record["category"] = CLASS.into();
        g.record_json = record.to_string();
    }
    leases
}

/// Returns an answer that leases the groups `ks` at `version`.
fn answer(ks: &[u32], version: u64) -> v1::LeaseResponse {
    let groups = ks.iter().map(|&k| lease(k, version)).collect();
    v1::LeaseResponse { groups, version, finished: false, renew_ms: 300 }
}

/// Returns weights of a seed as a safetensors file.
fn weights(seed: u64) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    write_model_directory(dir.path(), seed);
    std::fs::read(dir.path().join("model.safetensors")).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn worker_generates_scores_submits_and_loads_weights() {
    let services = start_run().await;
    services.fake.with(|s| {
        s.leases = [with_class(answer(&[0, 1], 0))].into();
        s.endless = true;
    });
    // Starts with version 0; publishes version 4 and a group for it once two groups are submitted.
    let fake = services.fake.clone();
    tokio::spawn(async move {
        while fake.with(|s| s.submitted.len()) < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        fake.with(|s| {
            s.weights = (4, weights(2));
            s.leases.push_back(with_class(answer(&[2], 4)));
            s.endless = false;
        });
    });
    let mut options = services.options();
    let page = free_address();
    options.config.rollout.metrics_listen = page.to_string();
    let report = tokio::time::timeout(Duration::from_secs(120), run(options, CancellationToken::new())).await.unwrap();
    let report = report.unwrap();
    assert_eq!((report.accepted, report.refused, report.weights, report.finished), (3, 0, 2, true));
    let page = tokio::task::spawn_blocking(move || MetricsPage::get(page)).await.unwrap();
    page.assert_documented("rollout");
    assert_eq!(page.expect_value("unveil_rollout_groups_total{verdict=\"accepted\"}"), 3.0);
    assert_eq!(page.expect_value("unveil_rollout_tokens_total"), report.tokens as f64);
    assert_eq!(
        (page.expect_value("unveil_rollout_weight_version"), page.expect_value("unveil_rollout_weight_lag_versions")),
        (4.0, 0.0)
    );
    let submitted: f64 = services.fake.with(|s| s.submitted.iter().map(|g| g.generate_ms / 1e3).sum());
    assert!((page.expect_value("unveil_rollout_generate_seconds_sum") - submitted).abs() < 1e-9, "the submitted times");
    services.fake.with(|s| {
        assert_eq!(s.weights_calls, [None, Some(0)]);
        assert!(!s.heartbeats.is_empty());
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
                assert!(r.tokens.len() <= 6 && r.logprobs.len() == r.tokens.len());
                assert!(r.versions.iter().all(|&v| v == version));
                assert!(r.spans.iter().all(|x| r.text.get(x.begin as usize..x.end as usize).is_some()));
            }
            assert!(g.breakdowns.iter().all(|b| b.total == Some(0.25)) && g.breakdowns.len() == 3);
            assert!(g.generate_ms > 0.0 && g.reward_ms > 0.0);
        }
        assert_eq!(s.scored.len(), 3);
        // Rows are sent for the tokens that name the class, and for no others.
        let rule = VisionRule::new(&Config::default().reward.vision_relevance);
        let mut rows = 0;
        let mut tokens = 0;
        for score in &s.scored {
            assert_eq!((score.image_width, score.resized_height), (96, 96));
            for r in &score.responses {
                let fed = r.tokens.len() - usize::from(r.finish == "stop");
                assert_eq!(r.spans.len(), r.tokens.len());
                let spans: Vec<_> = r.spans.iter().map(|x| (x.begin as usize, x.end as usize)).collect();
                let names = [CLASS.to_owned()];
                let mention = find_mention(&Config::default().answer_reader(), &r.text, &names);
                let named = mention.map(|mention| overlapping_tokens(&mention, &spans)).unwrap_or_default();
                let mut needed = rows_needed(named, &r.text, &spans, rule);
                needed.retain(|t| *t < fed);
                needed.sort_unstable();
                let a = r.attention.clone().map(|a| attention_from_wire(a).unwrap());
                assert_eq!(a.as_ref().map_or(&[][..], |a| &a.tokens), needed);
                for row in a.iter().flat_map(|a| &a.rows) {
                    assert!(row.len() == 36 && (row.iter().sum::<f32>() - 1.0).abs() < 1e-4);
                }
                rows += needed.len();
                tokens += fed;
            }
        }
        assert!(0 < rows && rows < tokens, "{rows} of {tokens}");
    });
    services.stop.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_weights_are_retried_and_then_refused() {
    let services = start_run().await;
    let address = services.experience.address.to_string();
    // Damaged twice, then intact.
    services.fake.with(|s| {
        s.leases = [answer(&[0], 0)].into();
        s.damage = [Some(Damage::Bit(3)), Some(Damage::Cut(5)), None].into();
    });
    assert_eq!(services.run().await.unwrap().accepted, 1);
    assert_eq!(services.fake.with(|s| std::mem::take(&mut s.weights_calls)), [None; 3]);
    // Damaged every time: a flipped bit, a stream that ends early.
    for (damage, words) in [(Damage::Bit(2), ["version 0", "CRC-32C"]), (Damage::Cut(4), ["version 0", "ended early"])]
    {
        services.fake.with(|s| s.damage = [Some(damage); 3].into());
        let e = services.run().await.unwrap_err();
        assert!(matches!(e, RolloutError::Experience(ClientError::Weights { .. })));
        let text = e.to_string();
        assert!(words.iter().all(|w| text.contains(w)) && text.contains(&address), "{text}");
        let calls = services.fake.with(|s| std::mem::take(&mut s.weights_calls));
        assert_eq!(calls.len(), 3);
    }
    // Complete, but of another model.
    let view = TensorView::new(Dtype::F32, vec![1], &[0; 4]).unwrap();
    let file = safetensors::serialize([("strange", view)], None).unwrap();
    services.fake.with(|s| s.weights = (0, file));
    let text = services.run().await.unwrap_err().to_string();
    assert!(text.contains("refused") && text.contains("missing") && text.contains(&address), "{text}");
    assert_eq!(services.fake.with(|s| s.submitted.len()), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rejected_weights_are_refetched_and_then_given_up() {
    let services = start_run().await;
    let held = v1::HeldWeights { version: 0, checksum: stream(0, &weights(1)).1 };
    // Rejected once with a lease and once with a group, which does not count; the next group does.
    services.fake.with(|s| {
        s.leases = [answer(&[0], 0), answer(&[1], 0)].into();
        s.reject_weights = (1, 1);
        s.endless = true;
    });
    let fake = services.fake.clone();
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
    let report = services.run().await.unwrap();
    assert!(report.accepted >= 1 && report.refused >= 1 && report.finished && report.weights == 3, "{report:?}");
    services.fake.with(|s| {
        assert_eq!(std::mem::take(&mut s.weights_calls), [None; 3]);
        assert!(std::mem::take(&mut s.held_at_lease).iter().all(|t| *t == Some(held)));
    });
    // Rejected every time.
    services.fake.with(|s| s.reject_weights = (usize::MAX, 0));
    let text = services.run().await.unwrap_err().to_string();
    assert!(text.contains("another CRC-32C") && text.contains(&services.experience.address.to_string()), "{text}");
    assert_eq!(services.fake.with(|s| s.held_at_lease.len()), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_and_weights_arrive_during_generation() {
    let services = start_run().await;
    let mut options = services.options();
    options.config.rollout.max_staleness = 1;
    let mut long = answer(&[0, 1], 0);
    set_size(&mut long, 8, 600);
    services.fake.with(|s| {
        s.leases = [long].into();
        s.endless = true;
    });
    let fake = services.fake.clone();
    let next = tokio::spawn(async move {
        // During the first batch: new weights, and a group that does not need them.
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
    assert!(next.await.unwrap(), "the next lease was taken before the first batch was submitted");
    let sums: Vec<u32> = [1, 2].map(|seed| stream(0, &weights(seed)).1).into();
    services.fake.with(|s| {
        let mut mixed = 0;
        for g in &s.submitted {
            let mut seen: Vec<u64> = g.responses.iter().flat_map(|r| r.versions.clone()).collect();
            seen.sort_unstable();
            seen.dedup();
            let expected: Vec<_> = seen.iter().map(|v| (*v, sums[*v as usize])).collect();
            assert_eq!(g.weights.iter().map(|h| (h.version, h.checksum)).collect::<Vec<_>>(), expected);
            for r in &g.responses {
                assert!(r.versions.is_sorted() && r.versions.len() == r.tokens.len());
                mixed += usize::from(r.versions.first() != r.versions.last());
            }
        }
        assert!(mixed > 0, "no response spans the change of weights");
    });
}
