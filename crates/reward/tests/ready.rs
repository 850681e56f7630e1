//! When the service says that it is ready, and how it ends: what it holds is finished, and nothing new is sent to it.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use unveil_config::Config;
use unveil_config::schema::RelevanceKind;
use unveil_core::Record;
use unveil_data::codec::Sizes;
use unveil_proto::v1;
use unveil_proto::v1::reward_client::RewardClient as Generated;
use unveil_reward::{RewardError, run_serve, score_request};
use unveil_service::{CancellationToken, READY, check_health, connect};
use unveil_testkit::{WebReply, WebServer};

const WAIT: Duration = Duration::from_secs(20);

fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// A service that asks a judge, with a listener for probes.
struct Served {
    address: SocketAddr,
    health: String,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), RewardError>>,
}

fn serve(judge: &str, prompt: &Path, drain_s: f64) -> Served {
    let (address, health) = (free(), free().to_string());
    let mut c = Config::default();
    c.reward.listen = address.to_string();
    c.health.listen.clone_from(&health);
    (c.reward.relevance.kind, c.reward.relevance.weight) = (RelevanceKind::Judge, 1.0);
    (c.reward.judge.base_url, c.reward.judge.model) = (judge.to_owned(), "m".into());
    c.reward.judge.prompt = prompt.display().to_string();
    (c.reward.judge.deadline_s, c.reward.service.drain_s) = (1.0, drain_s);
    let stop = CancellationToken::new();
    let token = stop.clone();
    let task = tokio::spawn(async move { run_serve(&c, token).await });
    Served { address, health, stop, task }
}

impl Served {
    async fn is(&self, service: &str) -> bool {
        check_health(&self.health, service, WAIT).await.unwrap()
    }

    async fn becomes(&self, ready: bool) {
        let start = Instant::now();
        while self.is(READY).await != ready {
            assert!(start.elapsed() < WAIT, "ready should be {ready}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// A call that the judge holds up for as long as it may.
    async fn hold(&self) -> tokio::task::JoinHandle<Result<v1::ScoreResponse, tonic::Status>> {
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

fn write(path: &Path) {
    std::fs::write(path, "Reply with a score.\n===\n{{ question }} {{ reference }} {{ answer }}").unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn it_is_alive_at_once_and_ready_when_its_scorers_are_loaded() {
    let dir = tempfile::tempdir().unwrap();
    // A pipe: whoever reads the prompt waits until somebody writes it.
    let prompt = dir.path().join("prompt");
    assert!(Command::new("mkfifo").arg(&prompt).status().unwrap().success());
    let served = serve("http://127.0.0.1:9/v1", &prompt, 5.0);
    let until = Instant::now() + Duration::from_millis(300);
    while Instant::now() < until {
        assert!(served.is("").await && !served.is(READY).await, "it waits for its prompt");
    }
    assert!(connect(&served.address.to_string(), Duration::from_millis(50)).await.is_err(), "nobody is served yet");
    tokio::task::spawn_blocking(move || write(&prompt)).await.unwrap();
    served.becomes(true).await;
    served.stop.cancel();
    served.becomes(false).await;
    served.task.await.unwrap().unwrap();
    // What cannot be loaded never becomes ready.
    let served = serve("http://127.0.0.1:9/v1", &dir.path().join("none"), 5.0);
    assert!(served.task.await.unwrap().unwrap_err().to_string().contains("none"));
    assert!(!check_health(&served.health, READY, WAIT).await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_it_holds_is_finished_within_the_time_for_it_and_no_longer() {
    let dir = tempfile::tempdir().unwrap();
    let prompt = dir.path().join("prompt");
    write(&prompt);
    let judge = WebServer::start(|_| WebReply::Stall);
    for (drain_s, finished) in [(10.0, true), (0.2, false)] {
        let served = serve(&judge.url(), &prompt, drain_s);
        served.becomes(true).await;
        let (call, start) = (served.hold().await, Instant::now());
        served.stop.cancel();
        served.becomes(false).await;
        assert!(start.elapsed() < Duration::from_millis(700) && !call.is_finished(), "not ready while it drains");
        served.task.await.unwrap().unwrap();
        // What the end of the server does not wait for ends with the process.
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
