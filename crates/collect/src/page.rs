//! Pages on which a reviewer accepts, edits or rejects collected answers. Each is a self-contained HTML file; the decisions are downloaded
//! from it as JSON lines.
//!
//! Texts are untrusted: they are embedded as JSON, and the script inserts them as text, never as markup.

use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::codecs::jpeg::JpegEncoder;
use image::{ExtendedColorType, ImageEncoder};
use minijinja::{Environment, UndefinedBehavior};
use serde_json::{Value, json};
use unveil_core::Record;
use unveil_data::image_store::{ContentHash, Image};
use unveil_data::records::RecordFile;
use unveil_preprocess::processor::{Filter, resize};

use crate::answer::is_usable_answer;
use crate::{COLLECTED, CollectError};

/// Longer side of the images on a page, in pixels.
const SIDE: u32 = 640;
/// JPEG quality, 1 to 100.
const QUALITY: u8 = 85;

/// Writes `review-001.html` and so on into `dir` for the answers in its record file, `per_page` on each, and removes older pages. An image
/// that cannot be read is missing on its page.
///
/// # Errors
/// Returns [`CollectError::Records`] if the record file cannot be read, [`CollectError::Io`] if a page cannot be written or removed.
pub fn write_pages(dir: &Path, per_page: usize) -> Result<Vec<PathBuf>, CollectError> {
    let file = RecordFile::load(&dir.join(COLLECTED))?;
    for old in std::fs::read_dir(dir).map_err(CollectError::io(dir))?.flatten().map(|e| e.path()) {
        let name = old.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if name.starts_with("review-") && name.ends_with(".html") {
            std::fs::remove_file(&old).map_err(CollectError::io(&old))?;
        }
    }
    let answered: Vec<&Record> = file.records.iter().filter(|r| r.extra.contains_key("collect")).collect();
    let chunks = answered.chunks(per_page.max(1));
    let count = chunks.len();
    let mut pages = Vec::with_capacity(count);
    for (k, records) in chunks.enumerate() {
        let items: Vec<Value> = records.iter().map(|r| page_item(&file, r)).collect();
        let path = dir.join(format!("review-{:03}.html", k + 1));
        let page = render_page(&items, k + 1, count)?;
        unveil_core::write_atomic(&path, page.as_bytes()).map_err(CollectError::io(&path))?;
        pages.push(path);
    }
    Ok(pages)
}

/// Returns the data of one answer for the script.
fn page_item(file: &RecordFile, r: &Record) -> Value {
    let collected = &r.extra["collect"];
    let reflection = collected["reflection"].as_str().unwrap_or_default();
    let label = |k: usize| r.labels.get(k).unwrap_or(&r.category);
    let boxes = r.boxes.iter().enumerate();
    let boxes: Vec<Value> =
        boxes.map(|(k, b)| json!({"label": label(k), "x1": b.x1, "y1": b.y1, "x2": b.x2, "y2": b.y2})).collect();
    let image = file.open_image(r).ok();
    let size = image.as_ref().map(|i| [i.width(), i.height()]).or(r.image_size).unwrap_or([1, 1]);
    json!({
        "id": r.id, "key": collected["key"], "category": r.category, "question": r.question, "modality": r.modality, "source": r.source,
        "size": size, "boxes": boxes, "image": image.and_then(embed).unwrap_or_default(),
        "diagnosis": collected["diagnosis"], "reflection": reflection, "faults": collected["faults"],
        "usable": !reflection.is_empty() && is_usable_answer(r, reflection),
    })
}

/// Returns the shrunk image as a JPEG data URL.
fn embed(image: Image) -> Option<String> {
    let scale = (f64::from(SIDE) / f64::from(image.width().max(image.height()))).min(1.0);
    let side = |v: u32| ((f64::from(v) * scale).round() as u32).max(1);
    let image =
        if scale < 1.0 { resize(&image, side(image.width()), side(image.height()), Filter::Bicubic) } else { image };
    let mut out = Vec::new();
    let encoder = JpegEncoder::new_with_quality(&mut out, QUALITY);
    encoder.write_image(image.rgb(), image.width(), image.height(), ExtendedColorType::Rgb8).ok()?;
    Some(format!("data:image/jpeg;base64,{}", STANDARD.encode(out)))
}

/// Renders page `number` of `total`. The template escapes every value that it does not mark as safe: our own style sheet and script, and
/// JSON without `<`.
fn render_page(items: &[Value], number: usize, total: usize) -> Result<String, CollectError> {
    // In a script element, only `</` and `<!--` have a meaning (HTML, "Restrictions for contents of script elements").
    let data = Value::from(items).to_string().replace('<', "\\u003c");
    let keys: String = items.iter().map(|i| i["key"].to_string()).collect();
    // Decisions are stored under a hash of the content, so that pages of other answers in the same folder do not show them.
    let name = format!("{number:03}-{}", &ContentHash::of(keys.as_bytes()).to_string()[..8]);
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_keep_trailing_newline(true);
    let values = json!({
        "number": number, "total": total, "name": name, "items": data,
        "style": include_str!("page.css"), "script": include_str!("page.js"),
    });
    // The ending of the name selects the escaping.
    environment.render_named_str("page.html", include_str!("page.html"), values).map_err(CollectError::Page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_escaped() {
        let items = [json!({"id": "</script><script>alert(1)</script>", "key": "k", "note": "<!-- x"})];
        let html = render_page(&items, 1, 3).unwrap();
        assert_eq!(html.matches("<script").count(), 2);
        assert!(
            html.contains("<title>Review 1 of 3</title>")
                && html.contains(include_str!("page.js"))
                && !html.contains("{{")
        );
        assert!(html.contains("http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:;"));
        assert!(!html.contains("alert(1)</script>") && !html.contains("<!-- x"));
        let start = html.find("id=\"items\">").unwrap() + 11;
        let back: Value = serde_json::from_str(&html[start..][..html[start..].find("</script>").unwrap()]).unwrap();
        assert_eq!(back[0], items[0]);
        assert!(
            !html.contains("http://")
                || html.matches("http://").count() == html.matches("http://www.w3.org/2000/svg").count()
        );
    }
}
