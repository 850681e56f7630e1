//! The one door between records and model input: a model directory's processor, tokenizer, chat template and box codec together.
//!
//! Must not know: tensors, devices, training.

pub(crate) mod error;

use std::path::Path;

use serde::Deserialize;
use unveil_core::{Grid, Record};

pub use error::PrepareError;

use crate::chat::{ChatTemplate, Prompt};
use crate::codec::{self, AbsoluteResized, BoxCodec, GroundedAnswer, Sizes};
use crate::processor::{ImageProcessor, Processed};
use crate::store::Image;
use crate::tokenizer::Tokenizer;

/// A model family, as far as data preparation differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Qwen2.5-VL: boxes in absolute pixels of the resized image.
    Qwen2_5Vl,
}

#[derive(Deserialize)]
struct ModelType {
    model_type: Option<String>,
}

#[derive(Deserialize)]
struct ProcessorClass {
    processor_class: Option<String>,
}

impl Family {
    /// Reads the family from `config.json`; where the weights are not there yet, from `preprocessor_config.json`.
    pub fn detect(dir: &Path) -> Result<Self, PrepareError> {
        let config = dir.join("config.json");
        let (path, found) = if config.is_file() {
            let found = error::read_json::<ModelType>(&config)?.model_type;
            (config, found)
        } else {
            let path = dir.join("preprocessor_config.json");
            let found = error::read_json::<ProcessorClass>(&path)?.processor_class;
            (path, found)
        };
        match found.as_deref() {
            Some("qwen2_5_vl" | "Qwen2_5_VLProcessor") => Ok(Self::Qwen2_5Vl),
            other => Err(PrepareError::Family { path, found: other.unwrap_or("(none)").to_owned() }),
        }
    }

    /// How the family writes boxes.
    pub fn codec(&self) -> &'static dyn BoxCodec {
        match self {
            Self::Qwen2_5Vl => &AbsoluteResized,
        }
    }
}

/// Prompt and pixels of one image and question.
#[derive(Debug, Clone, PartialEq)]
pub struct Prepared {
    /// Token ids with the image tokens expanded.
    pub prompt: Prompt,
    /// Patches, grids and sizes.
    pub image: Processed,
}

/// Everything that a model directory says about its input. Share it behind an `Arc`.
#[derive(Debug, Clone)]
pub struct Preparer {
    family: Family,
    processor: ImageProcessor,
    tokenizer: Tokenizer,
    chat: ChatTemplate,
}

impl Preparer {
    /// Reads a model directory; the weights are not needed.
    pub fn load(dir: &Path) -> Result<Self, PrepareError> {
        Ok(Self {
            family: Family::detect(dir)?,
            processor: ImageProcessor::load(dir)?,
            tokenizer: Tokenizer::load(dir)?,
            chat: ChatTemplate::load(dir)?,
        })
    }

    /// Prompt and pixels of an image and a question.
    pub fn prepare(&self, image: &Image, question: &str) -> Result<Prepared, PrepareError> {
        let image = self.processor.process(image)?;
        Ok(Prepared { prompt: self.prompt(image.merged, question)?, image })
    }

    /// The same from an encoded image; `name` appears in errors.
    pub fn prepare_bytes(&self, bytes: &[u8], name: &str, question: &str) -> Result<Prepared, PrepareError> {
        let image = Image::decode(bytes, name)?;
        self.prepare(&image, question)
            .map_err(|cause| PrepareError::Named { name: name.to_owned(), cause: Box::new(cause) })
    }

    /// The prompt alone, for an image with this grid of image tokens.
    pub fn prompt(&self, grid: Grid, question: &str) -> Result<Prompt, PrepareError> {
        self.chat.prompt(&self.tokenizer, &[grid], question)
    }

    /// Sizes of an image of `(width, height)` pixels before and after the resize.
    pub fn sizes(&self, original: (u32, u32)) -> Result<Sizes, PrepareError> {
        Ok(Sizes { original, resized: self.processor.resized_size(original)? })
    }

    /// The training answer of a record as text.
    pub fn answer_text(&self, record: &Record, sizes: &Sizes) -> Result<String, PrepareError> {
        codec::answer_text(self.family.codec(), record, sizes)
    }

    /// The training answer of a record as token ids, end token included.
    ///
    /// # Errors
    /// As [`codec::answer_text`], and a category that holds a special token.
    pub fn target_ids(&self, record: &Record, sizes: &Sizes) -> Result<Vec<u32>, PrepareError> {
        let text = self.answer_text(record, sizes)?;
        let mut ids = self
            .tokenizer
            .encode_plain(&text)
            .map_err(|e| PrepareError::Record { id: record.id.clone(), what: e.to_string() })?;
        ids.push(self.tokenizer.special().im_end);
        Ok(ids)
    }

    /// Reads a response; its boxes come back in original pixels.
    pub fn read_answer(&self, text: &str, sizes: &Sizes) -> GroundedAnswer {
        codec::read_answer(self.family.codec(), text, sizes)
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The image processor.
    pub fn processor(&self) -> &ImageProcessor {
        &self.processor
    }

    /// The chat template.
    pub fn chat(&self) -> &ChatTemplate {
        &self.chat
    }

    /// The model family.
    pub fn family(&self) -> Family {
        self.family
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tiny::{TinyProcessorSpec, write_tiny};

    fn tiny() -> (tempfile::TempDir, Preparer) {
        let dir = tempfile::tempdir().unwrap();
        write_tiny(dir.path(), &TinyProcessorSpec::default()).unwrap();
        let p = Preparer::load(dir.path()).unwrap();
        (dir, p)
    }

    #[test]
    fn from_record_to_ids_and_back() {
        let (_dir, p) = tiny();
        let made = p.prepare(&Image::new(640, 480), "What is abnormal, and where?").unwrap();
        assert_eq!((made.image.resized, made.image.image_tokens()), ((128, 96), 48));
        assert_eq!(made.prompt.image_token_positions.len(), 48);
        assert_eq!(made.image.patches.len(), made.image.n_patches() * made.image.patch_dim);
        let line = r#"{"id":"a","image":"x.png","category":"platelet","boxes":[[100,50,200,250]]}"#;
        let r: Record = serde_json::from_str(line).unwrap();
        let ids = p.target_ids(&r, &made.image.sizes()).unwrap();
        assert_eq!(ids.last(), Some(&p.tokenizer().special().im_end));
        let answer = p.read_answer(&p.tokenizer().decode(&ids).unwrap(), &made.image.sizes());
        assert_eq!((answer.boxes, answer.category.as_str()), (r.boxes, "platelet"));
        assert_eq!(p.prepare(&Image::new(96, 96), "x").unwrap().image.resized, (96, 96));
    }

    #[test]
    fn bad_images_are_named() {
        let (_dir, p) = tiny();
        assert_eq!(p.prepare(&Image::new(1, 1), "x").unwrap().image.resized, (96, 96));
        assert!(matches!(p.prepare(&Image::new(0, 4), "x"), Err(PrepareError::Size { .. })));
        let png = Image::new(20_00, 2).to_png().unwrap();
        let e = p.prepare_bytes(&png, "long.png", "x").unwrap_err().to_string();
        assert!(e.contains("long.png") && e.contains("2000 x 2") && e.contains("aspect"), "{e}");
        let e = p.prepare_bytes(&png[..40], "cut.png", "x").unwrap_err().to_string();
        assert!(e.contains("cut.png"), "{e}");
        let mut lying = Image::new(96, 96);
        lying.rgb.truncate(5);
        assert!(matches!(p.prepare(&lying, "x"), Err(PrepareError::Size { .. })));
    }

    #[test]
    fn a_category_cannot_write_special_tokens() {
        let (_dir, p) = tiny();
        let line = r#"{"id":"a7","image":"x.png","category":"x<|im_end|>","boxes":[[1,5,20,25]]}"#;
        let r: Record = serde_json::from_str(line).unwrap();
        let e = p.target_ids(&r, &p.sizes((96, 96)).unwrap()).unwrap_err().to_string();
        assert!(e.contains("a7") && e.contains("<|im_end|>"), "{e}");
    }

    #[test]
    fn other_families_are_refused_by_name() {
        let (dir, _) = tiny();
        std::fs::write(dir.path().join("config.json"), r#"{"model_type":"llava"}"#).unwrap();
        let e = Preparer::load(dir.path()).unwrap_err().to_string();
        assert!(e.contains("llava") && e.contains("qwen2_5_vl"), "{e}");
        std::fs::write(dir.path().join("config.json"), "{").unwrap();
        assert!(Preparer::load(dir.path()).unwrap_err().to_string().contains("config.json"));
    }
}
