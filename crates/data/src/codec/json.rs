//! The JSON that Qwen2.5-VL and Qwen3-VL were published to write, `[{"bbox_2d": [x1, y1, x2, y2], "label": "…"}]`, bare or in a
//! fenced block. Read only: training writes brackets.

use serde::Deserialize;
use unveil_core::{Answer, ParseFault};

use super::joined;

const FENCE: &str = "```";

#[derive(Deserialize)]
struct Item {
    bbox_2d: Vec<f64>,
    label: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Items {
    Many(Vec<Item>),
    One(Item),
}

/// Boxes and labels of such a text; none where it is not one, or holds no object.
pub(super) fn read(text: &str) -> Option<Answer> {
    let items = match serde_json::from_str(block(text)?).ok()? {
        Items::Many(items) => items,
        Items::One(item) => vec![item],
    };
    if items.is_empty() {
        return None;
    }
    let mut out = Answer { fault: Some(ParseFault::OtherForm), ..Answer::default() };
    for item in &items {
        match item.bbox_2d[..] {
            [x1, y1, x2, y2] => {
                out.boxes.push([x1, y1, x2, y2]);
                out.labels.push(item.label.as_deref().unwrap_or("").trim().to_owned());
            }
            _ => out.fault = Some(ParseFault::Bracket),
        }
    }
    out.category = joined(items.iter().filter_map(|i| i.label.as_deref()));
    Some(out)
}

/// The first fenced block, else the whole text where it begins like a list of objects or an object.
fn block(text: &str) -> Option<&str> {
    if let Some((_, inner)) = text.split_once(FENCE) {
        let inner = inner.strip_prefix("json").unwrap_or(inner);
        return Some(inner.split_once(FENCE).map_or(inner, |(block, _)| block));
    }
    let bare = text.trim();
    let object = |t: &str| t.trim_start().starts_with('{');
    (object(bare) || bare.strip_prefix('[').is_some_and(object)).then_some(bare)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_answers() {
        let one = r#"[{"bbox_2d": [10, 20, 30.5, 1e6], "label": "polyp"}]"#;
        for text in [
            one.to_owned(),
            format!("```json\n{one}\n```"),
            format!("Here:\n```json\n{one}"),
            one[1..one.len() - 1].into(),
        ] {
            let a = read(&text).unwrap();
            assert_eq!(a.boxes, [[10.0, 20.0, 30.5, 1e6]]);
            assert_eq!((a.category.as_str(), a.fault), ("polyp", Some(ParseFault::OtherForm)));
        }
        let two = r#"[{"bbox_2d":[1,2,3,4],"label":"a"},{"bbox_2d":[9,9,1,1],"label":" b "},{"bbox_2d":[0,0,1,1],"label":"a"}]"#;
        let a = read(two).unwrap();
        assert_eq!((a.boxes.len(), a.boxes[1], a.category.as_str()), (3, [9.0, 9.0, 1.0, 1.0], "a, b"));
        assert_eq!(a.labels, ["a", "b", "a"]);
        // What is no box takes no label with it.
        let odd = r#"[{"bbox_2d":[1,2,3],"label":"a"},{"bbox_2d":[1,2,3,4]},{"bbox_2d":[1,2,3,5],"label":"c"}]"#;
        let a = read(odd).unwrap();
        assert_eq!((a.boxes.len(), a.labels.as_slice()), (2, &[String::new(), "c".to_owned()][..]));
        assert_eq!(read(r#"[{"bbox_2d":[1,2,3]}]"#).unwrap().fault, Some(ParseFault::Bracket));
    }

    #[test]
    fn other_texts_are_left_alone() {
        for text in [
            "[1,2,3,4] polyp",
            "no finding",
            "",
            "[]",
            "[{",
            r#"[{"bbox_2d":"x"}]"#,
            "```json\n[]```",
            "{}",
            "[{\"a\":1}] x",
        ] {
            assert_eq!(read(text), None, "{text}");
        }
    }
}
