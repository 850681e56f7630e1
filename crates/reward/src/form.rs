//! Format and category: is the answer in the form that was asked for, and does it name the right class.

use unveil_core::{BBox, BoxFault, Component, MaskReason};
use unveil_data::codec::GroundedAnswer;

/// 1 when the answer reads without a fault and every box is finite, not inverted and has area; else 0. Range `{0, 1}`.
///
/// A box outside the image is localization's matter. Detail: `boxes`, `faulty`.
pub fn format(answer: &GroundedAnswer) -> Component {
    let faulty = |b: &&BBox| b.fault(f32::INFINITY, f32::INFINITY).is_some_and(|f| f != BoxFault::Outside);
    let faulty = answer.boxes.iter().filter(faulty).count();
    Component::value(f64::from(u8::from(answer.fault.is_none() && faulty == 0)))
        .with("boxes", answer.boxes.len() as f64)
        .with("faulty", faulty as f64)
}

/// 1 when the right class is named: the category after the boxes equals one of `names` (case-insensitive, nothing more and
/// nothing less), or, where nothing is to be found, the text says "no finding". Range `{0, 1}`; masked when a finding is
/// expected but the record names no class.
pub fn category(answer: &GroundedAnswer, names: &[String], finding_expected: bool) -> Component {
    if !finding_expected {
        return Component::value(f64::from(u8::from(answer.no_finding)));
    }
    if names.iter().all(|n| n.trim().is_empty()) {
        return Component::masked(MaskReason::NotApplicable);
    }
    let said = answer.category.to_lowercase();
    let right = !said.is_empty() && names.iter().any(|n| n.trim().to_lowercase() == said);
    Component::value(f64::from(u8::from(right)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use unveil_data::codec::{AbsoluteResized, Sizes, read_answer};

    fn read(text: &str) -> GroundedAnswer {
        read_answer(&AbsoluteResized, text, &Sizes { original: (9, 9), resized: (9, 9) })
    }

    fn form_of(text: &str) -> f64 {
        format(&read(text)).value.unwrap()
    }

    #[test]
    fn forms() {
        assert_eq!(form_of("[1,2,3,4] nodule"), 1.0);
        assert_eq!(form_of("no finding"), 1.0);
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
            assert_eq!(form_of(bad), 0.0, "{bad}");
        }
    }

    #[test]
    fn categories() {
        let names = vec!["Nodule".to_owned(), "lung nodule".to_owned()];
        let c = |t: &str, expected| category(&read(t), &names, expected).value.unwrap();
        assert_eq!(c("[1,2,3,4] nodule", true), 1.0);
        assert_eq!(c("[1,2,3,4] Lung Nodule", true), 1.0);
        assert_eq!(c("[1,2,3,4] nodule nodule", true), 0.0);
        assert_eq!(c("[1,2,3,4]", true), 0.0);
        assert_eq!(c("no finding", true), 0.0);
        assert_eq!(c("no finding", false), 1.0);
        assert_eq!(c("", false), 0.0);
        assert!(category(&read("x"), &[String::new()], true).masked);
    }
}
