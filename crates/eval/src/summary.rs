//! Greedy answers of a model to held-out images, compared with the truth; and the `summary` suite.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::sync::Arc;

use unveil_core::Sampling;
use unveil_data::prepare::Preparer;
use unveil_data::store::Image;
use unveil_engine::{Engine, GroupInput, GroupRequest};
use unveil_model::Vlm;
use unveil_report::Prediction;
use unveil_reward::{Scoring, byte_spans};

use crate::metrics::{Metrics, metrics};
use crate::{Answer, EvalError, Judged, Sample, Subject, judge};

/// How answers are generated and compared.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Length cap in tokens.
    pub max_new_tokens: usize,
    /// Images per engine call.
    pub batch: usize,
    /// Synonyms and the vision relevance mode.
    pub scoring: Scoring,
}

/// Compared answers.
#[derive(Debug, Clone)]
pub struct Evaluation {
    /// The numbers of the summary.
    pub metrics: Metrics,
    /// One per sample, in order.
    pub judged: Vec<Judged>,
}

impl Evaluation {
    /// The `summary` suite over compared answers.
    pub fn new(judged: Vec<Judged>) -> Self {
        let predictions: Vec<&Prediction> = judged.iter().map(|j| &j.prediction).collect();
        Self { metrics: metrics(&predictions), judged }
    }
}

/// Answers every sample greedily with `engine` (capture must be on for attention) and compares.
///
/// # Errors
/// Generation failed.
pub fn evaluate<V: Borrow<Vlm>>(
    engine: &mut Engine<V>,
    preparer: &Preparer,
    samples: &[Sample],
    settings: &Settings,
) -> Result<Evaluation, EvalError> {
    let inputs = samples.iter().map(|s| s.input.clone()).collect();
    Ok(Evaluation::new(answer(engine, preparer, (samples, inputs), settings)?))
}

/// The same with each image withheld: a black one of the same size stands in for it.
///
/// # Errors
/// As [`evaluate`].
pub fn evaluate_withheld<V: Borrow<Vlm>>(
    engine: &mut Engine<V>,
    preparer: &Preparer,
    samples: &[Sample],
    settings: &Settings,
) -> Result<Evaluation, EvalError> {
    let inputs = withheld(preparer, samples)?;
    Ok(Evaluation::new(answer(engine, preparer, (samples, inputs), settings)?))
}

/// The samples' prompts around black images of the same sizes.
fn withheld(preparer: &Preparer, samples: &[Sample]) -> Result<Vec<GroupInput>, EvalError> {
    let mut black: HashMap<(u32, u32), Arc<Vec<f32>>> = HashMap::new();
    let mut out = Vec::with_capacity(samples.len());
    for s in samples {
        let (width, height) = s.sizes.original;
        let patches = match black.get(&(width, height)) {
            Some(patches) => patches.clone(),
            None => {
                let made = Arc::new(preparer.processor().process(&Image::new(width, height))?.patches);
                black.insert((width, height), made.clone());
                made
            }
        };
        out.push(GroupInput { patches, hashes: Vec::new(), ..s.input.clone() });
    }
    Ok(out)
}

fn answer<V: Borrow<Vlm>>(
    engine: &mut Engine<V>,
    preparer: &Preparer,
    (samples, inputs): (&[Sample], Vec<GroupInput>),
    settings: &Settings,
) -> Result<Vec<Judged>, EvalError> {
    let sampling = Sampling { n: 1, temperature: 0.0, max_new_tokens: settings.max_new_tokens, ..Default::default() };
    let request = |input| GroupRequest { input, key: 0, sampling, stop: None };
    let mut requests = inputs.into_iter().map(request);
    let mut judged = Vec::with_capacity(samples.len());
    for chunk in samples.chunks(settings.batch.max(1)) {
        let batch: Vec<GroupRequest> = requests.by_ref().take(chunk.len()).collect();
        let outputs = engine.generate(&batch, None)?;
        for (sample, output) in chunk.iter().zip(outputs) {
            let subject = Subject {
                record: &sample.record,
                image: &sample.image,
                sizes: &sample.sizes,
                boxes: preparer.box_form(),
            };
            for response in output.responses {
                let decoded = preparer.tokenizer().decode_offsets(&response.tokens);
                let answer = Answer {
                    spans: byte_spans(&decoded.text, &decoded.spans),
                    text: decoded.text,
                    attention: response.attention.and_then(|a| a.to_attention(sample.grid)),
                };
                judged.push(judge(&subject, answer, &settings.scoring));
            }
        }
    }
    Ok(judged)
}

#[cfg(test)]
mod tests {
    use super::*;
    use unveil_data::records::RecordFile;
    use unveil_data::tokenizer::tiny::{TinyProcessorSpec, write_tiny};

    #[test]
    fn a_withheld_image_is_black_and_of_the_same_size() {
        let dir = tempfile::tempdir().unwrap();
        write_tiny(dir.path(), &TinyProcessorSpec::default()).unwrap();
        let preparer = Preparer::load(dir.path()).unwrap();
        let mut image = Image::new(160, 96);
        (0..96).for_each(|x| image.set_pixel(x, x, [255, 9, 70]));
        std::fs::write(dir.path().join("x.png"), image.to_png().unwrap()).unwrap();
        let records = dir.path().join("r.jsonl");
        std::fs::write(&records, "{\"id\":\"a\",\"image\":\"x.png\"}\n{\"id\":\"b\",\"image\":\"x.png\"}").unwrap();
        let samples = crate::load_samples(&RecordFile::load(&records).unwrap(), "", 0, "Where?", &preparer).unwrap();
        let black = preparer.prepare(&Image::new(160, 96), "Where?").unwrap();
        let inputs = withheld(&preparer, &samples).unwrap();
        assert!(Arc::ptr_eq(&inputs[0].patches, &inputs[1].patches), "one black image serves all of its size");
        for (input, sample) in inputs.iter().zip(&samples) {
            assert!(*input.patches == black.image.patches && input.patches != sample.input.patches);
            assert_eq!((&input.prompt.tokens, &input.id), (&black.prompt.ids, &sample.record.id));
        }
    }
}
