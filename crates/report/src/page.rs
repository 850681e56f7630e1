//! `report.html`: one self-contained page made from the files of a run directory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::chart::{Series, panel};
use crate::events::{lineage, read_events};
use crate::figure::{Prediction, escape, figure};
use crate::sample_page::write_samples;
use crate::shown::run_samples;
use crate::suites::suites;

/// The page cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The directory is not a run.
    #[error("{0} is not a run directory: it has no events.jsonl; give the directory named by run.dir")]
    NotARun(PathBuf),
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

const STYLE: &str = include_str!("page.css");

/// Writes `<run>/report.html` and returns its path. `images` held-out images are shown; where the run keeps responses,
/// `samples.html` beside it shows `samples` of them (0 = all).
///
/// # Errors
/// The directory is no run; a file cannot be read or written.
pub fn write_report(run: &Path, images: usize, samples: usize) -> Result<PathBuf, ReportError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| ReportError::Io { path, source }
    };
    if !run.join("events.jsonl").exists() {
        return Err(ReportError::NotARun(run.to_owned()));
    }
    let events = lineage(read_events(run).map_err(io(run))?);
    let summary: Value = std::fs::read_to_string(run.join("summary.json"))
        .ok()
        .and_then(|t| serde_json::from_str(&t).ok())
        .unwrap_or_default();
    let mut body = String::new();
    body += &headline(&summary);
    body += &charts(&events);
    body += &suites(&events);
    body += &gallery(run, images);
    let name = run.file_name().map_or_else(|| run.display().to_string(), |n| n.to_string_lossy().into_owned());
    let responses = run_samples(run, samples)?;
    if !responses.is_empty() {
        write_samples(&format!("{name}: rewarded responses"), &responses, run, &run.join("samples.html"))?;
        body += &format!(
            "<h2>Rewarded responses</h2><p><a href=\"samples.html\">{} responses of stage 2</a>, one by one: image, boxes, attention, \
             and every component of the reward.</p>",
            responses.len()
        );
    }
    if let Ok(config) = std::fs::read_to_string(run.join("config.toml")) {
        body += &format!(
            "<h2>Configuration</h2><details><summary>config.toml</summary><pre>{}</pre></details>",
            escape(&config)
        );
    }
    let page = format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>Unveil: {0}</title><style>{STYLE}</style></head><body><h1>Unveil <span>{0}</span></h1>{body}</body></html>",
        escape(&name)
    );
    let path = run.join("report.html");
    std::fs::write(&path, page).map_err(io(&path))?;
    Ok(path)
}

fn headline(summary: &Value) -> String {
    let rows = [
        ("mean_iou", "Mean IoU (one true box)"),
        ("acc50", "IoU at least 0.5"),
        ("soft_f1", "Soft F1 (all)"),
        ("accuracy", "Category right"),
        ("vision_lift", "Vision lift"),
    ];
    let cell = |stage: &str, key: &str| summary[stage][key].as_f64().map_or("–".into(), |v| format!("{v:.3}"));
    let mut out = String::from(
        "<p class=\"lead\">Held-out images, never trained on. <b>Before</b>: after stage 1 (instruction tuning). <b>After</b>: after stage 2 (rewarding).</p>\
         <table><tr><th></th><th>Before</th><th>After</th></tr>",
    );
    for (key, name) in rows {
        out +=
            &format!("<tr><td>{name}</td><td>{}</td><td><b>{}</b></td></tr>", cell("before", key), cell("after", key));
    }
    out += "</table>";
    let number = |k: &str| summary[k].as_f64();
    let mut facts = Vec::new();
    facts.extend(summary["after"]["n"].as_u64().map(|n| format!("{n} held-out images")));
    facts.extend(number("steps").map(|s| format!("{s:.0} updates in stage 2")));
    facts.extend(number("wall_s").map(|s| format!("{:.0} min {:02.0} s", (s / 60.0).floor(), s % 60.0)));
    facts.extend(number("peak_rss_mib").map(|m| format!("peak memory {m:.0} MiB")));
    facts.extend(number("seed").map(|s| format!("seed {s:.0}")));
    format!("{out}<p class=\"facts\">{}</p>", facts.join(" · "))
}

fn charts(events: &[Value]) -> String {
    let of = |kind: &str| events.iter().filter(|e| e["kind"] == kind).collect::<Vec<_>>();
    let points = |rows: &[&Value], pointer: &str| {
        rows.iter().filter_map(|e| Some((e["step"].as_f64()?, e.pointer(pointer)?.as_f64()?))).collect::<Vec<_>>()
    };
    let one = |title: &str, rows: &[&Value], pointer: &str| {
        panel(title, "step", &[Series { name: title, points: points(rows, pointer) }])
    };
    let (sft, train, eval) = (of("sft"), of("train"), of("eval"));
    let stage = |name: &str| eval.iter().copied().filter(|e| e["stage"] == name).collect::<Vec<_>>();
    let rl = stage("rl");
    let mut parts: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    for e in &train {
        if let (Some(step), Some(map)) = (e["step"].as_f64(), e["reward"].as_object()) {
            for (k, v) in map {
                if let Some(v) = v.as_f64() {
                    parts.entry(k.replace('_', " ")).or_default().push((step, v));
                }
            }
        }
    }
    let rewards: Vec<Series<'_>> = parts.iter().map(|(name, p)| Series { name, points: p.clone() }).collect();
    let held_out = [("mean IoU", "/mean_iou"), ("soft F1", "/soft_f1"), ("category right", "/accuracy")]
        .map(|(name, pointer)| Series { name, points: points(&rl, pointer) });
    let panels = [
        one("Stage 1: cross-entropy", &sft, "/loss"),
        panel("Stage 2: held-out validation", "step", &held_out),
        one("Stage 2: vision lift, validation", &rl, "/vision_lift"),
        panel("Stage 2: reward by component", "step", &rewards),
        one("Stage 2: approximate KL per update", &train, "/kl"),
        one("Stage 2: entropy of the policy", &train, "/entropy"),
        one("Stage 2: agreement, mean |Δ log p| of the same weights", &train, "/agreement"),
        one("Stage 2: drift, mean |Δ log p| of stale tokens", &train, "/drift"),
        one("Stage 2: gradient norm", &train, "/grad_norm"),
    ];
    format!("<h2>Curves</h2><div class=\"charts\">{}</div>", panels.concat())
}

fn gallery(run: &Path, images: usize) -> String {
    let read = |name: &str| -> Vec<Prediction> {
        std::fs::read_to_string(run.join("eval").join(name))
            .map(|t| t.lines().filter_map(|l| serde_json::from_str(l).ok()).collect())
            .unwrap_or_default()
    };
    let (before, after) = (read("before.jsonl"), read("after.jsonl"));
    if after.is_empty() && before.is_empty() {
        return String::new();
    }
    let mut out = String::from(
        "<h2>Held-out images</h2><p>The first ones of the held-out split, not chosen. <i class=\"key true\"></i> true box \
         <i class=\"key pred\"></i> predicted box <i class=\"key heat\"></i> where the tokens of the named class look.</p>\
         <div class=\"pairs\">",
    );
    let shown = if before.is_empty() { &after } else { &before };
    for p in shown.iter().take(images) {
        let find =
            |list: &[Prediction]| list.iter().find(|q| q.id == p.id).map_or_else(String::new, |q| figure(run, q));
        out += &format!(
            "<section><h3>{} <span>{}</span></h3><div><b>before</b>{}</div><div><b>after</b>{}</div></section>",
            escape(p.truth_in_words()),
            escape(&p.id),
            find(&before),
            find(&after)
        );
    }
    out + "</div>"
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use unveil_core::Grid;

    #[test]
    fn page_is_self_contained_and_safe() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path();
        assert!(matches!(write_report(run, 4, 0), Err(ReportError::NotARun(_))));
        let events: Vec<String> = (0..5)
            .map(|i| {
                json!({"kind": "train", "step": i, "reward": {"total": 0.1 * f64::from(i)}, "kl": 0.0}).to_string()
            })
            .collect();
        std::fs::write(run.join("events.jsonl"), events.join("\n") + "\n{torn").unwrap();
        std::fs::create_dir(run.join("eval")).unwrap();
        let p = Prediction {
            id: "a<b".into(),
            image: "missing.png".into(),
            size: [96, 96],
            category: "nodule".into(),
            reference: None,
            truth: vec![[1.0, 1.0, 9.0, 9.0].into()],
            boxes: vec![[f32::NAN, 0.0, 1.0, 1.0].into()],
            text: "<script>alert(1)</script>".into(),
            correct: false,
            iou: Some(0.0),
            soft_f1: 0.0,
            lift: None,
            grid: Grid { rows: 1, cols: 2 },
            heat: vec![0.25, 0.75],
        };
        let mut line = serde_json::to_value(&p).unwrap();
        line["boxes"] = json!([]);
        std::fs::write(run.join("eval/after.jsonl"), format!("{line}\n")).unwrap();
        std::fs::create_dir(run.join("rollouts")).unwrap();
        let kept = json!({"step": 1, "id": "a", "index": 0, "text": "x", "category": "c", "boxes": [], "image_size": [4, 4], "total": 1.0});
        std::fs::write(run.join("rollouts/step-1.jsonl"), format!("{kept}\n")).unwrap();
        let html = std::fs::read_to_string(write_report(run, 4, 0).unwrap()).unwrap();
        assert!(html.contains("&lt;script&gt;") && !html.contains("<script"));
        assert!(html.contains("href=\"samples.html\"") && run.join("samples.html").exists());
        assert!(html.contains("reward by component") && html.contains("class=\"true\""));
        assert!(!html.contains("http://") && !html.contains("https://"), "the page must not load anything");
    }
}
