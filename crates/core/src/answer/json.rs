//! JSON answers as published models write them, `[{"bbox_2d": [x1, y1, x2, y2], "label": "…"}]`, in a fenced block or bare in the text.
//!
//! Uses a custom scanner instead of a JSON parser: a truncated list or one with a trailing comma keeps its complete objects, numbers are
//! read as in the other forms (`NaN`, 400 digits), and the last value of a text is found in one pass, in linear time.

use super::{Answer, JsonText, ParseFault, join_labels, parse_four_numbers};

pub(super) const FENCE: &str = "```";

/// Maximum nesting depth that is parsed; deeper values are not answers.
const MAX_DEPTH: usize = 32;

/// Keys of a box, in order of preference.
pub(super) const BOX_KEYS: [&str; 3] = ["bbox_2d", "bbox", "box"];
/// Keys of a class, in order of preference.
pub(super) const CLASS_KEYS: [&str; 4] = ["label", "category", "class", "name"];

/// JSON answer in a text.
#[derive(Debug, PartialEq)]
pub(super) enum JsonAnswer<'a> {
    /// Objects that give a box or a class.
    Objects(Objects<'a>),
    /// A list without entries.
    EmptyList {
        /// Whether it is in a fenced block.
        fenced: bool,
    },
}

/// Objects of a list, or a single object.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Objects<'a> {
    items: Vec<Item<'a>>,
    /// Whether the value ends before it is closed.
    truncated: bool,
}

#[derive(Debug, PartialEq)]
struct Item<'a> {
    coordinates: Coordinates,
    class: Option<JsonText<'a>>,
}

/// Value of a box key.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Coordinates {
    /// Missing, null or an empty list.
    Absent,
    Four([f64; 4]),
    /// Anything but four numbers.
    Invalid,
}

impl Objects<'_> {
    /// Converts the objects to an answer; `is_no_finding` recognises labels such as "no finding".
    pub(super) fn answer(&self, is_no_finding: impl Fn(&str) -> bool) -> Answer {
        let mut out = Answer { fault: Some(ParseFault::OtherForm), ..Answer::default() };
        let nothing =
            |i: &&Item<'_>| i.coordinates == Coordinates::Absent && i.class.as_deref().is_some_and(&is_no_finding);
        out.no_finding = !self.truncated && self.items.iter().all(|i| nothing(&i));
        if self.truncated || self.items.iter().any(|i| !matches!(i.coordinates, Coordinates::Four(_)) && !nothing(&i)) {
            out.fault = Some(ParseFault::Bracket);
        }
        for item in &self.items {
            if let Coordinates::Four(four) = item.coordinates {
                out.boxes.push(four);
                out.labels.push(item.class.as_deref().unwrap_or("").trim().to_owned());
            }
        }
        let named = self.items.iter().filter(|i| !nothing(i)).filter_map(|i| i.class.as_deref());
        out.category = join_labels(named);
        out.words.clone_from(&out.category);
        out
    }
}

/// Finds the JSON answer of a text: the last closed fenced block that holds one, else an unclosed block, else the last bare value.
pub(super) fn find_json_answer(text: &str) -> Option<JsonAnswer<'_>> {
    if !text.contains(['{', '[']) {
        return None;
    }
    let (closed, open) = fenced_blocks(text);
    let fenced = closed.iter().rev().chain(open.as_ref()).find_map(|block| match last_value(block)? {
        JsonAnswer::EmptyList { .. } => Some(JsonAnswer::EmptyList { fenced: true }),
        objects => Some(objects),
    });
    fenced.or_else(|| last_value(text))
}

/// Returns the closed fenced blocks of a text, and the rest after an unclosed opening. The opening of the next block, which names a
/// language, also closes a block.
fn fenced_blocks(text: &str) -> (Vec<&str>, Option<&str>) {
    let mut closed = Vec::new();
    let mut open = None;
    for (start, _) in text.match_indices(FENCE) {
        let end = start + FENCE.len();
        let language_bytes = text[end..].bytes().take_while(|b| b.is_ascii_alphanumeric()).count();
        if let Some(from) = open {
            closed.push(&text[from..start]);
        }
        open = if open.is_none() || language_bytes > 0 { Some(end + language_bytes) } else { None };
    }
    (closed, open.map(|from| &text[from..]))
}

/// Returns the last value in `text` that holds objects, else an empty list if there is one. Objects separated only by commas and white
/// space count as one list.
fn last_value(text: &str) -> Option<JsonAnswer<'_>> {
    let mut scan = Scanner { text, position: 0, items: Vec::new() };
    let mut last = None::<Objects<'_>>;
    let mut end = 0;
    let mut after_object = false;
    let mut has_empty_list = false;
    while let Some(start) = text[scan.position..].find(['{', '[']).map(|i| scan.position + i) {
        let is_object = text.as_bytes()[start] == b'{';
        scan.position = start + 1;
        let complete = if is_object {
            scan.object(0, true)
        } else {
            match scan.peek() {
                Some(b']') => {
                    has_empty_list = true;
                    continue;
                }
                Some(b'{') => scan.list(0),
                _ => continue,
            }
        };
        let items = std::mem::take(&mut scan.items);
        if items.is_empty() {
            continue;
        }
        let truncated = complete.is_none();
        let is_separator = |c: char| c.is_whitespace() || c == ',';
        match &mut last {
            Some(previous) if after_object && is_object && text[end..start].chars().all(is_separator) => {
                previous.items.extend(items);
                previous.truncated |= truncated;
            }
            _ => last = Some(Objects { items, truncated }),
        }
        end = scan.position;
        after_object = is_object;
    }
    last.map(JsonAnswer::Objects).or_else(|| has_empty_list.then_some(JsonAnswer::EmptyList { fenced: false }))
}

/// Scanner of JSON values. On failure `position` stays at the unreadable byte and the complete objects are kept.
struct Scanner<'a> {
    text: &'a str,
    position: usize,
    items: Vec<Item<'a>>,
}

impl<'a> Scanner<'a> {
    /// Skips white space and returns the next byte without consuming it.
    fn peek(&mut self) -> Option<u8> {
        let rest = &self.text.as_bytes()[self.position..];
        self.position += rest.iter().take_while(|b| b.is_ascii_whitespace()).count();
        self.text.as_bytes().get(self.position).copied()
    }

    /// Consumes the next byte if it is `expected`.
    fn take(&mut self, expected: u8) -> Option<()> {
        (self.peek()? == expected).then(|| self.position += 1)
    }

    /// Parses an object after its `{`. An object that is not `listed` but the value of a key counts only with a box.
    fn object(&mut self, depth: usize, listed: bool) -> Option<()> {
        let before = self.items.len();
        let mut coordinates = Coordinates::Absent;
        let mut box_rank = BOX_KEYS.len();
        let mut class = None;
        let mut class_rank = CLASS_KEYS.len();
        let rank = |keys: &[&str], key: &str| keys.iter().position(|k| k.eq_ignore_ascii_case(key));
        while self.peek()? != b'}' {
            let key = self.string()?;
            self.take(b':')?;
            let next = self.peek()?;
            if let Some(r) = rank(&BOX_KEYS, &key).filter(|r| *r < box_rank) {
                coordinates = self.coordinates(depth)?;
                box_rank = r;
            } else if let Some(r) = rank(&CLASS_KEYS, &key).filter(|r| *r < class_rank && next == b'"') {
                class = Some(self.string()?);
                class_rank = r;
            } else {
                self.value(depth, false)?;
            }
            match self.peek()? {
                b',' => self.position += 1,
                b'}' => {}
                _ => return None,
            }
        }
        self.position += 1;
        let has_inner_items = self.items.len() > before;
        if coordinates != Coordinates::Absent || (class.is_some() && listed && !has_inner_items) {
            self.items.push(Item { coordinates, class });
        }
        Some(())
    }

    /// Parses the value of a box key.
    fn coordinates(&mut self, depth: usize) -> Option<Coordinates> {
        let from = self.position;
        if self.peek() == Some(b'[') {
            let inner = &self.text[from + 1..];
            let end = inner.find(['[', ']', '{', '}', '"'])?;
            if inner.as_bytes()[end] == b']' {
                self.position = from + 1 + end + 1;
                let inner = &inner[..end];
                return Some(if inner.trim().is_empty() {
                    Coordinates::Absent
                } else {
                    parse_four_numbers(inner).map_or(Coordinates::Invalid, Coordinates::Four)
                });
            }
        }
        self.value(depth, false)?;
        Some(if &self.text[from..self.position] == "null" { Coordinates::Absent } else { Coordinates::Invalid })
    }

    /// Parses the elements of a list up to its `]`, with `position` after its `[`. A comma before an object may be missing.
    fn list(&mut self, depth: usize) -> Option<()> {
        while self.peek()? != b']' {
            self.value(depth, true)?;
            match self.peek()? {
                b',' => self.position += 1,
                b']' | b'{' => {}
                _ => return None,
            }
        }
        self.position += 1;
        Some(())
    }

    /// Parses any value.
    fn value(&mut self, depth: usize, listed: bool) -> Option<()> {
        let next = self.peek()?;
        if matches!(next, b'{' | b'[') && depth >= MAX_DEPTH {
            return None;
        }
        match next {
            b'{' => {
                self.position += 1;
                self.object(depth + 1, listed)
            }
            b'[' => {
                self.position += 1;
                self.list(depth + 1)
            }
            b'"' => self.string().map(drop),
            _ => {
                let rest = &self.text.as_bytes()[self.position..];
                let is_literal = |b: &&u8| b.is_ascii_alphanumeric() || matches!(**b, b'+' | b'-' | b'.');
                let length = rest.iter().take_while(is_literal).count();
                self.position += length;
                (length > 0).then_some(())
            }
        }
    }

    /// Parses a string. A control character means that its end is missing.
    fn string(&mut self) -> Option<JsonText<'a>> {
        self.take(b'"')?;
        let from = self.position;
        let mut escaped = false;
        loop {
            let rest = &self.text.as_bytes()[self.position..];
            self.position += rest.iter().position(|b| matches!(b, b'"' | b'\\') || *b < b' ').unwrap_or(rest.len());
            match self.text.as_bytes().get(self.position)? {
                b'"' => break,
                b'\\' => {
                    escaped = true;
                    self.position += 1;
                    // Skips one character of any kind; the rest of an escape such as `\u00e9` needs no special handling.
                    self.position += self.text[self.position..].chars().next()?.len_utf8();
                }
                _ => return None,
            }
        }
        let inner = &self.text[from..self.position];
        self.position += 1;
        Some(if escaped {
            let quoted = &self.text[from - 1..self.position];
            serde_json::from_str::<String>(quoted).map_or(JsonText::Borrowed(inner), JsonText::Owned)
        } else {
            JsonText::Borrowed(inner)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Option<Answer> {
        match find_json_answer(text)? {
            JsonAnswer::Objects(o) => Some(o.answer(|t| t == "no finding")),
            JsonAnswer::EmptyList { .. } => Some(Answer { no_finding: true, ..Answer::default() }),
        }
    }

    #[test]
    fn published_answers() {
        let one = r#"[{"bbox_2d": [10, 20, 30.5, 1e6], "label": "polyp"}]"#;
        for text in [
            one.to_owned(),
            format!("```json\n{one}\n```"),
            format!("```{one}```"),
            format!("Here:\n```json\n{one}"),
            format!("Here, at last: {one} and no more."),
            format!("```json\n[]\n```json\n{one}\n```"),
            format!("```json\n[]\n```\nNo: ```json\n{one}\n```\nThat is {{all}}."),
            one[1..one.len() - 1].into(),
            one.replace("bbox_2d", "bbox").replace("label", "category"),
            one.replace("bbox_2d", "Box").replace("label", "class"),
            one.replace("label", "name"),
            format!(r#"{{"image": {{"name": "x.png"}}, "findings": {one}}}"#),
            one.replace("}]", ",},]"),
            one.replace("\"label\"", "\"name\": \"x\", \"confidence\": 0.5, \"extra\": [[{}], null], \"label\""),
        ] {
            let a = read(&text).unwrap_or_else(|| panic!("{text}"));
            assert_eq!(a.boxes, [[10.0, 20.0, 30.5, 1e6]], "{text}");
            assert_eq!((a.category.as_str(), a.fault), ("polyp", Some(ParseFault::OtherForm)), "{text}");
        }
        let two = r#"[{"bbox_2d":[1,2,3,4],"label":"a"},{"bbox_2d":[9,9,1,1],"label":" b "},{"bbox_2d":[0,0,1,1],"label":"a"}]"#;
        for text in [two.to_owned(), two[1..two.len() - 1].to_owned(), two.replace("},{", "}\n{")[1..].to_owned()] {
            let a = read(&text).unwrap();
            assert_eq!((a.boxes.len(), a.boxes[1], a.category.as_str()), (3, [9.0, 9.0, 1.0, 1.0], "a, b"), "{text}");
            assert_eq!(a.labels, ["a", "b", "a"]);
        }
        let escaped = read(r#"{"bbox":[1,2,3,4],"label":"a \"b\" \u00e9\ud83d\ude00"}"#).unwrap();
        assert_eq!(escaped.category, "a \"b\" é😀");
    }

    #[test]
    fn truncated_lists_keep_their_complete_objects() {
        let whole = r#"[{"bbox_2d":[1,2,3,4],"label":"a"},{"bbox_2d":[5,6,7,8],"label":"b"}]"#;
        for end in 1..whole.len() {
            let text = &whole[..end];
            let boxes = usize::from(end >= 34) + usize::from(end >= 68);
            let a = read(text);
            assert_eq!(a.as_ref().map_or(0, |a| a.boxes.len()), boxes, "{text}");
            if let Some(a) = a {
                assert_eq!((a.fault, a.no_finding), (Some(ParseFault::Bracket), false), "{text}");
            }
        }
    }

    #[test]
    fn invalid_boxes_are_faults_without_a_label() {
        let odd = r#"[{"bbox_2d":[1,2,3],"label":"a"},{"bbox_2d":[1,2,3,4]},{"bbox_2d":[1,2,3,5],"label":"c"}]"#;
        let a = read(odd).unwrap();
        assert_eq!((a.boxes.len(), a.labels.as_slice()), (2, &[String::new(), "c".to_owned()][..]));
        for text in [
            r#"[{"bbox_2d":[1,2,3]}]"#,
            r#"{"bbox":[[1,2,3,4]],"label":"a"}"#,
            r#"{"bbox":"1,2,3,4"}"#,
            r#"{"label":"polyp"}"#,
        ] {
            let a = read(text).unwrap();
            assert_eq!((a.boxes.len(), a.fault, a.no_finding), (0, Some(ParseFault::Bracket), false), "{text}");
        }
        let a = read(r#"{"bbox_2d":[NaN,0,1e400,-Infinity],"label":"a"}"#).unwrap();
        assert!(a.boxes[0][0].is_nan() && a.boxes[0][2] == f64::INFINITY && a.boxes[0][3] == f64::NEG_INFINITY);
    }

    #[test]
    fn no_finding_is_recognised() {
        for text in [
            "[]",
            "```json\n[]\n```",
            "```json [ ] ```",
            "Here:\n```\n[]",
            r#"{"bbox_2d": null, "label": "no finding"}"#,
            r#"[{"bbox_2d": [], "label": "no finding"}]"#,
            r#"{"label": "no finding"}"#,
        ] {
            let a = read(text).unwrap_or_else(|| panic!("{text}"));
            assert!(a.no_finding && a.boxes.is_empty(), "{text}");
        }
        let a = read(r#"[{"label": "no finding"}, {"bbox": [1,2,3,4], "label": "a"}]"#).unwrap();
        assert_eq!((a.no_finding, a.category.as_str()), (false, "a"), "boxes win");
    }

    #[test]
    fn other_texts_are_not_json_answers() {
        for text in [
            "[1,2,3,4] polyp",
            "no finding",
            "",
            "[{",
            "{}",
            "[[1,2,3,4]]",
            "[{\"a\":1}] x",
            "{a}",
            "```json\n[1,2,3,4]```",
        ] {
            assert_eq!(find_json_answer(text), None, "{text}");
        }
    }
}
