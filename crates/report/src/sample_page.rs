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

use crate::ReportError;
use crate::figure::escape;
use crate::shown::Shown;
use crate::thumbnail::Thumbnails;

const STYLE: &str = include_str!("sample_page.css");
const SCRIPT: &str = include_str!("sample_page.js");
/// The page may load nothing: images are data, style and script are its own.
const POLICY: &str = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'";

/// Writes the page of `samples` to `out`; image paths are relative to `base`.
///
/// # Errors
/// The page cannot be written. An image that cannot be read is shown as a grey field.
pub fn write_samples(title: &str, samples: &[Shown], base: &Path, out: &Path) -> Result<(), ReportError> {
    let mut images = Thumbnails::default();
    let mut masks: BTreeMap<String, usize> = BTreeMap::new();
    let (mut rows, mut data) = (String::new(), Vec::with_capacity(samples.len()));
    for (i, s) in samples.iter().enumerate() {
        let image = if s.image.as_os_str().is_empty() { None } else { images.number(&base.join(&s.image)) };
        let why: Vec<String> = s.components.iter().filter_map(|(name, c)| mask(name, c)).collect();
        why.iter().for_each(|w| *masks.entry(w.clone()).or_default() += 1);
        rows += &row(i, s, &why);
        data.push(entry(s, image, &why));
    }
    let options: String =
        masks.iter().map(|(why, n)| format!("<option value=\"{0}\">{0} ({n})</option>", escape(why))).collect();
    let body = format!(
        "<header><h1>Unveil <span>{0}</span></h1><form>\
         <input id=\"find\" type=\"search\" placeholder=\"id, text, step 12\" aria-label=\"Search\">\
         <label>reward <input id=\"low\" type=\"number\" step=\"any\" placeholder=\"from\">\
         <input id=\"high\" type=\"number\" step=\"any\" placeholder=\"to\"></label>\
         <select id=\"mask\" aria-label=\"Mask\"><option value=\"\">masked or not</option><option value=\"none\">nothing masked</option>\
         <option value=\"all\">no reward at all</option>{options}</select>\
         <select id=\"order\" aria-label=\"Order\"><option value=\"\">in their order</option><option value=\"up\">lowest reward first</option>\
         <option value=\"down\">highest reward first</option></select>\
         <output id=\"count\">{1}</output></form></header>\
         <main><ol id=\"list\">{rows}</ol><article id=\"one\"><noscript>The images need JavaScript.</noscript></article></main>\
         <footer>↑ ↓ or k j: one by one · PgUp PgDn: by ten · Home End · t: true boxes · p: predicted boxes · a: attention · /: search</footer>",
        escape(title),
        samples.len()
    );
    let data = json!({"images": images.into_uris(), "samples": data}).to_string().replace('<', "\\u003c");
    let page = format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta http-equiv=\"Content-Security-Policy\" content=\"{POLICY}\">\
         <meta name=\"viewport\" content=\"width=device-width\"><title>Unveil: {}</title><style>{STYLE}</style></head><body>{body}\
         <script type=\"application/json\" id=\"data\">{data}</script><script>{SCRIPT}</script></body></html>",
        escape(title)
    );
    std::fs::write(out, page).map_err(|source| ReportError::Io { path: out.to_owned(), source })
}

/// `component: reason` of a masked component.
fn mask(name: &str, c: &Component) -> Option<String> {
    let reason = match &c.reason {
        _ if !c.masked => return None,
        Some(MaskReason::NotApplicable) => "not applicable",
        Some(MaskReason::NoAttention) => "no attention",
        Some(MaskReason::GroupMasked) => "masked for another response of the group",
        Some(MaskReason::Failed(_)) => "failed",
        None => "masked",
    };
    Some(format!("{}: {reason}", name.replace('_', " ")))
}

fn row(i: usize, s: &Shown, why: &[String]) -> String {
    let step = s.step.map_or_else(String::new, |n| format!("step {n} · "));
    let total = s.total.map_or_else(|| "no reward".to_owned(), |t| format!("{t:.3}"));
    let masked = if why.is_empty() { String::new() } else { format!("<small>{}</small>", escape(&why.join("; "))) };
    format!(
        "<li data-i=\"{i}\"><img alt=\"\" width=\"44\" height=\"44\"><b>{total}</b><span>{step}{} #{}</span>{masked}</li>",
        escape(&s.id),
        s.index
    )
}

fn entry(s: &Shown, image: Option<usize>, why: &[String]) -> Value {
    let component = |(name, c): (&String, &Component)| {
        let failed = match &c.reason {
            Some(MaskReason::Failed(what)) => Some(what),
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
        write_samples("run <1>", &samples, dir.path(), &out).unwrap();
        let page = std::fs::read_to_string(&out).unwrap();
        assert!(page.len() < 2 << 20, "{} bytes", page.len());
        assert_eq!(page.matches("<script").count(), 2, "nothing of a response becomes a script");
        assert!(page.contains("run &lt;1&gt;") && !page.contains("<b>7") && !page.contains("<img src"));
        assert!(!page.contains("http://") && !page.contains("https://"), "the page must not load anything");
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
        write_samples("x", &[bare], dir.path(), &out).unwrap();
        let page = std::fs::read_to_string(&out).unwrap();
        let data: Value = serde_json::from_str(between(&page, "id=\"data\">", "</script>")).unwrap();
        let s = &data["samples"][0];
        assert!(s["heat"].is_null() && s["grid"].is_null() && s["total"].is_null() && page.contains("no reward</b>"));
        let e = write_samples("x", &[], dir.path(), &dir.path().join("gone/s.html")).unwrap_err().to_string();
        assert!(e.contains("gone"), "{e}");
    }
}
