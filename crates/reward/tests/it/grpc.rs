//! The service over a real connection on port 0: scores, bad requests, deadlines, a port in use, graceful shutdown.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use unveil_config::Config;
use unveil_core::{Attention, BoxForm, Breakdown, Component, Finish, MaskReason, Record, Response};
use unveil_preprocess::codec::Sizes;
use unveil_proto::v1::reward_client::RewardClient as Generated;
use unveil_proto::{response_to_wire, v1};
use unveil_reward::{COMPONENTS, RewardClient, RewardError, Unscored, score_request, serve_with, unavailable_reason};
use unveil_service::{CancellationToken, connect};

const WAIT: Duration = Duration::from_secs(10);

async fn start_service() -> (SocketAddr, CancellationToken, tokio::task::JoinHandle<Result<(), RewardError>>) {
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
async fn service_scores_a_group_and_stops_gracefully() {
    let (address, stop, task) = start_service().await;
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
async fn bad_request_names_the_field_and_masks_components() {
    let (address, stop, _task) = start_service().await;
    let channel = connect(&address.to_string(), WAIT).await.unwrap();
    let bad = v1::ScoreRequest { image_width: 0, ..request() };
    let status = Generated::new(channel.clone()).score(bad.clone()).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("`image_width`"), "{}", status.message());
    let start = Instant::now();
    let b = RewardClient::new(channel).score(bad, WAIT).await;
    assert!(start.elapsed() < Duration::from_secs(5), "a bad request is not retried");
    assert!(b.iter().all(|b| b.total.is_none()));
    let Some(MaskReason::Failed(why)) = &b[0].components["localization"].reason else { panic!("{b:?}") };
    assert!(why.contains("image_width"), "{why}");
    stop.cancel();
}

#[tokio::test]
async fn unresponsive_service_masks_components() {
    // Accepts connections and never answers.
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
            assert!(c.masked && c.value.is_none() && matches!(c.reason, Some(MaskReason::Unavailable(_))));
        }
    }
}

/// Whether the service or the group causes a missing score decides how the group is handled.
#[tokio::test]
async fn unavailable_service_differs_from_refused_group() {
    let soon = Duration::from_millis(300);
    let serve = async |change: &dyn Fn(&mut Config)| {
        let mut config = Config::default();
        let stop = CancellationToken::new();
        change(&mut config);
        let (send, receive) = tokio::sync::oneshot::channel();
        let token = stop.clone();
        tokio::spawn(async move { serve_with(&config, token, |address| send.send(address).unwrap()).await });
        (receive.await.unwrap().to_string(), stop)
    };
    let try_score = async |address: &str, request: v1::ScoreRequest| {
        let channel = connect(address, WAIT).await.unwrap();
        RewardClient::new(channel).try_score(request, soon).await
    };
    let (open, _a) = serve(&|_| ()).await;
    assert_eq!(try_score(&open, request()).await.unwrap().len(), 2);
    let bad = v1::ScoreRequest { image_width: 0, ..request() };
    let Err(Unscored::Refused(why)) = try_score(&open, bad).await else { panic!("the group is at fault") };
    assert!(why.contains("image_width"), "{why}");
    // A request that is too large for the service is refused, and not a reason to wait for it.
    let (small, _b) = serve(&|c| c.reward.service.max_message_mib = 1).await;
    let large = v1::ScoreRequest { record_json: "x".repeat(2 << 20), ..request() };
    assert!(matches!(try_score(&small, large).await, Err(Unscored::Refused(_))));
    // Without the required token and with too many calls in flight, the service is unavailable.
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, "0123456789abcdef0123456789abcdef").unwrap();
    let (closed, _c) = serve(&|c| c.auth.token_file = token.display().to_string()).await;
    let (full, _d) = serve(&|c| c.reward.service.max_in_flight = 0).await;
    for (address, word) in [(&closed, "Unauthenticated"), (&full, "calls are already in progress")] {
        let Err(Unscored::Unavailable(why)) = try_score(address, request()).await else { panic!("{word}") };
        assert!(why.contains(word), "{why}");
        let channel = connect(address, WAIT).await.unwrap();
        assert!(RewardClient::new(channel).probe(soon).await.is_err(), "{word}");
    }
    let channel = connect(&open, WAIT).await.unwrap();
    RewardClient::new(channel).probe(WAIT).await.unwrap();
}

#[test]
fn unavailable_reason_needs_a_weighted_component() {
    let masked = |name: &str, reason: MaskReason| {
        let components = [(name.to_owned(), Component::masked(reason))].into();
        vec![Breakdown { id: "a".into(), index: 0, total: None, components }]
    };
    let reward = &Config::default().reward;
    let unavailable = || MaskReason::Unavailable("no answer".into());
    assert_eq!(
        unavailable_reason(&masked("category", unavailable()), reward).as_deref(),
        Some("`category`: no answer")
    );
    for other in [MaskReason::Failed("no".into()), MaskReason::NotApplicable, MaskReason::NoAttention] {
        assert_eq!(unavailable_reason(&masked("category", other), reward), None);
    }
    assert_eq!(unavailable_reason(&masked("without_weight", unavailable()), reward), None);
    let mut rewarded = masked("category", unavailable());
    rewarded[0].total = Some(0.5);
    assert_eq!(unavailable_reason(&rewarded, reward), None, "other components have values");
}

#[tokio::test]
async fn client_reconnects_to_a_restarted_service() {
    let (address, stop, task) = start_service().await;
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
async fn port_in_use_is_named() {
    let (address, stop, _task) = start_service().await;
    let mut config = Config::default();
    config.reward.listen = address.to_string();
    let e = serve_with(&config, CancellationToken::new(), |_| ()).await.unwrap_err().to_string();
    assert!(e.contains(&address.to_string()) && e.contains("in use") && e.contains("port 0"), "{e}");
    stop.cancel();
}
