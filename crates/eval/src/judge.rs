//! One answer compared with the truth; what every suite counts from. The same for answers of the engine and of a file.
//!
//! Must not know: how the answer was made, suites.

use unveil_core::{Attention, BoxForm, Grid, ParseFault, Record};
use unveil_data::codec::{Sizes, codec, read_answer};
use unveil_report::Prediction;
use unveil_reward::Scoring;
use unveil_reward::form::category;
use unveil_reward::localization::localization;
use unveil_reward::mention::first_mention;
use unveil_reward::vision::{Region, vision_relevance};

use crate::look::{Look, Rows, mean_row};

/// What was asked: a record, and how its answers give boxes.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// The record.
    pub record: &'a Record,
    /// The image file, for the report.
    pub image: &'a str,
    /// Original and resized size.
    pub sizes: &'a Sizes,
    /// Form of the boxes.
    pub boxes: BoxForm,
}

/// What was answered.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Answer {
    /// Without special tokens.
    pub text: String,
    /// Per token, the bytes of `text` that it covers; empty when not known.
    pub spans: Vec<(usize, usize)>,
    /// Attention over the image tokens, when captured or given.
    pub attention: Option<Attention>,
}

/// A compared answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Judged {
    /// What the summary counts and the report shows.
    pub prediction: Prediction,
    /// The data set that the record comes from.
    pub source: String,
    /// First deviation from the answer's form.
    pub fault: Option<ParseFault>,
    /// Boxes that are impossible or outside the image.
    pub invalid: usize,
    /// Where the tokens that name the true class look.
    pub look: Look,
}

/// Compares one answer with the truth.
pub fn judge(subject: &Subject<'_>, answer: Answer, scoring: &Scoring) -> Judged {
    let (record, truth) = (subject.record, &subject.record.boxes);
    let size: [u32; 2] = subject.sizes.original.into();
    let said = read_answer(codec(subject.boxes), &answer.text, subject.sizes);
    let names = scoring.names(&record.category);
    let attention = answer.attention.as_ref();
    let mut region = Region::new(truth, size);
    let mode = scoring.reward.vision_relevance.mode;
    let vision = vision_relevance(&answer.text, &names, &answer.spans, attention, &mut region, mode);
    let grid = attention.map_or(Grid { rows: 0, cols: 0 }, |a| Grid { rows: a.grid[0], cols: a.grid[1] });
    let row = |names: &[String]| mean_row(attention?, &answer.text, names, &answer.spans);
    let measured = |row: Vec<f64>| Look::Measured(Rows::new(&row, grid, truth, size));
    let look = if !region.is_applicable() {
        Look::NotApplicable
    } else if first_mention(&answer.text, &names).is_none() {
        Look::Unnamed
    } else {
        row(&names).filter(|_| !vision.masked).map_or(Look::NoRows, measured)
    };
    let lift = match look {
        Look::NotApplicable | Look::NoRows => None,
        Look::Unnamed => Some(0.0),
        Look::Measured(_) => vision.detail.get("lift").copied(),
    };
    let shown = if said.category.is_empty() { names.clone() } else { vec![said.category.clone()] };
    let heat = row(&shown).map_or_else(Vec::new, |r| r.iter().map(|p| *p as f32).collect());
    let place = localization(&said.boxes, said.no_finding, truth, size);
    let valid = |b: &&unveil_core::BBox| b.fault(size[0] as f32, size[1] as f32).is_none();
    // One true box is compared with the first box of the answer; more boxes cannot raise it (soft F1 charges for them).
    let iou = match &truth[..] {
        [truth] => Some(said.boxes.first().filter(valid).map_or(0.0, |b| b.iou(truth))),
        _ => None,
    };
    let invalid = said.boxes.iter().filter(|b| !valid(b)).count();
    Judged {
        prediction: Prediction {
            id: record.id.clone(),
            image: subject.image.to_owned(),
            size,
            category: record.category.clone(),
            truth: truth.clone(),
            correct: category(&said, &names, !truth.is_empty()).value == Some(1.0),
            iou,
            soft_f1: place.value.unwrap_or(0.0),
            lift,
            grid,
            heat,
            boxes: said.boxes,
            text: answer.text,
        },
        source: record.source.clone(),
        fault: said.fault,
        invalid,
        look,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(truth: &[[f32; 4]], text: &str, attention: Option<Attention>) -> Judged {
        let record = serde_json::json!({"id": "a", "category": "nodule", "boxes": truth, "source": "s"});
        let record: Record = serde_json::from_value(record).unwrap();
        let sizes = Sizes { original: (20, 20), resized: (40, 40) };
        let subject = Subject { record: &record, image: "", sizes: &sizes, boxes: BoxForm::Absolute };
        let spans = text.char_indices().map(|(i, c)| (i, i + c.len_utf8())).collect();
        judge(&subject, Answer { text: text.to_owned(), spans, attention }, &Scoring::default())
    }

    fn even(tokens: usize) -> Option<Attention> {
        Some(Attention { grid: [2, 2], tokens: (0..tokens).collect(), rows: vec![vec![0.25; 4]; tokens] })
    }

    #[test]
    fn where_it_looks() {
        let boxes = [[0.0, 0.0, 10.0, 10.0]];
        let (text, n) = ("[0,0,20,20] nodule", 18);
        let j = judged(&boxes, text, even(n));
        assert_eq!((j.prediction.iou, j.prediction.lift, j.prediction.heat.len()), (Some(1.0), Some(1.0), 4));
        assert!(matches!(j.look, Look::Measured(r) if (r.energy - 0.25).abs() < 1e-12 && r.hit));
        let j = judged(&boxes, text, None);
        assert_eq!((j.look, j.prediction.lift), (Look::NoRows, None), "not known is not 0");
        assert_eq!(judged(&boxes, text, even(5)).look, Look::NoRows);
        let j = judged(&boxes, "[0,0,20,20] mass", even(16));
        assert_eq!((j.look, j.prediction.lift), (Look::Unnamed, Some(0.0)));
        for none in [vec![], vec![[0.0, 0.0, 20.0, 20.0]]] {
            assert_eq!(judged(&none, text, even(n)).look, Look::NotApplicable);
        }
    }

    #[test]
    fn boxes_are_counted_as_written() {
        let j = judged(&[[0.0, 0.0, 10.0, 10.0]], "[30,30,20,20], [0,0,20,20] nodule", None);
        assert_eq!((j.prediction.boxes.len(), j.invalid, j.prediction.iou), (2, 1, Some(0.0)));
        assert_eq!(judged(&[], "", None).fault, Some(ParseFault::Empty));
    }
}
