//! The sample page: rewarded responses one by one, with image, boxes, attention and reward components. It is a single file that uses no
//! network.
//!
//! The page contains the list and the data; `sample_page.js` draws image, boxes and attention of the selected response.

use std::collections::BTreeMap;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use unveil_core::{Component, MaskReason};

use crate::rewarded_response::RewardedResponse;
use crate::templates::{SCRIPT_POLICY, render};
use crate::thumbnail::Thumbnails;
use crate::{ImageFolders, ReportError};

const STYLE: &str = include_str!("sample_page.css");
const SCRIPT: &str = include_str!("sample_page.js");

/// Writes the page of `samples` to `out`. Image paths are relative to `base`; only images allowed by `images` are shown. An image that
/// cannot be read is shown as a grey area.
///
/// # Errors
/// Returns [`ReportError::Io`] if the page cannot be written.
pub fn write_samples(
    title: &str,
    samples: &[RewardedResponse],
    base: &Path,
    images: &ImageFolders,
    out: &Path,
) -> Result<(), ReportError> {
    let mut thumbnails = Thumbnails::default();
    let mut masks: BTreeMap<String, usize> = BTreeMap::new();
    let mut rows = Vec::with_capacity(samples.len());
    let mut data = Vec::with_capacity(samples.len());
    for s in samples {
        let image = match s.image.as_os_str().is_empty() {
            true => None,
            false => thumbnails.index_of(images, &base.join(&s.image)),
        };
        let why: Vec<String> = s.components.iter().filter_map(|(name, c)| mask_text(name, c)).collect();
        why.iter().for_each(|w| *masks.entry(w.clone()).or_default() += 1);
        rows.push(list_row(s, &why));
        data.push(script_data(s, image, &why));
    }
    // In a script element, only `</` and `<!--` have a meaning (HTML, "Restrictions for contents of script elements").
    let data = json!({"images": thumbnails.into_uris(), "samples": data}).to_string().replace('<', "\\u003c");
    let page = render(
        "samples.html",
        json!({
            "name": title, "policy": SCRIPT_POLICY, "style": STYLE, "script": SCRIPT, "data": data, "rows": rows,
            "masks": masks.into_iter().collect::<Vec<_>>(),
        }),
    )?;
    unveil_core::write_atomic(out, page.as_bytes()).map_err(|source| ReportError::Io { path: out.to_owned(), source })
}

/// Returns `component: reason` for a masked component.
fn mask_text(name: &str, c: &Component) -> Option<String> {
    let reason = match &c.reason {
        _ if !c.masked => return None,
        Some(MaskReason::NotApplicable) => "not applicable",
        Some(MaskReason::NoAttention) => "no attention",
        Some(MaskReason::GroupMasked) => "masked for another response of the group",
        Some(MaskReason::Failed(_)) => "failed",
        Some(MaskReason::Unavailable(_)) => "not available",
        Some(MaskReason::Form(_)) | None => "masked",
    };
    Some(format!("{}: {reason}", name.replace('_', " ")))
}

/// Returns one line of the list.
fn list_row(s: &RewardedResponse, why: &[String]) -> Value {
    let step = s.step.map_or_else(String::new, |n| format!("step {n} · "));
    let total = s.total.map_or_else(|| "no reward".to_owned(), |t| format!("{t:.3}"));
    json!({"total": total, "name": format!("{step}{} #{}", s.id, s.index), "masked": why.join("; ")})
}

/// Returns the data of one response for the script.
fn script_data(s: &RewardedResponse, image: Option<usize>, why: &[String]) -> Value {
    let component = |(name, c): (&String, &Component)| {
        let failed = match &c.reason {
            Some(MaskReason::Failed(what) | MaskReason::Unavailable(what)) => Some(what.clone()),
            Some(MaskReason::Form(rule)) => Some(rule.to_string()),
            _ => None,
        };
        json!({"name": name.replace('_', " "), "value": c.value, "why": mask_text(name, c), "failed": failed, "detail": c.detail})
    };
    let peak = s.heat.iter().copied().filter(|v| v.is_finite()).fold(0.0, f32::max);
    let heat: Vec<u8> = s.heat.iter().map(|v| (v / peak.max(f32::MIN_POSITIVE) * 255.0).round() as u8).collect();
    let complete = !heat.is_empty() && Some(heat.len()) == s.grid.rows.checked_mul(s.grid.cols);
    json!({
        "image": image, "step": s.step, "id": s.id, "index": s.index, "size": s.size, "category": s.category,
        "reference": s.reference, "text": s.text,
        "truth": s.truth, "predicted": s.predicted, "total": s.total, "masks": why,
        "grid": complete.then_some([s.grid.rows, s.grid.cols]), "heat": complete.then(|| STANDARD.encode(&heat)), "peak": peak,
        "components": s.components.iter().map(component).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use unveil_core::{Breakdown, Grid};
    use unveil_data::image_store::Image;

    fn sample(i: usize, image: &str, c: Component) -> RewardedResponse {
        let mut s = RewardedResponse {
            step: Some(3),
            id: format!("</script><b>{i}"),
            index: i,
            image: image.into(),
            size: [20, 20],
            category: "nodule".into(),
            reference: None,
            truth: vec![[1.0, 1.0, 9.0, 9.0].into()],
            predicted: vec![[f32::NAN, 0.0, 1.0, 1.0].into()],
            text: "<img src=x onerror=alert(1)>".into(),
            grid: Grid { rows: 1, cols: 2 },
            heat: vec![0.25, 0.75],
            total: Some(0.5),
            components: Default::default(),
        };
        s.components.insert("vision_relevance".into(), c);
        s
    }

    /// Returns the part of the page between two marks.
    fn between<'a>(page: &'a str, from: &str, to: &str) -> &'a str {
        page.split_once(from).and_then(|(_, rest)| rest.split_once(to)).map_or("", |(inside, _)| inside)
    }

    #[test]
    fn page_of_a_thousand_responses_is_small_and_safe() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.png"), Image::new(600, 600).to_png().unwrap()).unwrap();
        let samples: Vec<RewardedResponse> = (0..1000)
            .map(|i| match i % 3 {
                0 => sample(i, "a.png", Component::value(0.25).with_detail("lift", 2.0)),
                1 => sample(i, "gone.png", Component::masked(MaskReason::NoAttention)),
                _ => sample(i, "", Component::masked(MaskReason::Failed("<late>".into()))),
            })
            .collect();
        let out = dir.path().join("samples.html");
        write_samples("run <1>", &samples, dir.path(), &ImageFolders::new([dir.path()]), &out).unwrap();
        let page = std::fs::read_to_string(&out).unwrap();
        assert!(page.len() < 2 << 20, "{} bytes", page.len());
        assert_eq!(page.matches("<script").count(), 2, "no text of a response becomes a script");
        assert!(page.contains("run &lt;1&gt;") && !page.contains("<b>7") && !page.contains("<img src"));
        assert!(!page.contains("http://") && !page.contains("https://"), "the page must not load anything");
        let policy = "http-equiv=\"Content-Security-Policy\" content=\"default-src &#x27;none&#x27;; img-src data:;";
        assert!(page.contains(policy), "{}", &page[..1000]);
        let list = between(&page, "<ol id=\"list\">", "</ol>");
        assert_eq!(list.matches("<li data-i=").count(), 1000);
        assert!(page.contains(
            "<option value=\"vision relevance: no attention\">vision relevance: no attention (333)</option>"
        ));
        let data: Value = serde_json::from_str(between(&page, "id=\"data\">", "</script>")).unwrap();
        assert_eq!(data["images"].as_array().unwrap().len(), 1, "each image is included once");
        let s = &data["samples"];
        assert_eq!((&s[0]["image"], &s[1]["image"], &s[3]["image"]), (&json!(0), &Value::Null, &json!(0)));
        assert_eq!(s[0]["text"], "<img src=x onerror=alert(1)>");
        assert_eq!(STANDARD.decode(s[0]["heat"].as_str().unwrap()).unwrap(), [85, 255]);
        assert_eq!((&s[0]["components"][0]["value"], &s[0]["masks"]), (&json!(0.25), &json!([])));
        assert_eq!(
            (&s[2]["components"][0]["why"], &s[2]["components"][0]["failed"]),
            (&json!("vision relevance: failed"), &json!("<late>"))
        );
    }

    #[test]
    fn broken_rule_of_the_form_is_shown() {
        let rule = MaskReason::Form(unveil_core::ParseFault::TextAround);
        let data = script_data(&sample(0, "", Component::value(0.0).with_remark(Some(rule))), None, &[]);
        let component = &data["components"][0];
        assert_eq!(
            (&component["failed"], &component["why"]),
            (&json!("there is text around the answer"), &Value::Null)
        );
    }

    #[test]
    fn missing_values_are_not_drawn() {
        let dir = tempfile::tempdir().unwrap();
        let b = Breakdown { id: "a".into(), index: 0, total: None, components: BTreeMap::new() };
        let bare = RewardedResponse {
            heat: Vec::new(),
            total: b.total,
            components: b.components,
            ..sample(0, "", Component::value(1.0))
        };
        let out = dir.path().join("s.html");
        write_samples("x", &[bare], dir.path(), &ImageFolders::default(), &out).unwrap();
        let page = std::fs::read_to_string(&out).unwrap();
        let data: Value = serde_json::from_str(between(&page, "id=\"data\">", "</script>")).unwrap();
        let s = &data["samples"][0];
        assert!(s["heat"].is_null() && s["grid"].is_null() && s["total"].is_null() && page.contains("no reward</b>"));
        let below_a_file = out.join("s.html");
        let e = write_samples("x", &[], dir.path(), &ImageFolders::default(), &below_a_file).unwrap_err().to_string();
        assert!(e.contains("s.html"), "{e}");
    }
}
