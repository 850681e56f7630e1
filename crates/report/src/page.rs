//! The report page `report.html`: one self-contained page, generated from the files of a run directory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use crate::chart::{Panel, Series, line_chart};
use crate::events::{lineage, read_events};
use crate::prediction::{Figure, Prediction, figure};
use crate::rewarded_response::load_rewarded_responses;
use crate::sample_page::write_samples;
use crate::suites::{SuiteSection, suite_section};
use crate::templates::{POLICY, render};
use crate::{ImageFolders, ReportError};

const STYLE: &str = include_str!("page.css");

/// Writes `<run>/report.html` and returns its path. It shows `images` held-out images from below the run directory and `folders`. If the
/// run keeps responses, `samples.html` next to it shows `samples` of them (0: all).
///
/// # Errors
/// Returns [`ReportError::NotARun`] if the directory has no event log, [`ReportError::Io`] if a file cannot be read or written.
pub fn write_report(run: &Path, images: usize, samples: usize, folders: &ImageFolders) -> Result<PathBuf, ReportError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| ReportError::Io { path, source }
    };
    if !run.join("events.jsonl").exists() {
        return Err(ReportError::NotARun(run.to_owned()));
    }
    let folders = folders.and_below(run);
    let events = lineage(read_events(run).map_err(io(run))?);
    let summary: Value = std::fs::read_to_string(run.join("summary.json"))
        .ok()
        .and_then(|t| serde_json::from_str(&t).ok())
        .unwrap_or_default();
    let name = run.file_name().map_or_else(|| run.display().to_string(), |n| n.to_string_lossy().into_owned());
    let responses = load_rewarded_responses(run, samples)?;
    if !responses.is_empty() {
        let title = format!("{name}: rewarded responses");
        write_samples(&title, &responses, run, &folders, &run.join("samples.html"))?;
    }
    let (results, facts) = headline(&summary);
    let page = render(
        "report.html",
        Page {
            policy: POLICY,
            style: STYLE,
            name,
            results,
            facts,
            charts: charts(&events),
            suites: suite_section(&events),
            gallery: gallery(run, &folders, images),
            responses: responses.len(),
            config: std::fs::read_to_string(run.join("config.toml")).unwrap_or_default(),
        },
    )?;
    let path = run.join("report.html");
    unveil_core::write_atomic(&path, page.as_bytes()).map_err(io(&path))?;
    Ok(path)
}

/// Values of the report template.
#[derive(Serialize)]
struct Page {
    policy: &'static str,
    style: &'static str,
    name: String,
    results: Vec<MetricRow>,
    facts: Vec<String>,
    charts: Vec<Panel>,
    suites: Option<SuiteSection>,
    gallery: Vec<GalleryEntry>,
    responses: usize,
    config: String,
}

/// A metric before and after stage 2.
#[derive(Serialize)]
struct MetricRow {
    name: &'static str,
    before: String,
    after: String,
}

/// A held-out image with the answers before and after stage 2.
#[derive(Serialize)]
struct GalleryEntry {
    truth: String,
    id: String,
    before: Option<Figure>,
    after: Option<Figure>,
}

/// Returns the table of metrics and the facts below it.
fn headline(summary: &Value) -> (Vec<MetricRow>, Vec<String>) {
    let rows = [
        ("mean_iou", "Mean IoU (one true box)"),
        ("acc50", "IoU at least 0.5"),
        ("soft_f1", "Soft F1 (all)"),
        ("accuracy", "Accuracy of the category"),
        ("vision_lift", "Vision lift"),
    ];
    let cell = |stage: &str, key: &str| summary[stage][key].as_f64().map_or("–".into(), |v| format!("{v:.3}"));
    let row = |(key, name)| MetricRow { name, before: cell("before", key), after: cell("after", key) };
    let number = |k: &str| summary[k].as_f64();
    let mut facts = Vec::new();
    facts.extend(summary["after"]["n"].as_u64().map(|n| format!("{n} held-out images")));
    facts.extend(number("steps").map(|s| format!("{s:.0} updates in stage 2")));
    facts.extend(number("replaced_groups").map(|n| format!("{n:.0} groups replaced, because they teach nothing")));
    facts.extend(number("filtered_responses").map(|n| format!("{n:.0} cut responses left out of the loss")));
    facts.extend(number("wall_s").map(|s| format!("{:.0} min {:02.0} s", (s / 60.0).floor(), s % 60.0)));
    facts.extend(number("peak_rss_mib").map(|m| format!("peak memory {m:.0} MiB")));
    facts.extend(number("seed").map(|s| format!("seed {s:.0}")));
    (rows.map(row).into(), facts)
}

/// Returns the charts of both stages.
fn charts(events: &[Value]) -> Vec<Panel> {
    let events_of = |kind: &str| events.iter().filter(|e| e["kind"] == kind).collect::<Vec<_>>();
    let points = |rows: &[&Value], pointer: &str| {
        rows.iter().filter_map(|e| Some((e["step"].as_f64()?, e.pointer(pointer)?.as_f64()?))).collect::<Vec<_>>()
    };
    let single = |title: &str, rows: &[&Value], pointer: &str| {
        line_chart(title, "step", &[Series { name: title, points: points(rows, pointer) }])
    };
    let sft = events_of("sft");
    let train = events_of("train");
    let eval = events_of("eval");
    let rl: Vec<&Value> = eval.iter().copied().filter(|e| e["stage"] == "rl").collect();
    let mut components: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    for e in &train {
        if let (Some(step), Some(map)) = (e["step"].as_f64(), e["reward"].as_object()) {
            for (k, v) in map {
                if let Some(v) = v.as_f64() {
                    components.entry(k.replace('_', " ")).or_default().push((step, v));
                }
            }
        }
    }
    let rewards: Vec<Series<'_>> = components.iter().map(|(name, p)| Series { name, points: p.clone() }).collect();
    let held_out = [("mean IoU", "/mean_iou"), ("soft F1", "/soft_f1"), ("accuracy of the category", "/accuracy")]
        .map(|(name, pointer)| Series { name, points: points(&rl, pointer) });
    // Counts that are 0 throughout belong to a feature that is off.
    let counts = |title: &str, pointer: &str| {
        single(title, &train, pointer).filter(|_| points(&train, pointer).iter().any(|(_, count)| *count > 0.0))
    };
    let panels = [
        single("Stage 1: cross-entropy", &sft, "/loss"),
        line_chart("Stage 2: held-out validation", "step", &held_out),
        single("Stage 2: vision lift, validation", &rl, "/vision_lift"),
        line_chart("Stage 2: reward by component", "step", &rewards),
        single("Stage 2: approximate KL per update", &train, "/kl"),
        single("Stage 2: entropy of the policy", &train, "/entropy"),
        single("Stage 2: agreement, mean |Δ log p| of the same weights", &train, "/agreement"),
        single("Stage 2: drift, mean |Δ log p| of stale tokens", &train, "/drift"),
        single("Stage 2: gradient norm", &train, "/grad_norm"),
        counts("Stage 2: groups replaced per update, because they teach nothing", "/replaced"),
        counts("Stage 2: responses left out of the loss, cut at the length limit", "/filtered_responses"),
    ];
    panels.into_iter().flatten().collect()
}

/// Returns the first `images` held-out images.
fn gallery(run: &Path, folders: &ImageFolders, images: usize) -> Vec<GalleryEntry> {
    let read = |name: &str| -> Vec<Prediction> {
        std::fs::read_to_string(run.join("eval").join(name))
            .map(|t| t.lines().filter_map(|l| serde_json::from_str(l).ok()).collect())
            .unwrap_or_default()
    };
    let before = read("before.jsonl");
    let after = read("after.jsonl");
    let shown = if before.is_empty() { &after } else { &before };
    let entry = |p: &Prediction| {
        let find = |list: &[Prediction]| list.iter().find(|q| q.id == p.id).map(|q| figure(run, folders, q));
        GalleryEntry {
            truth: p.truth_in_words().to_owned(),
            id: p.id.clone(),
            before: find(&before),
            after: find(&after),
        }
    };
    shown.iter().take(images).map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use unveil_core::Grid;

    /// A line of predictions or responses can name any file of the machine.
    #[test]
    fn images_outside_the_folders_are_on_no_page() {
        let dir = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        let run = dir.path();
        let outside = other.path().join("a.png");
        std::fs::write(&outside, unveil_data::image_store::Image::new(8, 8).to_png().unwrap()).unwrap();
        std::fs::create_dir(run.join("eval")).unwrap();
        std::fs::create_dir(run.join("rollouts")).unwrap();
        std::fs::write(run.join("events.jsonl"), "").unwrap();
        let answer = json!({"id": "a", "image": outside, "size": [8, 8], "category": "c", "truth": [], "boxes": [], "text": "x",
            "correct": false, "soft_f1": 0.0, "grid": {"rows": 0, "cols": 0}, "heat": []});
        std::fs::write(run.join("eval/after.jsonl"), format!("{answer}\n")).unwrap();
        let kept = json!({"step": 1, "id": "a", "index": 0, "text": "x", "category": "c", "boxes": [], "image_size": [8, 8],
            "total": 1.0, "seen": outside});
        std::fs::write(run.join("rollouts/step-1.jsonl"), format!("{kept}\n")).unwrap();
        let images = |folders: &ImageFolders| {
            write_report(run, 4, 0, folders).unwrap();
            let page = |name: &str| std::fs::read_to_string(run.join(name)).unwrap();
            ["report.html", "samples.html"].map(|name| page(name).matches(";base64,").count())
        };
        assert_eq!(images(&ImageFolders::default()), [0, 0]);
        assert_eq!(images(&ImageFolders::new([other.path()])), [1, 1]);
    }

    #[test]
    fn replaced_groups_are_shown_if_there_are_any() {
        let page = |replaced: u64| {
            let dir = tempfile::tempdir().unwrap();
            let event = |step: u64| json!({"kind": "train", "step": step, "replaced": replaced * step, "filtered_responses": 0});
            let lines: String = (1..4).map(|step| format!("{}\n", event(step))).collect();
            std::fs::write(dir.path().join("events.jsonl"), lines).unwrap();
            let summary = json!({"replaced_groups": 6 * replaced}).to_string();
            std::fs::write(dir.path().join("summary.json"), if replaced > 0 { &summary } else { "{}" }).unwrap();
            std::fs::read_to_string(write_report(dir.path(), 0, 0, &ImageFolders::default()).unwrap()).unwrap()
        };
        let with = page(1);
        assert!(with.contains("groups replaced per update") && with.contains("6 groups replaced"), "{with}");
        assert!(!with.contains("cut at the length limit"), "{with}");
        assert!(!page(0).contains("replaced"));
    }

    #[test]
    fn page_is_self_contained_and_safe() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path();
        let folders = ImageFolders::default();
        assert!(matches!(write_report(run, 4, 0, &folders), Err(ReportError::NotARun(_))));
        let events: Vec<String> = (0..5)
            .map(|i| {
                let hostile = "<img src=x onerror=alert(1)>";
                let reward = json!({"total": 0.1 * f64::from(i), hostile: f64::from(i)});
                json!({"kind": "train", "step": i, "reward": reward, "kl": 0.0}).to_string()
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
        std::fs::write(run.join("config.toml"), "# </pre><script>alert(2)</script>").unwrap();
        let html = std::fs::read_to_string(write_report(run, 4, 0, &folders).unwrap()).unwrap();
        assert!(html.contains("&lt;script&gt;") && !html.contains("<script") && !html.contains("<img"), "{html}");
        assert!(html.contains("&lt;img src=x onerror=alert(1)&gt;") && html.contains("a&lt;b"), "{html}");
        assert!(
            html.contains("http-equiv=\"Content-Security-Policy\" content=\"default-src &#x27;none&#x27;"),
            "{html}"
        );
        assert!(html.contains("href=\"samples.html\"") && run.join("samples.html").exists());
        assert!(html.contains("reward by component") && html.contains("class=\"true\""));
        assert!(!html.contains("http://") && !html.contains("https://"), "the page must not load anything");
    }
}
