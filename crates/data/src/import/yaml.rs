//! Reads the YAML that describes a data set, with every scalar as the text that was written. Knows no format.
//!
//! Written over the parser's events, for the loader of the library makes numbers of names (`1e3`, `010`) and clones what an alias
//! names, so that a few hundred bytes fill the memory. Refused: aliases, nesting beyond [`DEPTH`].

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use yaml_rust2::parser::{Event, Parser};
use yaml_rust2::scanner::TScalarStyle;

/// Deepest nesting.
const DEPTH: usize = 32;

/// A value.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Node {
    /// Nothing, `~` or `null`, unquoted.
    Null,
    /// As written, without quotes.
    Text(String),
    List(Vec<Node>),
    /// Keys that are no scalars are dropped.
    Map(BTreeMap<String, Node>),
}

impl Node {
    /// The value of a key; null where there is none.
    pub(super) fn get(&self, key: &str) -> &Node {
        let Self::Map(map) = self else { return &Self::Null };
        map.get(key).unwrap_or(&Self::Null)
    }

    /// The text, trimmed; none of lists, maps, nothing, and blanks.
    pub(super) fn word(&self) -> Option<&str> {
        let Self::Text(text) = self else { return None };
        Some(text.trim()).filter(|t| !t.is_empty())
    }
}

/// What is being read: a list, or a map with the key that waits for its value.
enum Open {
    List(Vec<Node>),
    Map(BTreeMap<String, Node>, Option<Node>),
}

/// The first document of a text; null where it holds nothing.
///
/// # Errors
/// What is wrong, with the line.
pub(super) fn parse(text: &str) -> Result<Node, String> {
    let mut parser = Parser::new_from_str(text);
    let (mut open, mut root) = (Vec::<Open>::new(), Node::Null);
    loop {
        let (event, mark) = parser.next_token().map_err(|e| format!("not YAML: {e}"))?;
        let refuse = |what: &str| format!("line {}: {what}", mark.line());
        let done = match event {
            Event::Alias(_) => {
                return Err(refuse("aliases (*name) are not read: write the value out"));
            }
            Event::Scalar(text, style, ..) => {
                let plain = style == TScalarStyle::Plain && ["", "~", "null", "Null", "NULL"].contains(&text.as_str());
                if plain { Node::Null } else { Node::Text(text) }
            }
            Event::SequenceStart(..) | Event::MappingStart(..) if open.len() == DEPTH => {
                return Err(refuse("nested too deep"));
            }
            Event::SequenceStart(..) => {
                open.push(Open::List(Vec::new()));
                continue;
            }
            Event::MappingStart(..) => {
                open.push(Open::Map(BTreeMap::new(), None));
                continue;
            }
            Event::SequenceEnd | Event::MappingEnd => match open.pop() {
                Some(Open::List(list)) => Node::List(list),
                Some(Open::Map(map, _)) => Node::Map(map),
                None => Node::Null,
            },
            Event::StreamEnd | Event::DocumentEnd => return Ok(root),
            Event::Nothing | Event::StreamStart | Event::DocumentStart => continue,
        };
        match open.last_mut() {
            None => root = done,
            Some(Open::List(list)) => list.push(done),
            Some(Open::Map(_, key @ None)) => *key = Some(done),
            Some(Open::Map(map, key)) => {
                if let Some(Node::Text(key)) = key.take() {
                    match map.entry(key) {
                        Entry::Occupied(e) => return Err(refuse(&format!("the key \"{}\" is there twice", e.key()))),
                        Entry::Vacant(e) => e.insert(done),
                    };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalars_stay_as_written() {
        let doc = parse("# c\nnames: [3.5, polyp, \"1e3\", 010, yes, ~, 'null', \"\", null]\nnc: 9\n").unwrap();
        let Node::List(names) = doc.get("names") else { panic!("{doc:?}") };
        let words: Vec<_> = names.iter().map(Node::word).collect();
        assert_eq!(
            words,
            [Some("3.5"), Some("polyp"), Some("1e3"), Some("010"), Some("yes"), None, Some("null"), None, None]
        );
        assert_eq!(
            (doc.get("nc").word(), doc.get("gone"), doc.get("nc").get("x")),
            (Some("9"), &Node::Null, &Node::Null)
        );
        let map = parse("names:\n  0: cyst\n  3: &a mass\n? [1, 2]\n: x\n").unwrap();
        assert_eq!((map.get("names").get("3").word(), map.get("names").get("0").word()), (Some("mass"), Some("cyst")));
        assert_eq!(
            (parse(""), parse("# only\n"), parse("a")),
            (Ok(Node::Null), Ok(Node::Null), Ok(Node::Text("a".into())))
        );
    }

    #[test]
    fn what_grows_is_refused() {
        let bomb =
            (1..25).fold("a0: &a0 [x, x]\n".to_owned(), |b, k| format!("{b}a{k}: &a{k} [*a{0}, *a{0}]\n", k - 1));
        let e = parse(&bomb).unwrap_err();
        assert!(e.contains("line 2") && e.contains("aliases"), "{e}");
        for deep in ["- ".repeat(200_000), "[".repeat(200_000), "{a: ".repeat(100_000), "? ".repeat(100_000)] {
            assert!(parse(&deep).is_err());
        }
        assert!(parse("a: 1\na: 2").unwrap_err().contains("twice"));
        assert!(parse("a: [1").unwrap_err().contains("not YAML"));
    }
}
