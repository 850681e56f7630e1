//! Readiness and shutdown of the service: it is ready once its scorers are loaded, and drains its calls when it stops.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use unveil_config::Config;
use unveil_config::schema::RelevanceKind;
use unveil_core::Record;
use unveil_preprocess::codec::Sizes;
use unveil_proto::v1;
use unveil_proto::v1::reward_client::RewardClient as Generated;
use unveil_reward::{RewardError, run_serve, score_request};
use unveil_service::{CancellationToken, READY, check_health, connect};
use unveil_testkit::{WebReply, WebServer, free_address};

const WAIT: Duration = Duration::from_secs(20);

/// A running service that calls a judge, with a listener for health checks.
struct Served {
    address: SocketAddr,
    health: String,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), RewardError>>,
}

fn serve(judge: &str, prompt: &Path, drain_s: f64) -> Served {
    let address = free_address();
    let health = free_address().to_string();
    let mut c = Config::default();
    c.reward.listen = address.to_string();
    c.health.listen.clone_from(&health);
    c.reward.relevance.kind = RelevanceKind::Judge;
    c.reward.relevance.weight = 1.0;
    c.reward.judge.base_url = judge.to_owned();
    c.reward.judge.model = "m".into();
    c.reward.judge.prompt = prompt.display().to_string();
    c.reward.judge.deadline_s = 1.0;
    c.reward.service.drain_s = drain_s;
    let stop = CancellationToken::new();
    let token = stop.clone();
    let task = tokio::spawn(async move { run_serve(&c, token).await });
    Served { address, health, stop, task }
}

impl Served {
    async fn is_serving(&self, service: &str) -> bool {
        check_health(&self.health, service, WAIT).await.unwrap()
    }

    async fn wait_ready(&self, ready: bool) {
        let start = Instant::now();
        while self.is_serving(READY).await != ready {
            assert!(start.elapsed() < WAIT, "ready should be {ready}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Starts a call that the judge delays until its deadline.
    async fn start_slow_call(&self) -> tokio::task::JoinHandle<Result<v1::ScoreResponse, tonic::Status>> {
        let json = r#"{"id":"a","image_size":[96,96],"category":"nodule","answer":"a nodule","boxes":[[16,16,32,32]]}"#;
        let record: Record = serde_json::from_str(json).unwrap();
        let response = v1::Response { text: "[16,16,32,32] nodule".into(), ..Default::default() };
        let sizes = Sizes { original: (96, 96), resized: (96, 96) };
        let request = score_request(&record, &sizes, Default::default(), vec![response]).unwrap();
        let mut client = Generated::new(connect(&self.address.to_string(), WAIT).await.unwrap());
        let call = tokio::spawn(async move { client.score(request).await.map(tonic::Response::into_inner) });
        tokio::time::sleep(Duration::from_millis(200)).await;
        call
    }
}

fn write_prompt(path: &Path) {
    std::fs::write(path, "Reply with a score.\n===\n{{ question }} {{ reference }} {{ answer }}").unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn service_is_alive_first_and_ready_once_scorers_load() {
    let dir = tempfile::tempdir().unwrap();
    // A named pipe, so that reading the prompt blocks until it is written.
    let prompt = dir.path().join("prompt");
    assert!(Command::new("mkfifo").arg(&prompt).status().unwrap().success());
    let served = serve("http://127.0.0.1:9/v1", &prompt, 5.0);
    let until = Instant::now() + Duration::from_millis(300);
    while Instant::now() < until {
        assert!(served.is_serving("").await && !served.is_serving(READY).await, "it waits for its prompt");
    }
    assert!(connect(&served.address.to_string(), Duration::from_millis(50)).await.is_err(), "no client is served yet");
    tokio::task::spawn_blocking(move || write_prompt(&prompt)).await.unwrap();
    served.wait_ready(true).await;
    served.stop.cancel();
    served.wait_ready(false).await;
    served.task.await.unwrap().unwrap();
    // A service whose scorers cannot be loaded never becomes ready.
    let served = serve("http://127.0.0.1:9/v1", &dir.path().join("none"), 5.0);
    assert!(served.task.await.unwrap().unwrap_err().to_string().contains("none"));
    assert!(!check_health(&served.health, READY, WAIT).await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_are_drained_for_the_drain_time_only() {
    let dir = tempfile::tempdir().unwrap();
    let prompt = dir.path().join("prompt");
    write_prompt(&prompt);
    let judge = WebServer::start(|_| WebReply::Stall);
    for (drain_s, finished) in [(10.0, true), (0.2, false)] {
        let served = serve(&judge.url(), &prompt, drain_s);
        served.wait_ready(true).await;
        let call = served.start_slow_call().await;
        let start = Instant::now();
        served.stop.cancel();
        served.wait_ready(false).await;
        assert!(start.elapsed() < Duration::from_millis(700) && !call.is_finished(), "not ready while it drains");
        served.task.await.unwrap().unwrap();
        // Calls that the shutdown does not wait for end with the process.
        match tokio::time::timeout(Duration::from_millis(200), call).await {
            Ok(answer) => {
                let answer = answer.unwrap().unwrap();
                assert!(finished && answer.breakdowns[0].components["relevance"].masked, "{answer:?}");
            }
            Err(_) => assert!(!finished, "it was answered"),
        }
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    }
}
