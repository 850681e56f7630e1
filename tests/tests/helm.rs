//! The Helm chart and the container (driven in Python, with Helm's engine and Kubernetes' schemas), and the roles as pods run them: each with
//! a disk of its own, in any order.

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use unveil_testkit::{Finished, MetricsPage, Process, Sandbox, binary, python, workspace};

const SOON: Duration = Duration::from_secs(120);

#[test]
fn the_chart_and_the_container_keep_to_their_rules_and_to_the_program() {
    let s = Sandbox::new();
    let tests = workspace().join("tests/helm").to_string_lossy().into_owned();
    let mut command = s.command(&python(), &["-m", "unittest", "discover", "-s", &tests, "-t", &tests]);
    let done = s.start(command.env("UNVEIL", binary("unveil")).env("PYTHONDONTWRITEBYTECODE", "1")).wait(2 * SOON).ok();
    let ran = done.stderr.lines().find_map(|l| l.strip_prefix("Ran ")?.split(' ').next()?.parse::<usize>().ok());
    assert!(ran.is_some_and(|n| n > 20), "{}", done.stderr);
}

/// A port that nobody listens on now, below those that the system gives to connections: a role that comes later finds it free.
fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = 12_000 + (std::process::id() % 1_000) as u16 * 16;
    let mut ports = std::iter::repeat_with(|| first + NEXT.fetch_add(1, Ordering::Relaxed) % 4_000);
    ports.find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).expect("a free port")
}

/// Metrics of the role that serves them on this port.
fn page(port: u16) -> MetricsPage {
    MetricsPage::get(SocketAddr::from(([127, 0, 0, 1], port)))
}

/// Roles as pods run them: one configuration, a run directory each, everything else by variables.
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

    /// Asks a health listener as a container's health command does.
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

/// `health.listen` of a pod.
fn health(port: u16) -> (&'static str, String) {
    ("UNVEIL__HEALTH__LISTEN", format!("127.0.0.1:{port}"))
}

#[test]
fn roles_that_share_no_disk_find_each_other_and_say_how_they_are() {
    let sandbox = Sandbox::new();
    let config = sandbox.micro_config().to_string_lossy().into_owned();
    let port: Vec<u16> = (0..10).map(|_| free_port()).collect();
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

    pods.run("rollout", &["prepare", "rollout"]).says(1, &["stage 1 has not ended", "step 40", &store]);
    pods.run("stage1", &["prepare", "sft"]).ok();
    // The worker is there before stage 1 has ended, before the reward service, and before the learner.
    let mut prepare = pods.start("rollout", "unveil", &["prepare", "rollout", "--wait", "100"], &[]);
    while !prepare.stderr().contains("waiting for stage 1") {
        assert!(prepare.is_running(), "{}", prepare.stderr());
        std::thread::sleep(Duration::from_millis(20));
    }
    pods.run("stage1", &["sft"]).ok();
    prepare.wait(SOON).ok();
    let mut rollout = pods.start("rollout", "unveil", &["rollout", "--worker", "pod-a#1"], &[health(port[5])]);
    pods.run("learner", &["prepare", "learner"]).ok();
    assert!(
        has("learner/stage1/config.json") && has("learner/data/records.jsonl") && has("rollout/stage1/config.json")
    );
    assert!(!has("rollout/data") && !has("learner/model-init"), "no more than a role needs");

    let mut learner = pods.start("learner", "unveil", &["learner"], &[health(port[6])]);
    learner.until("life", SOON, || (pods.health(port[6], false).code() == Some(0)).then_some(()));
    pods.health(port[6], true).says(1, &[&at(6), "is not ready"]);
    rollout.until("life", SOON, || (pods.health(port[5], false).code() == Some(0)).then_some(()));
    pods.health(port[5], true).says(1, &[&at(5), "is not ready"]);
    let rank = ["learner", "--set", "learner.parallel.rank=1"];
    let mut second = pods.start("learner", "unveil", &rank, &[health(port[7])]);
    pods.becomes_ready(&mut learner, port[6]);
    pods.becomes_ready(&mut second, port[7]);
    let mut reward = pods.start("reward", "unveil-reward", &["serve"], &[health(port[8])]);
    pods.becomes_ready(&mut reward, port[8]);
    pods.becomes_ready(&mut rollout, port[5]);

    let pages = learner.until("an update", SOON, || {
        let pages = [1, 4, 9].map(|i| page(port[i]));
        (pages[0].of("unveil_learner_trained_groups_total") > 0.0).then_some(pages)
    });
    MetricsPage::have(&pages, &names_of_the_dashboard());
    learner.wait(SOON).ok();
    second.wait(SOON).ok();
    rollout.wait(SOON).ok();
    pods.health(port[6], false).says(1, &[&at(6)]);
    reward.signal(Signal::SIGTERM);
    reward.wait(SOON).ok();
    let model = pods.sandbox.path("exported");
    pods.sandbox.unveil(&["checkpoint", "export", &store, "--out", &model.to_string_lossy()]).ok();
    assert!(model.join("config.json").exists(), "the model comes from the store, the pods are gone");
}

/// The series that the dashboard asks for.
fn names_of_the_dashboard() -> BTreeSet<String> {
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
