//! A worker against an experience and a reward service in the same process, over real sockets.

use std::time::Duration;

use safetensors::tensor::{Dtype, TensorView};
use unveil_config::Config;
use unveil_proto::v1::experience_server::ExperienceServer;
use unveil_proto::v1::reward_server::RewardServer;
use unveil_proto::{attention_from_wire, v1};
use unveil_reward::mention::{mention, tokens_of};
use unveil_reward::vision::{VisionRule, rows_needed};
use unveil_service::{CancellationToken, Routes, RoutesBuilder, Running, ServeOptions, start};
use unveil_testkit::MetricsPage;

use crate::{RolloutError, WorkerOptions, WorkerReport, fixture, run};
use fake::{Damage, Fake, stream};

mod back;
mod ends;
mod fake;
mod lease;
mod order;

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

/// A port that nobody has, below those that the system hands out: a connection would take one of them before it is listened on.
fn free() -> std::net::SocketAddr {
    let free = |port: u16| std::net::TcpListener::bind(("127.0.0.1", port)).ok()?.local_addr().ok();
    (0..1000).find_map(|_| free(rand::random_range(12_000..30_000))).expect("a free port")
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

/// A class that answers of untrained weights name now and then.
const CLASS: &str = "e";

/// The same groups of that class.
fn named(mut leases: v1::LeaseResponse) -> v1::LeaseResponse {
    for g in &mut leases.groups {
        let mut record: serde_json::Value = serde_json::from_str(&g.record_json).unwrap();
        record["category"] = CLASS.into();
        g.record_json = record.to_string();
    }
    leases
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
        s.leases = [named(answer(&[0, 1], 0))].into();
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
            s.leases.push_back(named(answer(&[2], 4)));
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
                assert!(r.tokens.len() <= 6 && r.logprobs.len() == r.tokens.len());
                assert!(r.versions.iter().all(|&v| v == version));
                assert!(r.spans.iter().all(|x| r.text.get(x.begin as usize..x.end as usize).is_some()));
            }
            assert!(g.breakdowns.iter().all(|b| b.total == Some(0.25)) && g.breakdowns.len() == 3);
            assert!(g.generate_ms > 0.0 && g.reward_ms > 0.0);
        }
        assert_eq!(s.scored.len(), 3);
        // Rows travel for the tokens that name the class, and for no other.
        let rule = VisionRule::new(&Config::default().reward.vision_relevance);
        let (mut rows, mut tokens) = (0, 0);
        for score in &s.scored {
            assert_eq!((score.image_width, score.resized_height), (96, 96));
            for r in &score.responses {
                let fed = r.tokens.len() - usize::from(r.finish == "stop");
                assert_eq!(r.spans.len(), r.tokens.len());
                let spans: Vec<_> = r.spans.iter().map(|x| (x.begin as usize, x.end as usize)).collect();
                let names = [CLASS.to_owned()];
                let at = mention(&Config::default().reading(), &r.text, &names);
                let named = at.map(|at| tokens_of(&at, &spans)).unwrap_or_default();
                let mut needed = rows_needed(named, &r.text, &spans, rule);
                needed.retain(|t| *t < fed);
                needed.sort_unstable();
                let a = r.attention.clone().map(|a| attention_from_wire(a).unwrap());
                assert_eq!(a.as_ref().map_or(&[][..], |a| &a.tokens), needed);
                for row in a.iter().flat_map(|a| &a.rows) {
                    assert!(row.len() == 36 && (row.iter().sum::<f32>() - 1.0).abs() < 1e-4);
                }
                (rows, tokens) = (rows + needed.len(), tokens + fed);
            }
        }
        assert!(0 < rows && rows < tokens, "{rows} of {tokens}");
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
