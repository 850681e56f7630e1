//! Preprocessing for models: image processors, tokenizers and chat templates in the layout of Hugging Face, box codecs per model family,
//! the check that records fit into a context, and augmentation.
//!
//! Must not depend on: tch, tonic, the importers. Boxes are in original-image pixels everywhere except inside a codec.
//!
//! # Examples
//! The training answer of a record, and its boxes read back:
//! ```
//! use unveil_core::{AnswerReader, BoxForm, Record};
//! use unveil_preprocess::codec::{Sizes, answer_text, codec, read_answer};
//!
//! let line = r#"{"id":"ct-7","image":"ct-7.png","category":"polyp","boxes":[[320,100,400,200]]}"#;
//! let record = Record::parse(line)?;
//! let sizes = Sizes { original: (640, 480), resized: (128, 96) };
//!
//! let codec = codec(BoxForm::PerMille);
//! let text = answer_text(codec, &record, &sizes)?;
//! assert_eq!(text, "[500,208,625,417] polyp");
//!
//! let answer = read_answer(codec, &AnswerReader::default(), &text, &sizes);
//! assert_eq!((answer.category.as_str(), answer.fault), ("polyp", None));
//! assert!(answer.boxes[0].iou(&record.boxes[0]) > 0.98);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod augment;
pub mod chat;
pub mod codec;
pub mod context_fit;
pub mod family;
mod preprocess_error;
pub mod preprocessor;
pub mod processor;
pub mod prompt_template;
pub mod tokenizer;
