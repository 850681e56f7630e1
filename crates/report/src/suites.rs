//! Section of the report about the metrics suites: their values over the steps of a run, from its `eval` events.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use crate::chart::{Panel, Series, line_chart};

/// Charts of the grounding suite: title, and name and key of each series.
const GROUNDING: [(&str, &[(&str, &str)]); 3] = [
    (
        "Grounding: boxes",
        &[
            ("mean IoU", "/grounding/mean_iou"),
            ("soft F1", "/grounding/soft_f1"),
            ("mean IoU, image withheld", "/grounding/withheld/mean_iou"),
            ("soft F1, image withheld", "/grounding/withheld/soft_f1"),
        ],
    ),
    (
        "Grounding: attention of the named class",
        &[
            ("pointing game", "/grounding/pointing_game"),
            ("in-box energy", "/grounding/in_box_energy"),
            ("pointing at random", "/grounding/pointing_chance"),
            ("even attention", "/grounding/energy_chance"),
        ],
    ),
    (
        "Grounding: answers that cannot be read",
        &[("share", "/grounding/parse_failures"), ("share, image withheld", "/grounding/withheld/parse_failures")],
    ),
];

/// Name and key of each column of the table.
const COLUMNS: [(&str, &str); 9] = [
    ("mean IoU", "/grounding/mean_iou"),
    ("IoU ≥ 0.5", "/grounding/acc50"),
    ("IoU ≥ 0.75", "/grounding/acc75"),
    ("soft F1", "/grounding/soft_f1"),
    ("pointing", "/grounding/pointing_game"),
    ("energy", "/grounding/in_box_energy"),
    ("unread", "/grounding/parse_failures"),
    ("mean IoU withheld", "/grounding/withheld/mean_iou"),
    ("MAU accuracy", "/mau/accuracy"),
];

/// Values of the suite section of the report template.
#[derive(Debug, Serialize)]
pub(crate) struct SuiteSection {
    charts: Vec<Panel>,
    columns: Vec<&'static str>,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    name: String,
    cells: Vec<String>,
}

/// Returns the curves of stage 2 and the table of all evaluations; `None` if the run measured no suite.
pub(crate) fn suite_section(events: &[Value]) -> Option<SuiteSection> {
    let measured = |e: &&Value| e["kind"] == "eval" && (e["grounding"].is_object() || e["mau"].is_object());
    let all: Vec<&Value> = events.iter().filter(measured).collect();
    if all.is_empty() {
        return None;
    }
    let rl: Vec<&Value> = all.iter().copied().filter(|e| e["stage"] == "rl").collect();
    let points = |pointer: &str| -> Vec<(f64, f64)> {
        rl.iter().filter_map(|e| Some((e["step"].as_f64()?, e.pointer(pointer)?.as_f64()?))).collect()
    };
    let mut charts: Vec<Panel> = GROUNDING
        .iter()
        .filter_map(|(title, series)| {
            let series = series.iter().map(|(name, p)| Series { name, points: points(p) });
            line_chart(title, "step", &series.filter(|s| !s.points.is_empty()).collect::<Vec<_>>())
        })
        .collect();
    let mut sources: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
    for e in &rl {
        for (name, v) in e["mau"]["sources"].as_object().into_iter().flatten() {
            sources.entry(name).or_default().extend(e["step"].as_f64().zip(v.as_f64()));
        }
    }
    let mean = Series { name: "mean over the sources", points: points("/mau/accuracy") };
    let by_source = sources.iter().map(|(name, p)| Series { name, points: p.clone() });
    let by_source = std::iter::once(mean).chain(by_source).collect::<Vec<_>>();
    charts.extend(line_chart("MAU: accuracy by source", "step", &by_source));
    let used: Vec<&(&'static str, &str)> =
        COLUMNS.iter().filter(|(_, p)| all.iter().any(|e| e.pointer(p).is_some_and(Value::is_number))).collect();
    let row = |e: &&Value| {
        let stage = if e["stage"] == "rl" { "2" } else { "1" };
        let cell = |p: &str| e.pointer(p).and_then(Value::as_f64).map_or("–".into(), |v| format!("{v:.3}"));
        Row {
            name: format!("stage {stage}, step {}", e["step"].as_u64().unwrap_or_default()),
            cells: used.iter().map(|(_, p)| cell(p)).collect(),
        }
    };
    Some(SuiteSection {
        charts,
        columns: used.iter().map(|(name, _)| *name).collect(),
        rows: all.iter().map(row).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::templates::{POLICY, render};
    use serde_json::json;

    #[test]
    fn measured_suites_are_shown() {
        let eval = |stage: &str, step: u64, v: f64| {
            json!({"kind": "eval", "stage": stage, "step": step,
                "grounding": {"mean_iou": v, "pointing_game": null, "withheld": {"mean_iou": 0.125}},
                "mau": {"accuracy": v, "sources": {"a<b": v}}})
        };
        assert!(suite_section(&[json!({"kind": "eval", "stage": "rl", "step": 1, "mean_iou": 0.5})]).is_none());
        let section = suite_section(&[eval("sft", 9, 0.25), eval("rl", 10, 0.5), eval("rl", 20, 0.75)]).unwrap();
        let values = json!({"name": "x", "policy": POLICY, "style": "", "suites": section});
        let html = render("report.html", values).unwrap();
        for part in
            ["stage 1, step 9", "stage 2, step 20", "<td>0.750</td>", "<td>0.125</td>", "a&lt;b", "MAU accuracy"]
        {
            assert!(html.contains(part), "{part} is not in {html}");
        }
        assert!(!html.contains("<th>pointing</th>") && html.matches("<polyline").count() == 4, "{html}");
    }
}
