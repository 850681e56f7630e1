//! The sample page: rewarded responses one by one, with image, boxes, attention and every component's number. One file, no network.
//!
//! The list stands in the page; image, boxes and attention of a response are drawn by `sample_page.js` when it is looked at, from
//! data in the page. Must not know: where the responses come from.

use std::collections::BTreeMap;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use unveil_core::{Component, MaskReason};

use crate::shown::Shown;
use crate::templates::{SCRIPT_POLICY, render};
use crate::thumbnail::Thumbnails;
use crate::{ImageFolders, ReportError};

const STYLE: &str = include_str!("sample_page.css");
const SCRIPT: &str = include_str!("sample_page.js");
/// Writes the page of `samples` to `out`; image paths are relative to `base`, and are shown where `images` lets them be.
///
/// # Errors
/// The page cannot be written. An image that cannot be read is shown as a grey field.
pub fn write_samples(
    title: &str,
    samples: &[Shown],
    base: &Path,
    images: &ImageFolders,
    out: &Path,
) -> Result<(), ReportError> {
    let mut thumbnails = Thumbnails::default();
    let mut masks: BTreeMap<String, usize> = BTreeMap::new();
    let (mut rows, mut data) = (Vec::with_capacity(samples.len()), Vec::with_capacity(samples.len()));
    for s in samples {
        let image = match s.image.as_os_str().is_empty() {
            true => None,
            false => thumbnails.number(images, &base.join(&s.image)),
        };
        let why: Vec<String> = s.components.iter().filter_map(|(name, c)| mask(name, c)).collect();
        why.iter().for_each(|w| *masks.entry(w.clone()).or_default() += 1);
        rows.push(row(s, &why));
        data.push(entry(s, image, &why));
    }
    // In a script element only `</` and `<!--` end or change what is read (HTML, "Restrictions for contents of script elements").
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

/// `component: reason` of a masked component.
fn mask(name: &str, c: &Component) -> Option<String> {
    let reason = match &c.reason {
        _ if !c.masked => return None,
        Some(MaskReason::NotApplicable) => "not applicable",
        Some(MaskReason::NoAttention) => "no attention",
        Some(MaskReason::GroupMasked) => "masked for another response of the group",
        Some(MaskReason::Failed(_)) => "failed",
        Some(MaskReason::Unavailable(_)) => "not available",
        None => "masked",
    };
    Some(format!("{}: {reason}", name.replace('_', " ")))
}

/// One line of the list.
fn row(s: &Shown, why: &[String]) -> Value {
    let step = s.step.map_or_else(String::new, |n| format!("step {n} · "));
    let total = s.total.map_or_else(|| "no reward".to_owned(), |t| format!("{t:.3}"));
    json!({"total": total, "name": format!("{step}{} #{}", s.id, s.index), "masked": why.join("; ")})
}

fn entry(s: &Shown, image: Option<usize>, why: &[String]) -> Value {
    let component = |(name, c): (&String, &Component)| {
        let failed = match &c.reason {
            Some(MaskReason::Failed(what) | MaskReason::Unavailable(what)) => Some(what),
            _ => None,
        };
        json!({"name": name.replace('_', " "), "value": c.value, "why": mask(name, c), "failed": failed, "detail": c.detail})
    };
    let peak = s.heat.iter().copied().filter(|v| v.is_finite()).fold(0.0, f32::max);
    let heat: Vec<u8> = s.heat.iter().map(|v| (v / peak.max(f32::MIN_POSITIVE) * 255.0).round() as u8).collect();
    let known = !heat.is_empty() && Some(heat.len()) == s.grid.rows.checked_mul(s.grid.cols);
    json!({
        "image": image, "step": s.step, "id": s.id, "index": s.index, "size": s.size, "category": s.category,
        "reference": s.reference, "text": s.text,
        "truth": s.truth, "predicted": s.predicted, "total": s.total, "masks": why,
        "grid": known.then_some([s.grid.rows, s.grid.cols]), "heat": known.then(|| STANDARD.encode(&heat)), "peak": peak,
        "components": s.components.iter().map(component).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use unveil_core::{Breakdown, Grid};
    use unveil_data::store::Image;

    fn sample(i: usize, image: &str, c: Component) -> Shown {
        let mut s = Shown {
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

    /// What stands between two marks of the page.
    fn between<'a>(page: &'a str, from: &str, to: &str) -> &'a str {
        page.split_once(from).and_then(|(_, rest)| rest.split_once(to)).map_or("", |(inside, _)| inside)
    }

    #[test]
    fn a_thousand_responses_stay_small_and_safe() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.png"), Image::new(600, 600).to_png().unwrap()).unwrap();
        let samples: Vec<Shown> = (0..1000)
            .map(|i| match i % 3 {
                0 => sample(i, "a.png", Component::value(0.25).with("lift", 2.0)),
                1 => sample(i, "gone.png", Component::masked(MaskReason::NoAttention)),
                _ => sample(i, "", Component::masked(MaskReason::Failed("<late>".into()))),
            })
            .collect();
        let out = dir.path().join("samples.html");
        write_samples("run <1>", &samples, dir.path(), &ImageFolders::new([dir.path()]), &out).unwrap();
        let page = std::fs::read_to_string(&out).unwrap();
        assert!(page.len() < 2 << 20, "{} bytes", page.len());
        assert_eq!(page.matches("<script").count(), 2, "nothing of a response becomes a script");
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
        assert_eq!(data["images"].as_array().unwrap().len(), 1, "an image is there once");
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
    fn nothing_known_is_nothing_drawn() {
        let dir = tempfile::tempdir().unwrap();
        let b = Breakdown { id: "a".into(), index: 0, total: None, components: BTreeMap::new() };
        let bare = Shown {
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
