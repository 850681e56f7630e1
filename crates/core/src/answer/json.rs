//! The JSON that published models write, `[{"bbox_2d": [x1, y1, x2, y2], "label": "…"}]`, in a fenced block or bare among words.
//!
//! A scanner of its own rather than a JSON parser: a list that is cut short or holds a trailing comma keeps its whole objects, numbers
//! are read as in any other form (`NaN`, 400 digits), and the last value of a text is found in one pass. Time is linear.

use super::{Answer, ParseFault, Said, joined, numbers};

const FENCE: &str = "```";

/// Objects within objects that are followed; what lies deeper is no answer.
const DEEPEST: usize = 32;

/// Keys of a box and of a class, the best first.
const BOX_KEYS: [&str; 3] = ["bbox_2d", "bbox", "box"];
const CLASS_KEYS: [&str; 4] = ["label", "category", "class", "name"];

/// What JSON in a text says.
#[derive(Debug, PartialEq)]
pub(super) enum Found<'a> {
    /// Objects that give a box or a class.
    Objects(Objects<'a>),
    /// A list without entries.
    EmptyList {
        /// It stands in a fenced block.
        fenced: bool,
    },
}

/// The objects of one list, or one that stands alone.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Objects<'a> {
    items: Vec<Item<'a>>,
    /// The value ends before it is closed.
    cut: bool,
}

#[derive(Debug, PartialEq)]
struct Item<'a> {
    place: Place,
    class: Option<Said<'a>>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Place {
    Absent,
    Four([f64; 4]),
    /// Something stands where four numbers should.
    Other,
}

impl Objects<'_> {
    /// Boxes, labels and category; `says_nothing` tells a phrase such as "no finding" from a class.
    pub(super) fn answer(&self, says_nothing: impl Fn(&str) -> bool) -> Answer {
        let mut out = Answer { fault: Some(ParseFault::OtherForm), ..Answer::default() };
        let nothing = |i: &&Item<'_>| i.place == Place::Absent && i.class.as_deref().is_some_and(&says_nothing);
        out.no_finding = !self.cut && self.items.iter().all(|i| nothing(&i));
        if self.cut || self.items.iter().any(|i| !matches!(i.place, Place::Four(_)) && !nothing(&i)) {
            out.fault = Some(ParseFault::Bracket);
        }
        for item in &self.items {
            if let Place::Four(four) = item.place {
                out.boxes.push(four);
                out.labels.push(item.class.as_deref().unwrap_or("").trim().to_owned());
            }
        }
        let named = self.items.iter().filter(|i| !nothing(i)).filter_map(|i| i.class.as_deref());
        out.category = joined(named);
        out.words.clone_from(&out.category);
        out
    }
}

/// The last closed fenced block that holds such JSON, else one that is not closed, else the last value that stands bare.
pub(super) fn find(text: &str) -> Option<Found<'_>> {
    if !text.contains(['{', '[']) {
        return None;
    }
    let (closed, open) = blocks(text);
    let fenced = closed.iter().rev().chain(open.as_ref()).find_map(|block| match last_value(block)? {
        Found::EmptyList { .. } => Some(Found::EmptyList { fenced: true }),
        objects => Some(objects),
    });
    fenced.or_else(|| last_value(text))
}

/// The fenced blocks of a text, and what stands behind an opening that is not closed. A block is also closed by the opening of the
/// next one, which names a language.
fn blocks(text: &str) -> (Vec<&str>, Option<&str>) {
    let (mut closed, mut open) = (Vec::new(), None);
    for (at, _) in text.match_indices(FENCE) {
        let behind = at + FENCE.len();
        let word = text[behind..].bytes().take_while(|b| b.is_ascii_alphanumeric()).count();
        if let Some(from) = open {
            closed.push(&text[from..at]);
        }
        open = if open.is_none() || word > 0 { Some(behind + word) } else { None };
    }
    (closed, open.map(|from| &text[from..]))
}

/// The last value in `text` that holds objects; neighbours that only commas and blanks part are one list without brackets. An empty list
/// where there is none.
fn last_value(text: &str) -> Option<Found<'_>> {
    let mut scan = Scan { text, at: 0, items: Vec::new() };
    let (mut last, mut end, mut alone, mut empty) = (None::<Objects<'_>>, 0, false, false);
    while let Some(start) = text[scan.at..].find(['{', '[']).map(|i| scan.at + i) {
        let is_object = text.as_bytes()[start] == b'{';
        scan.at = start + 1;
        let whole = if is_object {
            scan.object(0, true)
        } else {
            match scan.peek() {
                Some(b']') => {
                    empty = true;
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
        let cut = whole.is_none();
        let between = |c: char| c.is_whitespace() || c == ',';
        match &mut last {
            Some(before) if alone && is_object && text[end..start].chars().all(between) => {
                before.items.extend(items);
                before.cut |= cut;
            }
            _ => last = Some(Objects { items, cut }),
        }
        (end, alone) = (scan.at, is_object);
    }
    last.map(Found::Objects).or_else(|| empty.then_some(Found::EmptyList { fenced: false }))
}

/// Reads values from `at` on. Where one fails, `at` stays at what cannot be read, and the objects that were whole are kept.
struct Scan<'a> {
    text: &'a str,
    at: usize,
    items: Vec<Item<'a>>,
}

impl<'a> Scan<'a> {
    /// The next byte that is not blank.
    fn peek(&mut self) -> Option<u8> {
        let rest = &self.text.as_bytes()[self.at..];
        self.at += rest.iter().take_while(|b| b.is_ascii_whitespace()).count();
        self.text.as_bytes().get(self.at).copied()
    }

    fn take(&mut self, wanted: u8) -> Option<()> {
        (self.peek()? == wanted).then(|| self.at += 1)
    }

    /// Behind a `{`. One that is the value of a key, not `listed`, is part of an answer only with a box.
    fn object(&mut self, depth: usize, listed: bool) -> Option<()> {
        let before = self.items.len();
        let (mut place, mut place_rank) = (Place::Absent, BOX_KEYS.len());
        let (mut class, mut class_rank) = (None, CLASS_KEYS.len());
        let rank = |keys: &[&str], key: &str| keys.iter().position(|k| k.eq_ignore_ascii_case(key));
        while self.peek()? != b'}' {
            let key = self.string()?;
            self.take(b':')?;
            let next = self.peek()?;
            if let Some(r) = rank(&BOX_KEYS, &key).filter(|r| *r < place_rank) {
                (place, place_rank) = (self.place(depth)?, r);
            } else if let Some(r) = rank(&CLASS_KEYS, &key).filter(|r| *r < class_rank && next == b'"') {
                (class, class_rank) = (Some(self.string()?), r);
            } else {
                self.value(depth, false)?;
            }
            match self.peek()? {
                b',' => self.at += 1,
                b'}' => {}
                _ => return None,
            }
        }
        self.at += 1;
        let holds_others = self.items.len() > before;
        if place != Place::Absent || (class.is_some() && listed && !holds_others) {
            self.items.push(Item { place, class });
        }
        Some(())
    }

    /// Four numbers in brackets; an empty list or null is no box.
    fn place(&mut self, depth: usize) -> Option<Place> {
        let from = self.at;
        if self.peek() == Some(b'[') {
            let inner = &self.text[from + 1..];
            let end = inner.find(['[', ']', '{', '}', '"'])?;
            if inner.as_bytes()[end] == b']' {
                self.at = from + 1 + end + 1;
                let inner = &inner[..end];
                return Some(if inner.trim().is_empty() {
                    Place::Absent
                } else {
                    numbers(inner).map_or(Place::Other, Place::Four)
                });
            }
        }
        self.value(depth, false)?;
        Some(if &self.text[from..self.at] == "null" { Place::Absent } else { Place::Other })
    }

    /// At a `[`, or behind it.
    fn list(&mut self, depth: usize) -> Option<()> {
        while self.peek()? != b']' {
            self.value(depth, true)?;
            match self.peek()? {
                b',' => self.at += 1,
                b']' => {}
                _ => return None,
            }
        }
        self.at += 1;
        Some(())
    }

    fn value(&mut self, depth: usize, listed: bool) -> Option<()> {
        let next = self.peek()?;
        if matches!(next, b'{' | b'[') && depth >= DEEPEST {
            return None;
        }
        match next {
            b'{' => {
                self.at += 1;
                self.object(depth + 1, listed)
            }
            b'[' => {
                self.at += 1;
                self.list(depth + 1)
            }
            b'"' => self.string().map(drop),
            _ => {
                let rest = &self.text.as_bytes()[self.at..];
                let word = |b: &&u8| b.is_ascii_alphanumeric() || matches!(**b, b'+' | b'-' | b'.');
                let length = rest.iter().take_while(word).count();
                self.at += length;
                (length > 0).then_some(())
            }
        }
    }

    /// A quoted text. One that holds a line break is none: its end is missing.
    fn string(&mut self) -> Option<Said<'a>> {
        self.take(b'"')?;
        let from = self.at;
        let mut escaped = false;
        loop {
            let rest = &self.text.as_bytes()[self.at..];
            self.at += rest.iter().position(|b| matches!(b, b'"' | b'\\') || *b < b' ').unwrap_or(rest.len());
            match self.text.as_bytes().get(self.at)? {
                b'"' => break,
                b'\\' => {
                    escaped = true;
                    self.at += 1;
                    // One character, whatever it is: the next round looks at what follows it.
                    self.at += self.text[self.at..].chars().next()?.len_utf8();
                }
                _ => return None,
            }
        }
        let inner = &self.text[from..self.at];
        self.at += 1;
        Some(if escaped {
            let quoted = &self.text[from - 1..self.at];
            serde_json::from_str::<String>(quoted).map_or(Said::Borrowed(inner), Said::Owned)
        } else {
            Said::Borrowed(inner)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Option<Answer> {
        match find(text)? {
            Found::Objects(o) => Some(o.answer(|t| t == "no finding")),
            Found::EmptyList { .. } => Some(Answer { no_finding: true, ..Answer::default() }),
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
    fn what_is_cut_keeps_its_whole_objects() {
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
    fn what_is_no_box_is_a_fault_and_takes_no_label() {
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
    fn nothing_is_there() {
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
    fn other_texts_are_left_alone() {
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
            assert_eq!(find(text), None, "{text}");
        }
    }
}
