//! Detection of stop strings while a text grows token by token; it works on bytes.

/// Detects when a growing text contains one of several strings. Clone one per text; each token costs time linear in its own bytes (times
/// the number of strings), regardless of the text before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopStrings {
    stops: Vec<Vec<u8>>,
    /// Last bytes of the text in which a match may still start: one fewer than the longest string has.
    tail: Vec<u8>,
}

impl StopStrings {
    /// Creates a detector for `stops`; empty strings are ignored because every text contains them.
    pub fn new<S: AsRef<str>>(stops: impl IntoIterator<Item = S>) -> Self {
        let stops = stops.into_iter().map(|s| s.as_ref().as_bytes().to_vec()).filter(|s| !s.is_empty()).collect();
        Self { stops, tail: Vec::new() }
    }

    /// Returns whether there is no string to detect.
    pub fn is_empty(&self) -> bool {
        self.stops.is_empty()
    }

    /// Appends the bytes of the next token and returns whether they complete a stop string, i.e. whether one ends within them.
    pub fn push(&mut self, piece: &[u8]) -> bool {
        let Some(longest) = self.stops.iter().map(Vec::len).max() else { return false };
        if piece.is_empty() {
            return false;
        }
        let old = self.tail.len();
        self.tail.extend_from_slice(piece);
        let text = &self.tail;
        // A new match ends after `old`, so it starts at most its length minus one before it.
        let ends_in_piece =
            |s: &Vec<u8>| text[(old + 1).saturating_sub(s.len())..].windows(s.len()).any(|w| w == &s[..]);
        let found = self.stops.iter().any(ends_in_piece);
        let spare = self.tail.len().saturating_sub(longest - 1);
        self.tail.drain(..spare);
        found
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hits(stops: &[&str], pieces: &[&[u8]]) -> Vec<bool> {
        let mut s = StopStrings::new(stops);
        pieces.iter().map(|p| s.push(p)).collect()
    }

    #[test]
    fn split_over_tokens() {
        assert_eq!(hits(&["\n\n"], &[b"a", b"\n", b"\n", b"b", b""]), [false, false, true, false, false]);
        assert_eq!(hits(&["abcd"], &[b"xab", b"", b"c", b"dabc", b"d"]), [false, false, false, true, true]);
        assert_eq!(hits(&["END", "."], &[b"a. E", b"N", b"D"]), [true, false, true]);
        assert_eq!(hits(&["aa"], &[b"aaa", b"b", b"a", b"a"]), [true, false, false, true]);
        assert_eq!(hits(&["long one", "x"], &[b"x", b"y", b"long on", b"e"]), [true, false, false, true]);
    }

    #[test]
    fn split_inside_a_character() {
        let euro = "€".as_bytes();
        assert_eq!(hits(&["1€"], &[b"1", &euro[..1], &euro[1..2], &euro[2..]]), [false, false, false, true]);
        assert_eq!(
            hits(&["€é"], &[&euro[..2], &["€é".as_bytes()[2..].to_vec(), b"z".to_vec()].concat()]),
            [false, true]
        );
    }

    #[test]
    fn empty_strings_are_ignored() {
        let mut s = StopStrings::new(["", ""]);
        assert!(s.is_empty() && !s.push(b"abc"));
    }

    proptest! {
        #[test]
        fn equal_to_a_search_of_the_whole_text(
            stops in prop::collection::vec("[ab€]{1,4}", 1..4),
            pieces in prop::collection::vec(prop::collection::vec(prop::sample::select("ab€".as_bytes().to_vec()), 0..6), 0..12),
        ) {
            let mut s = StopStrings::new(&stops);
            let longest = stops.iter().map(String::len).max().unwrap();
            let mut text: Vec<u8> = Vec::new();
            for piece in &pieces {
                let old = text.len();
                text.extend(piece);
                let ends_new = |stop: &String| {
                    (0..text.len()).any(|i| text[i..].starts_with(stop.as_bytes()) && i + stop.len() > old)
                };
                prop_assert_eq!(s.push(piece), stops.iter().any(ends_new));
                prop_assert!(s.tail.len() < longest);
            }
        }
    }
}
