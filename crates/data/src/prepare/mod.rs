//! The one door between records and model input: a model directory's processor, tokenizer, chat template and box codec together.
//!
//! Must not know: tensors, devices, training.

pub(crate) mod error;
mod family;

use std::path::Path;

use unveil_core::record::REGION;
use unveil_core::{BoxForm, Grid, Reading, Record};

pub use error::PrepareError;
pub use family::Family;

use crate::chat::{ChatTemplate, Prompt};
use crate::codec::{self, BoxCodec, GroundedAnswer, Sizes};
use crate::processor::{ImageProcessor, Processed};
use crate::store::Image;
use crate::tokenizer::Tokenizer;

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
    codec: &'static dyn BoxCodec,
    processor: ImageProcessor,
    tokenizer: Tokenizer,
    chat: ChatTemplate,
}

impl Preparer {
    /// Reads a model directory; the weights are not needed. Boxes are written as the family does.
    ///
    /// # Errors
    /// As [`Preparer::load_with`].
    pub fn load(dir: &Path) -> Result<Self, PrepareError> {
        Self::load_with(dir, None)
    }

    /// The same with a box form of the caller's choice; none: the family's.
    ///
    /// # Errors
    /// A file that is missing or cannot be used, a family that is not built in, a tokenizer without a token that the family or the box
    /// form needs.
    pub fn load_with(dir: &Path, boxes: Option<BoxForm>) -> Result<Self, PrepareError> {
        let family = Family::detect(dir)?;
        let codec = codec::codec(boxes.unwrap_or(family.box_form()));
        let mut tokenizer = Tokenizer::load(dir)?;
        tokenizer.allow(codec.special_tokens())?;
        Ok(Self { family, codec, processor: ImageProcessor::load(dir)?, tokenizer, chat: ChatTemplate::load(dir)? })
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
        codec::answer_text(self.codec, record, sizes)
    }

    /// The training answer of a record as token ids, end token included.
    ///
    /// # Errors
    /// As [`codec::answer_text`], and a category or answer that holds a special token.
    pub fn target_ids(&self, record: &Record, sizes: &Sizes) -> Result<Vec<u32>, PrepareError> {
        let bad = |e: PrepareError| PrepareError::Record { id: record.id.clone(), what: e.to_string() };
        // The form may write special tokens, what the record says must not.
        self.tokenizer.encode_plain(&record.category).map_err(bad)?;
        if record.is_text() || record.answer.contains(REGION) {
            self.tokenizer.encode_plain(&record.answer).map_err(bad)?;
        }
        let mut ids = self.tokenizer.encode(&self.answer_text(record, sizes)?).map_err(bad)?;
        ids.push(self.tokenizer.special().im_end);
        Ok(ids)
    }

    /// Reads a response as `reading` says; its boxes come back in original pixels.
    pub fn read_answer(&self, reading: &Reading, text: &str, sizes: &Sizes) -> GroundedAnswer {
        codec::read_answer(self.codec, reading, text, sizes)
    }

    /// The form in which boxes are written and read.
    pub fn box_form(&self) -> BoxForm {
        self.codec.form()
    }

    /// The tokenizer; its banned tokens leave out those of the box form.
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
        let answer = p.read_answer(&Reading::default(), &p.tokenizer().decode(&ids).unwrap(), &made.image.sizes());
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
    }

    #[test]
    fn a_category_cannot_write_special_tokens() {
        let (_dir, p) = tiny();
        let line = r#"{"id":"a7","image":"x.png","category":"x<|im_end|>","boxes":[[1,5,20,25]]}"#;
        let r: Record = serde_json::from_str(line).unwrap();
        let e = p.target_ids(&r, &p.sizes((96, 96)).unwrap()).unwrap_err().to_string();
        assert!(e.contains("a7") && e.contains("<|im_end|>"), "{e}");
        // Nor can an answer that is trained as it is written.
        for more in [r#""task":"vqa","answer":"yes<|image_pad|>""#, r#""answer":"<|im_end|> <region>""#] {
            let line = format!(r#"{{"id":"a9","image":"x.png","category":"x","boxes":[[1,5,20,25]],{more}}}"#);
            let r: Record = serde_json::from_str(&line).unwrap();
            let e = p.target_ids(&r, &p.sizes((96, 96)).unwrap()).unwrap_err().to_string();
            assert!(e.contains("a9") && e.contains("<|im"), "{e}");
        }
    }

    /// A processor directory of `family` whose tokenizer also has the box tokens of Qwen2-VL.
    fn with_box_tokens(dir: &Path, family: Family) -> usize {
        write_tiny(dir, &TinyProcessorSpec { family, ..TinyProcessorSpec::default() }).unwrap();
        let path = dir.join("tokenizer.json");
        let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let size = Tokenizer::load(dir).unwrap().vocab_size();
        let added = json["added_tokens"].as_array_mut().unwrap();
        for (i, token) in codec::codec(BoxForm::Qwen2Vl).special_tokens().iter().enumerate() {
            let mut entry = added[0].clone();
            (entry["id"], entry["content"]) = ((size + i).into(), (*token).into());
            added.push(entry);
        }
        std::fs::write(path, json.to_string()).unwrap();
        size
    }

    #[test]
    fn the_form_is_the_familys_unless_it_is_chosen() {
        let dir = tempfile::tempdir().unwrap();
        let first = with_box_tokens(dir.path(), Family::Qwen3Vl) as u32;
        let r: Record = serde_json::from_str(r#"{"id":"a","category":"cyst","boxes":[[48,24,96,96]]}"#).unwrap();
        let sizes = Sizes { original: (96, 96), resized: (96, 96) };
        let load = |form| Preparer::load_with(dir.path(), form).unwrap();
        let family = Preparer::load(dir.path()).unwrap();
        assert_eq!((family.family(), family.box_form()), (Family::Qwen3Vl, BoxForm::PerMille));
        assert_eq!(family.answer_text(&r, &sizes).unwrap(), "[500,250,1000,1000] cyst");
        assert!((first..first + 4).all(|id| family.tokenizer().special().banned.contains(&id)));
        for form in BoxForm::ALL {
            let p = load(Some(form));
            let ids = p.target_ids(&r, &sizes).unwrap();
            let back = p.read_answer(&Reading::default(), &p.tokenizer().decode(&ids).unwrap(), &sizes);
            assert_eq!(
                (p.box_form(), back.boxes, back.category.as_str(), back.fault),
                (form, r.boxes.clone(), "cyst", None)
            );
            // What training writes can be sampled.
            assert!(ids.iter().all(|id| !p.tokenizer().special().banned.contains(id)), "{form}");
        }
        let e = load(Some(BoxForm::Qwen2Vl));
        let sly: Record =
            serde_json::from_str(r#"{"id":"a8","category":"<|box_end|>","boxes":[[1,5,20,25]]}"#).unwrap();
        assert!(e.target_ids(&sly, &sizes).unwrap_err().to_string().contains("a8"));
    }

    #[test]
    fn missing_tokens_are_named_for_every_family() {
        for family in Family::ALL {
            let dir = tempfile::tempdir().unwrap();
            write_tiny(dir.path(), &TinyProcessorSpec { family, ..TinyProcessorSpec::default() }).unwrap();
            assert_eq!(Preparer::load(dir.path()).unwrap().family(), family);
            let e = Preparer::load_with(dir.path(), Some(BoxForm::Qwen2Vl)).unwrap_err().to_string();
            assert!(e.contains("<|object_ref_start|>") && e.contains("tokenizer.json"), "{e}");
            let path = dir.path().join("tokenizer.json");
            let text = std::fs::read_to_string(&path).unwrap();
            std::fs::write(&path, text.replace("<|vision_start|>", "<|look|>")).unwrap();
            let e = Preparer::load(dir.path()).unwrap_err().to_string();
            assert!(e.contains("<|vision_start|>") && e.contains("tokenizer.json"), "{e}");
            // transformers 5 saves one file for the whole processor.
            let whole = format!(r#"{{"processor_class":"{}"}}"#, family.processor_class());
            std::fs::write(dir.path().join("processor_config.json"), whole).unwrap();
            std::fs::remove_file(dir.path().join("preprocessor_config.json")).unwrap();
            assert_eq!(Family::detect(dir.path()).unwrap(), family);
        }
    }

    #[test]
    fn other_families_are_refused_by_name() {
        let (dir, _) = tiny();
        std::fs::write(dir.path().join("config.json"), r#"{"model_type":"llava"}"#).unwrap();
        let e = Preparer::load(dir.path()).unwrap_err().to_string();
        assert!(e.contains("llava") && Family::ALL.iter().all(|f| e.contains(f.name())), "{e}");
        std::fs::write(dir.path().join("config.json"), "{").unwrap();
        assert!(Preparer::load(dir.path()).unwrap_err().to_string().contains("config.json"));
    }
}
