//! The components `format` (the answer is in the requested form) and `category` (it names the right class).

use unveil_core::{BBox, BoxFault, Component, KnownClass, MaskReason, ParseFault};
use unveil_preprocess::codec::GroundedAnswer;

/// Returns 1 if form, span and reasoning are as configured and every box is finite, not inverted and has area, else 0 with the rule that
/// is broken as a remark. Range `{0, 1}`.
///
/// A box outside the image is left to localization. Detail: `boxes`, `faulty`.
pub fn score_format(answer: &GroundedAnswer) -> Component {
    let faulty = |b: &&BBox| b.fault(f32::INFINITY, f32::INFINITY).is_some_and(|f| f != BoxFault::Outside);
    let faulty = answer.boxes.iter().filter(faulty).count();
    let broken = answer.fault.or((faulty > 0).then_some(ParseFault::InvalidBox));
    Component::value(f64::from(u8::from(broken.is_none())))
        .with_remark(broken.map(MaskReason::Form))
        .with_detail("boxes", answer.boxes.len() as f64)
        .with_detail("faulty", faulty as f64)
}

/// Returns 1 if the answer names the right class, as compared by [`KnownClass`], or reports no finding where none is expected, else 0.
/// Range `{0, 1}`; masked if a finding is expected but the record has no class.
pub fn score_category(answer: &GroundedAnswer, class: &KnownClass, finding_expected: bool) -> Component {
    if !finding_expected {
        return Component::value(f64::from(u8::from(answer.no_finding)));
    }
    if class.is_unnamed() {
        return Component::masked(MaskReason::NotApplicable);
    }
    let right = !answer.no_finding && class.is_named(&answer.category, &answer.words);
    Component::value(f64::from(u8::from(right)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use unveil_core::{AnswerReader, ClassMatch};
    use unveil_preprocess::codec::{AbsoluteResized, Sizes, read_answer};

    fn read(text: &str) -> GroundedAnswer {
        read_answer(&AbsoluteResized, &AnswerReader::default(), text, &Sizes { original: (9, 9), resized: (9, 9) })
    }

    fn format_of(text: &str) -> f64 {
        score_format(&read(text)).value.unwrap()
    }

    #[test]
    fn format_of_good_and_bad_answers() {
        assert_eq!(format_of("[1,2,3,4] nodule"), 1.0);
        assert_eq!(format_of("no finding"), 1.0);
        for bad in [
            "",
            "nodule",
            "[1,2,3,4]",
            "[3,4,1,2] nodule",
            "[1,2,1,4] nodule",
            "[nan,2,3,4] nodule",
            "x [1,2,3,4] y",
            r#"[{"bbox_2d":[1,2,3,4],"label":"nodule"}]"#,
        ] {
            assert_eq!(format_of(bad), 0.0, "{bad}");
        }
    }

    #[test]
    fn broken_rule_is_named() {
        for (text, rule) in [
            ("[1,2,3,4] nodule", None),
            ("nodule", Some(ParseFault::NoBox)),
            ("[3,4,1,2] nodule", Some(ParseFault::InvalidBox)),
            ("<think>why</think>[1,2,3,4] nodule", Some(ParseFault::UnwantedReasoning)),
            (r#"[{"bbox_2d":[1,2,3,4],"label":"nodule"}]"#, Some(ParseFault::OtherForm)),
        ] {
            let c = score_format(&read(text));
            assert_eq!((c.value, c.masked), (Some(f64::from(u8::from(rule.is_none()))), false), "{text}");
            assert_eq!(c.reason, rule.map(MaskReason::Form), "{text}");
        }
        let remark = serde_json::to_value(score_format(&read("nodule"))).unwrap()["reason"].clone();
        assert_eq!(remark, serde_json::json!({"form": "no_box"}));
    }

    #[test]
    fn category_of_named_and_missing_classes() {
        let class = KnownClass::new(&["Nodule", "lung nodule"], &[], ClassMatch::Equal);
        let c = |t: &str, expected| score_category(&read(t), &class, expected).value.unwrap();
        assert_eq!(c("[1,2,3,4] nodule", true), 1.0);
        assert_eq!(c("[1,2,3,4] Lung Nodule", true), 1.0);
        assert_eq!(c("[1,2,3,4] **lung  nodule**.", true), 1.0);
        assert_eq!(c("[1,2,3,4] nodule nodule", true), 0.0);
        assert_eq!(c("[1,2,3,4]", true), 0.0);
        assert_eq!(c("no finding", true), 0.0);
        assert_eq!(c("no finding", false), 1.0);
        assert_eq!(c("", false), 0.0);
        assert!(score_category(&read("x"), &KnownClass::new(&[""], &[], ClassMatch::Equal), true).masked);
        let class = KnownClass::new(&["nodule"], &["mass"], ClassMatch::Contains);
        let c = |t: &str| score_category(&read(t), &class, true).value.unwrap();
        assert_eq!(
            (c("A nodule at [1,2,3,4]."), c("[1,2,3,4] a nodule or mass"), c("<think>nodule</think>mass")),
            (1.0, 0.0, 0.0)
        );
        assert_eq!(c(r#"[{"bbox_2d":[1,2,3,4],"label":"a small nodule"}]"#), 1.0);
    }
}
