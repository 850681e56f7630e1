//! A held-out image with true box, predicted box and attention heat map, as inline SVG over the embedded image.

use std::path::Path;

use base64::Engine;
use serde::{Deserialize, Serialize};
use unveil_core::{BBox, Grid};
use unveil_data::store::Image;

/// One held-out answer; a line of `eval/before.jsonl` and `eval/after.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// Record id.
    pub id: String,
    /// Image file, absolute or relative to the run directory.
    pub image: String,
    /// `[width, height]` in pixels.
    pub size: [u32; 2],
    /// True category.
    pub category: String,
    /// The answer of a record that is answered in text; absent where regions are asked for. Numbers speak of the latter only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// True boxes, original pixels.
    pub truth: Vec<BBox>,
    /// Predicted boxes, original pixels.
    pub boxes: Vec<BBox>,
    /// The answer as generated.
    pub text: String,
    /// Category named right.
    pub correct: bool,
    /// IoU of the one true box; absent when there is not exactly one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iou: Option<f64>,
    /// Soft F1.
    pub soft_f1: f64,
    /// Attention mass on the lesion over its area; absent when there is no lesion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lift: Option<f64>,
    /// Grid of `heat`.
    pub grid: Grid,
    /// Attention of the category's tokens over the image tokens, row-major, sums to 1; empty when no category was named.
    pub heat: Vec<f32>,
}

impl Prediction {
    /// What is right, in words: the reference of an answer in text, else the class, else that nothing is there.
    pub(crate) fn truth_in_words(&self) -> &str {
        match &self.reference {
            Some(reference) => reference,
            None if self.truth.is_empty() => unveil_core::NO_FINDING,
            None => &self.category,
        }
    }
}

/// The figure of one prediction.
pub(crate) fn figure(run: &Path, p: &Prediction) -> String {
    let [w, h] = p.size.map(f64::from);
    let mut svg = format!("<svg viewBox=\"0 0 {w} {h}\" class=\"shot\" role=\"img\">");
    match embed(&run.join(&p.image)) {
        Some(uri) => svg += &format!("<image href=\"{uri}\" width=\"{w}\" height=\"{h}\"/>"),
        None => svg += &format!("<rect width=\"{w}\" height=\"{h}\" fill=\"#ddd\"/>"),
    }
    if p.heat.len() == p.grid.tokens() {
        let peak = p.heat.iter().copied().fold(1e-9, f32::max);
        let (cw, ch) = (w / p.grid.cols as f64, h / p.grid.rows as f64);
        for (j, v) in p.heat.iter().enumerate() {
            let (r, c) = (j / p.grid.cols, j % p.grid.cols);
            let opacity = 0.55 * v / peak;
            if opacity > 0.02 {
                svg += &format!(
                    "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{cw:.1}\" height=\"{ch:.1}\" fill=\"#ff7a00\" opacity=\"{opacity:.2}\"/>",
                    c as f64 * cw,
                    r as f64 * ch
                );
            }
        }
    }
    let line = w / 96.0;
    for (boxes, class) in [(&p.truth, "true"), (&p.boxes, "pred")] {
        for b in boxes.iter().filter(|b| b.area() > 0.0) {
            svg += &format!(
                "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" class=\"{class}\" stroke-width=\"{line:.2}\"/>",
                b.x1,
                b.y1,
                b.x2 - b.x1,
                b.y2 - b.y1
            );
        }
    }
    svg += "</svg>";
    let mut facts = vec![match (p.iou, &p.reference) {
        (_, Some(_)) => "answered in text".to_owned(),
        (Some(iou), None) => format!("IoU {iou:.2}"),
        (None, None) => format!("soft F1 {:.2}", p.soft_f1),
    }];
    facts.extend(p.lift.map(|l| format!("lift {l:.1}")));
    format!("<div class=\"card\">{svg}<code>{}</code><small>{}</small></div>", escape(&p.text), facts.join(" · "))
}

fn embed(path: &Path) -> Option<String> {
    let mut bytes = std::fs::read(path).ok()?;
    let kind = match &bytes[..] {
        [0x89, b'P', b'N', b'G', ..] => "png",
        [0xff, 0xd8, ..] => "jpeg",
        // What browsers do not show.
        _ => {
            bytes = Image::decode(&bytes, &path.display().to_string()).and_then(|i| i.to_png()).ok()?;
            "png"
        }
    };
    Some(format!("data:image/{kind};base64,{}", base64::engine::general_purpose::STANDARD.encode(bytes)))
}

/// Text made safe for HTML.
pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A DICOM file of 2 x 1 pixels.
    fn dicom() -> Vec<u8> {
        let element = |tag: [u16; 2], vr: &str, value: &[u8]| {
            let mut out = [tag[0].to_le_bytes(), tag[1].to_le_bytes()].concat();
            out.extend(vr.bytes());
            match vr {
                "OB" => out.extend([[0; 2].to_vec(), (value.len() as u32).to_le_bytes().to_vec()].concat()),
                _ => out.extend((value.len() as u16).to_le_bytes()),
            }
            out.extend(value);
            out
        };
        let number = |tag, value: u16| element(tag, "US", &value.to_le_bytes());
        let syntax = element([2, 0x10], "UI", b"1.2.840.10008.1.2.1\0");
        let mut out = vec![0; 128];
        out.extend(b"DICM");
        out.extend(element([2, 0], "UL", &(syntax.len() as u32).to_le_bytes()));
        out.extend(syntax);
        out.extend(element([0x28, 4], "CS", b"MONOCHROME2 "));
        out.extend([number([0x28, 0x10], 1), number([0x28, 0x11], 2), number([0x28, 0x100], 8)].concat());
        out.extend(element([0x7fe0, 0x10], "OB", &[10, 20]));
        out
    }

    #[test]
    fn an_answer_in_text_is_shown_with_its_reference() {
        let line = r#"{"id":"q","image":"","size":[4,4],"category":"","truth":[],"boxes":[],"text":"a <b>","correct":false,"soft_f1":0.0,
            "grid":{"rows":0,"cols":0},"heat":[]}"#;
        let mut p: Prediction = serde_json::from_str(line).unwrap();
        assert_eq!((p.truth_in_words(), figure(Path::new(""), &p).contains("soft F1 0.00")), ("no finding", true));
        p.reference = Some("MRI".into());
        let shown = figure(Path::new(""), &p);
        assert_eq!(p.truth_in_words(), "MRI");
        assert!(shown.contains("answered in text") && !shown.contains("soft F1") && shown.contains("a &lt;b&gt;"), "{shown}");
    }

    #[test]
    fn what_browsers_do_not_show_becomes_png() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.dcm");
        std::fs::write(&path, dicom()).unwrap();
        let png = Image { width: 2, height: 1, rgb: vec![0, 0, 0, 255, 255, 255] }.to_png().unwrap();
        let encoded = base64::engine::general_purpose::STANDARD.encode(png);
        assert_eq!(embed(&path), Some(format!("data:image/png;base64,{encoded}")));
        std::fs::write(&path, "no image").unwrap();
        assert_eq!(embed(&path), None);
    }
}
