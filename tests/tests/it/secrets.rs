//! Secrets from all their sources, peers that echo them, and a search of all output for them.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use unveil_testkit::{Finished, Sandbox, WebReply, WebRequest, WebServer, binary};

const SOON: Duration = Duration::from_secs(120);

/// One secret per source: the token of the run (a file), the keys of judge and collection, and the keys of the object store (variables).
const TOKEN: &str = "MARKER-token-8d1f\"quoted\"";
const JUDGE: &str = "MARKER-judge-52c7";
const COLLECT: &str = "MARKER-collect-77ab";
const STORE: [&str; 3] = ["MARKERACCESSKEY1", "MARKER-secret-access-e09a", "MARKER-session-4f4f"];

/// A peer that echoes everything it receives.
fn echo(request: &WebRequest) -> WebReply {
    let headers: Vec<String> = request.headers.iter().map(|(n, v)| format!("{n}: {v}")).collect();
    let code = if request.number.is_multiple_of(2) { 401 } else { 400 };
    WebReply::immediate(code, format!("the keys are {} and {}; you said {}", STORE[1], STORE[2], headers.join(", ")))
}

/// Runs a command with all secrets in its environment.
fn run_with_secrets(s: &Sandbox, mut command: Command) -> Finished {
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

/// Searches all files below `dir` except for the token file.
fn search(dir: &Path, leaks: &mut Vec<String>, searched: &mut usize) {
    for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            search(&path, leaks, searched);
        } else if !path.ends_with("token") {
            *searched += 1;
            let bytes = std::fs::read(&path).unwrap();
            if let Some(start) = bytes.windows(6).position(|w| w == b"MARKER") {
                let end = bytes.len().min(start + 40);
                leaks.push(format!("{}: {}", path.display(), String::from_utf8_lossy(&bytes[start..end])));
            }
        }
    }
}

#[test]
fn no_output_contains_a_secret() {
    let s = Sandbox::new();
    let server = WebServer::start(echo);
    s.write("token", TOKEN);
    let tls = s.path("tls").display().to_string();
    s.unveil(&["tls", "init", "--out", &tls]).ok();
    let file = s.micro_config();
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
        run_with_secrets(&s, s.command(&binary("unveil"), &all))
    };
    let records = s.path("run/data/records.jsonl").display().to_string();
    let collected = s.path("collected").display().to_string();
    let mut ended = vec![
        with(&["train"]).ok(),
        with(&["config", "show"]).ok(),
        with(&["data", "collect", "--data", &records, "--out", &collected]).exits(1),
    ];
    // Each key was used, and echoed back.
    let keys: Vec<String> =
        server.requests().iter().filter_map(|r| r.header("authorization").map(str::to_owned)).collect();
    for key in [JUDGE, COLLECT] {
        assert!(keys.contains(&format!("Bearer {key}")), "{key}: {keys:?}");
    }
    let scored = std::fs::read_to_string(s.path("run/events.jsonl")).unwrap();
    assert!(scored.contains("\"kind\":\"train\""), "{scored}");
    // A store that knows the keys echoes them.
    let mut list = s.command(&binary("unveil"), &["checkpoint", "list", "s3://bucket/prefix"]);
    list.env("AWS_ENDPOINT_URL", &url);
    let list = run_with_secrets(&s, list).exits(1);
    assert!(list.stderr.contains("***"), "the store's answer is shown: {}", list.stderr);
    ended.push(list);
    // Secrets in place of their names, or in URLs.
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
        refused.clone().fails_with(2, &[]);
        assert!(refused.stderr.contains(key), "{}", refused.stderr);
        ended.push(refused);
    }
    for done in &ended {
        assert!(!done.stdout.contains("MARKER") && !done.stderr.contains("MARKER"), "{done:?}");
    }
    let mut leaks = Vec::new();
    let mut searched = 0;
    search(&s.path(""), &mut leaks, &mut searched);
    assert!(searched > 30 && leaks.is_empty(), "{searched} files, {leaks:#?}");
}
