//! Which box of an answer may be matched with which true box when labels count.
//!
//! Must not know: geometry, weights.

use std::collections::{HashMap, HashSet};

use unveil_core::Record;
use unveil_core::answer::fold;
use unveil_data::codec::GroundedAnswer;

/// Which labels of an answer go together with which true boxes.
#[derive(Debug)]
pub struct Labels {
    /// By distinct label of the answer, its category first: whether each true box has that label.
    verdicts: Vec<Vec<bool>>,
    /// Per box of the answer, which of them is its own; 0 where it has none.
    own: Vec<usize>,
}

impl Labels {
    /// The label of a box is its own where it has one: `answer.labels`, `record.labels`. Otherwise it is the category of its side; of the
    /// record's, any part between commas may be meant. `names_of` gives a label's synonyms, itself among them.
    pub fn new(answer: &GroundedAnswer, record: &Record, names_of: impl Fn(&str) -> Vec<String>) -> Self {
        let names = |label: &str| names_of(label).iter().map(|n| fold(n)).filter(|n| !n.is_empty()).collect::<Vec<_>>();
        let whole = std::iter::once(record.category.as_str());
        let of_category: Vec<String> = whole.chain(record.category.split(',')).flat_map(names).collect();
        let of_truth = |at: usize| match record.labels.get(at).filter(|l| !l.trim().is_empty()) {
            Some(label) => names(label),
            None => of_category.clone(),
        };
        let names: Vec<Vec<String>> = (0..record.boxes.len()).map(of_truth).collect();
        let there: HashSet<&str> = names.iter().flatten().map(String::as_str).collect();
        let mut verdicts = vec![verdict(&answer.category, &names, &there)];
        let mut known: HashMap<&str, usize> = HashMap::new();
        let mut number = |label: &str| {
            verdicts.push(verdict(label, &names, &there));
            verdicts.len() - 1
        };
        let own = answer.labels.iter().map(|label| match label.trim() {
            "" => 0,
            label => *known.entry(label).or_insert_with(|| number(label)),
        });
        let own = own.collect();
        Self { verdicts, own }
    }

    /// Whether box `predicted` of the answer is said to hold what true box `truth` holds, both folded. One that is said to
    /// hold several things by commas is said to hold each, if all of them are there: naming every class that exists names none.
    pub fn agree(&self, predicted: usize, truth: usize) -> bool {
        let label = self.own.get(predicted).copied().unwrap_or(0);
        self.verdicts.get(label).and_then(|v| v.get(truth)).is_some_and(|v| *v)
    }
}

/// For each true box whether a label is one of its `names`, or has a part that is, all parts being `there`. Time is linear in the label.
fn verdict(label: &str, names: &[Vec<String>], there: &HashSet<&str>) -> Vec<bool> {
    let whole = fold(label);
    let pieces = || label.split(',').map(fold);
    let several = label.contains(',') && pieces().all(|p| there.contains(p.as_str()));
    let parts: HashSet<String> = if several { pieces().collect() } else { HashSet::new() };
    names.iter().map(|n| n.iter().any(|n| *n == whole || parts.contains(n))).collect()
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
    fn long_labels_cost_what_they_are_long() {
        let (long, truth) = ("cyst, mass,".repeat(50_000) + "cyst", ["cyst", "mass"].repeat(10));
        let said: Vec<&str> = std::iter::repeat_n(long.as_str(), 50).chain(["x"; 1000]).collect();
        let start = std::time::Instant::now();
        let found = agree(&said, &long, &truth, "cyst");
        assert!(found[0].iter().all(|a| *a) && !found[60].contains(&true));
        assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
    }

    #[test]
    fn labels_of_boxes_count_before_categories() {
        let both = agree(&["Cyst.", "**tumour** ", ""], "cyst, tumour", &["cyst", "mass"], "cyst, mass");
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
