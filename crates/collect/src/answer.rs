//! Conversion of the model's text to a record's answer: cleaning, and problems that the reviewer should look at.

use serde_json::json;
use unveil_core::record::REGION;
use unveil_core::{BoxForm, Record};
use unveil_preprocess::codec::{Sizes, answer_text, codec};

/// Beginnings of answers that refuse.
const REFUSALS: [&str; 6] = ["i'm sorry", "i am sorry", "i cannot", "i can't", "as an ai", "i'm unable"];

/// Removes code fences, the region placeholder, outer blanks and quotes, and repeated blank lines.
pub(crate) fn clean_answer(text: &str) -> String {
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

/// Returns the problems of a cleaned answer; empty for a good one.
pub(crate) fn find_problems(record: &Record, text: &str, finish: &str) -> Vec<&'static str> {
    let lower = text.to_lowercase();
    let mut out = Vec::new();
    let mut add_if = |condition: bool, problem: &'static str| {
        if condition {
            out.push(problem);
        }
    };
    add_if(text.is_empty(), "is empty");
    add_if(finish == "length", "was truncated at collect.max_tokens");
    add_if(REFUSALS.iter().any(|r| lower.starts_with(r)), "refuses");
    let categories = record.category.split(", ").map(str::to_lowercase).filter(|c| !c.is_empty());
    add_if(!text.is_empty() && categories.into_iter().any(|c| !lower.contains(&c)), "does not name the category");
    add_if(!text.is_empty() && !is_usable_answer(record, text), "contains coordinates or other box marks");
    out
}

/// Returns the record with an answer: the text, followed by the placeholder of boxes and category.
pub(crate) fn with_answer(record: &Record, text: &str) -> Record {
    Record { answer: format!("{text}\n{REGION}"), ..record.clone() }
}

/// Returns whether a model can be trained on the record with this answer, in every box form.
pub(crate) fn is_usable_answer(record: &Record, text: &str) -> bool {
    let record = with_answer(record, text);
    let size = record.image_size.map_or((1000, 1000), |[w, h]| (w, h));
    let sizes = Sizes { original: size, resized: size };
    BoxForm::ALL.into_iter().all(|form| answer_text(codec(form), &record, &sizes).is_ok())
}

/// Returns the record with what was collected: the answer if it is usable, and the key `collect` in any case.
pub(crate) fn collected_record(
    record: &Record,
    texts: [&str; 2],
    key: &str,
    model: &str,
    problems: &[&'static str],
) -> Record {
    let mut out = if !texts[1].is_empty() && is_usable_answer(record, texts[1]) {
        with_answer(record, texts[1])
    } else {
        record.clone()
    };
    let collected = json!({
        "key": key, "model": model, "diagnosis": texts[0], "reflection": texts[1], "faults": problems, "status": "unreviewed",
    });
    out.extra.insert("collect".to_owned(), collected);
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
    fn answers_are_cleaned() {
        assert_eq!(
            clean_answer("```text\n\n\"There is a cyst. <region>\n\n\n\nIt is round.\"\r\n```\n"),
            "There is a cyst.\n\nIt is round."
        );
        assert_eq!(clean_answer(" \n"), "");
    }

    #[test]
    fn problems_are_found_and_bad_answers_are_not_used() {
        let r = record();
        let problems = |text: &str| find_problems(&r, text, "stop");
        assert_eq!(problems("There is a Liver Cyst in segment 4."), Vec::<&str>::new());
        assert_eq!(problems(""), ["is empty"]);
        assert_eq!(problems("I'm sorry, I cannot help."), ["refuses", "does not name the category"]);
        assert_eq!(problems("A liver cyst at [10, 20, 30, 40]."), ["contains coordinates or other box marks"]);
        assert_eq!(
            problems("A liver cyst <|box_start|>(1,2),(3,4)<|box_end|>."),
            ["contains coordinates or other box marks"]
        );
        assert_eq!(find_problems(&r, "A liver cyst", "length"), ["was truncated at collect.max_tokens"]);
        let good = collected_record(&r, ["d", "A liver cyst."], "k", "m", &[]);
        assert_eq!(
            (good.answer.as_str(), &good.extra["collect"]["diagnosis"]),
            ("A liver cyst.\n<region>", &json!("d"))
        );
        let bad = collected_record(&r, ["d", "At [1,2,3,4]."], "k", "m", &["x"]);
        assert_eq!((bad.answer.as_str(), &bad.extra["collect"]["faults"]), ("", &json!(["x"])));
    }
}
