//! The answers that stage 1 teaches: the region in the configured form, within the record's own answer and the configured span.

use unveil_core::record::REGION;
use unveil_core::{AnswerForm, AnswerReader, ParseFault, Reasoning, Record};

use super::{BoxCodec, Sizes};
use crate::preprocess_error::PreprocessError;

/// Returns the training answer of a record in the native form, without span and reasoning; see [`training_answer`].
///
/// # Errors
/// See [`training_answer`].
pub fn answer_text(codec: &dyn BoxCodec, record: &Record, sizes: &Sizes) -> Result<String, PreprocessError> {
    training_answer(codec, &AnswerReader::default(), record, sizes)
}

/// Returns the training answer of a record in the form and span that `reader` expects: its boxes in the numbers of the codec, sorted by (x1,
/// y1), and its category, or that there is no finding. If the record's answer contains `<region>`, this text replaces it. A text task is
/// answered verbatim.
///
/// # Errors
/// Returns [`PreprocessError::Record`] for boxes without a category, a category that cannot be parsed back in this form, a box that is
/// invalid for the image, a text task without an answer, a complete answer from which the boxes cannot be parsed back, or one without the
/// required reasoning.
pub fn training_answer(
    codec: &dyn BoxCodec,
    reader: &AnswerReader,
    record: &Record,
    sizes: &Sizes,
) -> Result<String, PreprocessError> {
    let record_error = |what: String| PreprocessError::Record { id: record.id.clone(), what };
    let answer = record.answer.trim();
    let complete = if record.is_text() {
        if answer.is_empty() {
            return Err(record_error("its task is answered in text, but it has no answer".to_owned()));
        }
        reader.enclose(answer.to_owned())
    } else {
        let region = region_text(codec, reader.form(), record, sizes).map_err(record_error)?;
        if answer.contains(REGION) {
            let whole = answer.replacen(REGION, &region, 1);
            // The record's answer may have the span already.
            let has_span = reader.enclose(whole.clone()) == whole;
            let complete = if has_span { whole } else { answer.replacen(REGION, &reader.enclose(region.clone()), 1) };
            let boxes =
                |reader: &AnswerReader, text: &str| reader.read(text, |inside| codec.parse_native(inside)).boxes;
            if boxes(reader, &complete) != boxes(&AnswerReader::default(), &region) || complete.contains(REGION) {
                return Err(record_error(format!("its answer contains more than one {REGION}, or other boxes")));
            }
            complete
        } else {
            reader.enclose(region)
        }
    };
    if reader.reasoning() == Reasoning::Required && reader.reasoning_fault(&complete) == Some(ParseFault::NoReasoning) {
        return Err(record_error(format!(
            "answer.reasoning is \"required\", but its `answer` has no reasoning: write it as <think>…</think> followed by {REGION} (or by \
             the text), or skip stage 1 (sft.steps = 0)"
        )));
    }
    Ok(complete)
}

/// Returns boxes and category of a record in the given form, without a span.
fn region_text(codec: &dyn BoxCodec, form: AnswerForm, record: &Record, sizes: &Sizes) -> Result<String, String> {
    let category = record.category.trim();
    if !record.boxes.is_empty() && category.is_empty() {
        return Err("it has boxes but no category".to_owned());
    }
    let mut boxes = Vec::with_capacity(record.boxes.len());
    for (i, b) in record.boxes.iter().enumerate() {
        if let Some(fault) = b.fault(sizes.original.0 as f32, sizes.original.1 as f32) {
            return Err(format!("box {i} {:?} {fault}", <[f32; 4]>::from(*b)));
        }
        boxes.push(codec.encode(b, sizes));
    }
    boxes.sort_unstable();
    let (text, form_name) = match form {
        AnswerForm::Native => (codec.write(&boxes, category), codec.form().name()),
        AnswerForm::Json => (json_text(codec, &boxes, category), "json"),
    };
    let parsed = AnswerReader::default().with_form(form).read(&text, |inside| codec.parse_native(inside));
    if parsed.boxes.len() != boxes.len() || parsed.fault.is_some() || (!boxes.is_empty() && parsed.category != category)
    {
        return Err(format!("the category {category:?} cannot be distinguished from a box in the form `{form_name}`"));
    }
    Ok(text)
}

/// Writes boxes in code steps as Qwen's published models answer: a fenced list of objects.
fn json_text(codec: &dyn BoxCodec, boxes: &[[i64; 4]], category: &str) -> String {
    if boxes.is_empty() {
        return "```json\n[]\n```".to_owned();
    }
    let label = serde_json::Value::from(category);
    let object = |code: &[i64; 4]| {
        let numbers = code.map(|v| codec.number(v)).join(", ");
        format!("\t{{\"bbox_2d\": [{numbers}], \"label\": {label}}}")
    };
    format!("```json\n[\n{}\n]\n```", boxes.iter().map(object).collect::<Vec<_>>().join(",\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{codec, read_answer};
    use unveil_core::{BoxForm, ClassMatch};

    const SIZES: Sizes = Sizes { original: (640, 480), resized: (128, 96) };

    fn record(more: &str) -> Record {
        let line = format!(
            r#"{{"id":"r7","image":"a.png","category":"polyp","boxes":[[320,100,400,200],[10,5,20,480]]{more}}}"#
        );
        Record::parse(&line).unwrap()
    }

    fn json_reader() -> AnswerReader {
        AnswerReader::default().with_form(AnswerForm::Json)
    }

    fn spanned() -> AnswerReader {
        AnswerReader::new(Some(["<answer>".into(), "</answer>".into()]), &["no finding"], ClassMatch::Equal)
    }

    #[test]
    fn json_answers_meet_their_form() {
        let want = [
            "[2, 1, 4, 96]\u{0}[64, 20, 80, 40]",
            "[16, 10, 31, 1000]\u{0}[500, 208, 625, 417]",
            "[16, 10, 31, 1000]\u{0}[500, 208, 625, 417]",
            "[0.016, 0.01, 0.031, 1.0]\u{0}[0.5, 0.208, 0.625, 0.417]",
        ];
        for (form, want) in BoxForm::ALL.into_iter().zip(want) {
            let (first, second) = want.split_once('\u{0}').unwrap();
            let text = training_answer(codec(form), &json_reader(), &record(""), &SIZES).unwrap();
            assert_eq!(
                text,
                format!(
                    "```json\n[\n\t{{\"bbox_2d\": {first}, \"label\": \"polyp\"}},\n\t{{\"bbox_2d\": {second}, \"label\": \"polyp\"}}\n]\n```"
                )
            );
            let native = answer_text(codec(form), &record(""), &SIZES).unwrap();
            let back = read_answer(codec(form), &json_reader(), &text, &SIZES);
            assert_eq!((back.fault, back.category.as_str()), (None, "polyp"));
            assert_eq!(back.boxes, read_answer(codec(form), &json_reader(), &native, &SIZES).boxes);
            let healthy = Record { boxes: Vec::new(), ..record("") };
            let none = training_answer(codec(form), &json_reader(), &healthy, &SIZES).unwrap();
            let back = read_answer(codec(form), &json_reader(), &none, &SIZES);
            assert!(none == "```json\n[]\n```" && back.no_finding && back.fault.is_none());
            // A class that the native form cannot write.
            let quoted = Record { category: "x \"y\" [1]".into(), ..record("") };
            let text = training_answer(codec(form), &json_reader(), &quoted, &SIZES).unwrap();
            assert_eq!(read_answer(codec(form), &json_reader(), &text, &SIZES).category, "x \"y\" [1]");
        }
    }

    #[test]
    fn answers_stand_in_the_span() {
        let codec = codec(BoxForm::PerMille);
        let region = answer_text(codec, &record(""), &SIZES).unwrap();
        for (more, expected) in [
            ("", "<answer>REGION</answer>"),
            (r#","answer":"ignored""#, "<answer>REGION</answer>"),
            (r#","answer":"A raised lesion. <region>""#, "A raised lesion. <answer>REGION</answer>"),
            (r#","answer":"So: <answer> <region> </answer>""#, "So: <answer> REGION </answer>"),
            (r#","task":"vqa","answer":"yes""#, "<answer>yes</answer>"),
            (r#","task":"vqa","answer":"Hm. <answer>yes</answer>""#, "Hm. <answer>yes</answer>"),
            (r#","task":"vqa","answer":"<think>why</think> yes""#, "<think>why</think><answer>yes</answer>"),
        ] {
            let text = training_answer(codec, &spanned(), &record(more), &SIZES).unwrap();
            assert_eq!(text, expected.replace("REGION", &region), "{more}");
            assert!(spanned().span(&text).is_some());
        }
    }

    #[test]
    fn required_reasoning_comes_from_the_record() {
        let codec = codec(BoxForm::Absolute);
        for reader in [AnswerReader::default(), spanned(), json_reader()] {
            let reader = reader.with_reasoning(Reasoning::Required);
            let thought = record(r#","answer":"<think>A raised lesion.</think><region>""#);
            let text = training_answer(codec, &reader, &thought, &SIZES).unwrap();
            let back = read_answer(codec, &reader, &text, &SIZES);
            assert_eq!((back.boxes.len(), back.fault), (2, None), "{text}");
            for bare in ["", r#","answer":"<think> </think><region>""#, r#","task":"vqa","answer":"yes""#] {
                let e = training_answer(codec, &reader, &record(bare), &SIZES).unwrap_err().to_string();
                assert!(e.contains("record r7") && e.contains("answer.reasoning") && e.contains("<think>"), "{e}");
            }
        }
    }
}
