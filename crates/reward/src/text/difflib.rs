//! The similarity ratio of Python's `difflib.SequenceMatcher` over characters, and the choice among options by it.
//!
//! Source: Ratcliff and Metzener 1988 ("gestalt pattern matching") as described by the Python documentation of `difflib`, with its
//! heuristic for popular characters. OmniMedVQA (Hu et al., arXiv 2402.09181) chooses the option most similar to the answer.

use std::collections::HashMap;

/// Characters of either text that are compared.
const CHARACTER_LIMIT: usize = 2048;
/// Length of the second text from which characters that make up more than 1 % of it do not start a match.
const POPULAR_FROM: usize = 200;

/// Returns `2 * M / T` in `[0, 1]`: M = characters in the matching blocks, T = characters of both; 1 for two empty texts. Equals
/// `SequenceMatcher(None, a, b).ratio()`. Not symmetric. The first 2,048 characters of either text are compared.
pub fn ratio(a: &str, b: &str) -> f64 {
    let a: Vec<char> = a.chars().take(CHARACTER_LIMIT).collect();
    let b: Vec<char> = b.chars().take(CHARACTER_LIMIT).collect();
    if a.is_empty() && b.is_empty() {
        return 1.0;
    }
    let positions = positions_by_char(&b);
    let mut matched = 0;
    let mut pending = vec![(0, a.len(), 0, b.len())];
    while let Some((a_from, a_to, b_from, b_to)) = pending.pop() {
        let (i, j, size) = longest_match(&a, &b, &positions, (a_from, a_to, b_from, b_to));
        if size > 0 {
            matched += size;
            pending.push((a_from, i, b_from, j));
            pending.push((i + size, a_to, j + size, b_to));
        }
    }
    2.0 * matched as f64 / (a.len() + b.len()) as f64
}

/// Returns the positions of each character in `b`, without the popular characters.
fn positions_by_char(b: &[char]) -> HashMap<char, Vec<usize>> {
    let mut out: HashMap<char, Vec<usize>> = HashMap::new();
    for (j, c) in b.iter().enumerate() {
        out.entry(*c).or_default().push(j);
    }
    if b.len() >= POPULAR_FROM {
        let most = b.len() / 100 + 1;
        out.retain(|_, positions| positions.len() <= most);
    }
    out
}

/// Returns `(i, j, size)` of the longest block `a[i..i + size] == b[j..j + size]` in the ranges: earliest in `a`, then in `b`; extended
/// over popular characters at both ends.
fn longest_match(
    a: &[char],
    b: &[char],
    positions: &HashMap<char, Vec<usize>>,
    (a_from, a_to, b_from, b_to): (usize, usize, usize, usize),
) -> (usize, usize, usize) {
    let mut i = a_from;
    let mut j = b_from;
    let mut size = 0;
    let mut lengths: HashMap<usize, usize> = HashMap::new();
    for (x, c) in a.iter().enumerate().take(a_to).skip(a_from) {
        let mut next = HashMap::new();
        for &y in positions.get(c).into_iter().flatten() {
            if y < b_from {
                continue;
            }
            if y >= b_to {
                break;
            }
            let k = y.checked_sub(1).and_then(|y| lengths.get(&y)).copied().unwrap_or(0) + 1;
            next.insert(y, k);
            if k > size {
                (i, j, size) = (x + 1 - k, y + 1 - k, k);
            }
        }
        lengths = next;
    }
    while i > a_from && j > b_from && a[i - 1] == b[j - 1] {
        (i, j, size) = (i - 1, j - 1, size + 1);
    }
    while i + size < a_to && j + size < b_to && a[i + size] == b[j + size] {
        size += 1;
    }
    (i, j, size)
}

/// Returns the index of the first option with the largest [`ratio`] to the answer, and that ratio; `None` without options.
pub fn most_similar(options: &[String], answer: &str) -> Option<(usize, f64)> {
    let mut best: Option<(usize, f64)> = None;
    for (i, option) in options.iter().enumerate() {
        let r = ratio(option, answer);
        if best.is_none_or(|(_, b)| r > b) {
            best = Some((i, r));
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratio_and_most_similar_option_by_hand() {
        assert_eq!(ratio("", ""), 1.0);
        assert_eq!(ratio("abcd", "bcde"), 0.75);
        assert_eq!(ratio("abc", "xyz"), 0.0);
        let options = ["CT".to_owned(), "MRI".to_owned(), "X-ray".to_owned()];
        assert_eq!(most_similar(&options, "It is an MRI").map(|(i, _)| i), Some(1));
        assert_eq!(most_similar(&[], "x"), None);
    }

    #[test]
    fn megabytes_compare_quickly() {
        let start = std::time::Instant::now();
        let a = "ab".repeat(1_000_000);
        let b = "a".repeat(150);
        assert!((0.0..=1.0).contains(&ratio(&a, &b)) && (0.0..=1.0).contains(&ratio(&b, &a)));
        // Comparing every pair of characters takes many minutes.
        assert!(start.elapsed().as_secs() < 60);
    }
}
