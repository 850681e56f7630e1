//! Exact match and token F1 (SQuAD), ROUGE-L.

use std::collections::HashMap;

use super::WORD_LIMIT;

/// Normalises a text as SQuAD does: lower case, no ASCII punctuation, no articles, single spaces.
///
/// Source: the official evaluation script of SQuAD v1.1 (Rajpurkar et al., arXiv 1606.05250).
pub fn normalise_text(text: &str) -> String {
    words(text).join(" ")
}

fn words(text: &str) -> Vec<String> {
    let bare: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    bare.split_whitespace().filter(|w| !matches!(*w, "a" | "an" | "the")).map(str::to_owned).collect()
}

/// Returns 1 if both texts are equal after [`normalise_text`], else 0. Range `{0, 1}`.
pub fn exact(answer: &str, reference: &str) -> f64 {
    f64::from(u8::from(normalise_text(answer) == normalise_text(reference)))
}

/// Returns the harmonic mean of the precision and recall of tokens after [`normalise_text`], repeated tokens counted each time.
/// Range `[0, 1]`; two empty texts are equal, one empty text scores 0.
///
/// Source: see [`normalise_text`].
pub fn token_f1(answer: &str, reference: &str) -> f64 {
    let a = words(answer);
    let r = words(reference);
    if a.is_empty() || r.is_empty() {
        return f64::from(u8::from(a.is_empty() && r.is_empty()));
    }
    let mut left: HashMap<&str, usize> = HashMap::new();
    for w in &r {
        *left.entry(w).or_default() += 1;
    }
    let mut same = 0;
    for w in &a {
        if let Some(n) = left.get_mut(w.as_str()).filter(|n| **n > 0) {
            *n -= 1;
            same += 1;
        }
    }
    f1(same, a.len(), r.len())
}

/// Returns ROUGE-L, the F-measure over the longest common subsequence of words. Range `[0, 1]`. Words are runs of `a-z0-9` in lower
/// case, without stemming; the first 2,048 of either text are compared.
///
/// Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3; equals Google's `rouge_score` with
/// `rougeL` and `use_stemmer=False`.
pub fn rouge_l(answer: &str, reference: &str) -> f64 {
    let split = |t: &str| -> Vec<String> {
        let lower = t.to_lowercase();
        let runs = lower.split(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit()));
        runs.filter(|w| !w.is_empty()).take(WORD_LIMIT).map(str::to_owned).collect()
    };
    let a = split(answer);
    let r = split(reference);
    f1(common_subsequence(&a, &r), a.len(), r.len())
}

/// Returns the length of the longest common subsequence; words are numbered first, so that integers are compared.
fn common_subsequence(a: &[String], b: &[String]) -> usize {
    let mut ids: HashMap<&str, u32> = HashMap::new();
    let mut numbers = Vec::with_capacity(a.len() + b.len());
    for word in a.iter().chain(b) {
        let next = ids.len() as u32;
        numbers.push(*ids.entry(word).or_insert(next));
    }
    let (a, b) = numbers.split_at(a.len());
    let mut row = vec![0_usize; b.len() + 1];
    for x in a {
        let mut diagonal = 0;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if x == y { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    row[b.len()]
}

fn f1(same: usize, a: usize, b: usize) -> f64 {
    if same == 0 {
        return 0.0;
    }
    let precision = same as f64 / a as f64;
    let recall = same as f64 / b as f64;
    2.0 * precision * recall / (precision + recall)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlap_measures_by_hand() {
        assert_eq!(exact("The  Nodule.", "nodule"), 1.0);
        assert_eq!(exact("a nodule", "mass"), 0.0);
        assert!((token_f1("left lung nodule", "nodule in the left lung") - 6.0 / 7.0).abs() < 1e-12);
        assert_eq!((token_f1("", ""), token_f1("x", ""), token_f1("", "x")), (1.0, 0.0, 0.0));
        // "the cat" of 3 and 5 words.
        assert!((rouge_l("the cat slept", "the black cat sat down") - 0.5).abs() < 1e-12);
        assert_eq!(rouge_l("", "x"), 0.0);
    }

    #[test]
    fn repetition_lowers_the_score() {
        assert!(token_f1("nodule nodule nodule", "nodule") < token_f1("nodule", "nodule"));
        assert!(rouge_l(&"nodule ".repeat(100_000), "nodule") < 0.01);
    }
}
