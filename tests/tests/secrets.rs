//! Secrets from every place that they can come from, peers that echo them, and every output searched for them.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use unveil_testkit::{Finished, Sandbox, WebReply, WebRequest, WebServer, binary};

const SOON: Duration = Duration::from_secs(120);

/// One for each place: the run's token (a file), the judge's and the collector's key, and those of the object store (variables).
const TOKEN: &str = "MARKER-token-8d1f\"quoted\"";
const JUDGE: &str = "MARKER-judge-52c7";
const COLLECT: &str = "MARKER-collect-77ab";
const STORE: [&str; 3] = ["MARKERACCESSKEY1", "MARKER-secret-access-e09a", "MARKER-session-4f4f"];

/// A peer that says back whatever it was told, in headers and words.
fn echo(request: &WebRequest) -> WebReply {
    let said: Vec<String> = request.headers.iter().map(|(n, v)| format!("{n}: {v}")).collect();
    let code = if request.number.is_multiple_of(2) { 401 } else { 400 };
    WebReply::now(code, format!("the keys are {} and {}; you said {}", STORE[1], STORE[2], said.join(", ")))
}

fn spoken(s: &Sandbox, mut command: Command) -> Finished {
    command
        .env("JUDGE_KEY", JUDGE)
        .env("COLLECT_KEY", COLLECT)
        .env("AWS_REGION", "us-east-1")
        .env("AWS_ALLOW_HTTP", "true");
    let names = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"];
    for (name, value) in names.iter().zip(STORE) {
        command.env(name, value);
    }
    s.start(&mut command).wait(SOON)
}

/// Every file below `dir` but the one that holds the token, and the folder of images.
fn search(dir: &Path, found: &mut Vec<String>, looked: &mut usize) {
    for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            search(&path, found, looked);
        } else if !path.ends_with("token") {
            *looked += 1;
            let bytes = std::fs::read(&path).unwrap();
            if let Some(at) = bytes.windows(6).position(|w| w == b"MARKER") {
                let end = bytes.len().min(at + 40);
                found.push(format!("{}: {}", path.display(), String::from_utf8_lossy(&bytes[at..end])));
            }
        }
    }
}

#[test]
fn no_output_holds_a_secret() {
    let s = Sandbox::new();
    let server = WebServer::start(echo);
    s.write("token", TOKEN);
    let tls = s.path("tls").display().to_string();
    s.unveil(&["tls", "init", "--out", &tls]).ok();
    let file = s.micro_config().display().to_string();
    let url = server.url();
    let sets = [
        format!("auth.token_file={}", s.path("token").display()),
        format!("tls.dir={tls}"),
        format!("reward.judge.base_url={url}/v1"),
        format!("collect.base_url={url}/v1"),
    ];
    let mut sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    sets.extend(["reward.judge.key_env=JUDGE_KEY", "reward.judge.model=m", "reward.relevance.weight=0.1"]);
    sets.extend(["collect.key_env=COLLECT_KEY", "collect.model=m", "collect.tries=1"]);
    sets.extend(["sft.steps=2", "learner.steps=2", "rollout.max_new_tokens=8", "eval.report_images=1"]);
    let with = |args: &[&str]| -> Finished {
        let mut all = args.to_vec();
        all.extend(["--config", &file]);
        all.extend(sets.iter().flat_map(|set| ["--set", *set]));
        spoken(&s, s.command(&binary("unveil"), &all))
    };
    let records = s.path("run/data/records.jsonl").display().to_string();
    let collected = s.path("collected").display().to_string();
    let mut ended = vec![
        with(&["train"]).ok(),
        with(&["config", "show"]).ok(),
        with(&["data", "collect", "--data", &records, "--out", &collected]).exits(1),
    ];
    // Someone asked with each key, and was told it back.
    let keys: Vec<String> = server.seen().iter().filter_map(|r| r.header("authorization").map(str::to_owned)).collect();
    for key in [JUDGE, COLLECT] {
        assert!(keys.contains(&format!("Bearer {key}")), "{key}: {keys:?}");
    }
    let scored = std::fs::read_to_string(s.path("run/events.jsonl")).unwrap();
    assert!(scored.contains("\"kind\":\"train\""), "{scored}");
    // The object store's keys, by a store that knows them.
    let mut list = s.command(&binary("unveil"), &["checkpoint", "list", "s3://bucket/prefix"]);
    list.env("AWS_ENDPOINT_URL", &url);
    let list = spoken(&s, list).exits(1);
    assert!(list.stderr.contains("***"), "the store's answer is shown: {}", list.stderr);
    ended.push(list);
    // A secret where its name, or nothing of it, belongs.
    for set in [
        "reward.judge.base_url=https://me:MARKER@host/v1",
        "reward.judge.key_env=MARKER-1",
        "checkpoint.url=s3://k:MARKER@b/p",
        "reward.judge.base_url=https://host/v1?api_key=MARKER-2",
        "checkpoint.url=az://account/container?sig=MARKER-3",
        "telemetry.otlp_endpoint=http://me:MARKER-4@collector",
        "telemetry.otlp_endpoint=collector?token=MARKER-5",
    ] {
        let key = set.split_once('=').unwrap().0;
        let refused = s.unveil(&["config", "check", "--set", set]);
        refused.clone().says(2, &[]);
        assert!(refused.stderr.contains(key), "{}", refused.stderr);
        ended.push(refused);
    }
    for done in &ended {
        assert!(!done.stdout.contains("MARKER") && !done.stderr.contains("MARKER"), "{done:?}");
    }
    let (mut found, mut looked) = (Vec::new(), 0);
    search(&s.path(""), &mut found, &mut looked);
    assert!(looked > 30 && found.is_empty(), "{looked} files, {found:#?}");
}
