//! Faults of the section `[answer]`, and of the span that `[reward.relevance]` names for it.

use unveil_core::ClassMatch;

use crate::schema::Config;

/// Characters that boxes and JSON are written with: a mark made of them would cut them.
const OF_BOXES: &str = "[](){},:\"";

/// Adds every fault to `out`.
pub(super) fn faults(c: &Config, out: &mut Vec<String>) {
    let mut need = |ok: bool, what: String| {
        if !ok {
            out.push(what);
        }
    };
    let (a, marks) = (&c.answer, &c.reward.relevance.span);
    let plain = a.span.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'));
    need(plain, format!("answer.span is `{}`: give the tag's name alone, such as `answer` for <answer>", a.span));
    need(
        !a.span.eq_ignore_ascii_case("think"),
        "answer.span is `think`: what stands there is never read; use another tag, such as `answer`".into(),
    );
    need(
        marks.is_empty() || (marks.len() == 2 && marks.iter().all(|s| !s.trim().is_empty())),
        format!("reward.relevance.span is {marks:?}: give the opening and the closing mark, or nothing"),
    );
    need(
        !marks.iter().any(|m| !m.trim().is_empty() && m.trim().chars().all(|c| OF_BOXES.contains(c))),
        format!(
            "reward.relevance.span is {marks:?}: answers give their boxes with these characters; use a tag (answer.span)"
        ),
    );
    let tag = [format!("<{}>", a.span), format!("</{}>", a.span)];
    need(
        a.span.is_empty() || marks.is_empty() || *marks == tag,
        format!(
            "reward.relevance.span is {marks:?} and answer.span is `{}`: both name the same span, so leave one out",
            a.span
        ),
    );
    need(
        a.no_finding.iter().all(|p| !unveil_core::answer::fold(p).is_empty()),
        "answer.no_finding holds a phrase without a word: leave it out".into(),
    );
    need(
        a.matching != ClassMatch::Contains || !c.data.synonyms.is_empty(),
        "answer.match = \"contains\" has to know every class, or an answer could name them all: list them in data.synonyms, with [] \
         where one has no synonym"
            .into(),
    );
}

#[cfg(test)]
mod tests {
    use unveil_core::Reading;

    use super::*;

    #[test]
    fn the_span_and_its_alias() {
        let mut c = Config::default();
        assert_eq!((c.answer_marks(), c.reading()), (None, Reading::default()));
        let tag = || Some(["<box>".to_owned(), "</box>".to_owned()]);
        c.answer.span = "box".into();
        assert_eq!(c.answer_marks(), tag());
        c.reward.relevance.span = tag().unwrap().to_vec();
        assert_eq!(c.answer_marks(), tag());
        let faults = |c: &Config| {
            let mut out = Vec::new();
            super::faults(c, &mut out);
            out.join("\n")
        };
        assert_eq!(faults(&c), "");
        c.answer.span = String::new();
        assert_eq!((c.answer_marks(), faults(&c)), (tag(), String::new()));
        c.answer.span = "answer".into();
        assert!(faults(&c).contains("leave one out"), "{}", faults(&c));
        for (marks, word) in [(vec!["<a>"], "closing"), (vec!["<a>", " "], "closing"), (vec!["[", "]"], "boxes")] {
            let mut c = Config::default();
            c.reward.relevance.span = marks.into_iter().map(str::to_owned).collect();
            assert!(faults(&c).contains(word), "{}", faults(&c));
        }
        for (span, word) in [("<answer>", "name alone"), ("Think", "never read")] {
            let mut c = Config::default();
            c.answer.span = span.into();
            assert!(faults(&c).contains(word), "{}", faults(&c));
        }
    }

    #[test]
    fn it_is_part_of_a_run_as_any_other_section() {
        let load = |sets: &[&str]| {
            let sets: Vec<String> = sets.iter().map(|s| (*s).to_owned()).collect();
            crate::load::load_from(None, std::iter::empty(), &sets).map_err(|e| e.to_string())
        };
        let c = load(&["answer.match=contains", "answer.span=box", "data.synonyms={nodule=[]}"]).unwrap();
        assert_eq!((c.answer.matching, c.answer.span.as_str()), (ClassMatch::Contains, "box"));
        assert!(load(&["answer.match=contain"]).unwrap_err().contains("contain"));
        assert!(load(&["answer.span=<a>"]).unwrap_err().contains("answer.span"));
        // What an earlier version wrote has no such keys; a change of one is a change of what is trained.
        let mut before = crate::change::entries(&Config::default());
        before.retain(|(key, _)| !key.starts_with("answer."));
        assert_eq!(crate::change::changes_since(&before, &Config::default()), []);
        let changed = crate::change::changes_since(&before, &c);
        let keys: Vec<&str> = changed.iter().filter(|c| !c.allowed).map(|c| c.key.as_str()).collect();
        assert!(keys.contains(&"answer.match") && keys.contains(&"answer.span"), "{keys:?}");
    }

    #[test]
    fn containing_needs_the_classes() {
        let mut c = Config::default();
        c.answer.matching = ClassMatch::Contains;
        let faults = |c: &Config| {
            let mut out = Vec::new();
            super::faults(c, &mut out);
            out.join("\n")
        };
        assert!(faults(&c).contains("data.synonyms"), "{}", faults(&c));
        c.data.synonyms.insert("nodule".into(), vec![]);
        assert_eq!(faults(&c), "");
        c.answer.no_finding = vec!["all clear".into(), " ** ".into()];
        assert!(faults(&c).contains("answer.no_finding"), "{}", faults(&c));
    }
}
