//! Driver of `make bench-reward`: groups of eight responses with boxes, a class and two rows of 1,024 attention values each.
//!
//! `reward_bench write DIR` writes the inputs for the peer, `values` prints all scores, `core SECONDS` scores on one thread,
//! `serve` runs the service on a free port, `load ADDRESS SECONDS RATE` calls it (RATE responses per second, 0 = as fast as it
//! answers). The result is one JSON line.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark may panic, and its results go to stdout")]

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::prelude::*;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use unveil_config::Config;
use unveil_core::{Attention, BoxForm, Finish, Record, Response};
use unveil_preprocess::codec::Sizes;
use unveil_proto::v1::reward_client::RewardClient;
use unveil_proto::{response_to_wire, v1};
use unveil_reward::{Scorers, group_from_request, run_serve, score_request};
use unveil_service::{CancellationToken, connect, limited};

const GROUPS: usize = 256;
const RESPONSES: usize = 8;
const GRID: [usize; 2] = [32, 32];
const IMAGE: u32 = 448;
/// Concurrent calls of the closed loop.
const CONCURRENCY: usize = 12;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args.as_slice() {
        ["write", dir] => write(Path::new(dir)),
        ["values"] => values(),
        ["core", seconds] => seconds.parse().map_err(Into::into).and_then(core),
        ["serve"] => serve(),
        ["load", address, seconds, rate] => load(address, seconds, rate),
        _ => Err("usage: reward_bench write DIR | values | core SECONDS | serve | load ADDRESS SECONDS RATE".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("reward_bench: {e}");
            ExitCode::FAILURE
        }
    }
}

fn draw_box(rng: &mut ChaCha8Rng) -> [u32; 4] {
    let x = rng.random_range(0..IMAGE - 120);
    let y = rng.random_range(0..IMAGE - 120);
    [x, y, x + rng.random_range(20..120), y + rng.random_range(20..120)]
}

/// Moves a true box a little.
fn jitter([x1, y1, x2, y2]: [u32; 4], rng: &mut ChaCha8Rng) -> [u32; 4] {
    [x1 + rng.random_range(0..10), y1 + rng.random_range(0..10), x2 + rng.random_range(0..10), y2]
}

/// Returns the requests of all groups, the same on every call.
fn requests() -> Outcome<Vec<v1::ScoreRequest>> {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let sizes = Sizes { original: (IMAGE, IMAGE), resized: (IMAGE, IMAGE) };
    (0..GROUPS)
        .map(|g| {
            let boxes: Vec<[u32; 4]> = (0..rng.random_range(1..4)).map(|_| draw_box(&mut rng)).collect();
            let record: Record = serde_json::from_value(json!({
                "id": format!("r{g}"), "image_size": [IMAGE, IMAGE], "category": "nodule", "boxes": boxes,
                "question": "What is abnormal, and where?",
            }))?;
            let responses = (0..RESPONSES).map(|index| response(index, &boxes, &mut rng)).collect();
            Ok(score_request(&record, &sizes, BoxForm::Absolute, responses)?)
        })
        .collect()
}

fn response(index: usize, boxes: &[[u32; 4]], rng: &mut ChaCha8Rng) -> v1::Response {
    let said: Vec<String> = (0..rng.random_range(1..4))
        .map(|i| {
            let b = boxes.get(i).map(|b| jitter(*b, rng)).unwrap_or_else(|| draw_box(rng));
            format!("[{},{},{},{}]", b[0], b[1], b[2], b[3])
        })
        .collect();
    let place = said.join(", ");
    let text = format!("{place} nodule");
    // The boxes are one token, the class two: " nod" and "ule".
    let spans = [(0, place.len()), (place.len(), place.len() + 4), (place.len() + 4, text.len())];
    let cells = GRID[0] * GRID[1];
    let row = |rng: &mut ChaCha8Rng| -> Vec<f32> {
        let raw: Vec<f32> = (0..cells).map(|_| rng.random::<f32>().powi(6)).collect();
        let sum: f32 = raw.iter().sum();
        raw.iter().map(|v| v / sum).collect()
    };
    let attention = Attention { grid: GRID, tokens: vec![1, 2], rows: vec![row(rng), row(rng)] };
    let tokens = vec![1, 2, 3];
    let r = Response { index, tokens, text, logprobs: vec![-0.5; 3], versions: vec![4; 3], finish: Finish::Stop };
    response_to_wire(&r, &spans, Some(&attention))
}

fn write(dir: &Path) -> Outcome<()> {
    let mut rows = std::fs::File::create(dir.join("rows.bin"))?;
    let mut groups = Vec::new();
    for request in requests()? {
        let record: Value = serde_json::from_str(&request.record_json)?;
        let mut texts = Vec::new();
        for r in request.responses {
            rows.write_all(&r.attention.map(|a| a.rows).unwrap_or_default())?;
            let spans: Vec<[u32; 2]> = r.spans.iter().map(|s| [s.begin, s.end]).collect();
            texts.push(json!({"text": r.text, "spans": spans, "tokens": [1, 2]}));
        }
        groups.push(json!({"category": record["category"], "boxes": record["boxes"], "responses": texts}));
    }
    let data = json!({"image": [IMAGE, IMAGE], "grid": GRID, "groups": groups});
    std::fs::write(dir.join("groups.json"), data.to_string())?;
    Ok(())
}

fn scorers() -> Outcome<Scorers> {
    Ok(Scorers::load(&config())?)
}

/// Configures localization, vision relevance and format as the total; the category is computed without a weight.
fn config() -> Config {
    let mut config = Config::default();
    config.reward.category.weight = 0.0;
    config.reward.service.max_in_flight = 256;
    config
}

fn values() -> Outcome<()> {
    let scorers = scorers()?;
    let mut out = Vec::new();
    for request in requests()? {
        for b in scorers.score_locally(&group_from_request(request)?) {
            let value = |name: &str| b.components[name].value;
            out.push(json!([value("localization"), value("vision_relevance"), value("format"), b.total]));
        }
    }
    println!("{}", Value::from(out));
    Ok(())
}

fn core(seconds: f64) -> Outcome<()> {
    let scorers = scorers()?;
    let requests = requests()?;
    let start = Instant::now();
    let mut done = 0;
    let mut sum = 0.0;
    while start.elapsed().as_secs_f64() < seconds {
        for request in &requests {
            let scored = scorers.score_locally(&group_from_request(request.clone())?);
            sum += scored.iter().filter_map(|b| b.total).sum::<f64>();
            done += scored.len();
        }
    }
    println!("{}", json!({"rate": done as f64 / start.elapsed().as_secs_f64(), "mean": sum / done as f64}));
    Ok(())
}

fn serve() -> Outcome<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    // Stops when the parent process closes the pipe.
    let stop = CancellationToken::new();
    let cancel = stop.clone();
    std::thread::spawn(move || {
        let _end = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        cancel.cancel();
    });
    Ok(runtime.block_on(run_serve(&config(), stop))?)
}

fn load(address: &str, seconds: &str, rate: &str) -> Outcome<()> {
    let (seconds, rate): (f64, f64) = (seconds.parse()?, rate.parse()?);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        let requests = Arc::new(requests()?);
        let channel = connect(address, Duration::from_secs(10)).await?;
        let start = Instant::now();
        let end = start + Duration::from_secs_f64(seconds);
        let mut lanes = tokio::task::JoinSet::new();
        let lane_count = if rate > 0.0 { CONCURRENCY * 4 } else { CONCURRENCY };
        let every = (rate > 0.0).then(|| Duration::from_secs_f64(RESPONSES as f64 * lane_count as f64 / rate));
        for lane in 0..lane_count {
            let requests = Arc::clone(&requests);
            let channel = channel.clone();
            lanes.spawn(async move {
                let mut client = limited!(RewardClient::new(channel));
                let mut latencies = Vec::new();
                let mut due = start + every.map_or(Duration::ZERO, |e| e.mul_f64(lane as f64 / lane_count as f64));
                for at in (lane..).step_by(lane_count) {
                    if every.is_some() {
                        tokio::time::sleep_until(due.into()).await;
                    }
                    let begun = Instant::now();
                    if begun >= end {
                        break;
                    }
                    let answer = client.score(requests[at % requests.len()].clone()).await?;
                    assert_eq!(answer.into_inner().breakdowns.len(), RESPONSES);
                    latencies.push(begun.elapsed().as_secs_f64() * 1e3);
                    due += every.unwrap_or_default();
                }
                Ok::<_, tonic::Status>(latencies)
            });
        }
        let mut latencies = Vec::new();
        while let Some(lane) = lanes.join_next().await {
            latencies.extend(lane??);
        }
        latencies.sort_by(f64::total_cmp);
        let quantile =
            |q: f64| latencies.get(((latencies.len() as f64 * q) as usize).min(latencies.len() - 1)).copied();
        let rate = (latencies.len() * RESPONSES) as f64 / start.elapsed().as_secs_f64();
        println!("{}", json!({"rate": rate, "p50_ms": quantile(0.5), "p99_ms": quantile(0.99)}));
        Ok(())
    })
}
