//! The service with clients that send too many, too large, too slow or unauthorised requests; streams; TLS; the metrics page.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use futures::StreamExt;
use tokio::io::AsyncWriteExt;
use tonic::{Code, Request, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use unveil_config::{Config, Role};
use unveil_core::{MaskReason, Record};
use unveil_preprocess::codec::Sizes;
use unveil_proto::v1;
use unveil_proto::v1::reward_client::RewardClient as Generated;
use unveil_proto::v1::reward_stream_client::RewardStreamClient;
use unveil_reward::{RewardClient, RewardError, score_request, serve_with};
use unveil_service::issue::{Existing, IssueOptions, issue};
use unveil_service::{CancellationToken, client_options, connect};
use unveil_testkit::{MetricsPage, WebReply, WebServer, free_address};

const WAIT: Duration = Duration::from_secs(20);

struct Served {
    address: SocketAddr,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), RewardError>>,
}

async fn serve(config: &Config) -> Served {
    let stop = CancellationToken::new();
    let (send, receive) = tokio::sync::oneshot::channel();
    let token = stop.clone();
    let config = config.clone();
    let task = tokio::spawn(async move { serve_with(&config, token, |address| send.send(address).unwrap()).await });
    Served { address: receive.await.unwrap(), stop, task }
}

fn request(id: &str) -> v1::ScoreRequest {
    let json = format!(r#"{{"id":"{id}","image_size":[96,96],"category":"nodule","boxes":[[16,16,32,32]]}}"#);
    let record: Record = serde_json::from_str(&json).unwrap();
    let response = v1::Response { text: "[16,16,32,32] nodule".into(), ..Default::default() };
    let sizes = Sizes { original: (96, 96), resized: (96, 96) };
    score_request(&record, &sizes, Default::default(), vec![response]).unwrap()
}

fn peak_memory_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

/// A request whose text may be invalid UTF-8.
#[derive(Clone, PartialEq, prost::Message)]
struct RawRequest {
    #[prost(bytes = "vec", tag = "1")]
    record_json: Vec<u8>,
}

#[tokio::test]
async fn malformed_messages_are_refused() {
    let served = serve(&Config::default()).await;
    let channel = connect(&served.address.to_string(), WAIT).await.unwrap();
    let nested = format!("{{\"id\":{}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
    for record_json in [vec![0xff, 0xfe, 0x00], b"\xf0\x28\x8c\x28".to_vec(), Vec::new(), nested.into_bytes()] {
        let mut raw = tonic::client::Grpc::new(channel.clone());
        raw.ready().await.unwrap();
        let codec = tonic_prost::ProstCodec::<RawRequest, v1::ScoreResponse>::default();
        let path = "/unveil.v1.Reward/Score".parse().unwrap();
        let status = raw.unary(Request::new(RawRequest { record_json }), path, codec).await.unwrap_err();
        assert!(matches!(status.code(), Code::Internal | Code::InvalidArgument), "{status}");
    }
    assert!(Generated::new(channel).score(request("b")).await.is_ok());
    served.stop.cancel();
}

/// Configures a judge; one that never answers keeps calls in flight.
fn with_judge(judge: &WebServer) -> Config {
    let mut c = Config::default();
    c.reward.relevance.weight = 1.0;
    c.reward.judge.base_url = judge.url();
    c.reward.judge.model = "m".into();
    c.reward.judge.deadline_s = 1.5;
    c.reward.judge.attempt_s = 10.0;
    c
}

#[tokio::test]
async fn excess_calls_are_refused_immediately() {
    let judge = WebServer::start(|_| WebReply::Stall);
    let mut c = with_judge(&judge);
    c.reward.service.max_in_flight = 3;
    let served = serve(&c).await;
    let channel = connect(&served.address.to_string(), WAIT).await.unwrap();
    let calls: Vec<_> = (0..40)
        .map(|i| {
            let mut client = Generated::new(channel.clone());
            tokio::spawn(async move {
                let start = Instant::now();
                (client.score(request(&i.to_string())).await, start.elapsed())
            })
        })
        .collect();
    let mut answered = 0;
    let mut refused = 0;
    for call in calls {
        match call.await.unwrap() {
            (Ok(r), _) => {
                answered += 1;
                let r = r.into_inner();
                assert!(r.breakdowns[0].components["relevance"].masked && r.breakdowns[0].total.is_some());
            }
            (Err(status), took) => {
                refused += 1;
                assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
                assert!(took < Duration::from_secs(1), "{took:?}");
            }
        }
    }
    assert_eq!((answered, refused), (3, 37));
    let health = HealthClient::new(channel).check(HealthCheckRequest::default()).await;
    assert!(health.is_ok(), "health checks are not refused");
    served.stop.cancel();
}

#[tokio::test]
async fn too_large_messages_are_refused_in_bounded_memory() {
    let mut c = Config::default();
    c.reward.service.max_message_mib = 1;
    c.reward.service.max_in_flight = 4;
    let served = serve(&c).await;
    let channel = connect(&served.address.to_string(), WAIT).await.unwrap();
    let mut client = Generated::new(channel.clone()).max_encoding_message_size(1 << 30);
    let before = peak_memory_mib();
    let mut large = request("a");
    large.responses[0].text = "x".repeat(48 << 20);
    let sent = peak_memory_mib();
    for _ in 0..4 {
        let status = client.score(large.clone()).await.unwrap_err();
        assert!(matches!(status.code(), Code::OutOfRange | Code::ResourceExhausted), "{status}");
    }
    // The copies of the sender are in this process, too: 48 MiB as text, and 48 MiB encoded.
    assert!(peak_memory_mib() < sent.max(before) + 48 * 5, "{before} {sent} {}", peak_memory_mib());
    assert!(client.score(request("b")).await.is_ok());
    served.stop.cancel();
}

/// A stream of frames that stops simulates a call whose body does not arrive.
#[tokio::test]
async fn slow_callers_are_disconnected() {
    let mut c = Config::default();
    c.reward.service.call_s = 0.5;
    let served = serve(&c).await;
    let channel = connect(&served.address.to_string(), WAIT).await.unwrap();
    // A stream that sends one group and then stops.
    let messages = futures::stream::iter([request("a")]).chain(futures::stream::pending());
    let mut answers = RewardStreamClient::new(channel.clone()).score_groups(messages).await.unwrap().into_inner();
    assert!(answers.message().await.unwrap().is_some());
    let start = Instant::now();
    let status = answers.message().await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    assert!(start.elapsed() < Duration::from_secs(5));
    // A unary call whose message never ends.
    let mut unary = tonic::client::Grpc::new(channel.clone());
    unary.ready().await.unwrap();
    let path = "/unveil.v1.Reward/Score".parse().unwrap();
    let codec = tonic_prost::ProstCodec::<v1::ScoreRequest, v1::ScoreResponse>::default();
    let never = futures::stream::pending::<v1::ScoreRequest>();
    let start = Instant::now();
    let status = unary.client_streaming(Request::new(never), path, codec).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    assert!(start.elapsed() < Duration::from_secs(5));
    // A silent connection does not block other clients.
    let mut silent = tokio::net::TcpStream::connect(served.address).await.unwrap();
    silent.write_all(b"PRI").await.unwrap();
    assert!(Generated::new(channel).score(request("b")).await.is_ok());
    served.stop.cancel();
    tokio::time::timeout(WAIT, served.task).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn streams_answer_in_order_until_a_bad_request() {
    let served = serve(&Config::default()).await;
    let channel = connect(&served.address.to_string(), WAIT).await.unwrap();
    let mut client = RewardStreamClient::new(channel);
    let mut list: Vec<v1::ScoreRequest> = (0..200).map(|i| request(&i.to_string())).collect();
    for (i, r) in list.iter_mut().enumerate() {
        r.responses[0].index = i as u32;
    }
    let mut answers = client.score_groups(futures::stream::iter(list.clone())).await.unwrap().into_inner();
    for i in 0..200 {
        let answer = answers.message().await.unwrap().unwrap();
        assert_eq!((answer.breakdowns[0].index, answer.breakdowns[0].components.len()), (i, 4));
    }
    assert!(answers.message().await.unwrap().is_none());
    list[50].image_width = 0;
    let mut answers = client.score_groups(futures::stream::iter(list)).await.unwrap().into_inner();
    let mut good = 0;
    let status = loop {
        match answers.message().await {
            Ok(Some(_)) => good += 1,
            Ok(None) => panic!("the stream ended without an error"),
            Err(status) => break status,
        }
    };
    assert_eq!((good, status.code()), (50, Code::InvalidArgument));
    assert!(status.message().contains("image_width"), "{status}");
    served.stop.cancel();
}

#[tokio::test]
async fn streams_limit_the_sender_and_hold_their_slot() {
    let judge = WebServer::start(|_| WebReply::Stall);
    let mut c = with_judge(&judge);
    c.reward.service.max_in_flight = 1;
    c.reward.judge.deadline_s = 0.5;
    let served = serve(&c).await;
    let channel = connect(&served.address.to_string(), WAIT).await.unwrap();
    let pulled = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counter = std::sync::Arc::clone(&pulled);
    let endless = futures::stream::iter(0..).map(move |i: u64| {
        counter.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        let mut r = request(&i.to_string());
        r.responses[0].text = "x".repeat(1 << 20);
        r
    });
    let enough = CancellationToken::new();
    let messages = endless.take_until(enough.clone().cancelled_owned());
    let answers = RewardStreamClient::new(channel.clone()).score_groups(messages).await.unwrap().into_inner();
    tokio::time::sleep(Duration::from_millis(700)).await;
    let sent = pulled.load(std::sync::atomic::Ordering::SeqCst);
    assert!(sent < 80, "{sent} MiB were sent while eight groups are open");
    let status = Generated::new(channel.clone()).score(request("b")).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "the stream holds the only slot");
    enough.cancel();
    drop(answers);
    let start = Instant::now();
    while Generated::new(channel.clone()).score(request("c")).await.is_err() {
        assert!(start.elapsed() < WAIT, "the slot is released");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    served.stop.cancel();
}

#[tokio::test]
async fn running_calls_finish_on_shutdown() {
    let judge = WebServer::start(|_| WebReply::delayed(Duration::from_millis(600), 500, "late"));
    let served = serve(&with_judge(&judge)).await;
    let channel = connect(&served.address.to_string(), WAIT).await.unwrap();
    let mut client = Generated::new(channel);
    let call = tokio::spawn(async move { client.score(request("a")).await });
    tokio::time::sleep(Duration::from_millis(200)).await;
    served.stop.cancel();
    assert!(call.await.unwrap().is_ok(), "it was drained");
    tokio::time::timeout(WAIT, served.task).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn configured_token_is_required() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    std::fs::write(&file, "s3cret-of-this-run\n").unwrap();
    let mut c = Config::default();
    c.auth.token_file = file.display().to_string();
    let served = serve(&c).await;
    let address = served.address.to_string();
    let channel = connect(&address, WAIT).await.unwrap();
    let mut bare = Generated::new(channel.clone());
    assert_eq!(bare.score(request("a")).await.unwrap_err().code(), Code::Unauthenticated);
    let mut wrong = Request::new(request("a"));
    wrong.metadata_mut().insert("authorization", "Bearer s3cret-of-this-ruN".parse().unwrap());
    assert_eq!(bare.score(wrong).await.unwrap_err().code(), Code::Unauthenticated);
    let stream = RewardStreamClient::new(channel.clone()).score_groups(futures::stream::iter([request("a")])).await;
    assert_eq!(stream.unwrap_err().code(), Code::Unauthenticated);
    assert!(HealthClient::new(channel).check(HealthCheckRequest::default()).await.is_ok());
    let options = client_options(&c, Role::Rollout).unwrap();
    let client = RewardClient::connect_with(&address, &options, WAIT).await.unwrap();
    assert!(client.score(request("a"), WAIT).await[0].total.is_some());
    let without = RewardClient::connect(&address, WAIT).await.unwrap().score(request("a"), WAIT).await;
    assert!(matches!(&without[0].components["format"].reason, Some(MaskReason::Unavailable(w)) if w.contains("token")));
    served.stop.cancel();
}

#[tokio::test]
async fn tls_with_and_without_client_certificates() {
    let dir = tempfile::tempdir().unwrap();
    let issue_all = |name: &str| {
        let options = IssueOptions { hosts: vec![], days: 1, existing: Existing::Refuse };
        let dir = dir.path().join(name);
        issue(&dir, &options).unwrap();
        dir.display().to_string()
    };
    let ours = issue_all("ours");
    let theirs = issue_all("theirs");
    let mut c = Config::default();
    c.tls.dir = ours.clone();
    let with = |change: &dyn Fn(&mut Config)| {
        let mut c = c.clone();
        change(&mut c);
        c
    };
    // A client that TLS refuses retries until its time is up; the others get through, however busy the machine is.
    let score_within = async |address: &str, c: &Config, limit: Duration| {
        let options = client_options(c, Role::Rollout).unwrap();
        let client = RewardClient::connect_with(address, &options, limit).await.map_err(|e| e.to_string())?;
        let scored = client.score(request("a"), limit).await;
        scored[0].total.ok_or_else(|| format!("{:?}", scored[0].components["format"].reason))
    };
    let score = async |address: &str, c: &Config| score_within(address, c, WAIT).await;
    let refused = async |address: &str, c: &Config| {
        score_within(address, c, Duration::from_millis(800)).await.unwrap_err();
    };
    let served = serve(&c).await;
    let https = format!("https://localhost:{}", served.address.port());
    score(&https, &c).await.unwrap();
    score(&served.address.to_string(), &c).await.unwrap();
    refused(&https, &with(&|c| c.tls.dir = theirs.clone())).await;
    refused(&https, &with(&|c| c.tls.mutual = false)).await;
    refused(&format!("http://{}", served.address), &c).await;
    served.stop.cancel();

    // A certificate of the authority is not enough: its name must belong to a role that may call.
    let served = serve(&with(&|c| drop(c.tls.names.insert("rollout".into(), vec!["somebody".into()])))).await;
    let e = score(&format!("https://localhost:{}", served.address.port()), &c).await.unwrap_err();
    assert!(e.contains("may call the reward service"), "{e}");
    served.stop.cancel();

    let open = with(&|c| c.tls.mutual = false);
    let served = serve(&open).await;
    let https = format!("https://localhost:{}", served.address.port());
    score(&https, &open).await.unwrap();
    refused(&https, &with(&|c| (c.tls.mutual, c.tls.dir) = (false, theirs.clone()))).await;
    // The same service as a custom scorer, verified by its configured certificate authority.
    for (ca, trusted) in [(format!("{ours}/client/ca.crt"), true), (String::new(), false)] {
        let mut c = Config::default();
        let address = https.replacen("https", "grpcs", 1);
        let deadline_s = if trusted { WAIT.as_secs_f64() } else { 2.0 };
        let custom = serde_json::json!({"name": "there", "address": address, "deadline_s": deadline_s, "range": [0.0, 2.0], "ca": ca});
        c.reward.custom.push(serde_json::from_value(custom).unwrap());
        let local = serve(&c).await;
        let client = RewardClient::connect(&local.address.to_string(), WAIT).await.unwrap();
        let b = client.score(request("a"), WAIT).await;
        assert_eq!(b[0].components["there"].value.is_some(), trusted, "{b:?}");
        local.stop.cancel();
    }
    served.stop.cancel();

    std::fs::remove_file(dir.path().join("ours/reward/tls.key")).unwrap();
    let e = serve_with(&c, CancellationToken::new(), |_| ()).await.unwrap_err().to_string();
    assert!(e.contains("ours/reward/tls.key") && e.contains("unveil tls init"), "{e}");
}

#[tokio::test]
async fn custom_scorer_can_be_another_reward_service() {
    let mut other = Config::default();
    other.reward.custom.clear();
    let served = serve(&other).await;
    let mut c = Config::default();
    let scorers =
        [("format_there", served.address.to_string(), WAIT.as_secs_f64()), ("nobody", "127.0.0.1:9".into(), 2.0)];
    for (name, address, deadline_s) in scorers {
        let custom = serde_json::json!({"name": name, "address": format!("grpc://{address}"), "deadline_s": deadline_s, "range": [0.0, 2.0]});
        c.reward.custom.push(serde_json::from_value(custom).unwrap());
    }
    let local = serve(&c).await;
    let client = RewardClient::connect(&local.address.to_string(), WAIT).await.unwrap();
    let b = &client.score(request("a"), WAIT).await[0];
    // The other service has no component of that name, so its total counts; all components but vision relevance are perfect.
    assert!((b.components["format_there"].value.unwrap() - 1.8).abs() < 1e-9, "{b:?}");
    assert!(b.components["format_there"].version.contains("unveil-reward"));
    assert!(b.components["nobody"].masked && b.total.is_some());
    served.stop.cancel();
    local.stop.cancel();
}

#[tokio::test]
async fn metrics_page_counts_scores_and_masks() {
    let free = free_address();
    let mut c = Config::default();
    c.reward.service.metrics_listen = free.to_string();
    let served = serve(&c).await;
    let mut client = Generated::new(connect(&served.address.to_string(), WAIT).await.unwrap());
    for i in 0..5 {
        client.score(request(&i.to_string())).await.unwrap();
    }
    let bad: Status = client.score(v1::ScoreRequest::default()).await.unwrap_err();
    assert_eq!(bad.code(), Code::InvalidArgument);
    let page = tokio::task::spawn_blocking(move || MetricsPage::get(free)).await.unwrap();
    for (series, value) in [
        ("unveil_reward_component_value_sum{component=\"localization\"}", 5.0),
        ("unveil_reward_masked_total{component=\"vision_relevance\",reason=\"no_attention\"}", 5.0),
        ("unveil_reward_group_seconds_count", 5.0),
        ("unveil_reward_calls{state=\"refused\"}", 0.0),
    ] {
        assert_eq!(page.expect_value(series), value, "{series}");
    }
    page.assert_documented("reward");
    served.stop.cancel();
}
