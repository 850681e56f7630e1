//! Tests against a server that is slow, drops connections, and replies 429, 500 and invalid text; killing and resuming; budget; review.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use unveil_collect::{COLLECTED, CollectError, CollectSummary, JOURNAL, StopReason, collect, review};
use unveil_config::schema::Collect;
use unveil_core::{Record, Secret};
use unveil_data::image_store::Image;
use unveil_data::records::RecordFile;
use unveil_preprocess::codec::{Sizes, answer_text, codec, read_answer};
use unveil_service::CancellationToken;
use unveil_testkit::{Authority, WebReply, WebRequest, WebServer, ignored_test};

/// Writes `n` records with one box each, except the last, which has no finding.
fn write_data(dir: &Path, n: usize) -> PathBuf {
    let mut lines = Vec::new();
    for k in 0..n {
        let mut image = Image::new(60, 40);
        image.rgb_mut().iter_mut().enumerate().for_each(|(i, v)| *v = (i + 40 * k) as u8);
        std::fs::write(dir.join(format!("{k}.png")), image.to_png().unwrap()).unwrap();
        let boxes = if k + 1 == n { json!([]) } else { json!([[10, 8, 30, 28]]) };
        lines.push(
            json!({"id": format!("r{k}"), "image": format!("{k}.png"), "image_size": [60, 40], "question": "What is abnormal?", "modality": "CT",
                   "category": "liver cyst", "boxes": boxes, "split": "train"})
            .to_string(),
        );
    }
    let path = dir.join("records.jsonl");
    std::fs::write(&path, lines.join("\n")).unwrap();
    path
}

fn settings(server: &WebServer) -> Collect {
    Collect {
        base_url: format!("{}/v1", server.url()),
        model: "seer".into(),
        concurrency: 2,
        tries: 6,
        attempt_s: 0.6,
        deadline_s: 20.0,
        price_prompt: 1.0,
        price_answer: 2.0,
        ..Collect::default()
    }
}

async fn run(data: &Path, out: &Path, settings: &Collect) -> CollectSummary {
    collect(data, out, settings, None, CancellationToken::new(), |_, _, _| ()).await.unwrap()
}

/// Returns text and image URL of the user message of a request.
fn parts(request: &WebRequest) -> (String, String) {
    let body: Value = serde_json::from_str(&request.body).unwrap();
    let content = &body["messages"].as_array().unwrap().last().unwrap()["content"];
    let text = content[0]["text"].as_str().unwrap().to_owned();
    (text, content[1]["image_url"]["url"].as_str().unwrap().to_owned())
}

fn completion(text: &str) -> String {
    json!({"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 1000, "completion_tokens": 100}}).to_string()
}

/// Replies like a good model.
fn good_reply(request: &WebRequest) -> WebReply {
    let (text, _) = parts(request);
    let second = text.contains("A colleague answered");
    WebReply::immediate(
        200,
        completion(if second { "Something dark and round lies in the liver: a liver cyst." } else { "A liver cyst." }),
    )
}

fn journal(out: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(out.join(JOURNAL)).unwrap();
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

#[tokio::test]
async fn both_prompts_are_sent_and_yield_training_answers() {
    let dir = tempfile::tempdir().unwrap();
    let file = write_data(dir.path(), 4);
    let out = dir.path().join("out");
    let server = WebServer::start(good_reply);
    let key = Some(Secret::new("sk-secret"));
    let mut progress = Vec::new();
    let s = collect(&file, &out, &settings(&server), key, CancellationToken::new(), |done, total, cost| {
        progress.push((done, total, cost))
    })
    .await
    .unwrap();
    assert_eq!((s.to_ask, s.answered, s.asked, s.reused, s.faulty), (3, 3, 6, 0, 0), "{s:?}");
    assert!(s.is_complete() && progress.last().is_some_and(|p| (p.0, p.1) == (3, 3)));
    // 6 answers of 1000 prompt and 100 answer tokens at 1 and 2 per million.
    assert!((s.cost - 6.0 * 1.2e-3).abs() < 1e-12 && s.tokens == [6000, 600], "{s:?}");
    let seen = server.requests();
    let (first, image) = parts(seen.iter().find(|r| !parts(r).0.contains("colleague")).unwrap());
    assert!(first.contains("liver cyst: from (10, 8) to (30, 28)") && first.contains("(CT)"), "{first}");
    assert_eq!(seen[0].header("authorization"), Some("Bearer sk-secret"));
    use base64::Engine;
    let png = base64::engine::general_purpose::STANDARD
        .decode(image.strip_prefix("data:image/png;base64,").unwrap())
        .unwrap();
    let sent = Image::decode(&png, "sent").unwrap();
    let frame = sent.pixel(9, 15);
    assert_eq!((sent.width(), frame.iter().filter(|v| [0, 255].contains(*v)).count()), (60, 3), "{frame:?} is a mark");
    let second = seen.iter().map(|r| parts(r).0).find(|t| t.contains("A colleague answered")).unwrap();
    assert!(second.contains("A liver cyst.\n"), "the diagnosis is in the second prompt: {second}");

    let written = RecordFile::load(&out.join(COLLECTED)).unwrap();
    assert_eq!(written.records.len(), 4);
    let r: &Record = &written.records[0];
    assert_eq!(r.answer, "Something dark and round lies in the liver: a liver cyst.\n<region>");
    assert_eq!((r.extra["collect"]["model"].as_str(), written.records[3].extra.get("collect")), (Some("seer"), None));
    assert_eq!(written.open_image(r).unwrap().width(), 60);
    let sizes = Sizes { original: (60, 40), resized: (56, 56) };
    let target = answer_text(codec(unveil_core::BoxForm::PerMille), r, &sizes).unwrap();
    let back =
        read_answer(codec(unveil_core::BoxForm::PerMille), &unveil_core::AnswerReader::default(), &target, &sizes);
    assert!(back.boxes[0].iou(&r.boxes[0]) > 0.95 && back.category == "liver cyst", "{target}");

    let lines = journal(&out);
    let kinds = |kind: &str| lines.iter().filter(|l| l["kind"] == kind).count();
    assert_eq!((kinds("ask"), kinds("answer"), lines.len()), (6, 6, 12));
    assert!(lines[0]["user"].as_str().unwrap().contains("liver cyst") && !lines[0].to_string().contains("base64"));
    assert!(!std::fs::read_to_string(out.join(JOURNAL)).unwrap().contains("sk-secret"));
}

#[tokio::test]
async fn failed_requests_are_retried_and_answers_reused() {
    let dir = tempfile::tempdir().unwrap();
    let file = write_data(dir.path(), 4);
    let out = dir.path().join("out");
    let server = WebServer::start(|r| match r.number {
        0 => WebReply::immediate(500, "oops"),
        1 => WebReply::Drop,
        2 => WebReply::immediate(200, "{\"choices\": 3}"),
        3 => WebReply::Stall,
        4 => WebReply::Answer {
            delay: Duration::ZERO,
            code: 429,
            headers: vec!["Retry-After: 0.1".into()],
            body: b"slow".to_vec(),
        },
        5 => WebReply::Truncate(completion("x").into()),
        _ => good_reply(r),
    });
    let s = run(&file, &out, &settings(&server)).await;
    assert_eq!((s.answered, s.asked), (3, 6), "{s:?}");
    assert_eq!(server.requests().len(), 12);
    let again = run(&file, &out, &settings(&server)).await;
    assert_eq!((again.answered, again.asked, again.reused, server.requests().len()), (3, 0, 6, 12), "{again:?}");
    assert_eq!(again.cost, s.cost);
}

#[tokio::test]
async fn failed_records_are_reported_and_retried_by_the_next_run() {
    let dir = tempfile::tempdir().unwrap();
    let file = write_data(dir.path(), 4);
    let out = dir.path().join("out");
    std::fs::write(dir.path().join("1.png"), b"no image").unwrap();
    let image = |r: &WebRequest| parts(r).1;
    let first = std::sync::Mutex::new(None::<String>);
    let server = WebServer::start(move |r| {
        let refused = first.lock().unwrap().get_or_insert_with(|| image(r)).clone();
        if image(r) == refused { WebReply::immediate(400, "the picture is not allowed") } else { good_reply(r) }
    });
    let s = run(&file, &out, &settings(&server)).await;
    assert_eq!((s.answered, s.failed.len(), s.is_complete()), (1, 2, false), "{s:?}");
    let reasons: String = s.failed.iter().map(|f| f.reason.clone()).collect();
    assert!(reasons.contains("not allowed") && reasons.contains("1.png"), "{reasons}");
    assert_eq!(journal(&out).iter().filter(|l| l["kind"] == "failed").count(), 1);
    let well = WebServer::start(good_reply);
    let s = run(&file, &out, &settings(&well)).await;
    assert_eq!((s.answered, s.failed.len(), s.asked, s.reused), (2, 1, 2, 2), "{s:?}");
}

#[tokio::test]
async fn run_stops_if_the_endpoint_refuses_or_is_down() {
    let dir = tempfile::tempdir().unwrap();
    let file = write_data(dir.path(), 30);
    let no = WebServer::start(|_| WebReply::immediate(401, "wrong key"));
    let s = run(&file, &dir.path().join("a"), &settings(&no)).await;
    assert!(matches!(&s.stopped, Some(StopReason::Refused { answer }) if answer.contains("wrong key")), "{s:?}");
    assert!(no.requests().len() <= 4, "{}", no.requests().len());
    let down = WebServer::start(|_| WebReply::immediate(503, "away"));
    let s = run(&file, &dir.path().join("b"), &Collect { tries: 1, ..settings(&down) }).await;
    assert!(matches!(&s.stopped, Some(StopReason::Down { failure }) if failure.contains("away")), "{s:?}");
    assert!((6..=8).contains(&down.requests().len()) && s.answered == 0, "{}", down.requests().len());
}

#[tokio::test]
async fn budget_applies_across_runs() {
    let dir = tempfile::tempdir().unwrap();
    let file = write_data(dir.path(), 12);
    let out = dir.path().join("out");
    let server = WebServer::start(good_reply);
    // An answer costs 0.0012; eight fit.
    let limited = Collect { budget: 0.01, concurrency: 1, ..settings(&server) };
    let s = run(&file, &out, &limited).await;
    assert_eq!(s.stopped, Some(StopReason::Budget));
    assert!(s.cost <= 0.01 && server.requests().len() == 8 && s.answered == 4, "{} {s:?}", server.requests().len());
    let again = run(&file, &out, &limited).await;
    assert_eq!(
        (again.asked, again.answered, again.stopped),
        (0, 4, Some(StopReason::Budget)),
        "existing answers are kept"
    );
    let more = run(&file, &out, &Collect { budget: 1.0, ..limited }).await;
    assert_eq!((more.answered, more.asked + 8, server.requests().len()), (11, 22, 22), "{more:?}");
}

#[tokio::test]
async fn request_rate_is_limited() {
    let dir = tempfile::tempdir().unwrap();
    let file = write_data(dir.path(), 4);
    let server = WebServer::start(good_reply);
    let start = std::time::Instant::now();
    // Two at once, then one every 0.1 s: the sixth starts 0.4 s after the first.
    let s = run(&file, &dir.path().join("out"), &Collect { per_minute: 600.0, ..settings(&server) }).await;
    assert!(s.answered == 3 && start.elapsed() >= Duration::from_millis(390), "{:?}", start.elapsed());
}

#[tokio::test]
async fn interrupted_run_keeps_its_answers() {
    let dir = tempfile::tempdir().unwrap();
    let file = write_data(dir.path(), 30);
    let out = dir.path().join("out");
    let cancel = CancellationToken::new();
    let inner = cancel.clone();
    let server = WebServer::start(move |r| {
        if r.number == 9 {
            inner.cancel();
        }
        good_reply(r)
    });
    let s = collect(&file, &out, &settings(&server), None, cancel, |_, _, _| ()).await.unwrap();
    assert_eq!(s.stopped, Some(StopReason::Interrupted));
    let held = journal(&out).iter().filter(|l| l["kind"] == "answer").count();
    let s = run(&file, &out, &settings(&server)).await;
    assert!(s.is_complete() && s.reused == held && s.asked == 58 - held && held >= 4, "{held} {s:?}");
}

/// Environment variable with the JSON of a child's arguments: records, output directory, base URL, and the file of the summary.
const CHILD_VARIABLE: &str = "UNVEIL_TEST_COLLECT";

/// The body of the child process: collects answers and writes the summary.
#[tokio::test]
#[ignore = "started by another test"]
async fn child() {
    let [data, out, base_url, summary]: [String; 4] =
        serde_json::from_str(&std::env::var(CHILD_VARIABLE).unwrap()).unwrap();
    let settings = Collect { base_url, model: "seer".into(), concurrency: 3, ..Collect::default() };
    let collected = run(Path::new(&data), Path::new(&out), &settings).await;
    std::fs::write(summary, serde_json::to_vec(&collected).unwrap()).unwrap();
}

#[test]
fn killed_run_resumes_without_repeating_answers() {
    let dir = tempfile::tempdir().unwrap();
    let file = write_data(dir.path(), 16);
    let out = dir.path().join("out");
    let server = WebServer::start(|r| {
        std::thread::sleep(Duration::from_millis(40));
        good_reply(r)
    });
    let summary = dir.path().join("summary.json");
    let arguments = json!([file, out, format!("{}/v1", server.url()), summary]).to_string();
    let start = || {
        let mut command = ignored_test("endpoint::child");
        command.env(CHILD_VARIABLE, &arguments).stdout(std::process::Stdio::null()).spawn().unwrap()
    };
    for asked in [5, 14] {
        let mut child = start();
        while server.requests().len() < asked {
            assert_eq!(child.try_wait().unwrap(), None, "it exited before it was killed");
            std::thread::sleep(Duration::from_millis(2));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    // Only requests in flight at a kill may be repeated: three requests, two kills.
    let answers = |out: &Path| {
        let text = std::fs::read_to_string(out.join(JOURNAL)).unwrap();
        text.lines().filter(|l| l.contains("\"kind\":\"answer\"")).count()
    };
    let held = answers(&out);
    let before = server.requests().len();
    assert!(held >= before - 6 && held >= 5, "{held} of {before}");
    assert!(start().wait().unwrap().success());
    let summary: Value = serde_json::from_slice(&std::fs::read(&summary).unwrap()).unwrap();
    assert_eq!(
        (&summary["answered"], &summary["reused"], &summary["asked"]),
        (&json!(15), &json!(held), &json!(30 - held))
    );
    assert_eq!((server.requests().len() - before, answers(&out)), (30 - held, 30), "each answer once");
}

#[tokio::test]
async fn changed_prompts_ask_again_and_bad_settings_fail() {
    let dir = tempfile::tempdir().unwrap();
    let file = write_data(dir.path(), 2);
    let out = dir.path().join("out");
    let server = WebServer::start(good_reply);
    run(&file, &out, &settings(&server)).await;
    let prompt = dir.path().join("own.txt");
    std::fs::write(&prompt, "Be brief.\n===\nA colleague answered: {{ diagnosis }}. Rewrite it.").unwrap();
    let changed = Collect { reflection_prompt: prompt.display().to_string(), ..settings(&server) };
    let s = run(&file, &out, &changed).await;
    assert_eq!((s.asked, s.reused), (1, 1));
    let body: Value = serde_json::from_str(&server.requests().last().unwrap().body).unwrap();
    assert_eq!(body["messages"][0], json!({"role": "system", "content": "Be brief."}));
    assert_eq!(body["messages"][1]["content"][0]["text"], "A colleague answered: A liver cyst.. Rewrite it.");
    let none = dir.path().join("none.jsonl");
    std::fs::write(&none, r#"{"id":"a","image":"0.png"}"#).unwrap();
    let quiet = CancellationToken::new;
    let e = collect(&none, &out, &settings(&server), None, quiet(), |_, _, _| ()).await.unwrap_err();
    assert!(matches!(e, CollectError::NothingToAsk(_)) && e.to_string().contains("none.jsonl"), "{e}");
    let invalid = Collect { base_url: "nowhere".into(), ..settings(&server) };
    let e = collect(&file, &out, &invalid, None, quiet(), |_, _, _| ()).await.unwrap_err();
    assert!(e.to_string().contains("nowhere"), "{e}");
    let e = collect(&file, &out, &Collect::default(), None, quiet(), |_, _, _| ()).await.unwrap_err();
    assert!(e.to_string().contains("collect.base_url"), "{e}");
}

#[tokio::test]
async fn configured_certificate_authority_is_trusted() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "private");
    let file = write_data(dir.path(), 2);
    let out = dir.path().join("out");
    let server = WebServer::start_tls(&authority.sign("seer"), good_reply);
    let without = Collect { tries: 1, deadline_s: 5.0, ..settings(&server) };
    let s = run(&file, &out, &without).await;
    assert_eq!((s.answered, s.failed.len(), server.requests().len()), (0, 1, 0), "{s:?}");
    assert!(s.failed[0].reason.contains("certificate"), "{:?}", s.failed);
    let s = run(&file, &out, &Collect { ca: authority.ca(), ..without }).await;
    assert!(s.is_complete() && s.answered == 1, "{s:?}");
}

/// Collects answers with problems for some records, then reviews them with every kind of decision.
#[tokio::test]
async fn decisions_determine_the_final_records() {
    let dir = tempfile::tempdir().unwrap();
    let file = write_data(dir.path(), 7);
    let out = dir.path().join("out");
    let server = WebServer::start(|r| {
        let (text, _) = parts(r);
        match text.contains("A colleague answered") {
            true if r.number % 2 == 0 => WebReply::immediate(200, completion("At [1, 2, 3, 4] is a liver cyst.")),
            _ => good_reply(r),
        }
    });
    let s = run(&file, &out, &Collect { concurrency: 1, page_size: 4, ..settings(&server) }).await;
    assert_eq!((s.answered, s.pages.len()), (6, 2));
    let page = std::fs::read_to_string(&s.pages[0]).unwrap();
    assert!(page.contains("data:image/jpeg;base64,") && page.contains("liver cyst") && page.len() < 300_000);
    let written = RecordFile::load(&out.join(COLLECTED)).unwrap();
    let good_ones: Vec<&Record> = written.records.iter().filter(|r| !r.answer.is_empty()).collect();
    let bad_ones: Vec<&Record> =
        written.records.iter().filter(|r| r.answer.is_empty() && !r.boxes.is_empty()).collect();
    assert_eq!(s.faulty, bad_ones.len());
    let line = |r: &Record, decision: &str, answer: &str| {
        json!({"id": r.id, "key": r.extra["collect"]["key"], "decision": decision, "answer": answer}).to_string()
    };
    let all: Vec<&Record> = good_ones.iter().chain(&bad_ones).copied().collect();
    let lines = [
        line(all[0], "reject", ""),
        line(all[0], "accept", ""),
        line(all[1], "edit", "I see a liver cyst."),
        line(all[2], "reject", ""),
        line(all[3], "edit", "A liver cyst at (0.1,0.2) [1,2,3,4]"),
        json!({"id": all[4].id, "key": "old", "decision": "accept"}).to_string(),
        json!({"id": "nobody", "key": "k", "decision": "accept"}).to_string(),
    ];
    let decisions = dir.path().join("decisions.jsonl");
    std::fs::write(&decisions, lines.join("\n")).unwrap();
    let last = dir.path().join("final/mau.jsonl");
    let done = review(&out, std::slice::from_ref(&decisions), &last, false).unwrap();
    assert_eq!((done.edited, done.rejected, done.not_asked), (1, 1, 1), "{done:?}");
    let usable_first = !all[0].answer.is_empty();
    assert_eq!((done.accepted, done.records), (usize::from(usable_first), 2 + usize::from(usable_first)));
    let ignored: Vec<&str> = done.ignored.keys().map(String::as_str).collect();
    assert_eq!(
        ignored,
        ["no record has this id", "the answer has changed since", "the answer is empty or contains coordinates"]
    );
    let kept = RecordFile::load(&last).unwrap();
    unveil_datasets::check::require_valid(&kept, None).unwrap();
    let edited = kept.records.iter().find(|r| r.id == all[1].id).unwrap();
    assert_eq!(
        (edited.answer.as_str(), &edited.extra["collect"]["status"]),
        ("I see a liver cyst.\n<region>", &json!("edited"))
    );
    let more = review(&out, std::slice::from_ref(&decisions), &last, true).unwrap();
    assert!(more.records >= done.records && more.unreviewed == done.unreviewed);
    std::fs::write(&decisions, "{\"id\": 3}").unwrap();
    let e = review(&out, &[decisions], &last, false).unwrap_err().to_string();
    assert!(e.contains("decisions.jsonl:1: not a decision"), "{e}");
}
