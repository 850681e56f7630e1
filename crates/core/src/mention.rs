//! Mentions of the abnormal class in an answer: the first case-insensitive match on characters, and the tokens that overlap it.
//! Rewards, gradients, evaluation and pages all use this search.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::answer::{AnswerReader, fold_class_name};
use crate::record::Record;

/// The names of each class, and the reader of the answers that may mention one.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MentionFinder {
    /// Reader of answers.
    pub reader: AnswerReader,
    /// Synonyms of each category that count as the same class.
    pub synonyms: BTreeMap<String, Vec<String>>,
}

impl MentionFinder {
    /// Finds the first mention of the record's class in a response, in bytes; `None` if the answer does not name it or the record is
    /// answered in text.
    pub fn find(&self, record: &Record, text: &str) -> Option<Range<usize>> {
        find_class_mention(&self.reader, &self.synonyms, record, text)
    }
}

/// Finds the first mention of the class of `record`, see [`MentionFinder::find`].
pub fn find_class_mention(
    reader: &AnswerReader,
    synonyms: &BTreeMap<String, Vec<String>>,
    record: &Record,
    text: &str,
) -> Option<Range<usize>> {
    if record.is_text() { None } else { find_mention(reader, text, &class_names(&record.category, synonyms)) }
}

/// Returns `category` and its synonyms; the lookup folds names as comparisons do.
pub fn class_names(category: &str, synonyms: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    let wanted = fold_class_name(category);
    let same = synonyms.iter().filter(|(k, _)| fold_class_name(k) == wanted).flat_map(|(_, v)| v.iter().cloned());
    std::iter::once(category.to_owned()).chain(same).collect()
}

/// Finds the first mention of one of `names` in the answer of `text`; text outside the answer, such as reasoning, is not searched.
/// Returns bytes counted from the beginning of `text`, as token spans are.
pub fn find_mention(reader: &AnswerReader, text: &str, names: &[String]) -> Option<Range<usize>> {
    let span = reader.span(text)?;
    let mention = first_mention(&text[span.clone()], names)?;
    Some(span.start + mention.start..span.start + mention.end)
}

/// Finds the first (leftmost, then longest) case-insensitive match of one of `names` in `text`, in bytes. Blank names never match.
///
/// Case is folded character by character (Unicode lower case); a match is on characters, not on words.
fn first_mention(text: &str, names: &[String]) -> Option<Range<usize>> {
    let folded: String = text.chars().flat_map(char::to_lowercase).collect();
    let found = names
        .iter()
        .map(|n| n.trim().chars().flat_map(char::to_lowercase).collect::<String>())
        .filter(|n| !n.is_empty())
        .filter_map(|n| folded.find(&n).map(|at| at..at + n.len()))
        .min_by_key(|r| (r.start, std::cmp::Reverse(r.end)))?;
    // Maps folded bytes back to bytes of `text`: a character counts whole if the match touches any of its folded form.
    let mut begin = None;
    let mut end = 0;
    let mut at = 0;
    for (byte, c) in text.char_indices() {
        let next = at + c.to_lowercase().map(char::len_utf8).sum::<usize>();
        if next > found.start && at < found.end {
            begin = begin.or(Some(byte));
            end = byte + c.len_utf8();
        }
        at = next;
    }
    begin.map(|b| b..end)
}

/// Returns the indices of the tokens whose byte span overlaps `mention`; tokens with an empty span (special tokens) never do.
pub fn overlapping_tokens(mention: &Range<usize>, spans: &[(usize, usize)]) -> Vec<usize> {
    let overlaps = |&(b, e): &(usize, usize)| b < e && b < mention.end && e > mention.start;
    spans.iter().enumerate().filter(|(_, s)| overlaps(s)).map(|(i, _)| i).collect()
}

/// Converts spans in characters of `text` (a tokenizer's offsets) to spans in bytes, clamped to the text.
pub fn byte_spans(text: &str, spans: &[[usize; 2]]) -> Vec<(usize, usize)> {
    let starts: Vec<usize> = text.char_indices().map(|(b, _)| b).chain([text.len()]).collect();
    let byte = |c: usize| starts.get(c).copied().unwrap_or(text.len());
    spans.iter().map(|&[b, e]| (byte(b), byte(e))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(n: &[&str]) -> Vec<String> {
        n.iter().map(|s| (*s).to_owned()).collect()
    }

    #[test]
    fn leftmost_then_longest_name_matches() {
        let n = names(&["nodule", "pulmonary nodule", " "]);
        assert_eq!(first_mention("[1,2,3,4] Nodule, nodule", &n), Some(10..16));
        assert_eq!(first_mention("a PULMONARY NODULE", &n), Some(2..18));
        assert_eq!(first_mention("mass", &n), None);
        assert_eq!(first_mention("", &n), None);
    }

    #[test]
    fn only_the_answer_is_searched() {
        let free = AnswerReader::default();
        let n = names(&["nodule"]);
        for (text, at) in [
            ("a nodule", Some(2)),
            ("<think>nodule</think> a nodule", Some(24)),
            ("<think>nodule</think><answer>é nodule</answer> nodule", Some(32)),
            ("<think>nodule</think> mass", None),
            ("<think>nodule", None),
            ("nodule <answer>mass</answer>", None),
        ] {
            assert_eq!(find_mention(&free, text, &n), at.map(|b| b..b + 6), "{text}");
        }
        let marks = Some(["<box>".to_owned(), "</box>".to_owned()]);
        let strict = AnswerReader::new(marks, &["no finding"], crate::answer::ClassMatch::Equal);
        assert_eq!(find_mention(&strict, "nodule <box>nodule</box>", &n), Some(12..18));
        assert_eq!(find_mention(&strict, "nodule", &n), None);
    }

    #[test]
    fn match_survives_characters_that_grow_when_folded() {
        let n = names(&["höhle"]);
        assert_eq!(first_mention("İİ HÖHLE", &n).map(|r| "İİ HÖHLE"[r].to_owned()), Some("HÖHLE".to_owned()));
    }

    #[test]
    fn character_spans_become_byte_spans() {
        assert_eq!(byte_spans("höhle", &[[0, 2], [2, 5], [5, 9]]), vec![(0, 3), (3, 6), (6, 6)]);
    }

    #[test]
    fn every_touched_token_overlaps() {
        let spans = [(0, 2), (2, 7), (7, 7), (7, 9), (9, 12)];
        assert_eq!(overlapping_tokens(&(3..8), &spans), vec![1, 3]);
    }
}
