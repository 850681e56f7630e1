//! Statistics of a record file: counts and distributions to look at before training on it.

use std::collections::BTreeMap;

use serde::Serialize;
use unveil_core::Record;
use unveil_data::image_store::image_size;
use unveil_data::records::{ImageRef, RecordFile};

/// Quantiles of a distribution.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Quantiles {
    /// Smallest value.
    pub min: f64,
    /// First decile.
    pub p10: f64,
    /// Median.
    pub p50: f64,
    /// Ninth decile.
    pub p90: f64,
    /// Largest value.
    pub max: f64,
}

/// Counts and shares of a record file.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Stats {
    /// Number of records.
    pub records: usize,
    /// Number of boxes.
    pub boxes: usize,
    /// Share of records without a box among the grounding records, in `[0, 1]`; 0 if there are none.
    pub no_finding: f64,
    /// Records whose question is answered in text; they do not count as records without a finding.
    pub in_text: usize,
    /// Records by split.
    pub by_split: BTreeMap<String, usize>,
    /// Records by source, then by split.
    pub by_source_and_split: BTreeMap<String, BTreeMap<String, usize>>,
    /// Records by category; those without a box count as "no finding".
    pub by_category: BTreeMap<String, usize>,
    /// Boxes by label.
    pub by_label: BTreeMap<String, usize>,
    /// Records by modality.
    pub by_modality: BTreeMap<String, usize>,
    /// Records by source.
    pub by_source: BTreeMap<String, usize>,
    /// Records by number of boxes.
    pub boxes_per_image: BTreeMap<usize, usize>,
    /// Box width as a share of the image's.
    pub box_width: Option<Quantiles>,
    /// Box height as a share of the image's.
    pub box_height: Option<Quantiles>,
    /// Box area as a share of the image's.
    pub box_area: Option<Quantiles>,
    /// Images by size, `WxH`; images of unknown size are under "unknown".
    pub image_sizes: BTreeMap<String, usize>,
}

/// Computes the statistics of `file`. Sizes are taken from `image_size` or the image's header. Invalid boxes are counted as boxes but
/// excluded from the quantiles.
pub fn stats(file: &RecordFile) -> Stats {
    let mut out = Stats { records: file.records.len(), ..Stats::default() };
    // Width, height and area of the boxes as shares of the image's.
    let mut shares: [Vec<f64>; 3] = Default::default();
    for r in &file.records {
        let count = |map: &mut BTreeMap<String, usize>, key: &str| *map.entry(key.to_owned()).or_default() += 1;
        count(&mut out.by_split, &r.split);
        count(&mut out.by_modality, &r.modality);
        count(&mut out.by_source, &r.source);
        count(out.by_source_and_split.entry(r.source.clone()).or_default(), &r.split);
        let size = size_of(file, r);
        count(&mut out.image_sizes, &size.map_or("unknown".to_owned(), |(w, h)| format!("{w}x{h}")));
        if r.is_text() {
            out.in_text += 1;
            continue;
        }
        count(&mut out.by_category, if r.boxes.is_empty() { unveil_core::answer::NO_FINDING } else { &r.category });
        for (i, _) in r.boxes.iter().enumerate() {
            count(&mut out.by_label, r.labels.get(i).unwrap_or(&r.category));
        }
        *out.boxes_per_image.entry(r.boxes.len()).or_default() += 1;
        out.boxes += r.boxes.len();
        let Some((w, h)) = size.map(|(w, h)| (w as f32, h as f32)) else { continue };
        for b in r.boxes.iter().filter(|b| b.fault(w, h).is_none()) {
            let x = f64::from((b.x2 - b.x1) / w);
            let y = f64::from((b.y2 - b.y1) / h);
            shares.iter_mut().zip([x, y, x * y]).for_each(|(list, v)| list.push(v));
        }
    }
    let empty = out.boxes_per_image.get(&0).copied().unwrap_or(0);
    out.no_finding = empty as f64 / (out.records - out.in_text).max(1) as f64;
    [out.box_width, out.box_height, out.box_area] = shares.map(quantiles);
    out
}

fn size_of(file: &RecordFile, r: &Record) -> Option<(u32, u32)> {
    match (r.image_size, file.image_ref(r)) {
        (Some([w, h]), _) => Some((w, h)),
        (None, ImageRef::File(_)) => image_size(&file.root().file(r).ok()?).ok(),
        _ => None,
    }
}

/// Computes nearest-rank quantiles; `None` without values.
fn quantiles(mut values: Vec<f64>) -> Option<Quantiles> {
    values.sort_by(f64::total_cmp);
    let last = values.len().checked_sub(1)?;
    let quantile = |q: f64| values[(q * last as f64).round() as usize];
    Some(Quantiles {
        min: quantile(0.0),
        p10: quantile(0.1),
        p50: quantile(0.5),
        p90: quantile(0.9),
        max: quantile(1.0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::{RECORDS_FILE, SynthSpec, generate};

    #[test]
    fn counts_and_quantiles_match_by_hand() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.jsonl");
        let text = r#"{"id":"a","image_size":[100,50],"category":"x","boxes":[[0,0,10,25],[0,0,20,5]],"labels":["p","q"],"split":"train"}
{"id":"b","image_size":[100,50],"category":"x","boxes":[[0,0,30,10]],"split":"test","modality":"ct"}
{"id":"c","image":"gone.png","category":"x","boxes":[],"split":"test","source":"s"}
{"id":"d","image_size":[7,5],"answer":"yes","task":"vqa","split":"test","source":"s"}"#;
        std::fs::write(&path, text).unwrap();
        let s = stats(&RecordFile::load(&path).unwrap());
        assert_eq!((s.records, s.boxes, s.in_text), (4, 3, 1));
        assert!((s.no_finding - 1.0 / 3.0).abs() < 1e-12);
        assert_eq!((s.by_split["test"], s.by_category["x"], s.by_category["no finding"]), (3, 2, 1));
        assert_eq!((s.by_label["p"], s.by_label["q"], s.by_label["x"]), (1, 1, 1));
        assert_eq!((s.by_modality["ct"], s.by_source["s"], s.boxes_per_image[&2]), (1, 2, 1));
        assert_eq!((s.by_source_and_split["s"]["test"], s.by_source_and_split[""]["train"]), (2, 1));
        assert_eq!((s.image_sizes["100x50"], s.image_sizes["unknown"]), (2, 1));
        let w = s.box_width.unwrap();
        assert!((w.min - 0.1).abs() < 1e-6 && (w.p50 - 0.2).abs() < 1e-6 && (w.max - 0.3).abs() < 1e-6);
        assert!(serde_json::to_string(&s).unwrap().contains("\"boxes_per_image\":{\"0\":1"));
    }

    #[test]
    fn synthetic_and_empty_files() {
        let dir = tempfile::tempdir().unwrap();
        generate(&SynthSpec::new(60, 2), dir.path(), |_, _| {}).unwrap();
        let s = stats(&RecordFile::load(&dir.path().join(RECORDS_FILE)).unwrap());
        assert_eq!((s.records, s.by_split["train"], s.image_sizes["96x96"]), (60, 48, 60));
        std::fs::write(dir.path().join("e.jsonl"), "").unwrap();
        let s = stats(&RecordFile::load(&dir.path().join("e.jsonl")).unwrap());
        assert_eq!((s.records, s.no_finding, s.box_area), (0, 0.0, None));
    }
}
