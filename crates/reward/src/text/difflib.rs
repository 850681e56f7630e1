//! The similarity ratio of Python's `difflib.SequenceMatcher` over characters, and choosing among options by it.
//!
//! Source: Ratcliff and Metzener 1988 ("gestalt pattern matching") as the Python documentation of `difflib` describes it, with its
//! heuristic for popular characters. OmniMedVQA (Hu et al., arXiv 2402.09181) takes the option that is most similar to the answer.

use std::collections::HashMap;

/// Characters of either text that are compared.
const LIMIT: usize = 2048;
/// From this length of the second text on, characters that make up more than 1 % of it are not matched by themselves.
const POPULAR_FROM: usize = 200;

/// `2 * M / T` in `[0, 1]`: M = characters in the matching blocks, T = characters of both; 1 for two empty texts. As
/// `SequenceMatcher(None, a, b).ratio()`. Not symmetric. The first 2,048 characters of either text are compared.
pub fn ratio(a: &str, b: &str) -> f64 {
    let a: Vec<char> = a.chars().take(LIMIT).collect();
    let b: Vec<char> = b.chars().take(LIMIT).collect();
    if a.is_empty() && b.is_empty() {
        return 1.0;
    }
    let places = places(&b);
    let mut matched = 0;
    let mut open = vec![(0, a.len(), 0, b.len())];
    while let Some((a_from, a_to, b_from, b_to)) = open.pop() {
        let (i, j, size) = longest(&a, &b, &places, (a_from, a_to, b_from, b_to));
        if size > 0 {
            matched += size;
            open.push((a_from, i, b_from, j));
            open.push((i + size, a_to, j + size, b_to));
        }
    }
    2.0 * matched as f64 / (a.len() + b.len()) as f64
}

/// Where each character of `b` stands, without the popular ones.
fn places(b: &[char]) -> HashMap<char, Vec<usize>> {
    let mut out: HashMap<char, Vec<usize>> = HashMap::new();
    for (j, c) in b.iter().enumerate() {
        out.entry(*c).or_default().push(j);
    }
    if b.len() >= POPULAR_FROM {
        let most = b.len() / 100 + 1;
        out.retain(|_, at| at.len() <= most);
    }
    out
}

/// The longest block `a[i..i + size] == b[j..j + size]` in the ranges: earliest in `a`, then in `b`; extended over popular
/// characters at both ends.
fn longest(
    a: &[char],
    b: &[char],
    places: &HashMap<char, Vec<usize>>,
    (a_from, a_to, b_from, b_to): (usize, usize, usize, usize),
) -> (usize, usize, usize) {
    let (mut i, mut j, mut size) = (a_from, b_from, 0);
    let mut lengths: HashMap<usize, usize> = HashMap::new();
    for (x, c) in a.iter().enumerate().take(a_to).skip(a_from) {
        let mut next = HashMap::new();
        for &y in places.get(c).into_iter().flatten() {
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

/// Index of the first option whose [`ratio`] to the answer is largest, and that ratio; none without options.
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
    fn by_hand() {
        assert_eq!(ratio("", ""), 1.0);
        assert_eq!(ratio("abcd", "bcde"), 0.75);
        assert_eq!(ratio("abc", "xyz"), 0.0);
        let options = ["CT".to_owned(), "MRI".to_owned(), "X-ray".to_owned()];
        assert_eq!(most_similar(&options, "It is an MRI").map(|(i, _)| i), Some(1));
        assert_eq!(most_similar(&[], "x"), None);
    }

    #[test]
    fn megabytes_stay_quick() {
        let start = std::time::Instant::now();
        let (a, b) = ("ab".repeat(1_000_000), "a".repeat(150));
        assert!((0.0..=1.0).contains(&ratio(&a, &b)) && (0.0..=1.0).contains(&ratio(&b, &a)));
        assert!(start.elapsed().as_secs() < 5);
    }
}
