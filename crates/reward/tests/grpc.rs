//! The service over a real connection on port 0: scores, bad requests, deadlines, the port in use, a graceful end.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use unveil_config::Config;
use unveil_core::{Attention, BoxForm, Finish, MaskReason, Record, Response};
use unveil_data::codec::Sizes;
use unveil_proto::v1::reward_client::RewardClient as Generated;
use unveil_proto::{response_to_wire, v1};
use unveil_reward::{COMPONENTS, RewardClient, RewardError, score_request, serve_with};
use unveil_service::{CancellationToken, connect};

const WAIT: Duration = Duration::from_secs(10);

async fn start() -> (SocketAddr, CancellationToken, tokio::task::JoinHandle<Result<(), RewardError>>) {
    let stop = CancellationToken::new();
    let (send, receive) = tokio::sync::oneshot::channel();
    let token = stop.clone();
    let task =
        tokio::spawn(async move { serve_with(&Config::default(), token, |address| send.send(address).unwrap()).await });
    (receive.await.unwrap(), stop, task)
}

fn request() -> v1::ScoreRequest {
    let json = r#"{"id":"a","image_size":[96,96],"category":"nodule","boxes":[[16,16,32,32]]}"#;
    let record: Record = serde_json::from_str(json).unwrap();
    let responses =
        [("[16,16,32,32] nodule", 13), ("no finding", 10)].iter().enumerate().map(|(index, (text, split))| {
            let r = Response {
                index,
                tokens: vec![5, 6],
                text: (*text).to_owned(),
                logprobs: vec![-0.5; 2],
                versions: vec![0; 2],
                finish: Finish::Stop,
            };
            let mut row = vec![0.0; 36];
            row[7] = 1.0;
            let attention = Attention { grid: [6, 6], tokens: vec![0, 1], rows: vec![row; 2] };
            response_to_wire(&r, &[(0, *split), (*split, text.len())], Some(&attention))
        });
    let sizes = Sizes { original: (96, 96), resized: (96, 96) };
    score_request(&record, &sizes, BoxForm::Absolute, responses.collect()).unwrap()
}

#[tokio::test]
async fn scores_a_group_and_ends_gracefully() {
    let (address, stop, task) = start().await;
    let channel = connect(&format!("http://{address}"), WAIT).await.unwrap();
    let health = HealthClient::new(channel.clone())
        .check(HealthCheckRequest { service: "unveil.v1.Reward".into() })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(health.status, 1);
    let b = RewardClient::new(channel).score(request(), WAIT).await;
    assert_eq!((b.len(), b[0].id.as_str(), b[0].index, b[1].index), (2, "a", 0, 1));
    for name in COMPONENTS {
        assert_eq!(b[0].components[name].value, Some(1.0), "{name}");
    }
    assert!((b[0].total.unwrap() - 1.8).abs() < 1e-9);
    assert!((b[1].total.unwrap() - 0.1).abs() < 1e-9, "only the format is right");
    stop.cancel();
    tokio::time::timeout(WAIT, task).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn a_bad_request_names_the_field_and_is_masked_for_the_caller() {
    let (address, stop, _task) = start().await;
    let channel = connect(&address.to_string(), WAIT).await.unwrap();
    let bad = v1::ScoreRequest { image_width: 0, ..request() };
    let status = Generated::new(channel.clone()).score(bad.clone()).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("`image_width`"), "{}", status.message());
    let start = Instant::now();
    let b = RewardClient::new(channel).score(bad, WAIT).await;
    assert!(start.elapsed() < Duration::from_secs(5), "a bad request is not tried again");
    assert!(b.iter().all(|b| b.total.is_none()));
    let Some(MaskReason::Failed(why)) = &b[0].components["localization"].reason else { panic!("{b:?}") };
    assert!(why.contains("image_width"), "{why}");
    stop.cancel();
}

#[tokio::test]
async fn a_service_that_does_not_answer_masks_and_never_scores_zero() {
    // Accepts connections and says nothing.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let _held = tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            held.push(stream);
        }
    });
    let channel = connect(&address.to_string(), WAIT).await.unwrap();
    let start = Instant::now();
    let b = RewardClient::new(channel).score(request(), Duration::from_millis(400)).await;
    assert!(start.elapsed() < Duration::from_secs(3));
    assert_eq!(b.len(), 2);
    for b in &b {
        assert_eq!(b.total, None);
        assert_eq!(b.components.len(), COMPONENTS.len());
        for c in b.components.values() {
            assert!(c.masked && c.value.is_none() && matches!(c.reason, Some(MaskReason::Failed(_))));
        }
    }
}

#[tokio::test]
async fn a_service_that_comes_back_is_used_again() {
    let (address, stop, task) = start().await;
    let client = RewardClient::connect(&address.to_string(), WAIT).await.unwrap();
    assert!(client.score(request(), WAIT).await[0].total.is_some());
    stop.cancel();
    task.await.unwrap().unwrap();
    let again = CancellationToken::new();
    let token = again.clone();
    let mut config = Config::default();
    config.reward.listen = address.to_string();
    let task = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(300)).await;
        serve_with(&config, token, |_| ()).await
    });
    assert!(client.score(request(), WAIT).await[0].total.is_some());
    again.cancel();
    task.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let (address, stop, _task) = start().await;
    let mut config = Config::default();
    config.reward.listen = address.to_string();
    let e = serve_with(&config, CancellationToken::new(), |_| ()).await.unwrap_err().to_string();
    assert!(e.contains(&address.to_string()) && e.contains("in use") && e.contains("port 0"), "{e}");
    stop.cancel();
}
