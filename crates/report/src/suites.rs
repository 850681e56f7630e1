//! The suites' numbers over the steps of a run, from its `eval` events.
//!
//! Must not know: how the suites are computed; only the names of the keys that it draws.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::chart::{Series, panel};
use crate::figure::escape;

/// Keys of the grounding suite that are drawn together, and what they are called.
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

/// Columns of the table.
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

/// Curves of stage 2 and a table of all evaluations; empty where the run measured no suite.
pub(crate) fn suites(events: &[Value]) -> String {
    let measured = |e: &&Value| e["kind"] == "eval" && (e["grounding"].is_object() || e["mau"].is_object());
    let all: Vec<&Value> = events.iter().filter(measured).collect();
    if all.is_empty() {
        return String::new();
    }
    let rl: Vec<&Value> = all.iter().copied().filter(|e| e["stage"] == "rl").collect();
    let points = |pointer: &str| -> Vec<(f64, f64)> {
        rl.iter().filter_map(|e| Some((e["step"].as_f64()?, e.pointer(pointer)?.as_f64()?))).collect()
    };
    let mut panels: String = GROUNDING
        .iter()
        .map(|(title, series)| {
            let series = series.iter().map(|(name, p)| Series { name, points: points(p) });
            panel(title, "step", &series.filter(|s| !s.points.is_empty()).collect::<Vec<_>>())
        })
        .collect();
    let mut sources: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    for e in &rl {
        for (name, v) in e["mau"]["sources"].as_object().into_iter().flatten() {
            sources.entry(escape(name)).or_default().extend(e["step"].as_f64().zip(v.as_f64()));
        }
    }
    let mean = Series { name: "mean over the sources", points: points("/mau/accuracy") };
    let by_source = sources.iter().map(|(name, p)| Series { name, points: p.clone() });
    panels += &panel("MAU: accuracy by source", "step", &std::iter::once(mean).chain(by_source).collect::<Vec<_>>());
    let used: Vec<&(&str, &str)> =
        COLUMNS.iter().filter(|(_, p)| all.iter().any(|e| e.pointer(p).is_some_and(Value::is_number))).collect();
    let head: String = used.iter().map(|(name, _)| format!("<th>{name}</th>")).collect();
    let rows: String = all
        .iter()
        .map(|e| {
            let stage = if e["stage"] == "rl" { "2" } else { "1" };
            let cell = |p: &str| e.pointer(p).and_then(Value::as_f64).map_or("–".into(), |v| format!("{v:.3}"));
            let cells: String = used.iter().map(|(_, p)| format!("<td>{}</td>", cell(p))).collect();
            format!("<tr><td>stage {stage}, step {}</td>{cells}</tr>", e["step"].as_u64().unwrap_or_default())
        })
        .collect();
    format!(
        "<h2>Suites on the validation split</h2><p>Withheld: a black image of the same size stands in, so what is left is guessed. \
         Attention is that of the tokens that name the class; an answer that does not name it counts 0.</p>\
         <div class=\"charts\">{panels}</div><table class=\"suites\"><tr><th></th>{head}</tr>{rows}</table>"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_was_measured_is_shown() {
        let eval = |stage: &str, step: u64, v: f64| {
            json!({"kind": "eval", "stage": stage, "step": step,
                "grounding": {"mean_iou": v, "pointing_game": null, "withheld": {"mean_iou": 0.125}},
                "mau": {"accuracy": v, "sources": {"a<b": v}}})
        };
        assert_eq!(suites(&[json!({"kind": "eval", "stage": "rl", "step": 1, "mean_iou": 0.5})]), "");
        let html = suites(&[eval("sft", 9, 0.25), eval("rl", 10, 0.5), eval("rl", 20, 0.75)]);
        for part in
            ["stage 1, step 9", "stage 2, step 20", "<td>0.750</td>", "<td>0.125</td>", "a&lt;b", "MAU accuracy"]
        {
            assert!(html.contains(part), "{part} is not in {html}");
        }
        assert!(!html.contains("<th>pointing</th>") && html.matches("<polyline").count() == 4, "{html}");
    }
}
