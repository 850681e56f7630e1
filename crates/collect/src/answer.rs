//! From what the model said to a record's answer: cleaning, and faults that a person should look at. Pure.

use serde_json::json;
use unveil_core::record::REGION;
use unveil_core::{BoxForm, Record};
use unveil_data::codec::{Sizes, answer_text, codec};

/// Starts of answers that say no.
const REFUSALS: [&str; 6] = ["i'm sorry", "i am sorry", "i cannot", "i can't", "as an ai", "i'm unable"];

/// The text without fences, headings' marks and the placeholder; blanks at the ends and doubled blank lines go.
pub(crate) fn clean(text: &str) -> String {
    let text = text.replace(REGION, "").replace('\r', "");
    let lines = text.lines().filter(|l| !l.trim_start().starts_with("```")).map(str::trim_end);
    let mut out: Vec<&str> = Vec::new();
    for line in lines {
        if !(line.is_empty() && out.last().is_none_or(|l| l.is_empty())) {
            out.push(line);
        }
    }
    out.join("\n").trim().trim_matches('"').trim().to_owned()
}

/// What is wrong with a cleaned answer; nothing for a good one.
pub(crate) fn faults(record: &Record, text: &str, finish: &str) -> Vec<&'static str> {
    let lower = text.to_lowercase();
    let mut out = Vec::new();
    let mut note = |is: bool, what: &'static str| {
        if is {
            out.push(what);
        }
    };
    note(text.is_empty(), "is empty");
    note(finish == "length", "was cut off at collect.max_tokens");
    note(REFUSALS.iter().any(|r| lower.starts_with(r)), "refuses");
    let categories = record.category.split(", ").map(str::to_lowercase).filter(|c| !c.is_empty());
    note(!text.is_empty() && categories.into_iter().any(|c| !lower.contains(&c)), "does not name the category");
    note(!text.is_empty() && !usable(record, text), "holds coordinates or other marks of its own");
    out
}

/// The record with an answer: the text, then the place of boxes and category.
pub(crate) fn answered(record: &Record, text: &str) -> Record {
    Record { answer: format!("{text}\n{REGION}"), ..record.clone() }
}

/// Whether a model can be trained on the record with this answer, in every box form.
pub(crate) fn usable(record: &Record, text: &str) -> bool {
    let record = answered(record, text);
    let size = record.image_size.map_or((1000, 1000), |[w, h]| (w, h));
    let sizes = Sizes { original: size, resized: size };
    BoxForm::ALL.into_iter().all(|form| answer_text(codec(form), &record, &sizes).is_ok())
}

/// Writes what was collected into a record: the answer where it is usable, and the key `collect` in any case.
pub(crate) fn fill(record: &Record, texts: [&str; 2], key: &str, model: &str, faults: &[&'static str]) -> Record {
    let mut out =
        if !texts[1].is_empty() && usable(record, texts[1]) { answered(record, texts[1]) } else { record.clone() };
    let about = json!({
        "key": key, "model": model, "diagnosis": texts[0], "reflection": texts[1], "faults": faults, "status": "unreviewed",
    });
    out.extra.insert("collect".to_owned(), about);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        serde_json::from_str(
            r#"{"id":"a","image":"a.png","image_size":[100,80],"category":"liver cyst","boxes":[[10,10,30,40]]}"#,
        )
        .unwrap()
    }

    #[test]
    fn cleaning() {
        assert_eq!(
            clean("```text\n\n\"There is a cyst. <region>\n\n\n\nIt is round.\"\r\n```\n"),
            "There is a cyst.\n\nIt is round."
        );
        assert_eq!(clean(" \n"), "");
    }

    #[test]
    fn faults_are_named_and_bad_answers_do_not_become_targets() {
        let r = record();
        let of = |text: &str| faults(&r, text, "stop");
        assert_eq!(of("There is a Liver Cyst in segment 4."), Vec::<&str>::new());
        assert_eq!(of(""), ["is empty"]);
        assert_eq!(of("I'm sorry, I cannot help."), ["refuses", "does not name the category"]);
        assert_eq!(of("A liver cyst at [10, 20, 30, 40]."), ["holds coordinates or other marks of its own"]);
        assert_eq!(
            of("A liver cyst <|box_start|>(1,2),(3,4)<|box_end|>."),
            ["holds coordinates or other marks of its own"]
        );
        assert_eq!(faults(&r, "A liver cyst", "length"), ["was cut off at collect.max_tokens"]);
        let good = fill(&r, ["d", "A liver cyst."], "k", "m", &[]);
        assert_eq!(
            (good.answer.as_str(), &good.extra["collect"]["diagnosis"]),
            ("A liver cyst.\n<region>", &json!("d"))
        );
        let bad = fill(&r, ["d", "At [1,2,3,4]."], "k", "m", &["x"]);
        assert_eq!((bad.answer.as_str(), &bad.extra["collect"]["faults"]), ("", &json!(["x"])));
    }
}
