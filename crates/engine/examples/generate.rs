//! Generates responses to the first record of a file with a model directory, and reads their boxes.
//!
//! ```sh
//! cargo run -p unveil-engine --example generate -- MODEL_DIR RECORDS.jsonl 4
//! ```
//!
//! MODEL_DIR is in Hugging Face layout (`unveil model init` writes one); RECORDS.jsonl has lines such as
//! `{"id": "a", "image": "a.png", "question": "What is abnormal, and where?"}`. The last argument is the number of responses.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "an example prints its results")]

use std::path::Path;
use std::sync::Arc;

use unveil_core::{AnswerReader, BBox, Finish, Sampling};
use unveil_data::records::RecordFile;
use unveil_engine::random::group_key;
use unveil_engine::{Engine, EngineOptions, GroupRequest, PromptInput};
use unveil_model::{AttentionSet, Vlm};
use unveil_preprocess::preprocessor::Preprocessor;

type BoxError = Box<dyn std::error::Error>;

/// A response as text.
struct Generated {
    /// Text of all tokens.
    text: String,
    /// Boxes of the answer, in pixels of the original image.
    boxes: Vec<BBox>,
    /// Log-probability of the whole response.
    logprob: f32,
    /// Why the response ended.
    finish: Finish,
    /// Row and column of the image token that the first response token attends to most.
    looks_at: Option<[usize; 2]>,
}

/// Generates `n` responses to the first record of `records`.
fn generate(model: &Path, records: &Path, n: usize) -> Result<Vec<Generated>, BoxError> {
    let preprocessor = Preprocessor::load(model)?;
    let file = RecordFile::load(records)?;
    let record = file.records.first().ok_or("the file has no record")?;
    let prepared = preprocessor.prepare(&file.open_image(record)?, record)?;
    let sizes = prepared.image.sizes();
    let cells = prepared.image.merged;

    let vlm = Vlm::load(model, tch::Device::Cpu, tch::Kind::Float)?;
    let options = EngineOptions {
        // The attention of one layer over the image tokens comes with every response.
        capture: Some(AttentionSet::layer(vlm.config().default_capture_layer())),
        banned: preprocessor.tokenizer().banned().to_vec(),
        ..EngineOptions::default()
    };
    let mut engine = Engine::new(vlm, options)?;

    let input = PromptInput {
        id: record.id.clone(),
        prompt: prepared.prompt,
        patches: Arc::new(prepared.image.patches),
        hashes: Vec::new(),
    };
    let sampling = Sampling { n, temperature: 0.7, max_new_tokens: 64, seed: 0, ..Sampling::default() };
    // The key makes the responses to this record independent of the other groups of a batch.
    let key = group_key(&[record.id.as_bytes()]);
    let outputs = engine.generate(&[GroupRequest { input, key, sampling, stop: None }], None)?;

    let reader = AnswerReader::default();
    let generated = outputs.into_iter().flat_map(|group| group.responses).map(|response| {
        let text = preprocessor.tokenizer().decode_offsets(&response.tokens).text;
        let boxes = preprocessor.read_answer(&reader, &text, &sizes).boxes;
        let first_row = response.attention.as_ref().and_then(|rows| rows.row(0));
        let looks_at = first_row.and_then(largest).map(|cell| [cell / cells.cols, cell % cells.cols]);
        Generated { text, boxes, logprob: response.logprobs.iter().sum(), finish: response.finish, looks_at }
    });
    Ok(generated.collect())
}

/// Returns the index of the largest value.
fn largest(values: &[f32]) -> Option<usize> {
    (0..values.len()).max_by(|&a, &b| values[a].total_cmp(&values[b]))
}

fn main() -> Result<(), BoxError> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, records, n] = args.as_slice() else {
        return Err("usage: generate MODEL_DIR RECORDS.jsonl N".into());
    };
    for response in generate(Path::new(model), Path::new(records), n.parse()?)? {
        let Generated { text, boxes, logprob, finish, looks_at } = response;
        println!("{text:?} (boxes {boxes:?}, log-probability {logprob:.4}, {finish:?}, looks at {looks_at:?})");
    }
    Ok(())
}
