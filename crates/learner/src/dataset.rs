//! Training records as model input: image, augmentation, prompt, patches; and as what a lease carries. Safe to share between
//! threads. Knows no order of the data: who asks says which record in which pass.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use unveil_config::Config;
use unveil_core::{GroupId, Record};
use unveil_data::augment::{AugmentSpec, augment};
use unveil_data::fits::Limits;
use unveil_data::prepare::Preparer;
use unveil_data::processor::resize;
use unveil_data::records::RecordFile;
use unveil_data::root::Root;
use unveil_data::store::{ContentHash, Image};
use unveil_model::Prompt;

use crate::batch::GroupInput;
use crate::error::{LearnerError, Result};
use crate::serve::{LeaseSource, Leased};

/// Bytes of prepared images that are kept when augmentation is off.
const CACHE_BYTES: usize = 192 << 20;

/// Records of the training split and how they become input.
pub struct Dataset {
    records: Vec<Record>,
    by_id: HashMap<String, usize>,
    root: Root,
    preparer: Arc<Preparer>,
    augment: AugmentSpec,
    question: String,
    seed: u64,
    cache: Mutex<Cache>,
    /// What prompts and answers must fit into; none = not looked at.
    limits: Option<Limits>,
}

#[derive(Default)]
struct Cache {
    kept: HashMap<usize, Arc<Item>>,
    bytes: usize,
}

impl Cache {
    /// Keeps an item as far as there is room; several threads may have made it at once.
    fn keep(&mut self, index: usize, item: &Arc<Item>) {
        let before = self.kept.get(&index).map_or(0, |i| i.bytes());
        if self.bytes - before + item.bytes() <= CACHE_BYTES {
            self.bytes = self.bytes - before + item.bytes();
            self.kept.insert(index, item.clone());
        }
    }
}

/// A record as one pass sees it.
pub struct Item {
    /// Prompt, patches, and the record with boxes in the image's pixels.
    pub input: Arc<GroupInput>,
    /// Answer tokens with the end token.
    pub target: Vec<u32>,
    /// The encoded image, PNG or JPEG; absent when it was not asked for.
    image: Option<(Bytes, String)>,
}

impl Item {
    fn bytes(&self) -> usize {
        self.input.patches.len() * 4 + self.image.as_ref().map_or(0, |(b, _)| b.len())
    }
}

impl Dataset {
    /// Records of `data.train_split` of a file.
    ///
    /// # Errors
    /// No record in that split; augmentation out of range.
    pub fn new(config: &Config, records: RecordFile, preparer: Arc<Preparer>) -> Result<Self> {
        let path = records.path.display().to_string();
        let root = records.root();
        let split = &config.data.train_split;
        let records = records.split(split).records;
        if records.is_empty() {
            return Err(LearnerError::Setting(format!("{path} has no record of split `{split}` (data.train_split)")));
        }
        let a = &config.data.augment;
        let augment = AugmentSpec {
            crop_min: a.crop_min,
            flip_h: a.flip_horizontal,
            flip_v: a.flip_vertical,
            jitter: a.jitter,
            ..Default::default()
        };
        augment.validate().map_err(|e| LearnerError::Setting(e.to_string()))?;
        let (question, seed) = (config.data.question.clone(), config.run.seed);
        let by_id = records.iter().enumerate().map(|(i, r)| (r.id.clone(), i)).collect();
        Ok(Self { records, by_id, root, preparer, augment, question, seed, cache: Mutex::default(), limits: None })
    }

    /// Refuses items that do not fit, which else take what memory there is.
    pub fn within(self, limits: Limits) -> Self {
        Self { limits: Some(limits), ..self }
    }

    /// Number of records.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether there is no record; never true for one that was built.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// The records, as the file has them.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// Record ids in order.
    pub fn ids(&self) -> Vec<String> {
        self.records.iter().map(|r| r.id.clone()).collect()
    }

    /// The place of the record with this id.
    pub fn index(&self, id: &str) -> Option<usize> {
        self.by_id.get(id).copied()
    }

    /// Tokenizer, processor and codec.
    pub fn preparer(&self) -> &Arc<Preparer> {
        &self.preparer
    }

    /// Record `index` as pass `pass` sees it; `with_image` also encodes the image for the wire.
    ///
    /// # Errors
    /// The image or the record cannot be used; the message names both.
    pub fn item(&self, index: usize, pass: u64, with_image: bool) -> Result<Arc<Item>> {
        let record = self.records.get(index).ok_or_else(|| {
            LearnerError::Setting(format!("record {index} was asked for, there are {}", self.records.len()))
        })?;
        let keep = self.augment.is_off();
        if keep {
            let cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(item) = cache.kept.get(&index).filter(|i| i.image.is_some() || !with_image) {
                return Ok(item.clone());
            }
        }
        let item = Arc::new(self.make(record, pass, with_image)?);
        if keep {
            self.cache.lock().unwrap_or_else(PoisonError::into_inner).keep(index, &item);
        }
        Ok(item)
    }

    fn make(&self, record: &Record, pass: u64, with_image: bool) -> Result<Item> {
        let prepare = |source| LearnerError::Prepare { record: record.id.clone(), source };
        let mut encoded = Bytes::from(self.root.read(record)?);
        let name = format!("{} of record \"{}\"", record.image, record.id);
        let mut image = Image::decode(&encoded, &name)?;
        let mut record = record.clone();
        if record.question.trim().is_empty() {
            record.question.clone_from(&self.question);
        }
        if !self.augment.is_off() {
            let made = augment(&self.augment, self.seed, pass, &record.id, &image, &record.boxes)
                .map_err(|e| LearnerError::Setting(e.to_string()))?;
            record.labels = made.kept.iter().filter_map(|i| record.labels.get(*i).cloned()).collect();
            (record.boxes, image) = (made.boxes, made.image);
            self.shrink(&mut record, &mut image).map_err(prepare)?;
            if with_image {
                encoded = image.to_png()?.into();
            }
        }
        record.image_size = Some([image.width(), image.height()]);
        let prepared = self.preparer.prepare(&image, &record.question).map_err(prepare)?;
        let sizes = prepared.image.sizes();
        let target = self.preparer.target_ids(&record, &sizes).map_err(prepare)?;
        if let Some(limits) = &self.limits {
            limits
                .check(prepared.prompt.ids.len(), prepared.image.image_tokens(), target.len())
                .map_err(|source| LearnerError::Misfit { record: record.id.clone(), source })?;
        }
        let encoded = if with_image { encoded } else { Bytes::new() };
        let image_hash = with_image.then(|| (encoded.clone(), ContentHash::of(image.rgb()).to_string()));
        let grid = prepared.image.grid_thw.map(|v| v as i64);
        let input = GroupInput {
            image_size: (image.width(), image.height()),
            prompt: Prompt { tokens: prepared.prompt.ids, grids: vec![grid] },
            merged: prepared.image.merged,
            patches: prepared.image.patches,
            encoded,
            record,
        };
        Ok(Item { input: Arc::new(input), target, image: image_hash })
    }

    /// The file that holds the image of `record` as the policy sees it; none where augmentation changes it.
    pub fn image_file(&self, record: &Record) -> Option<PathBuf> {
        let path = self.root.file(record).ok().filter(|_| self.augment.is_off())?;
        Some(std::fs::canonicalize(&path).unwrap_or(path))
    }

    /// Brings an augmented image that is larger than what the processor makes of it to that size: nothing is lost that the model
    /// would see, and it travels and decodes faster.
    fn shrink(&self, record: &mut Record, image: &mut Image) -> Result<(), unveil_data::prepare::PrepareError> {
        let processor = self.preparer.processor();
        let (w, h) = processor.resized_size((image.width(), image.height()))?;
        if w > image.width() || h > image.height() || processor.resized_size((w, h))? != (w, h) {
            return Ok(());
        }
        let (sx, sy) = (w as f32 / image.width() as f32, h as f32 / image.height() as f32);
        *image = resize(image, w, h, processor.config().filter);
        record.boxes.iter_mut().for_each(|b| *b = b.scaled(sx, sy));
        Ok(())
    }
}

impl LeaseSource for Dataset {
    fn lease(&self, index: usize, group: &GroupId) -> Result<Leased> {
        let item = self.item(index, group.pass, true)?;
        let (image, image_hash) = item.image.clone().unwrap_or_default();
        Ok(Leased { input: item.input.clone(), image, image_hash })
    }
}
