//! Data: records, importers, images and their store, processors and tokenizers, box codecs per model family, synthetic lesions.
//!
//! Must not know: tch, tonic. Boxes are original-image pixels everywhere but inside a codec.

mod files;
pub mod import;
pub mod records;
pub mod store;
pub mod synth;
