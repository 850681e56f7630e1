//! Training records as model input (image, augmentation, prompt, patches) and as leased groups. Shareable between
//! threads and independent of the order of the data: callers name record and pass.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use unveil_config::Config;
use unveil_config::schema::Augment;
use unveil_core::{GroupId, GroupInput, Record};
use unveil_data::image_root::ImageRoot;
use unveil_data::image_store::{ContentHash, Image};
use unveil_data::records::RecordFile;
use unveil_experience_rpc::{GroupSource, PreparedGroup, RecordFailure};
use unveil_preprocess::augment::{AugmentSpec, augment};
use unveil_preprocess::context_fit::TokenLimits;
use unveil_preprocess::preprocessor::Preprocessor;
use unveil_preprocess::processor::resize;

use crate::error::{LearnerError, Result};

/// Bytes of prepared items that are cached if augmentation is disabled.
const CACHE_BYTES: usize = 192 << 20;

/// Records of the training split with everything that turns them into model input.
#[derive(Debug)]
pub struct Dataset {
    records: Vec<Record>,
    by_id: HashMap<String, usize>,
    root: ImageRoot,
    preprocessor: Arc<Preprocessor>,
    augment: AugmentSpec,
    question: String,
    seed: u64,
    cache: Mutex<Cache>,
    /// Limits that prompts and answers must fit; `None`: not checked.
    limits: Option<TokenLimits>,
}

#[derive(Default, Debug)]
struct Cache {
    items: HashMap<usize, Arc<Item>>,
    bytes: usize,
}

impl Cache {
    /// Adds an item if it fits; several threads may add the same one.
    fn insert(&mut self, index: usize, item: &Arc<Item>) {
        let replaced = self.items.get(&index).map_or(0, |i| i.bytes());
        if self.bytes - replaced + item.bytes() <= CACHE_BYTES {
            self.bytes = self.bytes - replaced + item.bytes();
            self.items.insert(index, item.clone());
        }
    }
}

/// A record in one pass over the data, with its augmentation.
#[derive(Debug)]
pub struct Item {
    /// Prompt, patches, and the record with its boxes in pixels of the (augmented) image.
    pub input: Arc<GroupInput>,
    /// Tokens of the answer, including the end token.
    pub target: Vec<u32>,
    /// Encoded image (PNG or JPEG) and its content hash; `None` if not requested.
    image: Option<(Bytes, String)>,
}

impl Item {
    fn bytes(&self) -> usize {
        self.input.patches.len() * 4 + self.image.as_ref().map_or(0, |(b, _)| b.len())
    }
}

impl Dataset {
    /// Selects the records of split `data.train_split`.
    ///
    /// # Errors
    /// Returns [`LearnerError::EmptySplit`] if that split has no record, and [`LearnerError::Augment`] if an augmentation setting is
    /// out of range.
    pub fn new(config: &Config, records: RecordFile, preprocessor: Arc<Preprocessor>) -> Result<Self> {
        let file = records.path.clone();
        let root = records.root();
        let split = &config.data.train_split;
        let records = records.split(split).records;
        if records.is_empty() {
            return Err(LearnerError::EmptySplit { file, split: split.clone() });
        }
        // No key is without effect: a new one does not compile until it is listed here.
        let Augment { crop_min, flip_horizontal: flip_h, flip_vertical: flip_v, jitter } = config.data.augment;
        let augment = AugmentSpec { crop_min, flip_h, flip_v, jitter, ..AugmentSpec::default() };
        augment.validate()?;
        let question = config.data.question.clone();
        let seed = config.run.seed;
        let by_id = records.iter().enumerate().map(|(i, r)| (r.id.clone(), i)).collect();
        Ok(Self { records, by_id, root, preprocessor, augment, question, seed, cache: Mutex::default(), limits: None })
    }

    /// Sets limits; items that exceed them are refused before they exhaust the memory.
    pub fn with_limits(self, limits: TokenLimits) -> Self {
        Self { limits: Some(limits), ..self }
    }

    /// Returns the number of records.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Returns whether there are no records; never true, since [`Dataset::new`] refuses an empty split.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Returns the records as read from the file.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// Returns the ids of all records, in order.
    pub fn ids(&self) -> Vec<String> {
        self.records.iter().map(|r| r.id.clone()).collect()
    }

    /// Returns the index of the record with this id.
    pub fn index(&self, id: &str) -> Option<usize> {
        self.by_id.get(id).copied()
    }

    /// Returns the tokenizer, processor and codec.
    pub fn preprocessor(&self) -> &Arc<Preprocessor> {
        &self.preprocessor
    }

    /// Prepares record `index` for pass `pass`; `with_image` adds the encoded image for transport.
    ///
    /// # Errors
    /// Returns [`LearnerError::Image`], [`LearnerError::Prepare`], [`LearnerError::Augment`] or [`LearnerError::Misfit`] if the
    /// image or the record cannot be used; the message names the record. Returns [`LearnerError::RecordIndex`] if there is no such
    /// record.
    pub fn item(&self, index: usize, pass: u64, with_image: bool) -> Result<Arc<Item>> {
        let record = self.records.get(index).ok_or(LearnerError::RecordIndex { index, count: self.records.len() })?;
        let cached = self.augment.is_off();
        if cached {
            let cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(item) = cache.items.get(&index).filter(|i| i.image.is_some() || !with_image) {
                return Ok(item.clone());
            }
        }
        let item = Arc::new(self.prepare_item(record, pass, with_image)?);
        if cached {
            self.cache.lock().unwrap_or_else(PoisonError::into_inner).insert(index, &item);
        }
        Ok(item)
    }

    fn prepare_item(&self, record: &Record, pass: u64, with_image: bool) -> Result<Item> {
        let prepare = |source| LearnerError::Prepare { record: record.id.clone(), source };
        let mut encoded = Bytes::from(self.root.read(record)?);
        let name = format!("{} of record \"{}\"", record.image, record.id);
        let mut image = Image::decode(&encoded, &name)?;
        let mut record = record.clone();
        record.question = record.question_or(&self.question).to_owned();
        if !self.augment.is_off() {
            let augmented = augment(&self.augment, self.seed, pass, &record.id, &image, &record.boxes)?;
            record.labels = augmented.kept.iter().filter_map(|i| record.labels.get(*i).cloned()).collect();
            record.boxes = augmented.boxes;
            image = augmented.image;
            self.shrink(&mut record, &mut image).map_err(prepare)?;
            if with_image {
                encoded = image.to_png()?.into();
            }
        }
        record.image_size = Some([image.width(), image.height()]);
        let prepared = self.preprocessor.prepare(&image, &record).map_err(prepare)?;
        let sizes = prepared.image.sizes();
        let target = self.preprocessor.target_ids(&record, &sizes).map_err(prepare)?;
        if let Some(limits) = &self.limits {
            limits
                .check(prepared.prompt.tokens.len(), prepared.image.image_tokens(), target.len())
                .map_err(|source| LearnerError::Misfit { record: record.id.clone(), source })?;
        }
        let encoded = if with_image { encoded } else { Bytes::new() };
        let image_hash = with_image.then(|| (encoded.clone(), ContentHash::of(image.rgb()).to_string()));
        let input = GroupInput {
            image_size: (image.width(), image.height()),
            prompt: prepared.prompt,
            merged: prepared.image.merged,
            patches: prepared.image.patches,
            encoded,
            record,
        };
        Ok(Item { input: Arc::new(input), target, image: image_hash })
    }

    /// Returns the path of the image of `record`, or `None` if augmentation changes what the policy sees.
    pub fn image_file(&self, record: &Record) -> Option<PathBuf> {
        let path = self.root.file(record).ok().filter(|_| self.augment.is_off())?;
        Some(std::fs::canonicalize(&path).unwrap_or(path))
    }

    /// Shrinks an augmented image to the size that the processor would resize it to: the model sees the same pixels,
    /// and the image is smaller to send and to decode.
    fn shrink(
        &self,
        record: &mut Record,
        image: &mut Image,
    ) -> Result<(), unveil_preprocess::preprocessor::PreprocessError> {
        let processor = self.preprocessor.processor();
        let (w, h) = processor.resized_size((image.width(), image.height()))?;
        if w > image.width() || h > image.height() || processor.resized_size((w, h))? != (w, h) {
            return Ok(());
        }
        let sx = w as f32 / image.width() as f32;
        let sy = h as f32 / image.height() as f32;
        *image = resize(image, w, h, processor.config().filter);
        record.boxes.iter_mut().for_each(|b| *b = b.scaled(sx, sy));
        Ok(())
    }
}

impl GroupSource for Dataset {
    fn prepare(&self, index: usize, group: &GroupId) -> Result<PreparedGroup, RecordFailure> {
        let item = self.item(index, group.pass, true)?;
        let (image, image_hash) = item.image.clone().unwrap_or_default();
        Ok(PreparedGroup { input: item.input.clone(), image, image_hash })
    }
}
