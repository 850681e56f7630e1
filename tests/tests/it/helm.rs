//! The Helm chart and the container (tested in Python, with Helm's engine and Kubernetes' schemas), and the roles as in pods: each with its
//! own disk, started in any order.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use nix::sys::signal::Signal;
use unveil_testkit::{Finished, MetricsPage, Process, Sandbox, binary, free_address, python, workspace};

const SOON: Duration = Duration::from_secs(120);

#[test]
fn chart_and_container_pass_their_tests() {
    let s = Sandbox::new();
    let tests = workspace().join("tests/helm").to_string_lossy().into_owned();
    let mut command = s.command(&python(), &["-m", "unittest", "discover", "-s", &tests, "-t", &tests]);
    let done = s.start(command.env("UNVEIL", binary("unveil")).env("PYTHONDONTWRITEBYTECODE", "1")).wait(2 * SOON).ok();
    let ran = done.stderr.lines().find_map(|l| l.strip_prefix("Ran ")?.split(' ').next()?.parse::<usize>().ok());
    assert!(ran.is_some_and(|n| n > 20), "{}", done.stderr);
}

/// Fetches the metrics page on a port.
fn metrics_page(port: u16) -> MetricsPage {
    MetricsPage::get(SocketAddr::from(([127, 0, 0, 1], port)))
}

/// Roles as in pods: one configuration, separate run directories, everything else in environment variables.
struct Pods {
    sandbox: Sandbox,
    config: String,
    variables: Vec<(&'static str, String)>,
}

impl Pods {
    fn start(&self, pod: &str, program: &str, args: &[&str], more: &[(&str, String)]) -> Process {
        let args = [args, &["--config", &self.config]].concat();
        let mut command = self.sandbox.command(&binary(program), &args);
        command.env("UNVEIL__RUN__DIR", self.sandbox.path(pod)).envs(self.variables.iter().map(|(k, v)| (k, v)));
        self.sandbox.start(command.envs(more.iter().map(|(k, v)| (k, v))))
    }

    fn run(&self, pod: &str, args: &[&str]) -> Finished {
        self.start(pod, "unveil", args, &[]).wait(SOON)
    }

    /// Queries a health endpoint like the health command of a container.
    fn health(&self, port: u16, ready: bool) -> Finished {
        let address = format!("127.0.0.1:{port}");
        let args = ["health", "--address", &address, "--ready"];
        let args = &args[..if ready { 4 } else { 3 }];
        self.sandbox.start(&mut self.sandbox.command(&binary("unveil-reward"), args)).wait(SOON)
    }

    fn becomes_ready(&self, process: &mut Process, port: u16) {
        process.until("readiness", SOON, || (self.health(port, true).code() == Some(0)).then_some(()));
    }
}

/// Returns the variable for `health.listen` of a pod.
fn health_variable(port: u16) -> (&'static str, String) {
    ("UNVEIL__HEALTH__LISTEN", format!("127.0.0.1:{port}"))
}

#[test]
fn roles_without_a_shared_disk_run_and_report_health() {
    let sandbox = Sandbox::new();
    let config = sandbox.micro_config();
    let port: Vec<u16> = (0..10).map(|_| free_address().port()).collect();
    let at = |i: usize| format!("127.0.0.1:{}", port[i]);
    let store = sandbox.path("store").to_string_lossy().into_owned();
    let variables = vec![
        ("UNVEIL__CHECKPOINT__URL", store.clone()),
        ("UNVEIL__LEARNER__LISTEN", at(0)),
        ("UNVEIL__LEARNER__ADDRESS", format!("http://{}", at(0))),
        ("UNVEIL__LEARNER__METRICS_LISTEN", at(1)),
        ("UNVEIL__LEARNER__PARALLEL__RANKS", "2".to_owned()),
        ("UNVEIL__LEARNER__PARALLEL__RENDEZVOUS", at(2)),
        ("UNVEIL__ROLLOUT__METRICS_LISTEN", at(9)),
        ("UNVEIL__REWARD__LISTEN", at(3)),
        ("UNVEIL__REWARD__ADDRESS", format!("http://{}", at(3))),
        ("UNVEIL__REWARD__SERVICE__METRICS_LISTEN", at(4)),
    ];
    let pods = Pods { sandbox, config, variables };
    let has = |file: &str| pods.sandbox.path(file).exists();

    pods.run("rollout", &["prepare", "rollout"]).fails_with(1, &["stage 1 has not ended", "step 40", &store]);
    pods.run("stage1", &["prepare", "sft"]).ok();
    // The worker starts before stage 1 has ended, before the reward service, and before the learner.
    let mut prepare = pods.start("rollout", "unveil", &["prepare", "rollout", "--wait", "100"], &[]);
    while !prepare.stderr().contains("waiting for stage 1") {
        assert!(prepare.is_running(), "{}", prepare.stderr());
        std::thread::sleep(Duration::from_millis(20));
    }
    pods.run("stage1", &["sft"]).ok();
    prepare.wait(SOON).ok();
    let mut rollout = pods.start("rollout", "unveil", &["rollout", "--worker", "pod-a#1"], &[health_variable(port[5])]);
    pods.run("learner", &["prepare", "learner"]).ok();
    assert!(
        has("learner/stage1/config.json") && has("learner/data/records.jsonl") && has("rollout/stage1/config.json")
    );
    assert!(!has("rollout/data") && !has("learner/model-init"), "no more than a role needs");

    let mut learner = pods.start("learner", "unveil", &["learner"], &[health_variable(port[6])]);
    learner.until("life", SOON, || (pods.health(port[6], false).code() == Some(0)).then_some(()));
    pods.health(port[6], true).fails_with(1, &[&at(6), "is not ready"]);
    rollout.until("life", SOON, || (pods.health(port[5], false).code() == Some(0)).then_some(()));
    pods.health(port[5], true).fails_with(1, &[&at(5), "is not ready"]);
    let rank = ["learner", "--set", "learner.parallel.rank=1"];
    let mut second = pods.start("learner", "unveil", &rank, &[health_variable(port[7])]);
    pods.becomes_ready(&mut learner, port[6]);
    pods.becomes_ready(&mut second, port[7]);
    let mut reward = pods.start("reward", "unveil-reward", &["serve"], &[health_variable(port[8])]);
    pods.becomes_ready(&mut reward, port[8]);
    pods.becomes_ready(&mut rollout, port[5]);

    let pages = learner.until("an update", SOON, || {
        let pages = [1, 4, 9].map(|i| metrics_page(port[i]));
        (pages[0].expect_value("unveil_learner_trained_groups_total") > 0.0).then_some(pages)
    });
    MetricsPage::assert_contain(&pages, &dashboard_series());
    learner.wait(SOON).ok();
    second.wait(SOON).ok();
    rollout.wait(SOON).ok();
    pods.health(port[6], false).fails_with(1, &[&at(6)]);
    reward.signal(Signal::SIGTERM);
    reward.wait(SOON).ok();
    let model = pods.sandbox.path("exported");
    pods.sandbox.unveil(&["checkpoint", "export", &store, "--out", &model.to_string_lossy()]).ok();
    assert!(model.join("config.json").exists(), "the model comes from the store alone");
}

/// Returns the metric series used by the dashboard.
fn dashboard_series() -> BTreeSet<String> {
    let path = workspace().join("cluster/helm/unveil/dashboards/unveil.json");
    let text = std::fs::read_to_string(&path).expect("the dashboard");
    let board: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let panels = board["panels"].as_array().expect("panels");
    let mut names = BTreeSet::new();
    for expression in panels.iter().flat_map(|p| p["targets"].as_array().expect("targets")) {
        let expression = expression["expr"].as_str().expect("an expression");
        let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        names.extend(words.filter(|w| w.starts_with("unveil_")).map(str::to_owned));
    }
    assert!(names.len() > 20, "{names:?}");
    names
}
