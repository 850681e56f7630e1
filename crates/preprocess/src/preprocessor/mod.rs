//! The single entry point from records to model input: it combines the image processor, tokenizer, chat template and box codec of a model
//! directory.

use std::path::Path;

use unveil_core::record::REGION;
use unveil_core::{AnswerReader, BoxForm, Family, Grid, InputSettings, Prompt, Record};
use unveil_data::image_store::Image;

pub use crate::preprocess_error::PreprocessError;

use crate::chat::ChatTemplate;
use crate::codec::{self, BoxCodec, GroundedAnswer, Sizes};
use crate::family::detect_family;
use crate::processor::{ImageProcessor, PixelBounds, ProcessedImage, ProcessorConfig};
use crate::prompt_template::PromptTemplate;
use crate::tokenizer::Tokenizer;

/// Prompt and pixels of one record.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelInput {
    /// Token ids with expanded image tokens, and the grid of the image.
    pub prompt: Prompt,
    /// Image patches, grids and sizes.
    pub image: ProcessedImage,
}

/// Preprocessing as a model directory defines it. Share it in an `Arc`.
#[derive(Debug, Clone)]
pub struct Preprocessor {
    family: Family,
    codec: &'static dyn BoxCodec,
    /// Says in which form training answers are written.
    reader: AnswerReader,
    processor: ImageProcessor,
    tokenizer: Tokenizer,
    chat: ChatTemplate,
    prompt: PromptTemplate,
}

impl Preprocessor {
    /// Loads a model directory with the default settings: the family's own box form, the question as prompt; the weights are not needed.
    ///
    /// # Errors
    /// See [`Preprocessor::load_with`].
    pub fn load(dir: &Path) -> Result<Self, PreprocessError> {
        Self::load_with(dir, &InputSettings::default())
    }

    /// Loads a model directory with the settings of a run.
    ///
    /// # Errors
    /// Returns [`PreprocessError::File`], [`PreprocessError::Format`] or [`PreprocessError::Config`] for a missing or unusable file,
    /// [`PreprocessError::Family`] for an unsupported family, [`PreprocessError::MissingToken`] if the tokenizer lacks a token that the
    /// family or the box form needs, [`PreprocessError::Tag`] if it does not preserve a tag of answers, [`PreprocessError::Prompt`] for an
    /// unusable template, and [`PreprocessError::Pixels`] for bounds that contradict each other or those of the directory.
    pub fn load_with(dir: &Path, settings: &InputSettings) -> Result<Self, PreprocessError> {
        let family = detect_family(dir)?;
        let codec = codec::codec(settings.boxes.unwrap_or(family.box_form()));
        let mut tokenizer = Tokenizer::load(dir)?;
        tokenizer.allow(codec.special_tokens())?;
        let reader = settings.reader.clone();
        reader.tags().into_iter().try_for_each(|tag| tokenizer.check_tag(tag))?;
        let bounds = PixelBounds { min: settings.min_pixels, max: settings.max_pixels };
        Ok(Self {
            family,
            codec,
            reader,
            processor: ImageProcessor::new(ProcessorConfig::load(dir)?.bounded(bounds)?),
            tokenizer,
            chat: ChatTemplate::load(dir)?,
            prompt: PromptTemplate::new(&settings.prompt)?,
        })
    }

    /// Builds the model input of a record from its image.
    ///
    /// # Errors
    /// Returns [`PreprocessError::Aspect`] or [`PreprocessError::Size`] for an image that cannot be processed; see also
    /// [`Preprocessor::prompt_ids`].
    pub fn prepare(&self, image: &Image, record: &Record) -> Result<ModelInput, PreprocessError> {
        let image = self.processor.process(image)?;
        let prompt = Prompt { tokens: self.prompt_ids(image.merged, record)?, grids: vec![image.grid_thw] };
        Ok(ModelInput { prompt, image })
    }

    /// Builds the model input of a record from its encoded image; `name` appears in errors.
    ///
    /// # Errors
    /// Returns [`PreprocessError::Image`] if the image cannot be decoded; see also [`Preprocessor::prepare`].
    pub fn prepare_bytes(&self, bytes: &[u8], name: &str, record: &Record) -> Result<ModelInput, PreprocessError> {
        let image = Image::decode(bytes, name)?;
        self.prepare(&image, record)
            .map_err(|cause| PreprocessError::Named { name: name.to_owned(), cause: Box::new(cause) })
    }

    /// Returns the token ids of the prompt of a record whose image has this grid of image tokens. Every role builds its prompts here.
    ///
    /// # Errors
    /// Returns [`PreprocessError::Record`] if the prompt template cannot be rendered for the record; see also [`ChatTemplate::prompt_ids`].
    pub fn prompt_ids(&self, grid: Grid, record: &Record) -> Result<Vec<u32>, PreprocessError> {
        self.chat.prompt_ids(&self.tokenizer, &[grid], self.prompt.system(), &self.prompt_text(record)?)
    }

    /// Returns the text of the user message for a record, which follows the image.
    ///
    /// # Errors
    /// Returns [`PreprocessError::Record`] if the prompt template cannot be rendered for the record.
    pub fn prompt_text(&self, record: &Record) -> Result<String, PreprocessError> {
        self.prompt.text(record)
    }

    /// Returns the sizes before and after the resize of an image of `(width, height)` pixels.
    pub fn sizes(&self, original: (u32, u32)) -> Result<Sizes, PreprocessError> {
        Ok(Sizes { original, resized: self.processor.resized_size(original)? })
    }

    /// Returns the training answer of a record as text.
    pub fn answer_text(&self, record: &Record, sizes: &Sizes) -> Result<String, PreprocessError> {
        codec::training_answer(self.codec, &self.reader, record, sizes)
    }

    /// Returns the training answer of a record as token ids, including the end token.
    ///
    /// # Errors
    /// Returns [`PreprocessError::Record`] if the category or answer contains a special token; see also [`codec::training_answer`].
    pub fn target_ids(&self, record: &Record, sizes: &Sizes) -> Result<Vec<u32>, PreprocessError> {
        let record_error = |e: PreprocessError| PreprocessError::Record { id: record.id.clone(), what: e.to_string() };
        // The box form may write special tokens, but the record's texts must not contain any.
        self.tokenizer.encode_plain(&record.category).map_err(record_error)?;
        if record.is_text() || record.answer.contains(REGION) {
            self.tokenizer.encode_plain(&record.answer).map_err(record_error)?;
        }
        let mut ids = self.tokenizer.encode(&self.answer_text(record, sizes)?).map_err(record_error)?;
        ids.push(self.tokenizer.special().im_end);
        Ok(ids)
    }

    /// Reads a response as `reading` says; its boxes come back in original pixels.
    pub fn read_answer(&self, reading: &AnswerReader, text: &str, sizes: &Sizes) -> GroundedAnswer {
        codec::read_answer(self.codec, reading, text, sizes)
    }

    /// Returns the form in which boxes are written and read.
    pub fn box_form(&self) -> BoxForm {
        self.codec.form()
    }

    /// Returns the tokenizer; its banned tokens exclude those of the box form.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Returns the image processor.
    pub fn processor(&self) -> &ImageProcessor {
        &self.processor
    }

    /// Returns the chat template.
    pub fn chat(&self) -> &ChatTemplate {
        &self.chat
    }

    /// Returns the model family.
    pub fn family(&self) -> Family {
        self.family
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::processor_class;
    use crate::tokenizer::tiny::{TinyProcessorSpec, write_tiny};

    fn tiny() -> (tempfile::TempDir, Preprocessor) {
        let dir = tempfile::tempdir().unwrap();
        write_tiny(dir.path(), &TinyProcessorSpec::default()).unwrap();
        let p = Preprocessor::load(dir.path()).unwrap();
        (dir, p)
    }

    fn asked(question: &str) -> Record {
        let record = serde_json::json!({"id": "q", "image": "x.png", "question": question});
        serde_json::from_value(record).unwrap()
    }

    #[test]
    fn from_record_to_ids_and_back() {
        let (_dir, p) = tiny();
        let input = p.prepare(&Image::new(640, 480), &asked("What is abnormal, and where?")).unwrap();
        assert_eq!((input.image.resized, input.image.image_tokens()), ((128, 96), 48));
        let pad = p.tokenizer().special().image_pad;
        assert_eq!(input.prompt.tokens.iter().filter(|id| **id == pad).count(), 48);
        assert_eq!(input.prompt.grids, [[1, 12, 16]]);
        assert_eq!(input.image.patches.len(), input.image.n_patches() * input.image.patch_dim);
        let line = r#"{"id":"a","image":"x.png","category":"platelet","boxes":[[100,50,200,250]]}"#;
        let r: Record = serde_json::from_str(line).unwrap();
        let ids = p.target_ids(&r, &input.image.sizes()).unwrap();
        assert_eq!(ids.last(), Some(&p.tokenizer().special().im_end));
        let answer =
            p.read_answer(&AnswerReader::default(), &p.tokenizer().decode(&ids).unwrap(), &input.image.sizes());
        assert_eq!((answer.boxes, answer.category.as_str()), (r.boxes, "platelet"));
        assert_eq!(p.prepare(&Image::new(96, 96), &asked("x")).unwrap().image.resized, (96, 96));
    }

    #[test]
    fn bad_images_are_named() {
        let (_dir, p) = tiny();
        assert_eq!(p.prepare(&Image::new(1, 1), &asked("x")).unwrap().image.resized, (96, 96));
        assert!(matches!(p.prepare(&Image::new(0, 4), &asked("x")), Err(PreprocessError::Size { .. })));
        let png = Image::new(20_00, 2).to_png().unwrap();
        let e = p.prepare_bytes(&png, "long.png", &asked("x")).unwrap_err().to_string();
        assert!(e.contains("long.png") && e.contains("2000 x 2") && e.contains("aspect"), "{e}");
        let e = p.prepare_bytes(&png[..40], "cut.png", &asked("x")).unwrap_err().to_string();
        assert!(e.contains("cut.png"), "{e}");
    }

    #[test]
    fn special_tokens_in_records_are_refused() {
        let (_dir, p) = tiny();
        let line = r#"{"id":"a7","image":"x.png","category":"x<|im_end|>","boxes":[[1,5,20,25]]}"#;
        let r: Record = serde_json::from_str(line).unwrap();
        let e = p.target_ids(&r, &p.sizes((96, 96)).unwrap()).unwrap_err().to_string();
        assert!(e.contains("a7") && e.contains("<|im_end|>"), "{e}");
        // The same holds for an answer that is trained verbatim.
        for more in [r#""task":"vqa","answer":"yes<|image_pad|>""#, r#""answer":"<|im_end|> <region>""#] {
            let line = format!(r#"{{"id":"a9","image":"x.png","category":"x","boxes":[[1,5,20,25]],{more}}}"#);
            let r: Record = serde_json::from_str(&line).unwrap();
            let e = p.target_ids(&r, &p.sizes((96, 96)).unwrap()).unwrap_err().to_string();
            assert!(e.contains("a9") && e.contains("<|im"), "{e}");
        }
    }

    /// Writes a processor directory of `family` whose tokenizer also has the box tokens of Qwen2-VL; returns the id of the first one.
    fn with_box_tokens(dir: &Path, family: Family) -> usize {
        write_tiny(dir, &TinyProcessorSpec { family, ..TinyProcessorSpec::default() }).unwrap();
        let path = dir.join("tokenizer.json");
        let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let size = Tokenizer::load(dir).unwrap().vocab_size();
        let added = json["added_tokens"].as_array_mut().unwrap();
        for (i, token) in codec::codec(BoxForm::Qwen2Vl).special_tokens().iter().enumerate() {
            let mut entry = added[0].clone();
            entry["id"] = (size + i).into();
            entry["content"] = (*token).into();
            added.push(entry);
        }
        std::fs::write(path, json.to_string()).unwrap();
        size
    }

    #[test]
    fn box_form_defaults_to_the_family() {
        let dir = tempfile::tempdir().unwrap();
        let first = with_box_tokens(dir.path(), Family::Qwen3Vl) as u32;
        let r: Record = serde_json::from_str(r#"{"id":"a","category":"cyst","boxes":[[48,24,96,96]]}"#).unwrap();
        let sizes = Sizes { original: (96, 96), resized: (96, 96) };
        let load =
            |form| Preprocessor::load_with(dir.path(), &InputSettings { boxes: form, ..Default::default() }).unwrap();
        let family = Preprocessor::load(dir.path()).unwrap();
        assert_eq!((family.family(), family.box_form()), (Family::Qwen3Vl, BoxForm::PerMille));
        assert_eq!(family.answer_text(&r, &sizes).unwrap(), "[500,250,1000,1000] cyst");
        assert!((first..first + 4).all(|id| family.tokenizer().banned().contains(&id)));
        for form in BoxForm::ALL {
            let p = load(Some(form));
            let ids = p.target_ids(&r, &sizes).unwrap();
            let back = p.read_answer(&AnswerReader::default(), &p.tokenizer().decode(&ids).unwrap(), &sizes);
            assert_eq!(
                (p.box_form(), back.boxes, back.category.as_str(), back.fault),
                (form, r.boxes.clone(), "cyst", None)
            );
            // Every token of a training answer can be sampled.
            assert!(ids.iter().all(|id| !p.tokenizer().banned().contains(id)), "{form}");
        }
        let e = load(Some(BoxForm::Qwen2Vl));
        let sly: Record =
            serde_json::from_str(r#"{"id":"a8","category":"<|box_end|>","boxes":[[1,5,20,25]]}"#).unwrap();
        assert!(e.target_ids(&sly, &sizes).unwrap_err().to_string().contains("a8"));
    }

    #[test]
    fn missing_special_tokens_are_named() {
        for family in Family::ALL {
            let dir = tempfile::tempdir().unwrap();
            write_tiny(dir.path(), &TinyProcessorSpec { family, ..TinyProcessorSpec::default() }).unwrap();
            assert_eq!(Preprocessor::load(dir.path()).unwrap().family(), family);
            let qwen2 = InputSettings { boxes: Some(BoxForm::Qwen2Vl), ..Default::default() };
            let e = Preprocessor::load_with(dir.path(), &qwen2).unwrap_err().to_string();
            assert!(e.contains("<|object_ref_start|>") && e.contains("tokenizer.json"), "{e}");
            let path = dir.path().join("tokenizer.json");
            let text = std::fs::read_to_string(&path).unwrap();
            std::fs::write(&path, text.replace("<|vision_start|>", "<|look|>")).unwrap();
            let e = Preprocessor::load(dir.path()).unwrap_err().to_string();
            assert!(e.contains("<|vision_start|>") && e.contains("tokenizer.json"), "{e}");
            // transformers 5 saves one file for the whole processor.
            let combined = format!(r#"{{"processor_class":"{}"}}"#, processor_class(family));
            std::fs::write(dir.path().join("processor_config.json"), combined).unwrap();
            std::fs::remove_file(dir.path().join("preprocessor_config.json")).unwrap();
            assert_eq!(detect_family(dir.path()).unwrap(), family);
        }
    }

    #[test]
    fn unsupported_families_are_named() {
        let (dir, _) = tiny();
        std::fs::write(dir.path().join("config.json"), r#"{"model_type":"llava"}"#).unwrap();
        let e = Preprocessor::load(dir.path()).unwrap_err().to_string();
        assert!(e.contains("llava") && Family::ALL.iter().all(|f| e.contains(f.name())), "{e}");
        std::fs::write(dir.path().join("config.json"), "{").unwrap();
        assert!(Preprocessor::load(dir.path()).unwrap_err().to_string().contains("config.json"));
    }
}
