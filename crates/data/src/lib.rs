//! Data: record files, dataset importers, image decoding and storage, image processors and tokenizers, box codecs per model family, and
//! synthetic lesions.
//!
//! Must not depend on: tch, tonic. Boxes are in original-image pixels everywhere except inside a codec.

pub mod augment;
pub mod chat;
pub mod check;
pub mod codec;
pub mod context_fit;
mod decode;
mod family;
pub mod files;
pub mod image_folder;
mod image_path;
pub mod image_root;
pub mod image_store;
pub mod import;
mod near_duplicates;
mod preprocess_error;
pub mod preprocessor;
pub mod processor;
pub mod records;
mod rgb_image;
pub mod stats;
pub mod synth;
pub mod tokenizer;
