//! Reading of answers through a tokenizer and a box codec.

use std::path::Path;

use proptest::prelude::*;
use serde_json::Value;
use unveil_core::mention::{byte_spans, find_mention, overlapping_tokens};
use unveil_core::{AnswerForm, AnswerReader, BoxForm, ClassMatch, InputSettings, Reasoning};
use unveil_preprocess::codec::{Sizes, codec, read_answer};
use unveil_preprocess::preprocessor::Preprocessor;
use unveil_preprocess::tokenizer::Tokenizer;
use unveil_preprocess::tokenizer::tiny::{TinyProcessorSpec, write_tiny};

const SIZES: Sizes = Sizes { original: (640, 480), resized: (128, 96) };

fn spanned() -> AnswerReader {
    AnswerReader::new(Some(["<answer>".to_owned(), "</answer>".to_owned()]), &["no finding"], ClassMatch::Equal)
}

/// Writes a processor directory whose tokenizer has these additional tokens.
fn write_with_tokens(dir: &Path, tokens: &[&str], special: bool) {
    write_tiny(dir, &TinyProcessorSpec::default()).unwrap();
    let path = dir.join("tokenizer.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let size = Tokenizer::load(dir).unwrap().vocab_size();
    let added = json["added_tokens"].as_array_mut().unwrap();
    for (i, token) in tokens.iter().enumerate() {
        let mut entry = added[0].clone();
        entry["id"] = (size + i).into();
        entry["content"] = (*token).into();
        entry["special"] = special.into();
        added.push(entry);
    }
    std::fs::write(path, json.to_string()).unwrap();
}

#[test]
fn tags_may_be_split_within_tokens() {
    let dir = tempfile::tempdir().unwrap();
    // One token holds the end of a tag and the beginning of a box, another one the class and the beginning of a tag.
    write_with_tokens(dir.path(), &["er>[64", "nodule</"], false);
    let settings = InputSettings { reader: spanned(), ..InputSettings::default() };
    let preprocessor = Preprocessor::load_with(dir.path(), &settings).unwrap();
    let tokenizer = preprocessor.tokenizer();
    let text = "A nodule? <answer>[64,24,128,48] nodule</answer> nodule";
    let ids = tokenizer.encode(text).unwrap();
    let decoded = tokenizer.decode_offsets(&ids);
    assert_eq!(decoded.text, text);
    let token = |name: &str| ids.iter().position(|id| *id == tokenizer.id(name).unwrap()).unwrap();
    let answer = preprocessor.read_answer(&spanned(), &decoded.text, &SIZES);
    assert_eq!((answer.boxes, answer.fault), (vec![[320.0, 120.0, 640.0, 240.0].into()], None));
    let mention = find_mention(&spanned(), &decoded.text, &["nodule".to_owned()]).unwrap();
    assert_eq!(&text[mention.clone()], "nodule");
    let named = overlapping_tokens(&mention, &byte_spans(&decoded.text, &decoded.spans));
    assert!(named.contains(&token("nodule</")) && !named.contains(&token("er>[64")), "{named:?}");
    // The class outside of the span does not count.
    assert!(named.iter().all(|t| *t > token("er>[64") && *t <= token("nodule</")), "{named:?}");
}

#[test]
fn tags_that_decoding_drops_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    write_with_tokens(dir.path(), &["</answer>", "<think>"], true);
    let load = |reader: AnswerReader| {
        let settings = InputSettings { reader, ..InputSettings::default() };
        Preprocessor::load_with(dir.path(), &settings).map(|_| ()).map_err(|e| e.to_string())
    };
    let e = load(spanned()).unwrap_err();
    assert!(e.contains("tokenizer.json") && e.contains("</answer>") && e.contains("answer.span"), "{e}");
    let e = load(AnswerReader::default().with_reasoning(Reasoning::Optional)).unwrap_err();
    assert!(e.contains("<think>"), "{e}");
    assert_eq!(load(AnswerReader::default()), Ok(()));
    let other = AnswerReader::new(Some(["<box>".into(), "</box>".into()]), &["no finding"], ClassMatch::Equal);
    assert_eq!(load(other), Ok(()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Two thoughts before the same answer are the same to every reader.
    #[test]
    fn readings_do_not_depend_on_the_thought(
        free in prop::collection::vec("\\PC{0,12}", 0..3),
        pieces in prop::collection::vec(prop::sample::select(vec![
            "<think>", "<answer>", "</answer>", "[1,2,3,4] nodule", "no finding", "[]", "```json\n", "```", "{\"bbox_2d\":[1,2,3,4],",
            "\"label\":\"mass\"}", "\"", "\\", " why ", "é", "(1,2),(3,4)", "<|box_start|>",
        ]), 0..8),
        answer in prop::sample::select(vec![
            "[10,20,30,40] nodule", "```json\n[{\"bbox_2d\":[10,20,30,40],\"label\":\"nodule\"}]\n```", "[]", "no finding",
            "<answer>[10,20,30,40] nodule</answer>", "Text <answer>nodule(1,2),(3,4)</answer> text", "nodule(1,2),(3,4)", "", "nodule",
            "{\"bbox_2d\":[10,20,30,40],\"label\":\"nodule\"} as seen", "<answer>no finding", "```json\n[{\"bbox\":[1,2,3,4]},",
        ]),
    ) {
        let thought = format!("x{}{}", free.concat(), pieces.concat()).replace("</think>", "");
        let thought = format!("<think>{thought}</think>{answer}");
        let plain = format!("<think>why</think>{answer}");
        for form in BoxForm::ALL {
            for reader in [AnswerReader::default(), spanned()] {
                for expected in [AnswerForm::Native, AnswerForm::Json] {
                    for reasoning in [Reasoning::None, Reasoning::Optional, Reasoning::Required] {
                        let reader = reader.clone().with_form(expected).with_reasoning(reasoning);
                        let mut with = read_answer(codec(form), &reader, &thought, &SIZES);
                        let mut without = read_answer(codec(form), &reader, &plain, &SIZES);
                        let shift = |span: Option<std::ops::Range<usize>>, text: &str| span.map(|s| text[s].to_owned());
                        prop_assert_eq!(shift(with.span.take(), &thought), shift(without.span.take(), &plain));
                        prop_assert_eq!(format!("{with:?}"), format!("{without:?}"), "{}", thought);
                        let names = ["nodule".to_owned(), "mass".to_owned()];
                        let mention = |text: &str| find_mention(&reader, text, &names).map(|m| text.len() - m.start);
                        prop_assert_eq!(mention(&thought), mention(&plain));
                    }
                }
            }
        }
    }
}
