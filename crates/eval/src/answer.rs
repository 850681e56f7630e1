//! Comparison of one answer with the truth, on which all suites are based. Answers of the engine and of a file are treated alike.

use unveil_core::mention::find_mention;
use unveil_core::{Attention, BoxForm, Grid, ParseFault, Record};
use unveil_preprocess::codec::{Sizes, codec, read_answer};
use unveil_report::Prediction;
use unveil_reward::Scoring;
use unveil_reward::format::score_category;
use unveil_reward::localization::score_localization_by_iou;
use unveil_reward::vision::{AttendedResponse, Region, score_vision_relevance_unfiltered};

use crate::attention::{AttentionMeasures, LesionAttention, mean_row};

/// Record that was asked about, and how to read the boxes of its answers.
#[derive(Debug, Clone, Copy)]
pub struct AnswerContext<'a> {
    /// The record.
    pub record: &'a Record,
    /// The image file, for the report.
    pub image: &'a str,
    /// Original and resized image size.
    pub sizes: &'a Sizes,
    /// Form of the boxes in answers.
    pub boxes: BoxForm,
}

/// An answer of a model.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Answer {
    /// Text without special tokens.
    pub text: String,
    /// Byte range of `text` that each token covers; empty if unknown.
    pub spans: Vec<(usize, usize)>,
    /// Attention over the image tokens, if captured or given.
    pub attention: Option<Attention>,
}

/// An answer compared with the truth.
#[derive(Debug, Clone, PartialEq)]
pub struct EvaluatedAnswer {
    /// Values for the summary and the report.
    pub prediction: Prediction,
    /// Data set of the record.
    pub source: String,
    /// First deviation from the answer form.
    pub fault: Option<ParseFault>,
    /// Number of boxes that are invalid or outside the image.
    pub invalid: usize,
    /// Attention of the tokens that name the true class, compared with the true boxes.
    pub attention: LesionAttention,
}

impl EvaluatedAnswer {
    /// Returns whether the record is answered in text: such answers are not compared, and grounding metrics leave them out.
    pub fn is_text(&self) -> bool {
        self.prediction.reference.is_some()
    }
}

/// Compares one answer with the truth.
pub fn evaluate_answer(context: &AnswerContext<'_>, answer: Answer, scoring: &Scoring) -> EvaluatedAnswer {
    let record = context.record;
    let truth = &context.record.boxes;
    let size: [u32; 2] = context.sizes.original.into();
    if record.is_text() {
        return text_answer(context, answer);
    }
    let parsed = read_answer(codec(context.boxes), &scoring.reader, &answer.text, context.sizes);
    let names = scoring.names(&record.category);
    let attention = answer.attention.as_ref();
    let mut region = Region::new(truth, size);
    let mode = scoring.reward.vision_relevance.mode;
    let attended = AttendedResponse { text: &answer.text, reader: &scoring.reader, spans: &answer.spans, attention };
    let vision = score_vision_relevance_unfiltered(attended, &names, &mut region, mode);
    let grid = attention.map_or(Grid { rows: 0, cols: 0 }, |a| Grid { rows: a.grid[0], cols: a.grid[1] });
    let mentioned = |names: &[String]| find_mention(&scoring.reader, &answer.text, names);
    let row = |names: &[String]| mean_row(attention?, &mentioned(names)?, &answer.spans);
    let measure = |row: Vec<f64>| LesionAttention::Measured(AttentionMeasures::new(&row, grid, truth, size));
    let lesion_attention = if !region.is_applicable() {
        LesionAttention::NotApplicable
    } else if mentioned(&names).is_none() {
        LesionAttention::Unnamed
    } else {
        row(&names).filter(|_| !vision.masked).map_or(LesionAttention::NoRows, measure)
    };
    let lift = match lesion_attention {
        LesionAttention::NotApplicable | LesionAttention::NoRows => None,
        LesionAttention::Unnamed => Some(0.0),
        LesionAttention::Measured(_) => vision.detail.get("lift").copied(),
    };
    let shown = if parsed.category.is_empty() { names.clone() } else { vec![parsed.category.clone()] };
    let heat = row(&shown).map_or_else(Vec::new, |r| r.iter().map(|p| *p as f32).collect());
    let localization = score_localization_by_iou(&parsed.boxes, parsed.no_finding, truth, size);
    let valid = |b: &&unveil_core::BBox| b.fault(size[0] as f32, size[1] as f32).is_none();
    // A single true box is compared with the first box of the answer, so further boxes cannot raise it (soft F1 penalises them).
    let iou = match &truth[..] {
        [truth] => Some(parsed.boxes.first().filter(valid).map_or(0.0, |b| b.iou(truth))),
        _ => None,
    };
    let invalid = parsed.boxes.iter().filter(|b| !valid(b)).count();
    EvaluatedAnswer {
        prediction: Prediction {
            id: record.id.clone(),
            image: context.image.to_owned(),
            size,
            category: record.category.clone(),
            reference: None,
            truth: truth.clone(),
            correct: score_category(&parsed, &scoring.class(&record.category), !truth.is_empty()).value == Some(1.0),
            iou,
            soft_f1: localization.value.unwrap_or(0.0),
            lift,
            grid,
            heat,
            boxes: parsed.boxes,
            text: answer.text,
        },
        source: record.source.clone(),
        fault: parsed.fault,
        invalid,
        attention: lesion_attention,
    }
}

/// Returns an answer to a text record: it is shown and counted, but not compared.
fn text_answer(context: &AnswerContext<'_>, answer: Answer) -> EvaluatedAnswer {
    let record = context.record;
    EvaluatedAnswer {
        prediction: Prediction {
            id: record.id.clone(),
            image: context.image.to_owned(),
            size: context.sizes.original.into(),
            category: record.category.clone(),
            reference: Some(record.answer.clone()),
            truth: record.boxes.clone(),
            boxes: Vec::new(),
            text: answer.text,
            correct: false,
            iou: None,
            soft_f1: 0.0,
            lift: None,
            grid: Grid { rows: 0, cols: 0 },
            heat: Vec::new(),
        },
        source: record.source.clone(),
        fault: None,
        invalid: 0,
        attention: LesionAttention::NotApplicable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evaluated(truth: &[[f32; 4]], text: &str, attention: Option<Attention>) -> EvaluatedAnswer {
        let record = serde_json::json!({"id": "a", "category": "nodule", "boxes": truth, "source": "s"});
        let record: Record = serde_json::from_value(record).unwrap();
        let sizes = Sizes { original: (20, 20), resized: (40, 40) };
        let context = AnswerContext { record: &record, image: "", sizes: &sizes, boxes: BoxForm::Absolute };
        let spans = text.char_indices().map(|(i, c)| (i, i + c.len_utf8())).collect();
        evaluate_answer(&context, Answer { text: text.to_owned(), spans, attention }, &Scoring::default())
    }

    fn even(tokens: usize) -> Option<Attention> {
        Some(Attention { grid: [2, 2], tokens: (0..tokens).collect(), rows: vec![vec![0.25; 4]; tokens] })
    }

    #[test]
    fn attention_is_compared_with_the_lesion() {
        let boxes = [[0.0, 0.0, 10.0, 10.0]];
        let text = "[0,0,20,20] nodule";
        let n = 18;
        let e = evaluated(&boxes, text, even(n));
        assert_eq!((e.prediction.iou, e.prediction.lift, e.prediction.heat.len()), (Some(1.0), Some(1.0), 4));
        assert!(matches!(e.attention, LesionAttention::Measured(r) if (r.energy - 0.25).abs() < 1e-12 && r.hit));
        let e = evaluated(&boxes, text, None);
        assert_eq!((e.attention, e.prediction.lift), (LesionAttention::NoRows, None), "unknown is not 0");
        assert_eq!(evaluated(&boxes, text, even(5)).attention, LesionAttention::NoRows);
        let e = evaluated(&boxes, "[0,0,20,20] mass", even(16));
        assert_eq!((e.attention, e.prediction.lift), (LesionAttention::Unnamed, Some(0.0)));
        for none in [vec![], vec![[0.0, 0.0, 20.0, 20.0]]] {
            assert_eq!(evaluated(&none, text, even(n)).attention, LesionAttention::NotApplicable);
        }
    }

    #[test]
    fn invalid_boxes_are_counted() {
        let e = evaluated(&[[0.0, 0.0, 10.0, 10.0]], "[30,30,20,20], [0,0,20,20] nodule", None);
        assert_eq!((e.prediction.boxes.len(), e.invalid, e.prediction.iou), (2, 1, Some(0.0)));
        assert_eq!(evaluated(&[], "", None).fault, Some(ParseFault::Empty));
    }

    #[test]
    fn reasoning_is_ignored() {
        let text = "<think>nodule [9,9,10,10]</think>[0,0,20,20] mass.";
        let e = evaluated(&[[0.0, 0.0, 10.0, 10.0]], text, even(text.len()));
        assert_eq!((e.attention, e.prediction.iou, e.prediction.boxes.len()), (LesionAttention::Unnamed, Some(1.0), 1));
        let text = "<think>mass</think><answer>[0,0,20,20] Nodule.</answer>";
        let e = evaluated(&[[0.0, 0.0, 10.0, 10.0]], text, even(text.len()));
        assert!(
            matches!(e.attention, LesionAttention::Measured(_))
                && e.prediction.correct
                && e.fault == Some(ParseFault::UnwantedReasoning)
        );
        for none in ["No finding.", "[]", "<think>A nodule?</think> no findings"] {
            let e = evaluated(&[], none, None);
            assert!(e.prediction.correct && e.prediction.soft_f1 == 1.0, "{none}");
        }
    }

    #[test]
    fn text_answers_are_not_compared() {
        let record = serde_json::json!({"id": "a", "task": "vqa", "answer": "MRI", "boxes": []});
        let record: Record = serde_json::from_value(record).unwrap();
        let sizes = Sizes { original: (20, 20), resized: (40, 40) };
        let context = AnswerContext { record: &record, image: "", sizes: &sizes, boxes: BoxForm::Absolute };
        for text in ["MRI", "no finding", "[1,2,3,4] x"] {
            let answer = Answer { text: text.to_owned(), ..Answer::default() };
            let e = evaluate_answer(&context, answer, &Scoring::default());
            assert!(e.is_text() && !e.prediction.correct && e.prediction.boxes.is_empty(), "{text}");
            assert_eq!(
                (e.prediction.reference.as_deref(), e.fault, e.attention),
                (Some("MRI"), None, LesionAttention::NotApplicable)
            );
        }
    }
}
