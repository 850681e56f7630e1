//! Synthetic records: organ-like images with lesions whose boxes are exact.
//!
//! Record `i` is a function of (seed, i): the same numbers give the same pixels and the same line, however many records are drawn.

mod lesion;
mod modality;
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
use unveil_data::image_store::{Image, ImageError};
use unveil_data::records::{self, RecordsError};

pub use lesion::{Category, Mask};
pub use modality::Modality;

use phantom::{Canvas, Scene};
use shape::SampleRng;

/// Question of every synthetic record.
pub const QUESTION: &str = "What is abnormal, and where?";
/// Name of the record file in the output folder.
pub const RECORDS_FILE: &str = "records.jsonl";

/// Specification of a synthetic data set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SynthSpec {
    /// Random seed.
    pub seed: u64,
    /// Number of train records (the first indices).
    pub train: usize,
    /// Number of val records (the next indices).
    pub val: usize,
    /// Number of test records (the last indices).
    pub test: usize,
    /// Side of the square images in pixels, 48 to 1024.
    pub size: u32,
    /// Probability of a record without a finding.
    pub no_finding: f64,
    /// Probability of two or three lesions; the other records have exactly one.
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
    /// Creates a specification of `n` records: a tenth each for val and test, the rest for train.
    pub fn new(n: usize, seed: u64) -> Self {
        Self { seed, train: n - 2 * (n / 10), val: n / 10, test: n / 10, ..Self::default() }
    }

    /// Returns the number of records.
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

    /// Checks the specification.
    ///
    /// # Errors
    /// Returns [`SynthError::Spec`] for the first field that is out of range.
    pub fn validate(&self) -> Result<(), SynthError> {
        let invalid = |what: String| Err(SynthError::Spec { what });
        let share = |p: f64| (0.0..=1.0).contains(&p);
        if !(48..=1024).contains(&self.size) {
            invalid(format!("size = {} must be from 48 to 1024", self.size))
        } else if !share(self.no_finding) || !share(self.several) || self.no_finding + self.several > 1.0 {
            invalid(format!(
                "no_finding = {} and several = {} must be shares that add up to at most 1",
                self.no_finding, self.several
            ))
        } else if !(0.1..=1.0).contains(&self.contrast) {
            invalid(format!("contrast = {} must be from 0.1 to 1", self.contrast))
        } else {
            Ok(())
        }
    }
}

/// Error of generating synthetic data.
#[derive(Debug, thiserror::Error)]
pub enum SynthError {
    /// The specification is invalid.
    #[error("synthetic data: {what}")]
    Spec {
        /// Which field, and why.
        what: String,
    },
    /// No scene had space for the lesions.
    #[error("synthetic data: no scene had space for the lesions of record {index}")]
    NoRoom {
        /// Index of the record.
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
        /// Error of the operating system.
        cause: std::io::Error,
    },
}

/// Content of a record, decided before anything is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SamplePlan {
    /// Kind of image.
    pub modality: Modality,
    /// Kind of lesion; `None` for no finding.
    pub category: Option<Category>,
    /// Number of lesions.
    pub count: usize,
}

/// A drawn sample.
#[derive(Debug, Clone)]
pub struct SynthSample {
    /// Its content.
    pub plan: SamplePlan,
    /// The image.
    pub image: Image,
    /// The image without its lesions.
    pub clean: Image,
    /// One mask per lesion, in the order of `boxes`.
    pub masks: Vec<Mask>,
    /// Exact boxes in pixels, sorted by left, then top edge.
    pub boxes: Vec<BBox>,
}

/// Draws the content of a record by the probabilities of `spec`.
fn draw_plan(spec: &SynthSpec, rng: &mut SampleRng) -> SamplePlan {
    let category = Category::ALL[rng.below(Category::ALL.len())];
    let modalities = category.modalities();
    let modality = modalities[rng.below(modalities.len())];
    let share = f64::from(rng.unit());
    let count = 2 + rng.below(2);
    if share < spec.no_finding {
        SamplePlan { modality, category: None, count: 0 }
    } else if share < spec.no_finding + spec.several {
        SamplePlan { modality, category: Some(category), count }
    } else {
        SamplePlan { modality, category: Some(category), count: 1 }
    }
}

/// Returns the content of record `index`, drawn by the probabilities of `spec` and not changed afterwards.
pub fn plan(spec: &SynthSpec, index: usize) -> SamplePlan {
    draw_plan(spec, &mut SampleRng::new(spec.seed, index as u64))
}

/// Draws record `index`.
///
/// # Errors
/// Returns [`SynthError::Spec`] if the specification is invalid, [`SynthError::NoRoom`] if no scene had space for the lesions.
pub fn sample(spec: &SynthSpec, index: usize) -> Result<SynthSample, SynthError> {
    spec.validate()?;
    let mut rng = SampleRng::new(spec.seed, index as u64);
    let plan = draw_plan(spec, &mut rng);
    let n = spec.size as usize;
    for _ in 0..200 {
        let scene = Scene::new(&mut rng, plan.modality, n);
        let Some(category) = plan.category else {
            let image = render(&scene.canvas, &scene.grain);
            return Ok(SynthSample { plan, clean: image.clone(), image, masks: Vec::new(), boxes: Vec::new() });
        };
        let Some(shapes) = lesion::place(&mut rng, &scene, category, plan.count) else { continue };
        let mut canvas = scene.canvas.clone();
        let mut lesions: Vec<(BBox, Mask)> = shapes
            .iter()
            .map(|s| lesion::draw(&mut rng, &mut canvas, s, category, spec.contrast))
            .filter_map(|m| m.bounds().map(|b| (b, m)))
            .collect();
        if lesions.len() < plan.count {
            continue;
        }
        lesions.sort_by(|(a, _), (b, _)| a.x1.total_cmp(&b.x1).then(a.y1.total_cmp(&b.y1)));
        let (boxes, masks) = lesions.into_iter().unzip();
        let image = render(&canvas, &scene.grain);
        let clean = render(&scene.canvas, &scene.grain);
        return Ok(SynthSample { plan, image, clean, masks, boxes });
    }
    Err(SynthError::NoRoom { index })
}

/// Adds grain and converts intensities to 8-bit pixels.
fn render(canvas: &Canvas, grain: &[f32]) -> Image {
    let mut image = Image::new(canvas.n as u32, canvas.n as u32);
    for ((out, px), g) in image.rgb_mut().chunks_exact_mut(3).zip(&canvas.px).zip(grain) {
        for (o, v) in out.iter_mut().zip(px) {
            *o = ((v + g).clamp(0.0, 1.0) * 255.0 + 0.5) as u8;
        }
    }
    image
}

/// Returns the record of a drawn sample; its image is `images/{id}.png`.
pub fn record(spec: &SynthSpec, index: usize, sample: &SynthSample) -> Record {
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

/// Draws all records into `out`: `images/*.png`, and `records.jsonl` last, so that a folder with a record file is complete.
///
/// Uses all cores; `progress(done, total)` is called on this thread after each record.
///
/// # Errors
/// Returns an error if the specification is invalid or a file cannot be written.
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
            let send = send.clone();
            let next = &next;
            scope.spawn(move || {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= total || send.send(write_sample(spec, index, out).map(|r| (index, r))).is_err() {
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

fn write_sample(spec: &SynthSpec, index: usize, out: &Path) -> Result<Record, SynthError> {
    let drawn = sample(spec, index)?;
    let record = record(spec, index, &drawn);
    let path = out.join(&record.image);
    std::fs::write(&path, drawn.image.to_png()?).map_err(|cause| SynthError::Write { path, cause })?;
    Ok(record)
}
