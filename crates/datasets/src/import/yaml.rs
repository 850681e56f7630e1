//! Parser for the YAML file that describes a data set. Scalars are kept as written.
//!
//! It is built on the parser's events because the library's loader turns names into numbers (`1e3`, `010`) and copies the value of every
//! alias, so that a few hundred bytes can exhaust the memory. Aliases and nesting deeper than [`MAX_DEPTH`] are errors.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use yaml_rust2::parser::{Event, Parser};
use yaml_rust2::scanner::TScalarStyle;

/// Maximum nesting of lists and maps.
const MAX_DEPTH: usize = 32;

/// A YAML value.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Node {
    /// An empty value, `~` or `null`, unquoted.
    Null,
    /// A scalar as written, without quotes.
    Text(String),
    List(Vec<Self>),
    /// A map; keys that are not scalars are dropped.
    Map(BTreeMap<String, Self>),
}

impl Node {
    /// Returns the value of a key; null if there is none.
    pub(super) fn get(&self, key: &str) -> &Self {
        let Self::Map(map) = self else { return &Self::Null };
        map.get(key).unwrap_or(&Self::Null)
    }

    /// Returns the trimmed text; `None` for lists, maps, null and blank text.
    pub(super) fn word(&self) -> Option<&str> {
        let Self::Text(text) = self else { return None };
        Some(text.trim()).filter(|t| !t.is_empty())
    }
}

/// A collection that is being parsed: a list, or a map with the key whose value comes next.
enum OpenNode {
    List(Vec<Node>),
    Map(BTreeMap<String, Node>, Option<Node>),
}

/// Parses the first document of a text; null if it is empty.
///
/// # Errors
/// Returns a message that says what is wrong, with the line.
pub(super) fn parse(text: &str) -> Result<Node, String> {
    let mut parser = Parser::new_from_str(text);
    let mut open = Vec::<OpenNode>::new();
    let mut root = Node::Null;
    loop {
        let (event, mark) = parser.next_token().map_err(|e| format!("not YAML: {e}"))?;
        let refuse = |what: &str| format!("line {}: {what}", mark.line());
        let node = match event {
            Event::Alias(_) => {
                return Err(refuse("aliases (*name) are not supported: write out the value"));
            }
            Event::Scalar(text, style, ..) => {
                let plain = style == TScalarStyle::Plain && ["", "~", "null", "Null", "NULL"].contains(&text.as_str());
                if plain { Node::Null } else { Node::Text(text) }
            }
            Event::SequenceStart(..) | Event::MappingStart(..) if open.len() == MAX_DEPTH => {
                return Err(refuse("nested too deeply"));
            }
            Event::SequenceStart(..) => {
                open.push(OpenNode::List(Vec::new()));
                continue;
            }
            Event::MappingStart(..) => {
                open.push(OpenNode::Map(BTreeMap::new(), None));
                continue;
            }
            Event::SequenceEnd | Event::MappingEnd => match open.pop() {
                Some(OpenNode::List(list)) => Node::List(list),
                Some(OpenNode::Map(map, _)) => Node::Map(map),
                None => Node::Null,
            },
            Event::StreamEnd | Event::DocumentEnd => return Ok(root),
            Event::Nothing | Event::StreamStart | Event::DocumentStart => continue,
        };
        match open.last_mut() {
            None => root = node,
            Some(OpenNode::List(list)) => list.push(node),
            Some(OpenNode::Map(_, key @ None)) => *key = Some(node),
            Some(OpenNode::Map(map, key)) => {
                if let Some(Node::Text(key)) = key.take() {
                    match map.entry(key) {
                        Entry::Occupied(e) => return Err(refuse(&format!("the key \"{}\" is repeated", e.key()))),
                        Entry::Vacant(e) => e.insert(node),
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
    fn aliases_and_deep_nesting_are_errors() {
        let bomb =
            (1..25).fold("a0: &a0 [x, x]\n".to_owned(), |b, k| format!("{b}a{k}: &a{k} [*a{0}, *a{0}]\n", k - 1));
        let e = parse(&bomb).unwrap_err();
        assert!(e.contains("line 2") && e.contains("aliases"), "{e}");
        for deep in ["- ".repeat(200_000), "[".repeat(200_000), "{a: ".repeat(100_000), "? ".repeat(100_000)] {
            assert!(parse(&deep).is_err());
        }
        assert!(parse("a: 1\na: 2").unwrap_err().contains("repeated"));
        assert!(parse("a: [1").unwrap_err().contains("not YAML"));
    }
}
