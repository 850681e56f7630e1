//! Telemetry of a run: metrics that match the events, one trace per group through all roles, health; and a worker that
//! is stopped while others continue.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::common::small_run::SmallRun;
use serde_json::Value;
use unveil_config::Config;
use unveil_learner::{EventSink, Ready, SilentProgress, run_rl};
use unveil_rollout::{WorkerOptions, WorkerReport};
use unveil_service::{CancellationToken, TraceOptions, check_health, init_tracing};
use unveil_testkit::{MetricsPage, Span, SpanCollector, free_address, ignored_test};

const SOON: Duration = Duration::from_secs(10);

/// Keeps the events, all metrics pages at the last update, and the learner's page at the first checkpoint.
struct ObservedRun {
    seen: Vec<Value>,
    last: u64,
    at: [SocketAddr; 3],
    pages: Vec<MetricsPage>,
    at_checkpoint: Option<MetricsPage>,
}

impl EventSink for ObservedRun {
    fn append(&mut self, event: &Value) -> std::io::Result<()> {
        if event["kind"] == "checkpoint" && self.at_checkpoint.is_none() {
            self.at_checkpoint = Some(MetricsPage::get(self.at[0]));
        }
        if event["kind"] == "train" && event["step"] == self.last {
            // The worker counts a group when it receives the verdict.
            wait_for_value(self.at[1], "unveil_rollout_groups_total{verdict=\"accepted\"}", 2.0 * self.last as f64);
            self.pages = self.at.iter().map(|at| MetricsPage::get(*at)).collect();
        }
        self.seen.push(event.clone());
        Ok(())
    }
}

/// Starts a worker on a thread that ends with the run or when stopped.
fn work(
    config: &Config,
    small: &SmallRun,
    at: SocketAddr,
    reward: SocketAddr,
    name: &str,
    stop: CancellationToken,
) -> Working {
    let model = small.model();
    let name = name.to_owned();
    let options = WorkerOptions::new(config.clone(), model, format!("http://{at}"), format!("http://{reward}"), name);
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(unveil_rollout::run(options, stop)).unwrap()
    })
}

type Working = std::thread::JoinHandle<WorkerReport>;

/// Starts the reward service on a thread.
fn rewards(config: &Config, stop: &CancellationToken) -> SocketAddr {
    let config = config.clone();
    let stop = stop.clone();
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(unveil_reward::serve_with(&config, stop, |at| send.send(at).unwrap())).unwrap();
    });
    receive.recv_timeout(SOON).unwrap()
}

/// Waits until a series has a value.
fn wait_for_value(page: SocketAddr, series: &str, value: f64) {
    let start = Instant::now();
    while MetricsPage::get(page).value(series) != Some(value) {
        assert!(start.elapsed() < 2 * SOON, "{series} should be {value}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn is_healthy(address: SocketAddr, service: &str) -> bool {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(check_health(&address.to_string(), service, SOON)).unwrap()
}

/// The trace subscriber is global to a process, so the traced run gets its own.
#[test]
fn metrics_match_events_and_each_group_is_one_trace() {
    let child = ignored_test("telemetry::traced_run").output().unwrap();
    let output = format!("{}{}", String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
    assert!(child.status.success() && output.contains("1 passed"), "{output}");
}

#[test]
#[ignore = "started in its own process by another test"]
fn traced_run() {
    let mut small = SmallRun::new(5);
    let collector = SpanCollector::start();
    let pages = [free_address(), free_address(), free_address()];
    let c = &mut small.config;
    c.learner.steps = 3;
    c.learner.checkpoint_every = 2;
    c.learner.kl_coef = 0.01;
    c.rollout.threads = 1;
    c.rollout.groups_per_lease = 2;
    c.learner.metrics_listen = pages[0].to_string();
    c.rollout.metrics_listen = pages[1].to_string();
    c.reward.service.metrics_listen = pages[2].to_string();
    let options =
        TraceOptions { role: "all", level: "warn", json: false, run: "runs/x", collector: collector.endpoint() };
    let tracing = init_tracing(&options).unwrap();
    let stop = CancellationToken::new();
    let mut worker = None;
    let reward = rewards(&small.config, &stop);
    let mut events = ObservedRun { seen: vec![], last: 3, at: pages, pages: vec![], at_checkpoint: None };
    let model = small.model();
    let out = small.dir.path().join("rl-out");
    let mut silent = SilentProgress;
    let stage = small.stage(&model, &out, &mut events, &mut silent, CancellationToken::new());
    let outcome = run_rl(stage, |ready| {
        let Ready::Experience(at) = ready else { return };
        assert!(
            is_healthy(at, "") && is_healthy(at, "unveil.v1.Experience"),
            "the service is reported once it is ready"
        );
        worker = Some(work(&small.config, &small, at, reward, "w0", stop.clone()));
    });
    assert_eq!(outcome.unwrap().step, 3);
    let report = worker.unwrap().join().unwrap();
    assert_eq!((report.accepted, report.finished), (6, true));
    stop.cancel();
    drop(tracing);
    check_metrics_against_events(&events);
    check_one_trace_per_group(&collector.spans(), &events.seen);
}

fn check_metrics_against_events(events: &ObservedRun) {
    let [learner, rollout, reward] = &events.pages[..] else { panic!("{:?}", events.seen) };
    learner.assert_documented("learner");
    rollout.assert_documented("rollout");
    reward.assert_documented("reward");
    let trained: Vec<&Value> = events.seen.iter().filter(|e| e["kind"] == "train").collect();
    let sum = |key: &str| trained.iter().map(|e| e[key].as_f64().unwrap()).sum::<f64>();
    let last = trained.last().unwrap();
    let close = |series: &str, wanted: f64| {
        let value = learner.expect_value(series);
        assert!((value - wanted).abs() <= 1e-9 * wanted.abs().max(1.0), "{series}: {value}, events {wanted}");
    };
    close("unveil_learner_updates_total", 3.0);
    close("unveil_learner_trained_groups_total", 6.0);
    close("unveil_learner_responses_total", sum("responses"));
    close("unveil_learner_tokens_total", sum("tokens"));
    close("unveil_learner_part_seconds_sum{part=\"update\"}", sum("step_ms") / 1e3);
    close("unveil_learner_part_seconds_sum{part=\"wait\"}", sum("wait_ms") / 1e3);
    close("unveil_learner_gradient_norm", last["grad_norm"].as_f64().unwrap());
    close("unveil_learner_kl_reference_nats", last["kl_reference"].as_f64().unwrap());
    close("unveil_learner_loss{part=\"loss\"}", last["loss"]["loss"].as_f64().unwrap());
    close("unveil_learner_reward{component=\"total\"}", last["reward"]["total"].as_f64().unwrap());
    close("unveil_learner_agreement_nats", last["agreement"].as_f64().unwrap());
    close("unveil_learner_staleness_versions_count", 6.0);
    close("unveil_learner_staleness_versions_bucket{le=\"0.0\"}", 6.0);
    close("unveil_learner_groups{state=\"leasable\"}", 0.0);
    close("unveil_learner_workers", 1.0);
    let saved = events.at_checkpoint.as_ref().unwrap();
    assert!(saved.expect_value("unveil_learner_checkpoint_save_seconds_count") >= 1.0);
    assert!(saved.expect_value("unveil_learner_checkpoint_age_seconds") < 30.0);
    let scored = reward.expect_value("unveil_reward_responses_total");
    assert_eq!(
        (scored, rollout.expect_value("unveil_rollout_groups_total{verdict=\"accepted\"}")),
        (sum("responses"), 6.0)
    );
    assert_eq!(rollout.expect_value("unveil_rollout_tokens_total"), sum("tokens"));
}

/// Checks that lease, generation, score, submission and update of each group form one trace across all roles.
fn check_one_trace_per_group(spans: &[Span], events: &[Value]) {
    let groups: Vec<&Span> = spans.iter().filter(|s| s.name == "group").collect();
    let mut traces: Vec<&str> = groups.iter().map(|g| g.trace.as_str()).collect();
    traces.sort_unstable();
    traces.dedup();
    assert_eq!((groups.len(), traces.len()), (6, 6), "{spans:#?}");
    for group in groups {
        let trace: Vec<&Span> = spans.iter().filter(|s| s.trace == group.trace).collect();
        let the = |name: &str| {
            let mut matching = trace.iter().filter(|s| s.name == name);
            let first = *matching.next().unwrap_or_else(|| panic!("no {name} in {trace:#?}"));
            assert!(matching.next().is_none(), "{name} twice in {trace:#?}");
            first
        };
        let below = |upper: &str, name: &str| {
            assert_eq!(the(name).parent, the(upper).id, "{name} is below {upper}: {trace:#?}");
            assert!(the(name).time.0 >= the(upper).time.0 && the(name).time.1 >= the(name).time.0);
        };
        below("group", "lease");
        below("lease", "generate");
        below("lease", "score");
        below("score", "rewards");
        below("lease", "submit");
        below("submit", "take");
        below("group", "train");
        assert_eq!((group.parent.as_str(), trace.len()), ("", 8), "{trace:#?}");
        assert_eq!(the("take").attribute("verdict"), Some("ACCEPTED"));
        let step: u64 = the("train").attribute("step").unwrap().parse().unwrap();
        let update = events.iter().find(|e| e["kind"] == "train" && e["step"] == step).unwrap();
        let record = group.attribute("record").unwrap();
        assert!(update["groups"].as_array().unwrap().iter().any(|g| g == record), "{record} in {update}");
        assert!(the("take").time.0 <= the("train").time.0, "trained after it came in");
    }
}

#[test]
fn stopped_worker_releases_its_groups_immediately() {
    let mut small = SmallRun::new(5);
    let c = &mut small.config;
    c.learner.steps = 1;
    c.rollout.threads = 1;
    c.rollout.groups_per_lease = 2;
    // Leases outlast the test, so that a group is freed only if it is released.
    c.rollout.lease_s = 3600.0;
    c.rollout.stall_s = 7200.0;
    let page = free_address();
    c.learner.metrics_listen = page.to_string();
    let mut slow = c.clone();
    slow.reward.deadline_s = 3600.0;
    let stop_slow = CancellationToken::new();
    let stop_all = CancellationToken::new();
    let mut workers = Vec::new();
    let reward = rewards(&small.config, &stop_all);
    let unused_address = free_address();
    let model = small.model();
    let out = small.dir.path().join("rl-out");
    let mut silent = SilentProgress;
    let mut events: Vec<Value> = vec![];
    let stage = small.stage(&model, &out, &mut events, &mut silent, CancellationToken::new());
    let outcome = run_rl(stage, |ready| {
        let Ready::Experience(at) = ready else { return };
        // The first worker keeps both groups, because its reward service never answers.
        workers.push(work(&slow, &small, at, unused_address, "slow", stop_slow.clone()));
        wait_for_value(page, "unveil_learner_groups{state=\"leased\"}", 2.0);
        workers.push(work(&small.config, &small, at, reward, "quick", stop_all.clone()));
        wait_for_value(page, "unveil_learner_workers", 2.0);
        std::thread::sleep(Duration::from_millis(500));
        let now = MetricsPage::get(page);
        let state = |s: &str| now.expect_value(&format!("unveil_learner_groups{{state=\"{s}\"}}"));
        assert_eq!((state("leased"), state("leasable"), state("ready")), (2.0, 0.0, 0.0), "nothing is left for it");
        stop_slow.cancel();
    });
    assert_eq!(outcome.unwrap().step, 1);
    let reports: Vec<WorkerReport> = workers.into_iter().map(|w| w.join().unwrap()).collect();
    let totals: Vec<_> = reports.iter().map(|r| (r.accepted, r.finished)).collect();
    assert_eq!(totals, [(0, false), (2, true)]);
    stop_all.cancel();
}
