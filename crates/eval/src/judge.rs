//! One answer compared with the truth; what every suite counts from. The same for answers of the engine and of a file.
//!
//! Must not know: how the answer was made, suites.

use unveil_core::{Attention, BoxForm, Grid, ParseFault, Record};
use unveil_data::codec::{Sizes, codec, read_answer};
use unveil_report::Prediction;
use unveil_reward::Scoring;
use unveil_reward::form::category;
use unveil_reward::localization::localization;
use unveil_reward::mention::mention;
use unveil_reward::vision::{Region, Seen, vision_relevance};

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

impl Judged {
    /// Its record is answered in text: nothing here says how well, and metrics of regions leave it out.
    pub fn is_text(&self) -> bool {
        self.prediction.reference.is_some()
    }
}

/// Compares one answer with the truth.
pub fn judge(subject: &Subject<'_>, answer: Answer, scoring: &Scoring) -> Judged {
    let (record, truth) = (subject.record, &subject.record.boxes);
    let size: [u32; 2] = subject.sizes.original.into();
    if record.is_text() {
        return in_text(subject, answer);
    }
    let said = read_answer(codec(subject.boxes), &scoring.reading, &answer.text, subject.sizes);
    let names = scoring.names(&record.category);
    let attention = answer.attention.as_ref();
    let mut region = Region::new(truth, size);
    let mode = scoring.reward.vision_relevance.mode;
    let seen = Seen { text: &answer.text, reading: &scoring.reading, spans: &answer.spans, attention };
    let vision = vision_relevance(seen, &names, &mut region, mode);
    let grid = attention.map_or(Grid { rows: 0, cols: 0 }, |a| Grid { rows: a.grid[0], cols: a.grid[1] });
    let mentioned = |names: &[String]| mention(&scoring.reading, &answer.text, names);
    let row = |names: &[String]| mean_row(attention?, &mentioned(names)?, &answer.spans);
    let measured = |row: Vec<f64>| Look::Measured(Rows::new(&row, grid, truth, size));
    let look = if !region.is_applicable() {
        Look::NotApplicable
    } else if mentioned(&names).is_none() {
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
            reference: None,
            truth: truth.clone(),
            correct: category(&said, &scoring.class(&record.category), !truth.is_empty()).value == Some(1.0),
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

/// An answer to a record that is answered in text: shown and counted, not compared.
fn in_text(subject: &Subject<'_>, answer: Answer) -> Judged {
    let record = subject.record;
    Judged {
        prediction: Prediction {
            id: record.id.clone(),
            image: subject.image.to_owned(),
            size: subject.sizes.original.into(),
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
        look: Look::NotApplicable,
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

    #[test]
    fn reasoning_is_not_looked_at() {
        let text = "<think>nodule [9,9,10,10]</think>[0,0,20,20] mass.";
        let j = judged(&[[0.0, 0.0, 10.0, 10.0]], text, even(text.len()));
        assert_eq!((j.look, j.prediction.iou, j.prediction.boxes.len()), (Look::Unnamed, Some(1.0), 1));
        let text = "<think>mass</think><answer>[0,0,20,20] Nodule.</answer>";
        let j = judged(&[[0.0, 0.0, 10.0, 10.0]], text, even(text.len()));
        assert!(matches!(j.look, Look::Measured(_)) && j.prediction.correct && j.fault == Some(ParseFault::OtherForm));
        for none in ["No finding.", "[]", "<think>A nodule?</think> no findings"] {
            let j = judged(&[], none, None);
            assert!(j.prediction.correct && j.prediction.soft_f1 == 1.0, "{none}");
        }
    }

    #[test]
    fn answers_in_text_are_shown_and_not_compared() {
        let record = serde_json::json!({"id": "a", "task": "vqa", "answer": "MRI", "boxes": []});
        let record: Record = serde_json::from_value(record).unwrap();
        let sizes = Sizes { original: (20, 20), resized: (40, 40) };
        let subject = Subject { record: &record, image: "", sizes: &sizes, boxes: BoxForm::Absolute };
        for text in ["MRI", "no finding", "[1,2,3,4] x"] {
            let answer = Answer { text: text.to_owned(), ..Answer::default() };
            let j = judge(&subject, answer, &Scoring::default());
            assert!(j.is_text() && !j.prediction.correct && j.prediction.boxes.is_empty(), "{text}");
            assert_eq!((j.prediction.reference.as_deref(), j.fault, j.look), (Some("MRI"), None, Look::NotApplicable));
        }
    }
}
