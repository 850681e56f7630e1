//! A held-out image with true box, predicted box and attention heat map, as inline SVG over the embedded image.

use std::path::Path;

use base64::Engine;
use serde::{Deserialize, Serialize};
use unveil_core::{BBox, Grid};

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
    let mut facts = vec![match p.iou {
        Some(iou) => format!("IoU {iou:.2}"),
        None => format!("soft F1 {:.2}", p.soft_f1),
    }];
    facts.extend(p.lift.map(|l| format!("lift {l:.1}")));
    format!("<div class=\"card\">{svg}<code>{}</code><small>{}</small></div>", escape(&p.text), facts.join(" · "))
}

fn embed(path: &Path) -> Option<String> {
    let bytes = std::fs::read(path).ok()?;
    let kind = if bytes.starts_with(b"\x89PNG") { "png" } else { "jpeg" };
    Some(format!("data:image/{kind};base64,{}", base64::engine::general_purpose::STANDARD.encode(bytes)))
}

/// Text made safe for HTML.
pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
