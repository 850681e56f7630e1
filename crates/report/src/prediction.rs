//! Predictions on held-out images, and figures of them: the embedded image with true boxes, predicted boxes and attention heat map.

use std::path::Path;

use base64::Engine;
use serde::{Deserialize, Serialize};
use unveil_core::{BBox, Grid};
use unveil_data::image_store::Image;

use crate::ImageFolders;

/// An answer to a held-out image; one line of `eval/before.jsonl` or `eval/after.jsonl`.
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
    /// Reference answer of a text record; absent for grounding records. The metrics below apply to the latter only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// True boxes in original pixels.
    pub truth: Vec<BBox>,
    /// Predicted boxes in original pixels.
    pub boxes: Vec<BBox>,
    /// The answer as generated.
    pub text: String,
    /// Whether the category is right.
    pub correct: bool,
    /// IoU of the first predicted box with the true box; absent unless there is exactly one true box.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iou: Option<f64>,
    /// Soft F1 of predicted and true boxes.
    pub soft_f1: f64,
    /// Attention mass on the lesion divided by its share of the area; absent if there is no lesion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lift: Option<f64>,
    /// Grid of `heat`.
    pub grid: Grid,
    /// Attention of the category's tokens over the image tokens, row-major, sum 1; empty if no category was named.
    pub heat: Vec<f32>,
}

impl Prediction {
    /// Returns the true answer in words: the reference of a text record, else the category, else "no finding".
    pub(crate) fn truth_in_words(&self) -> &str {
        match &self.reference {
            Some(reference) => reference,
            None if self.truth.is_empty() => unveil_core::NO_FINDING,
            None => &self.category,
        }
    }
}

/// Values of the figure template, in pixels of the image.
#[derive(Debug, Serialize)]
pub(crate) struct Figure {
    width: u32,
    height: u32,
    /// Data URI; `None` if there is no image that can be shown.
    image: Option<String>,
    /// Width and height of a cell of the heat map.
    cell: [String; 2],
    heat: Vec<HeatCell>,
    boxes: Vec<BoxOutline>,
    /// Line width of the boxes.
    line: String,
    text: String,
    facts: Vec<String>,
}

#[derive(Debug, Serialize)]
struct HeatCell {
    x: String,
    y: String,
    opacity: String,
}

#[derive(Debug, Clone, Serialize)]
struct BoxOutline {
    x: f32,
    y: f32,
    width: f32,
    height: f32,
    class: &'static str,
}

/// Returns the figure of one prediction, whose image path is relative to `run`.
pub(crate) fn figure(run: &Path, images: &ImageFolders, p: &Prediction) -> Figure {
    let [w, h] = p.size.map(f64::from);
    let cw = w / p.grid.cols.max(1) as f64;
    let ch = h / p.grid.rows.max(1) as f64;
    let peak = p.heat.iter().copied().filter(|v| v.is_finite()).fold(1e-9, f32::max);
    let cell = |(j, v): (usize, &f32)| {
        let opacity = 0.55 * v / peak;
        let row = j / p.grid.cols;
        let column = j % p.grid.cols;
        (opacity > 0.02).then(|| HeatCell {
            x: format!("{:.1}", column as f64 * cw),
            y: format!("{:.1}", row as f64 * ch),
            opacity: format!("{opacity:.2}"),
        })
    };
    let complete = p.grid.rows.checked_mul(p.grid.cols) == Some(p.heat.len());
    let outlines = |boxes: &[BBox], class: &'static str| -> Vec<BoxOutline> {
        let drawn = boxes.iter().filter(|b| b.area() > 0.0);
        drawn.map(|b| BoxOutline { x: b.x1, y: b.y1, width: b.x2 - b.x1, height: b.y2 - b.y1, class }).collect()
    };
    let mut facts = vec![match (p.iou, &p.reference) {
        (_, Some(_)) => "answered in text".to_owned(),
        (Some(iou), None) => format!("IoU {iou:.2}"),
        (None, None) => format!("soft F1 {:.2}", p.soft_f1),
    }];
    facts.extend(p.lift.map(|l| format!("lift {l:.1}")));
    Figure {
        width: p.size[0],
        height: p.size[1],
        image: embed(images, &run.join(&p.image)),
        cell: [format!("{cw:.1}"), format!("{ch:.1}")],
        heat: if complete { p.heat.iter().enumerate().filter_map(cell).collect() } else { Vec::new() },
        boxes: [outlines(&p.truth, "true"), outlines(&p.boxes, "pred")].concat(),
        line: format!("{:.2}", w / 96.0),
        text: p.text.clone(),
        facts,
    }
}

/// Returns an image file as a data URI; formats that browsers do not show are converted to PNG.
fn embed(images: &ImageFolders, path: &Path) -> Option<String> {
    let mut bytes = images.read(path)?;
    let kind = match &bytes[..] {
        [0x89, b'P', b'N', b'G', ..] => "png",
        [0xff, 0xd8, ..] => "jpeg",
        // Formats that browsers do not show.
        _ => {
            bytes = Image::decode(&bytes, &path.display().to_string()).and_then(|i| i.to_png()).ok()?;
            "png"
        }
    };
    Some(format!("data:image/{kind};base64,{}", base64::engine::general_purpose::STANDARD.encode(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a DICOM file of 2 x 1 pixels.
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
    fn text_answers_are_shown_with_their_reference() {
        let line = r#"{"id":"q","image":"","size":[4,4],"category":"","truth":[],"boxes":[],"text":"a <b>","correct":false,"soft_f1":0.0,
            "grid":{"rows":0,"cols":0},"heat":[]}"#;
        let mut p: Prediction = serde_json::from_str(line).unwrap();
        let shown = |p: &Prediction| figure(Path::new(""), &ImageFolders::default(), p).facts;
        assert_eq!((p.truth_in_words(), shown(&p)), ("no finding", vec!["soft F1 0.00".to_owned()]));
        p.reference = Some("MRI".into());
        assert_eq!((p.truth_in_words(), shown(&p)), ("MRI", vec!["answered in text".to_owned()]));
    }

    #[test]
    fn formats_unknown_to_browsers_become_png() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.dcm");
        std::fs::write(&path, dicom()).unwrap();
        let png = Image::from_rgb(2, 1, vec![0, 0, 0, 255, 255, 255]).unwrap().to_png().unwrap();
        let encoded = base64::engine::general_purpose::STANDARD.encode(png);
        let images = ImageFolders::new([dir.path()]);
        assert_eq!(embed(&images, &path), Some(format!("data:image/png;base64,{encoded}")));
        std::fs::write(&path, "no image").unwrap();
        assert_eq!(embed(&images, &path), None);
    }
}
