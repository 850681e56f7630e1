//! Decides which boxes of an answer may be matched with which true boxes when labels count.

use std::collections::{HashMap, HashSet};

use unveil_core::Record;
use unveil_core::answer::fold_class_name;
use unveil_preprocess::codec::GroundedAnswer;

/// Matches between the labels of an answer and the true boxes.
#[derive(Debug)]
pub(crate) struct LabelMatches {
    /// For each distinct label of the answer, its category first: whether each true box has that label.
    matches: Vec<Vec<bool>>,
    /// Index into `matches` for each box of the answer; 0, the category, if the box has no label.
    label_of_box: Vec<usize>,
}

impl LabelMatches {
    /// Compares the labels of the boxes. A box without a label in `answer.labels` or `record.labels` has the category of its side; of the
    /// record's category, any item between commas may match. `names_of` returns a label and its synonyms.
    pub(crate) fn new(answer: &GroundedAnswer, record: &Record, names_of: impl Fn(&str) -> Vec<String>) -> Self {
        let names = |label: &str| {
            names_of(label).iter().map(|n| fold_class_name(n)).filter(|n| !n.is_empty()).collect::<Vec<_>>()
        };
        let whole = std::iter::once(record.category.as_str());
        let category_names: Vec<String> = whole.chain(record.category.split(',')).flat_map(names).collect();
        let names_of_box = |index: usize| match record.labels.get(index).filter(|l| !l.trim().is_empty()) {
            Some(label) => names(label),
            None => category_names.clone(),
        };
        let names: Vec<Vec<String>> = (0..record.boxes.len()).map(names_of_box).collect();
        let present: HashSet<&str> = names.iter().flatten().map(String::as_str).collect();
        let mut matches = vec![match_label(&answer.category, &names, &present)];
        let mut indices: HashMap<&str, usize> = HashMap::new();
        let mut add_label = |label: &str| {
            matches.push(match_label(label, &names, &present));
            matches.len() - 1
        };
        let label_of_box = answer.labels.iter().map(|label| match label.trim() {
            "" => 0,
            label => *indices.entry(label).or_insert_with(|| add_label(label)),
        });
        let label_of_box = label_of_box.collect();
        Self { matches, label_of_box }
    }

    /// Whether box `predicted` of the answer and true box `truth` have the same label after folding. A label with several items between
    /// commas has each of them if all are present in the record: naming every existing class names none.
    pub(crate) fn agree(&self, predicted: usize, truth: usize) -> bool {
        let label = self.label_of_box.get(predicted).copied().unwrap_or(0);
        self.matches.get(label).and_then(|v| v.get(truth)).is_some_and(|v| *v)
    }
}

/// Returns for each true box whether a label, or one of its items if all are `present`, is one of the box's `names`. Time is linear in
/// the length of the label.
fn match_label(label: &str, names: &[Vec<String>], present: &HashSet<&str>) -> Vec<bool> {
    let whole = fold_class_name(label);
    let split = || label.split(',').map(fold_class_name);
    let several = label.contains(',') && split().all(|p| present.contains(p.as_str()));
    let items: HashSet<String> = if several { split().collect() } else { HashSet::new() };
    names.iter().map(|n| n.iter().any(|n| *n == whole || items.contains(n))).collect()
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
        let l = LabelMatches::new(&answer, &record, same);
        (0..said.len().max(1)).map(|p| (0..record.boxes.len()).map(|t| l.agree(p, t)).collect()).collect()
    }

    #[test]
    fn long_labels_take_linear_time() {
        let long = "cyst, mass,".repeat(50_000) + "cyst";
        let truth = ["cyst", "mass"].repeat(10);
        let said: Vec<&str> = std::iter::repeat_n(long.as_str(), 50).chain(["x"; 1000]).collect();
        let start = std::time::Instant::now();
        let found = agree(&said, &long, &truth, "cyst");
        assert!(found[0].iter().all(|a| *a) && !found[60].contains(&true));
        assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
    }

    #[test]
    fn box_labels_take_precedence_over_categories() {
        let both = agree(&["Cyst.", "**tumour** ", ""], "cyst, tumour", &["cyst", "mass"], "cyst, mass");
        assert_eq!(both, [[true, false], [false, true], [true, true]]);
        // A side without labels uses its category, any item of it.
        assert_eq!(agree(&["cyst", "stone"], "", &[], "cyst, mass"), [[true], [false]]);
        assert_eq!(agree(&[], "cyst", &["cyst", "mass"], "x"), [[true, false]]);
        assert_eq!(agree(&[], "Cyst, mass", &["cyst", "mass"], "x"), [[true, true]]);
        // Without labels on either side, categories are compared, whole or by item.
        assert_eq!(agree(&[], "nodule, left", &[], "nodule, left"), [[true]]);
        assert_eq!(agree(&[], "", &["cyst"], "cyst"), [[false]]);
        assert_eq!(agree(&[""], "", &[""], ""), [[false]], "nothing is named");
        // A label names more classes than are present.
        assert_eq!(agree(&["cyst, mass, stone"], "", &["cyst", "mass"], "x"), [[false, false]]);
        assert_eq!(agree(&[], "cyst, stone", &["cyst"], "cyst"), [[false]]);
    }
}
