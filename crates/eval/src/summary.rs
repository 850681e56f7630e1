//! The `summary` suite: greedy answers to held-out images, compared with the truth.

use std::borrow::Borrow;

use unveil_core::{Grid, Sampling};
use unveil_data::prepare::Preparer;
use unveil_engine::{AttentionRows, Engine, GroupRequest, RawResponse};
use unveil_model::Vlm;
use unveil_report::Prediction;
use unveil_reward::Scoring;
use unveil_reward::form::category;
use unveil_reward::localization::localization;
use unveil_reward::mention::{byte_spans, first_mention, tokens_of};
use unveil_reward::vision::{Region, vision_relevance};

use crate::metrics::{Metrics, metrics};
use crate::{EvalError, Sample};

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

/// Metrics and the predictions behind them.
#[derive(Debug, Clone)]
pub struct Evaluation {
    /// The numbers.
    pub metrics: Metrics,
    /// One per sample, in order.
    pub predictions: Vec<Prediction>,
}

/// Answers every sample greedily with `engine` (capture must be on for lift and heat maps) and compares.
pub fn evaluate<V: Borrow<Vlm>>(
    engine: &mut Engine<V>,
    preparer: &Preparer,
    samples: &[Sample],
    settings: &Settings,
) -> Result<Evaluation, EvalError> {
    let sampling = Sampling { n: 1, temperature: 0.0, max_new_tokens: settings.max_new_tokens, ..Default::default() };
    let mut predictions = Vec::with_capacity(samples.len());
    for chunk in samples.chunks(settings.batch.max(1)) {
        let requests: Vec<GroupRequest> =
            chunk.iter().map(|s| GroupRequest { input: s.input.clone(), key: 0, sampling, stop: None }).collect();
        let outputs = engine.generate(&requests, None)?;
        for (sample, output) in chunk.iter().zip(outputs) {
            for response in output.responses {
                predictions.push(predict(sample, &response, preparer, &settings.scoring)?);
            }
        }
    }
    Ok(Evaluation { metrics: metrics(&predictions), predictions })
}

fn predict(
    sample: &Sample,
    response: &RawResponse,
    preparer: &Preparer,
    scoring: &Scoring,
) -> Result<Prediction, EvalError> {
    let record = &sample.record;
    let decoded = preparer.tokenizer().decode_offsets(&response.tokens);
    let spans = byte_spans(&decoded.text, &decoded.spans);
    let answer = preparer.read_answer(&decoded.text, &sample.sizes);
    let names = scoring.names(&record.category);
    let size: [u32; 2] = sample.sizes.original.into();
    let attention = response.attention.as_ref().and_then(|a| a.to_attention(sample.grid));
    let mut region = Region::new(&record.boxes, size);
    let mode = scoring.reward.vision_relevance.mode;
    let vision = vision_relevance(&decoded.text, &names, &spans, attention.as_ref(), &mut region, mode);
    let place = localization(&answer.boxes, answer.no_finding, &record.boxes, size);
    let named = category(&answer, &names, !record.boxes.is_empty());
    // One true box is compared with the first box of the answer; more boxes cannot raise it (soft F1 charges for them).
    let valid = |b: &&unveil_core::BBox| b.fault(size[0] as f32, size[1] as f32).is_none();
    let iou = match &record.boxes[..] {
        [truth] => Some(answer.boxes.first().filter(valid).map_or(0.0, |b| b.iou(truth))),
        _ => None,
    };
    let heat_names = if answer.category.is_empty() { names } else { vec![answer.category.clone()] };
    let heat = response
        .attention
        .as_ref()
        .map_or_else(Vec::new, |rows| heat(rows, sample.grid, &decoded.text, &heat_names, &spans));
    Ok(Prediction {
        id: record.id.clone(),
        image: sample.image.clone(),
        size,
        category: record.category.clone(),
        truth: record.boxes.clone(),
        boxes: answer.boxes,
        text: decoded.text,
        correct: named.value == Some(1.0),
        iou,
        soft_f1: place.value.unwrap_or(0.0),
        lift: region.is_applicable().then(|| vision.detail.get("lift").copied().unwrap_or(0.0)),
        grid: sample.grid,
        heat,
    })
}

/// Mean attention of the tokens that name a class; empty when none is named.
fn heat(rows: &AttentionRows, grid: Grid, text: &str, names: &[String], spans: &[(usize, usize)]) -> Vec<f32> {
    let Some(mention) = first_mention(text, names) else { return Vec::new() };
    let named: Vec<&[f32]> = tokens_of(&mention, spans).into_iter().filter_map(|t| rows.row(t)).collect();
    if named.is_empty() || rows.cells != grid.tokens() {
        return Vec::new();
    }
    (0..rows.cells).map(|j| named.iter().map(|r| r[j]).sum::<f32>() / named.len() as f32).collect()
}
