//! Relevance without a judge: compares an answer with the record's reference by text measures, choices or embeddings.

use unveil_config::schema::RelevanceKind;
use unveil_core::{Component, MaskReason, NO_FINDING, Record};

use crate::embed::similarity;
use crate::scoring::{Resources, Scoring};
use crate::text::{bleu::bleu, choice, difflib, overlap};

/// Returns the text that an answer is compared with: the record's answer, else its category, else "no finding" for a grounding record
/// without boxes. `None`: there is nothing to compare with.
pub(crate) fn reference_text(record: &Record) -> Option<&str> {
    let fallback = if record.boxes.is_empty() && !record.is_text() { NO_FINDING } else { "" };
    [record.answer.trim(), record.category.trim(), fallback].into_iter().find(|t| !t.is_empty())
}

/// The reference of a group, prepared once for all answers.
#[derive(Debug)]
pub(crate) struct ReferenceAnswer {
    kind: RelevanceKind,
    text: String,
    options: Vec<String>,
    right: Option<usize>,
    embedded: Result<Vec<f32>, String>,
}

impl ReferenceAnswer {
    /// Prepares the record's [`reference_text`], and its `options` for closed questions.
    pub(crate) fn new(scoring: &Scoring, resources: &Resources, record: &Record) -> Self {
        let relevance = &scoring.reward.relevance;
        let enabled = relevance.weight > 0.0;
        let kind = relevance.kind;
        let text = reference_text(record).unwrap_or_default().to_owned();
        let closed = enabled && matches!(kind, RelevanceKind::Choice | RelevanceKind::Options);
        let options = if closed { options(record) } else { Vec::new() };
        let right = choice::right_option(&text, &options);
        let embedded = match &resources.embedder {
            Some(e) if enabled && kind == RelevanceKind::Embedding => e.embed(&text),
            _ => Err("no embedding model is loaded".to_owned()),
        };
        Self { kind, text, options, right, embedded }
    }

    /// Scores an answer in `[0, 1]`; `None`, a response without an answer, scores 0. Masked if the record has no reference
    /// (`NotApplicable`) or the embedding model failed.
    pub(crate) fn score(&self, answer: Option<&str>, resources: &Resources) -> Component {
        let closed = matches!(self.kind, RelevanceKind::Choice | RelevanceKind::Options);
        if self.text.is_empty() || (closed && self.right.is_none()) {
            return Component::masked(MaskReason::NotApplicable);
        }
        let Some(answer) = answer else {
            return Component::value(0.0).with_detail("no_span", 1.0);
        };
        let (value, version) = match self.kind {
            RelevanceKind::Judge => return Component::masked(MaskReason::Failed("the judge was not asked".to_owned())),
            RelevanceKind::Exact => (overlap::exact(answer, &self.text), "exact-1"),
            RelevanceKind::TokenF1 => (overlap::token_f1(answer, &self.text), "token_f1-1"),
            RelevanceKind::RougeL => (overlap::rouge_l(answer, &self.text), "rouge_l-1"),
            RelevanceKind::Bleu => (bleu(answer, &self.text), "bleu-1"),
            RelevanceKind::Choice => {
                (indicator(choice::chosen_option(answer, &self.options) == self.right), "choice-1")
            }
            RelevanceKind::Options => {
                let best = difflib::most_similar(&self.options, answer);
                let (at, ratio) = best.map_or((None, 0.0), |(at, ratio)| (Some(at), ratio));
                return Component::value(indicator(at == self.right))
                    .with_detail("ratio", ratio)
                    .with_version("options-1");
            }
            RelevanceKind::Embedding => return self.score_embedding(answer, resources),
        };
        Component::value(value).with_version(version)
    }

    fn score_embedding(&self, answer: &str, resources: &Resources) -> Component {
        let failed = |why: &str| Component::masked(MaskReason::Failed(format!("embedding: {why}")));
        match (&self.embedded, &resources.embedder) {
            (Ok(reference), Some(e)) => match e.embed(answer) {
                Ok(v) => Component::value(similarity(&v, reference)).with_version(e.version().to_owned()),
                Err(why) => failed(&why),
            },
            (Err(why), _) => failed(why),
            (Ok(_), None) => failed("no embedding model is loaded"),
        }
    }
}

fn indicator(condition: bool) -> f64 {
    f64::from(u8::from(condition))
}

/// Returns the `options` of a record, given as a list of texts or as letters with texts (`{"A": …}`, in the order of the letters).
fn options(record: &Record) -> Vec<String> {
    let text = |v: &serde_json::Value| v.as_str().map(str::to_owned);
    match record.extra.get("options") {
        Some(serde_json::Value::Array(list)) => list.iter().map(text).collect::<Option<_>>().unwrap_or_default(),
        Some(serde_json::Value::Object(map)) => {
            let mut pairs: Vec<(&String, &serde_json::Value)> = map.iter().collect();
            pairs.sort_by_key(|(letter, _)| *letter);
            pairs.into_iter().map(|(_, v)| text(v)).collect::<Option<_>>().unwrap_or_default()
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(kind: RelevanceKind, record: &str, answers: &[&str]) -> Vec<Option<f64>> {
        let mut s = Scoring::default();
        s.reward.relevance.weight = 1.0;
        s.reward.relevance.kind = kind;
        let record: Record = serde_json::from_str(record).unwrap();
        let none = Resources::default();
        let reference = ReferenceAnswer::new(&s, &none, &record);
        answers.iter().map(|a| reference.score(Some(a), &none).value).collect()
    }

    #[test]
    fn relevance_of_closed_and_open_answers() {
        let closed = r#"{"id":"a","answer":"MRI","options":{"B":"MRI","A":"CT","C":"X-ray"}}"#;
        let c = scores(RelevanceKind::Choice, closed, &["B", "(b)", "MRI", "A", "A or B", ""]);
        assert_eq!(c, [Some(1.0), Some(1.0), Some(1.0), Some(0.0), Some(0.0), Some(0.0)]);
        let listed = r#"{"id":"a","answer":"B","options":["CT","MRI","X-ray"]}"#;
        assert_eq!(scores(RelevanceKind::Options, listed, &["an MRI scan", "a CT"]), [Some(1.0), Some(0.0)]);
        assert_eq!(scores(RelevanceKind::Choice, r#"{"id":"a","answer":"B"}"#, &["B"]), [None], "no options");
        let open = r#"{"id":"a","answer":"The left lung."}"#;
        assert_eq!(scores(RelevanceKind::Exact, open, &["left lung", "right lung"]), [Some(1.0), Some(0.0)]);
        let unnamed = r#"{"id":"a","boxes":[[1,2,3,4]]}"#;
        assert_eq!(scores(RelevanceKind::RougeL, unnamed, &["x"]), [None], "nothing to compare with");
        assert_eq!(scores(RelevanceKind::RougeL, r#"{"id":"a"}"#, &["no finding"]), [Some(1.0)]);
        let unanswered = r#"{"id":"a","task":"vqa"}"#;
        assert_eq!(
            scores(RelevanceKind::RougeL, unanswered, &["no finding"]),
            [None],
            "asked in text, and never answered"
        );
        assert_eq!(scores(RelevanceKind::Embedding, open, &["x"]), [None], "no model");
    }
}
