//! Checks of the section `[answer]` and of its alias `reward.relevance.span`.

use unveil_core::ClassMatch;

use crate::schema::Config;

/// Characters used by boxes and JSON; marks made of them only would split answers.
const BOX_CHARACTERS: &str = "[](){},:\"";

/// Adds a message to `out` for every problem.
pub(super) fn check(c: &Config, out: &mut Vec<String>) {
    let mut require = |ok: bool, message: String| {
        if !ok {
            out.push(message);
        }
    };
    let a = &c.answer;
    let marks = &c.reward.relevance.span;
    let plain = a.span.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'));
    require(
        plain,
        format!("answer.span is `{}`: give the name of the tag only, such as `answer` for <answer>", a.span),
    );
    require(
        !a.span.eq_ignore_ascii_case("think"),
        "answer.span is `think`: reasoning is never read as an answer; use another tag, such as `answer`".into(),
    );
    require(
        marks.is_empty() || (marks.len() == 2 && marks.iter().all(|s| !s.trim().is_empty())),
        format!("reward.relevance.span is {marks:?}: give the opening and the closing mark, or leave it empty"),
    );
    require(
        !marks.iter().any(|m| !m.trim().is_empty() && m.trim().chars().all(|c| BOX_CHARACTERS.contains(c))),
        format!(
            "reward.relevance.span is {marks:?}: answers write boxes with these characters; use a tag (answer.span)"
        ),
    );
    let tag = [format!("<{}>", a.span), format!("</{}>", a.span)];
    require(
        a.span.is_empty() || marks.is_empty() || *marks == tag,
        format!(
            "reward.relevance.span is {marks:?} and answer.span is `{}`: both define the answer span; remove one",
            a.span
        ),
    );
    require(
        a.no_finding.iter().all(|p| !unveil_core::answer::fold_class_name(p).is_empty()),
        "answer.no_finding contains a phrase without words: remove it".into(),
    );
    require(
        a.matching != ClassMatch::Contains || !c.data.synonyms.is_empty(),
        "answer.match = \"contains\" needs the list of all classes, or an answer could name them all: list them in data.synonyms, \
         with [] for a class without synonyms"
            .into(),
    );
}

#[cfg(test)]
mod tests {
    use unveil_core::AnswerReader;

    use super::*;

    #[test]
    fn the_span_and_its_alias() {
        let mut c = Config::default();
        assert_eq!((c.answer_marks(), c.answer_reader()), (None, AnswerReader::default()));
        let tag = || Some(["<box>".to_owned(), "</box>".to_owned()]);
        c.answer.span = "box".into();
        assert_eq!(c.answer_marks(), tag());
        c.reward.relevance.span = tag().unwrap().to_vec();
        assert_eq!(c.answer_marks(), tag());
        let problems = |c: &Config| {
            let mut out = Vec::new();
            super::check(c, &mut out);
            out.join("\n")
        };
        assert_eq!(problems(&c), "");
        c.answer.span = String::new();
        assert_eq!((c.answer_marks(), problems(&c)), (tag(), String::new()));
        c.answer.span = "answer".into();
        assert!(problems(&c).contains("remove one"), "{}", problems(&c));
        for (marks, word) in [(vec!["<a>"], "closing"), (vec!["<a>", " "], "closing"), (vec!["[", "]"], "boxes")] {
            let mut c = Config::default();
            c.reward.relevance.span = marks.into_iter().map(str::to_owned).collect();
            assert!(problems(&c).contains(word), "{}", problems(&c));
        }
        for (span, word) in [("<answer>", "name of the tag"), ("Think", "never read")] {
            let mut c = Config::default();
            c.answer.span = span.into();
            assert!(problems(&c).contains(word), "{}", problems(&c));
        }
    }

    #[test]
    fn the_section_is_loaded_and_compared_like_others() {
        let load = |sets: &[&str]| {
            let sets: Vec<String> = sets.iter().map(|s| (*s).to_owned()).collect();
            crate::load::load_from(None, std::iter::empty(), &sets).map_err(|e| e.to_string())
        };
        let c = load(&["answer.match=contains", "answer.span=box", "data.synonyms={nodule=[]}"]).unwrap();
        assert_eq!((c.answer.matching, c.answer.span.as_str()), (ClassMatch::Contains, "box"));
        assert!(load(&["answer.match=contain"]).unwrap_err().contains("contain"));
        assert!(load(&["answer.span=<a>"]).unwrap_err().contains("answer.span"));
        // Configurations of versions without these keys count as having the defaults.
        let mut before = crate::change::entries(&Config::default());
        before.retain(|(key, _)| !key.starts_with("answer."));
        assert_eq!(crate::change::changes_since(&before, &Config::default()), []);
        let changed = crate::change::changes_since(&before, &c);
        let keys: Vec<&str> = changed.iter().filter(|c| !c.allowed).map(|c| c.key.as_str()).collect();
        assert!(keys.contains(&"answer.match") && keys.contains(&"answer.span"), "{keys:?}");
    }

    #[test]
    fn auto_is_native_after_stage_1_else_the_published_form() {
        use unveil_core::{AnswerForm, Family};

        use crate::schema::AnswerFormChoice;

        let dir = tempfile::tempdir().unwrap();
        let mut c = Config::default();
        assert_eq!((c.answer.form, c.answer_form()), (AnswerFormChoice::Auto, AnswerForm::Native));
        c.sft.steps = 0;
        for family in Family::ALL {
            c.model.dir = String::new();
            c.model.family = family.name().into();
            assert_eq!(c.answer_form(), family.published_answer_form());
            c.model.dir = dir.path().display().to_string();
            let text = format!(r#"{{"model_type": "{}"}}"#, family.name());
            std::fs::write(dir.path().join("config.json"), text).unwrap();
            assert_eq!(c.answer_reader().form(), family.published_answer_form());
        }
        // A directory that cannot be used is reported where the model is loaded.
        c.model.dir = "/no/such".into();
        assert_eq!(c.answer_form(), AnswerForm::Json);
        for (choice, form) in
            [(AnswerFormChoice::Native, AnswerForm::Native), (AnswerFormChoice::Json, AnswerForm::Json)]
        {
            c.answer.form = choice;
            for steps in [0, 5] {
                c.sft.steps = steps;
                assert_eq!(c.answer_form(), form);
            }
        }
    }

    #[test]
    fn match_contains_needs_the_classes() {
        let mut c = Config::default();
        c.answer.matching = ClassMatch::Contains;
        let problems = |c: &Config| {
            let mut out = Vec::new();
            super::check(c, &mut out);
            out.join("\n")
        };
        assert!(problems(&c).contains("data.synonyms"), "{}", problems(&c));
        c.data.synonyms.insert("nodule".into(), vec![]);
        assert_eq!(problems(&c), "");
        c.answer.no_finding = vec!["all clear".into(), " ** ".into()];
        assert!(problems(&c).contains("answer.no_finding"), "{}", problems(&c));
    }
}
