//! Sentence BLEU with the tokenisation of WMT's mteval-v13a.

use std::collections::HashMap;
use std::sync::LazyLock;

use regex::Regex;

use super::WORD_LIMIT;

/// Order of the longest n-grams.
const MAX_ORDER: usize = 4;

/// Returns sentence BLEU in `[0, 1]`: 1- to 4-grams (at most the length of the answer), exponential smoothing, brevity penalty, case
/// sensitive. The first 2,048 tokens of either text are compared.
///
/// Source: Papineni et al. 2002; Chen and Cherry 2014, method 3; as `sacrebleu.sentence_bleu` (tokenize 13a, smooth exp,
/// effective order), divided by 100.
pub fn bleu(answer: &str, reference: &str) -> f64 {
    let a = tokens(answer);
    let r = tokens(reference);
    if a.is_empty() {
        return 0.0;
    }
    let mut smooth = 1.0;
    let mut sum = 0.0;
    let mut orders = 0;
    let mut any_match = false;
    for n in 1..=MAX_ORDER.min(a.len()) {
        let total = a.len() + 1 - n;
        let correct = count_matches(&a, &r, n);
        any_match |= correct > 0;
        let precision = if correct > 0 {
            correct as f64 / total as f64
        } else {
            smooth *= 2.0;
            1.0 / (smooth * total as f64)
        };
        sum += precision.ln();
        orders += 1;
    }
    if !any_match {
        return 0.0;
    }
    let brevity = if a.len() < r.len() { (1.0 - r.len() as f64 / a.len() as f64).exp() } else { 1.0 };
    (brevity * (sum / f64::from(orders)).exp()).clamp(0.0, 1.0)
}

/// Counts the n-grams of `a` that also occur in `r`, each at most as often as in `r`.
fn count_matches(a: &[String], r: &[String], n: usize) -> usize {
    let mut left: HashMap<&[String], usize> = HashMap::new();
    for gram in r.windows(n) {
        *left.entry(gram).or_default() += 1;
    }
    let mut same = 0;
    for gram in a.windows(n) {
        if let Some(n) = left.get_mut(gram).filter(|n| **n > 0) {
            *n -= 1;
            same += 1;
        }
    }
    same
}

/// Substitution rules of mteval-v13a in order.
static RULES: LazyLock<Option<[(Regex, &'static str); 4]>> = LazyLock::new(|| {
    let rule = |pattern| Regex::new(pattern).ok();
    Some([
        (rule(r"([\{-~\[-` -\&\(-\+:-@/])")?, " $1 "),
        (rule(r"([^0-9])([\.,])")?, "$1 $2 "),
        (rule(r"([\.,])([^0-9])")?, " $1 $2"),
        (rule(r"([0-9])(-)")?, "$1 $2 "),
    ])
});

fn tokens(text: &str) -> Vec<String> {
    let mut line = text.trim_end().replace("<skipped>", "").replace("-\n", "").replace('\n', " ");
    if line.contains('&') {
        line = line.replace("&quot;", "\"").replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">");
    }
    line = format!(" {line} ");
    for (pattern, replacement) in RULES.iter().flatten() {
        line = pattern.replace_all(&line, *replacement).into_owned();
    }
    line.split_whitespace().take(WORD_LIMIT).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_follow_mteval_v13a() {
        assert!(RULES.is_some());
        assert_eq!(tokens("It's 3.5 mm, (left)-sided."), ["It's", "3.5", "mm", ",", "(", "left", ")", "-sided", "."]);
        assert_eq!(tokens("7-8 &lt; x"), ["7", "-", "8", "<", "x"]);
    }

    #[test]
    fn bleu_reaches_both_ends_of_its_range() {
        assert!((bleu("a nodule in the left lung", "a nodule in the left lung") - 1.0).abs() < 1e-12);
        assert_eq!((bleu("", "x"), bleu("x", ""), bleu("x", "y")), (0.0, 0.0, 0.0));
        assert!(bleu(&"nodule ".repeat(50_000), "a nodule") < 0.01);
    }
}
