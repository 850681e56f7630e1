//! Synthetic records: organ-like images with lesions whose boxes are exact. Owns what is drawn and how often.
//!
//! Record `i` depends on (seed, i) alone: the same numbers give the same pixels and the same lines, whatever else is drawn.
//! Must not know: model families, training.

mod lesion;
mod phantom;
mod shape;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use unveil_core::{BBox, Record, Task, answer::NO_FINDING};

pub use lesion::{Category, Mask, Modality};

use crate::records::{self, RecordsError};
use crate::store::{Image, ImageError};
use phantom::{Canvas, Scene};
use shape::Dice;

/// The question of every synthetic record.
pub const QUESTION: &str = "What is abnormal, and where?";
/// The record file inside the output folder.
pub const RECORDS_FILE: &str = "records.jsonl";

/// What to draw.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SynthSpec {
    /// Seed of everything.
    pub seed: u64,
    /// Records of the train split (the first indices).
    pub train: usize,
    /// Records of the val split (the next).
    pub val: usize,
    /// Records of the test split (the last).
    pub test: usize,
    /// Side of the square images in pixels, 48 to 1024.
    pub size: u32,
    /// Probability of a record without a finding.
    pub no_finding: f64,
    /// Probability of two or three lesions; what is left has exactly one.
    pub several: f64,
    /// Strength of the lesions: 1 is clearly visible, 0.5 is hard.
    pub contrast: f32,
}

impl Default for SynthSpec {
    fn default() -> Self {
        Self { seed: 0, train: 0, val: 0, test: 0, size: 96, no_finding: 0.12, several: 0.22, contrast: 1.0 }
    }
}

impl SynthSpec {
    /// `n` records: a tenth each for val and test, the rest for train.
    pub fn new(n: usize, seed: u64) -> Self {
        Self { seed, train: n - 2 * (n / 10), val: n / 10, test: n / 10, ..Self::default() }
    }

    /// Number of records.
    pub fn n(&self) -> usize {
        self.train + self.val + self.test
    }

    fn split(&self, index: usize) -> &'static str {
        match index {
            i if i < self.train => "train",
            i if i < self.train + self.val => "val",
            _ => "test",
        }
    }

    /// Says what cannot be drawn.
    pub fn validate(&self) -> Result<(), SynthError> {
        let bad = |what: String| Err(SynthError::Spec { what });
        let share = |p: f64| (0.0..=1.0).contains(&p);
        if !(48..=1024).contains(&self.size) {
            bad(format!("size = {} must be from 48 to 1024", self.size))
        } else if !share(self.no_finding) || !share(self.several) || self.no_finding + self.several > 1.0 {
            bad(format!(
                "no_finding = {} and several = {} must be shares that add up to at most 1",
                self.no_finding, self.several
            ))
        } else if !(0.1..=1.0).contains(&self.contrast) {
            bad(format!("contrast = {} must be from 0.1 to 1", self.contrast))
        } else {
            Ok(())
        }
    }
}

/// Why synthetic data could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SynthError {
    /// The specification makes no sense.
    #[error("synthetic data: {what}")]
    Spec {
        /// Which field and why.
        what: String,
    },
    /// No scene had room for the lesions.
    #[error("synthetic data: record {index} found no room for its lesions")]
    NoRoom {
        /// Which record.
        index: usize,
    },
    /// An image could not be encoded.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The records could not be written.
    #[error(transparent)]
    Records(#[from] RecordsError),
    /// A file could not be written.
    #[error("cannot write {}: {cause}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
}

/// What record `index` will show, before anything is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// Kind of image.
    pub modality: Modality,
    /// Kind of lesion; `None` for no finding.
    pub category: Option<Category>,
    /// Number of lesions.
    pub count: usize,
}

/// One drawn sample.
#[derive(Debug, Clone)]
pub struct Sample {
    /// What it shows.
    pub plan: Plan,
    /// The image.
    pub image: Image,
    /// The same image without its lesions.
    pub clean: Image,
    /// One mask per lesion, in the order of `boxes`.
    pub masks: Vec<Mask>,
    /// Exact boxes in pixels, sorted by left, then top edge.
    pub boxes: Vec<BBox>,
}

fn plan_with(spec: &SynthSpec, dice: &mut Dice) -> Plan {
    let category = Category::ALL[dice.below(Category::ALL.len())];
    let from = category.modalities();
    let modality = from[dice.below(from.len())];
    let share = f64::from(dice.unit());
    let many = 2 + dice.below(2);
    if share < spec.no_finding {
        Plan { modality, category: None, count: 0 }
    } else if share < spec.no_finding + spec.several {
        Plan { modality, category: Some(category), count: many }
    } else {
        Plan { modality, category: Some(category), count: 1 }
    }
}

/// What record `index` shows: counts are drawn by the shares of `spec`, and never changed afterwards.
pub fn plan(spec: &SynthSpec, index: usize) -> Plan {
    plan_with(spec, &mut Dice::new(spec.seed, index as u64))
}

/// Draws record `index`.
pub fn sample(spec: &SynthSpec, index: usize) -> Result<Sample, SynthError> {
    spec.validate()?;
    let mut dice = Dice::new(spec.seed, index as u64);
    let plan = plan_with(spec, &mut dice);
    let n = spec.size as usize;
    for _ in 0..200 {
        let scene = Scene::new(&mut dice, plan.modality, n);
        let Some(category) = plan.category else {
            let image = develop(&scene.canvas, &scene.grain);
            return Ok(Sample { plan, clean: image.clone(), image, masks: Vec::new(), boxes: Vec::new() });
        };
        let Some(shapes) = lesion::place(&mut dice, &scene, category, plan.count) else { continue };
        let mut canvas = scene.canvas.clone();
        let mut found: Vec<(BBox, Mask)> = shapes
            .iter()
            .map(|s| lesion::draw(&mut dice, &mut canvas, s, category, spec.contrast))
            .filter_map(|m| m.bounds().map(|b| (b, m)))
            .collect();
        if found.len() < plan.count {
            continue;
        }
        found.sort_by(|(a, _), (b, _)| a.x1.total_cmp(&b.x1).then(a.y1.total_cmp(&b.y1)));
        let (boxes, masks) = found.into_iter().unzip();
        let (image, clean) = (develop(&canvas, &scene.grain), develop(&scene.canvas, &scene.grain));
        return Ok(Sample { plan, image, clean, masks, boxes });
    }
    Err(SynthError::NoRoom { index })
}

fn develop(canvas: &Canvas, grain: &[f32]) -> Image {
    let mut image = Image::new(canvas.n as u32, canvas.n as u32);
    for ((out, px), g) in image.rgb_mut().chunks_exact_mut(3).zip(&canvas.px).zip(grain) {
        for (o, v) in out.iter_mut().zip(px) {
            *o = ((v + g).clamp(0.0, 1.0) * 255.0 + 0.5) as u8;
        }
    }
    image
}

/// The record of a drawn sample; its image is `images/{id}.png`.
pub fn record(spec: &SynthSpec, index: usize, sample: &Sample) -> Record {
    let id = format!("synth-{}-{index:06}", spec.seed);
    let category = sample.plan.category.map_or("", Category::name).to_owned();
    let mut extra = Map::new();
    if let Some(c) = sample.plan.category {
        extra.insert("technique".to_owned(), Value::from(c.technique()));
    }
    let answer = match sample.boxes.len() {
        0 => NO_FINDING.to_owned(),
        1 => format!("There is a {category}."),
        k => format!("There are {k} lesions: {category}."),
    };
    Record {
        image: format!("images/{id}.png"),
        id,
        image_size: Some([spec.size, spec.size]),
        question: QUESTION.to_owned(),
        answer,
        labels: vec![category.clone(); sample.boxes.len()],
        category,
        boxes: sample.boxes.clone(),
        modality: sample.plan.modality.name().to_owned(),
        source: "synthetic".to_owned(),
        split: spec.split(index).to_owned(),
        task: Task::Grounding,
        extra,
    }
}

/// Draws everything into `out`: `images/*.png`, then `records.jsonl` last, so that a folder with records is whole.
///
/// Uses all cores; `progress(done, total)` is called on this thread after each record.
pub fn generate(
    spec: &SynthSpec,
    out: &Path,
    mut progress: impl FnMut(usize, usize),
) -> Result<Vec<Record>, SynthError> {
    spec.validate()?;
    let images = out.join("images");
    std::fs::create_dir_all(&images).map_err(|cause| SynthError::Write { path: images.clone(), cause })?;
    let total = spec.n();
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(total.max(1));
    let next = AtomicUsize::new(0);
    let mut list: Vec<Option<Record>> = vec![None; total];
    std::thread::scope(|scope| {
        let (send, receive) = mpsc::channel();
        for _ in 0..workers {
            let (send, next) = (send.clone(), &next);
            scope.spawn(move || {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= total || send.send(write_one(spec, index, out).map(|r| (index, r))).is_err() {
                        break;
                    }
                }
            });
        }
        drop(send);
        for (done, result) in receive.iter().enumerate() {
            // An early return drops the receiver, and the workers stop at their next send.
            let (index, record) = result?;
            list[index] = Some(record);
            progress(done + 1, total);
        }
        Ok::<(), SynthError>(())
    })?;
    let list: Vec<Record> = list.into_iter().flatten().collect();
    records::write(&out.join(RECORDS_FILE), &list)?;
    Ok(list)
}

fn write_one(spec: &SynthSpec, index: usize, out: &Path) -> Result<Record, SynthError> {
    let s = sample(spec, index)?;
    let r = record(spec, index, &s);
    let path = out.join(&r.image);
    std::fs::write(&path, s.image.to_png()?).map_err(|cause| SynthError::Write { path, cause })?;
    Ok(r)
}
