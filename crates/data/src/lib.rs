//! Data: records, importers, images and their store, processors and tokenizers, box codecs per model family, synthetic lesions.
//!
//! Must not know: tch, tonic. Boxes are original-image pixels everywhere but inside a codec.

pub mod augment;
pub mod chat;
pub mod check;
pub mod codec;
mod decode;
pub mod files;
pub mod fits;
pub mod import;
mod near;
pub mod prepare;
pub mod processor;
pub mod reach;
pub mod records;
pub mod root;
pub mod stats;
pub mod store;
pub mod synth;
pub mod tokenizer;
