//! Records of every importer can be written as training answers and read back in every box form.

use unveil_core::BoxForm;
use unveil_preprocess::codec::{Sizes, answer_text, codec, read_answer};

use super::{Format, ImportOptions, fixtures};

#[test]
fn records_of_every_format_round_trip_as_answers() {
    for format in Format::ALL {
        let (_, records) = fixtures::dataset(format).import(format, &ImportOptions::default());
        for r in records.values() {
            let [w, h] = r.image_size.unwrap();
            let sizes = Sizes { original: (w, h), resized: (280, 140) };
            for form in BoxForm::ALL {
                let text = answer_text(codec(form), r, &sizes).unwrap();
                if r.is_text() {
                    assert_eq!(text, r.answer);
                    continue;
                }
                let back = read_answer(codec(form), &unveil_core::AnswerReader::default(), &text, &sizes);
                assert_eq!((back.boxes.len(), back.fault), (r.boxes.len(), None), "{}: {text}", format.name());
                assert!(r.boxes.is_empty() || back.category == r.category, "{text}");
            }
        }
    }
}
