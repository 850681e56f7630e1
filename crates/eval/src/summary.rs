//! Evaluation of a model: greedy answers to held-out images, compared with the truth, and the `summary` suite.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::sync::Arc;

use unveil_core::Sampling;
use unveil_core::mention::byte_spans;
use unveil_data::image_store::Image;
use unveil_engine::{Engine, GroupRequest, PromptInput};
use unveil_model::Vlm;
use unveil_preprocess::preprocessor::Preprocessor;
use unveil_report::Prediction;
use unveil_reward::Scoring;

use crate::metrics::{SummaryMetrics, summarize};
use crate::{Answer, AnswerContext, EvalError, EvalSample, EvaluatedAnswer, evaluate_answer};

/// Settings of an evaluation.
#[derive(Debug, Clone)]
pub struct EvalSettings {
    /// Maximum length of an answer in tokens.
    pub max_new_tokens: usize,
    /// Number of images per engine call.
    pub batch: usize,
    /// Synonyms, reader of answers and vision relevance mode.
    pub scoring: Scoring,
}

/// Evaluated answers and their summary.
#[derive(Debug, Clone)]
pub struct Evaluation {
    /// Metrics of the `summary` suite.
    pub metrics: SummaryMetrics,
    /// One answer per sample, in order.
    pub answers: Vec<EvaluatedAnswer>,
}

impl Evaluation {
    /// Computes the `summary` suite over evaluated answers.
    pub fn new(answers: Vec<EvaluatedAnswer>) -> Self {
        let predictions: Vec<&Prediction> = answers.iter().map(|a| &a.prediction).collect();
        Self { metrics: summarize(&predictions), answers }
    }
}

/// Generates an answer to every sample greedily with `engine` (with attention capture on, if attention is needed) and compares it.
///
/// # Errors
/// Returns [`EvalError::Engine`] if generation failed.
pub fn evaluate<V: Borrow<Vlm>>(
    engine: &mut Engine<V>,
    preprocessor: &Preprocessor,
    samples: &[EvalSample],
    settings: &EvalSettings,
) -> Result<Evaluation, EvalError> {
    let inputs = samples.iter().map(|s| s.input.clone()).collect();
    Ok(Evaluation::new(answer_samples(engine, preprocessor, (samples, inputs), settings)?))
}

/// Evaluates like [`evaluate`], but replaces each image by a black one of the same size.
///
/// # Errors
/// Returns [`EvalError::Engine`] if generation failed, [`EvalError::Prepare`] if a black image cannot be processed.
pub fn evaluate_withheld<V: Borrow<Vlm>>(
    engine: &mut Engine<V>,
    preprocessor: &Preprocessor,
    samples: &[EvalSample],
    settings: &EvalSettings,
) -> Result<Evaluation, EvalError> {
    let inputs = black_inputs(preprocessor, samples)?;
    Ok(Evaluation::new(answer_samples(engine, preprocessor, (samples, inputs), settings)?))
}

/// Returns the samples' inputs with black images of the same sizes.
fn black_inputs(preprocessor: &Preprocessor, samples: &[EvalSample]) -> Result<Vec<PromptInput>, EvalError> {
    let mut black: HashMap<(u32, u32), Arc<Vec<f32>>> = HashMap::new();
    let mut out = Vec::with_capacity(samples.len());
    for s in samples {
        let (width, height) = s.sizes.original;
        let patches = match black.get(&(width, height)) {
            Some(patches) => patches.clone(),
            None => {
                let patches = Arc::new(preprocessor.processor().process(&Image::new(width, height))?.patches);
                black.insert((width, height), patches.clone());
                patches
            }
        };
        out.push(PromptInput { patches, hashes: Vec::new(), ..s.input.clone() });
    }
    Ok(out)
}

fn answer_samples<V: Borrow<Vlm>>(
    engine: &mut Engine<V>,
    preprocessor: &Preprocessor,
    (samples, inputs): (&[EvalSample], Vec<PromptInput>),
    settings: &EvalSettings,
) -> Result<Vec<EvaluatedAnswer>, EvalError> {
    let sampling = Sampling { n: 1, temperature: 0.0, max_new_tokens: settings.max_new_tokens, ..Default::default() };
    let request = |input| GroupRequest { input, key: 0, sampling, stop: None };
    let mut requests = inputs.into_iter().map(request);
    let mut answers = Vec::with_capacity(samples.len());
    for chunk in samples.chunks(settings.batch.max(1)) {
        let batch: Vec<GroupRequest> = requests.by_ref().take(chunk.len()).collect();
        let outputs = engine.generate(&batch, None)?;
        for (sample, output) in chunk.iter().zip(outputs) {
            let context = AnswerContext {
                record: &sample.record,
                image: &sample.image,
                sizes: &sample.sizes,
                boxes: preprocessor.box_form(),
            };
            for response in output.responses {
                let decoded = preprocessor.tokenizer().decode_offsets(&response.tokens);
                let answer = Answer {
                    spans: byte_spans(&decoded.text, &decoded.spans),
                    text: decoded.text,
                    attention: response.attention.and_then(|a| a.to_attention(sample.grid)),
                };
                answers.push(evaluate_answer(&context, answer, &settings.scoring));
            }
        }
    }
    Ok(answers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use unveil_data::records::RecordFile;
    use unveil_preprocess::tokenizer::tiny::{TinyProcessorSpec, write_tiny};

    #[test]
    fn withheld_images_are_black_and_of_the_same_size() {
        let dir = tempfile::tempdir().unwrap();
        write_tiny(dir.path(), &TinyProcessorSpec::default()).unwrap();
        let preprocessor = Preprocessor::load(dir.path()).unwrap();
        let mut image = Image::new(160, 96);
        (0..96).for_each(|x| image.set_pixel(x, x, [255, 9, 70]));
        std::fs::write(dir.path().join("x.png"), image.to_png().unwrap()).unwrap();
        let records = dir.path().join("r.jsonl");
        std::fs::write(&records, "{\"id\":\"a\",\"image\":\"x.png\"}\n{\"id\":\"b\",\"image\":\"x.png\"}").unwrap();
        let samples = crate::load_samples(&RecordFile::load(&records).unwrap(), "", 0, &preprocessor).unwrap();
        let black = preprocessor.prepare(&Image::new(160, 96), &samples[0].record).unwrap();
        let inputs = black_inputs(&preprocessor, &samples).unwrap();
        assert!(Arc::ptr_eq(&inputs[0].patches, &inputs[1].patches), "samples of one size share a black image");
        for (input, sample) in inputs.iter().zip(&samples) {
            assert!(*input.patches == black.image.patches && input.patches != sample.input.patches);
            assert_eq!((&input.prompt.tokens, &input.id), (&black.prompt.tokens, &sample.record.id));
        }
    }
}
