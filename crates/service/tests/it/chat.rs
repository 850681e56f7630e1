//! The chat client against a server that is slow, drops connections, fails, stalls and sends invalid responses.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use unveil_core::Secret;
use unveil_service::Backoff;
use unveil_service::chat::{ChatClient, ChatError, ChatMessage, ChatOptions, ChatRequest, ChatRole};
use unveil_testkit::{WebReply, WebServer};

const TIMEOUT: Duration = Duration::from_secs(20);
const GOOD: &str = r#"{"choices":[{"message":{"role":"assistant","content":"fine"},"finish_reason":"stop"}],
    "usage":{"prompt_tokens":7,"completion_tokens":2}}"#;

fn options(server: &WebServer) -> ChatOptions {
    ChatOptions {
        base_url: format!("{}/v1/", server.url()),
        model: "judge".into(),
        backoff: Backoff { initial: Duration::from_millis(20), max: Duration::from_millis(80) },
        ..ChatOptions::default()
    }
}

fn request() -> ChatRequest {
    ChatRequest {
        messages: vec![ChatMessage::text(ChatRole::User, "how is it?")],
        max_tokens: 8,
        temperature: 0.0,
        seed: None,
        json: true,
    }
}

#[tokio::test]
async fn request_format_and_usage() {
    let server = WebServer::start(|_| WebReply::immediate(200, GOOD));
    let key = Some(Secret::new("sk-test"));
    let client = ChatClient::new(ChatOptions { key, ..options(&server) }).unwrap();
    let reply = client.chat(&request(), TIMEOUT).await.unwrap();
    assert_eq!((reply.text.as_str(), reply.finish.as_str(), reply.usage), ("fine", "stop", Some([7, 2])));
    let seen = &server.requests()[0];
    assert_eq!(seen.path, "/v1/chat/completions");
    assert_eq!(seen.header("authorization"), Some("Bearer sk-test"));
    assert!(seen.body.contains(r#""model":"judge""#) && seen.body.contains("json_object"));
    assert_eq!((client.spent().requests, client.spent().tokens), (1, 9));
    assert!(!format!("{client:?}").contains("sk-test"));
}

#[tokio::test]
async fn transient_failures_are_retried() {
    let server = WebServer::start(|r| match r.number {
        0 => WebReply::immediate(500, "oops"),
        1 => WebReply::Drop,
        2 => WebReply::immediate(200, "{\"choices\": 3}"),
        3 => WebReply::Truncate(GOOD.into()),
        4 => WebReply::Answer {
            delay: Duration::ZERO,
            code: 429,
            headers: vec!["Retry-After: 0.2".into()],
            body: b"slow down".to_vec(),
        },
        _ => WebReply::immediate(200, GOOD),
    });
    let client = ChatClient::new(ChatOptions { tries: 6, ..options(&server) }).unwrap();
    let start = Instant::now();
    assert_eq!(client.chat(&request(), TIMEOUT).await.unwrap().text, "fine");
    assert_eq!(server.requests().len(), 6);
    assert!(start.elapsed() >= Duration::from_millis(200), "Retry-After is respected");
}

#[tokio::test]
async fn refusals_are_not_retried_and_hide_the_key() {
    let server = WebServer::start(|r| WebReply::immediate(401, format!("no: {}", r.header("authorization").unwrap())));
    let key = Some(Secret::new("sk-test"));
    let client = ChatClient::new(ChatOptions { key, ..options(&server) }).unwrap();
    let e = client.chat(&request(), TIMEOUT).await.unwrap_err();
    assert!(matches!(e, ChatError::Status { code: 401, .. }), "{e}");
    assert!(e.to_string().contains("***") && !e.to_string().contains("sk-test"), "{e}");
    assert_eq!(server.requests().len(), 1);
    let server = WebServer::start(|_| WebReply::Answer {
        delay: Duration::ZERO,
        code: 307,
        headers: vec!["Location: http://127.0.0.1:1/".into()],
        body: Vec::new(),
    });
    let e = ChatClient::new(options(&server)).unwrap().chat(&request(), TIMEOUT).await.unwrap_err();
    assert!(matches!(e, ChatError::Status { code: 307, .. }), "the key is not sent to a redirect target: {e}");
}

#[tokio::test]
async fn deadline_is_respected() {
    for reply in
        [WebReply::Stall, WebReply::immediate(503, "busy"), WebReply::delayed(Duration::from_secs(5), 200, GOOD)]
    {
        let server = WebServer::start(move |_| reply.clone());
        let client = ChatClient::new(ChatOptions { tries: 1000, ..options(&server) }).unwrap();
        let start = Instant::now();
        let e = client.chat(&request(), Duration::from_millis(300)).await.unwrap_err();
        assert!(matches!(e, ChatError::Deadline { .. }), "{e}");
        assert!(start.elapsed() < Duration::from_millis(1500), "{:?}", start.elapsed());
    }
}

#[tokio::test]
async fn stalled_requests_time_out_and_are_retried() {
    let server = WebServer::start(|r| if r.number == 0 { WebReply::Stall } else { WebReply::immediate(200, GOOD) });
    let attempt = Duration::from_millis(200);
    let client = ChatClient::new(ChatOptions { attempt, ..options(&server) }).unwrap();
    assert_eq!(client.chat(&request(), TIMEOUT).await.unwrap().text, "fine");
}

#[tokio::test]
async fn concurrency_and_rate_are_limited() {
    static CURRENT: AtomicUsize = AtomicUsize::new(0);
    static PEAK: AtomicUsize = AtomicUsize::new(0);
    let server = WebServer::start(|_| {
        PEAK.fetch_max(CURRENT.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(30));
        CURRENT.fetch_sub(1, Ordering::SeqCst);
        WebReply::immediate(200, GOOD)
    });
    let client = ChatClient::new(ChatOptions { concurrency: 3, ..options(&server) }).unwrap();
    let calls: Vec<_> = (0..12)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.chat(&request(), TIMEOUT).await.unwrap() })
        })
        .collect();
    for call in calls {
        call.await.unwrap();
    }
    assert_eq!(PEAK.load(Ordering::SeqCst), 3);
    let slow = ChatClient::new(ChatOptions { concurrency: 1, per_minute: 600.0, ..options(&server) }).unwrap();
    let start = Instant::now();
    for _ in 0..4 {
        slow.chat(&request(), TIMEOUT).await.unwrap();
    }
    assert!(start.elapsed() >= Duration::from_millis(300), "three delays of 100 ms: {:?}", start.elapsed());
}

#[tokio::test]
async fn exhausted_budget_is_an_error() {
    let server = WebServer::start(|_| WebReply::immediate(200, GOOD));
    let client = ChatClient::new(ChatOptions { max_tokens: 10, ..options(&server) }).unwrap();
    client.chat(&request(), TIMEOUT).await.unwrap();
    client.chat(&request(), TIMEOUT).await.unwrap();
    let e = client.chat(&request(), TIMEOUT).await.unwrap_err();
    assert_eq!(e, ChatError::Budget { what: "tokens", limit: 10 });
    let failing = WebServer::start(|_| WebReply::immediate(500, ""));
    let client = ChatClient::new(ChatOptions { max_requests: 3, tries: 10, ..options(&failing) }).unwrap();
    let e = client.chat(&request(), TIMEOUT).await.unwrap_err();
    assert_eq!(e, ChatError::Budget { what: "requests", limit: 3 });
    assert_eq!(failing.requests().len(), 3);
}

#[tokio::test]
async fn stragglers_are_hedged() {
    // The request after 30 quick ones stalls.
    let server = WebServer::start(|r| if r.number == 30 { WebReply::Stall } else { WebReply::immediate(200, GOOD) });
    let client = ChatClient::new(ChatOptions { hedge: Some(0.95), tries: 1, ..options(&server) }).unwrap();
    for _ in 0..31 {
        assert_eq!(client.chat(&request(), Duration::from_secs(5)).await.unwrap().text, "fine");
    }
    let spent = client.spent();
    assert!(spent.hedges >= 1 && spent.requests == 31 + spent.hedges, "{spent:?}");
}

#[tokio::test]
async fn oversized_responses_are_refused() {
    let server = WebServer::start(|_| WebReply::immediate(200, vec![b' '; unveil_service::MAX_RESPONSE_BYTES + 1]));
    let client = ChatClient::new(ChatOptions { tries: 1, ..options(&server) }).unwrap();
    let e = client.chat(&request(), TIMEOUT).await.unwrap_err();
    assert!(e.to_string().contains("larger than"), "{e}");
}

#[test]
fn invalid_options_are_named() {
    let good = ChatOptions { base_url: "http://127.0.0.1:1".into(), ..ChatOptions::default() };
    for (bad, word) in [
        (ChatOptions { base_url: "nowhere".into(), ..good.clone() }, "http(s)://"),
        (ChatOptions { base_url: "ftp://x".into(), ..good.clone() }, "http(s)://"),
        (ChatOptions { concurrency: 0, ..good.clone() }, "concurrency"),
        (ChatOptions { per_minute: f64::NAN, ..good.clone() }, "per_minute"),
        (ChatOptions { hedge: Some(1.0), ..good.clone() }, "hedge"),
        (ChatOptions { key: Some(Secret::new("a\u{1}b")), ..good.clone() }, "key"),
        (ChatOptions { ca: Some("/no/such.pem".into()), ..good.clone() }, "/no/such.pem"),
    ] {
        let e = ChatClient::new(bad).unwrap_err();
        assert!(e.to_string().contains(word), "{e}");
    }
}
