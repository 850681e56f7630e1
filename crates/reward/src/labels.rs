//! Which box of an answer may be matched with which true box when labels count.
//!
//! Must not know: geometry, weights.

use unveil_core::Record;
use unveil_data::codec::GroundedAnswer;

/// What each side says of its boxes, in lower case.
#[derive(Debug)]
pub struct Labels {
    /// Per box of the answer; none = it has no label of its own.
    said: Vec<Option<Vec<String>>>,
    /// What the answer says of its boxes as a whole.
    category: Vec<String>,
    /// Per true box: its label and what counts as the same.
    names: Vec<Vec<String>>,
}

impl Labels {
    /// The label of a box is its own where it has one: `answer.labels`, `record.labels`. Otherwise it is the category of its side; of the
    /// record's, any part between commas may be meant. `names_of` gives a label's synonyms, itself among them.
    pub fn new(answer: &GroundedAnswer, record: &Record, names_of: impl Fn(&str) -> Vec<String>) -> Self {
        let names =
            |label: &str| names_of(label).iter().map(|n| folded(n)).filter(|n| !n.is_empty()).collect::<Vec<_>>();
        let whole = std::iter::once(record.category.as_str());
        let of_category: Vec<String> = whole.chain(record.category.split(',')).flat_map(names).collect();
        let of_truth = |at: usize| match record.labels.get(at).filter(|l| !l.trim().is_empty()) {
            Some(label) => names(label),
            None => of_category.clone(),
        };
        let names: Vec<Vec<String>> = (0..record.boxes.len()).map(of_truth).collect();
        let own = |label: &String| Some(said(label, &names)).filter(|s| !s.is_empty());
        Self { said: answer.labels.iter().map(own).collect(), category: said(&answer.category, &names), names }
    }

    /// Whether box `predicted` of the answer is said to hold what true box `truth` holds, without regard to case. One that is said to
    /// hold several things by commas is said to hold each, if all of them are there: naming every class that exists names none.
    pub fn agree(&self, predicted: usize, truth: usize) -> bool {
        let said = self.said.get(predicted).and_then(Option::as_ref).unwrap_or(&self.category);
        self.names.get(truth).is_some_and(|names| said.iter().any(|s| names.contains(s)))
    }
}

/// A text, and its parts where it has several and each is the name of a true box.
fn said(text: &str, names: &[Vec<String>]) -> Vec<String> {
    let whole = Some(folded(text)).filter(|t| !t.is_empty());
    let parts: Vec<String> = text.split(',').map(folded).collect();
    let all_there = parts.iter().all(|part| names.iter().any(|n| n.contains(part)));
    let parts = if parts.len() > 1 && all_there { parts } else { Vec::new() };
    whole.into_iter().chain(parts).collect()
}

fn folded(text: &str) -> String {
    text.trim().to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agree(said: &[&str], category: &str, truth: &[&str], whole: &str) -> Vec<Vec<bool>> {
        let boxes = vec![[0, 0, 1, 1]; truth.len().max(1)];
        let record =
            serde_json::json!({"id": "a", "image_size": [9, 9], "category": whole, "labels": truth, "boxes": boxes});
        let record: Record = serde_json::from_value(record).unwrap();
        let labels = said.iter().map(|s| (*s).to_owned()).collect();
        let answer = GroundedAnswer { labels, category: category.to_owned(), ..Default::default() };
        let same = |l: &str| if l == "mass" { vec!["mass".into(), "Tumour".into()] } else { vec![l.to_owned()] };
        let l = Labels::new(&answer, &record, same);
        (0..said.len().max(1)).map(|p| (0..record.boxes.len()).map(|t| l.agree(p, t)).collect()).collect()
    }

    #[test]
    fn labels_of_boxes_count_before_categories() {
        let both = agree(&["Cyst", "tumour ", ""], "cyst, tumour", &["cyst", "mass"], "cyst, mass");
        assert_eq!(both, [[true, false], [false, true], [true, true]]);
        // One side has none: its category stands in, any part of it.
        assert_eq!(agree(&["cyst", "stone"], "", &[], "cyst, mass"), [[true], [false]]);
        assert_eq!(agree(&[], "cyst", &["cyst", "mass"], "x"), [[true, false]]);
        assert_eq!(agree(&[], "Cyst, mass", &["cyst", "mass"], "x"), [[true, true]]);
        // Neither has: categories, whole or in parts.
        assert_eq!(agree(&[], "nodule, left", &[], "nodule, left"), [[true]]);
        assert_eq!(agree(&[], "", &["cyst"], "cyst"), [[false]]);
        assert_eq!(agree(&[""], "", &[""], ""), [[false]], "nothing is named");
        // More is named than is there.
        assert_eq!(agree(&["cyst, mass, stone"], "", &["cyst", "mass"], "x"), [[false, false]]);
        assert_eq!(agree(&[], "cyst, stone", &["cyst"], "cyst"), [[false]]);
    }
}
