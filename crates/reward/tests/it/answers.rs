//! All components read answers alike: formats of published models, reasoning, no-finding phrases; and records answered in text, to which
//! region components do not apply.

use proptest::prelude::*;
use serde_json::{Value, json};
use unveil_config::Config;
use unveil_config::schema::{Gate, RelevanceKind};
use unveil_core::{Attention, BoxForm, Breakdown, Component, MaskReason, Reasoning, Record};
use unveil_preprocess::codec::Sizes;
use unveil_reward::{GroupInput, REGION_COMPONENTS, ResponseInput, Scoring, run_score, score_group};

const SIZES: Sizes = Sizes { original: (640, 480), resized: (640, 480) };

fn group(record: &Value, texts: &[&str]) -> GroupInput {
    let record: Record = serde_json::from_value(record.clone()).unwrap();
    let response = |(index, t): (usize, &&str)| {
        let spans: Vec<(usize, usize)> = t.char_indices().map(|(b, c)| (b, b + c.len_utf8())).collect();
        ResponseInput { index, text: (*t).to_owned(), spans, ..Default::default() }
    };
    GroupInput {
        record,
        sizes: SIZES,
        boxes: BoxForm::Absolute,
        responses: texts.iter().enumerate().map(response).collect(),
    }
}

fn score(c: &Config, record: &Value, texts: &[&str]) -> Vec<Breakdown> {
    score_group(&Scoring::new(c), &group(record, texts))
}

fn lesion() -> Value {
    json!({"id": "r", "image_size": [640, 480], "category": "nodule", "boxes": [[100, 100, 200, 200]]})
}

fn empty() -> Value {
    json!({"id": "e", "image_size": [640, 480], "category": "", "boxes": []})
}

fn question() -> Value {
    json!({"id": "q", "image_size": [640, 480], "task": "vqa", "question": "What modality is used?", "answer": "MRI", "boxes": []})
}

/// Returns the values of localization and category of one response.
fn localization_and_category(record: &Value, text: &str) -> [f64; 2] {
    let b = &score(&Config::default(), record, &[text])[0];
    ["localization", "category"].map(|n| b.components[n].value.unwrap())
}

#[test]
fn answers_of_published_models_are_read() {
    let object = r#"{"bbox_2d": [100, 100, 200, 200], "label": "nodule"}"#;
    let right = [1.0, 1.0];
    let huge = format!("[{},0,5,5] nodule", "9".repeat(400));
    let spray: Vec<String> = (0..96)
        .map(|i| format!("[{0},{1},{2},{3}]", i / 8 * 50, i % 8 * 50, i / 8 * 50 + 100, i % 8 * 50 + 100))
        .collect();
    let spray = format!("{} nodule", spray.join(", "));
    for (name, text, expected) in [
        ("bracket", "[100,100,200,200] nodule".to_owned(), right),
        ("json-fence", format!("```json\n[{object}]\n```"), right),
        ("prose-then-object", format!("The lesion is dense and round, so I locate it here. {object}"), right),
        ("prose-then-list", format!("It is [here]: [{object}]."), right),
        (
            "think-answer-brackets",
            "<think>It may be near [10,10,50,50], but the edge is sharper.</think><answer>[100,100,200,200] nodule</answer>".to_owned(),
            right,
        ),
        ("box in reasoning", "<think>maybe [1,1,5,5]</think><answer>[100,100,200,200] nodule</answer>".to_owned(), right),
        (
            "think-answer-json",
            format!(
                "<think>I would write ```json\n[{{\"bbox_2d\": [1, 1, 9, 9], \"label\": \"mass\"}}]\n``` first, no.</think>\n<answer>\n```json\n[{object}]\n```\n</answer>"
            ),
            right,
        ),
        ("answer-only", "<answer>[100,100,200,200] nodule</answer>".to_owned(), right),
        ("trailing-comma", format!("```json\n[{object},]\n```"), right),
        ("cut short", format!("```json\n[{object}, {{\"bbox_2d\": [1,"), right),
        ("two-fences", format!("```json\n[]\n```\nCorrection:\n```json\n[{object}]\n```"), right),
        ("fence closed by an opening", format!("```json\n[]\n```json\n[{object}]\n```"), right),
        ("caps", "[100,100,200,200] Nodule.".to_owned(), right),
        ("emphasis", "[100,100,200,200] **Nodule**".to_owned(), right),
        ("empty-json", "```json\n[]\n```".to_owned(), [0.0, 0.0]),
        ("huge-int", huge, [0.0, 1.0]),
        ("nan", "[nan,0,5,5] nodule".to_owned(), [0.0, 1.0]),
        ("inverted", "[200,200,100,100] nodule".to_owned(), [0.0, 1.0]),
        ("unclosed think", "<think>[100,100,200,200] nodule".to_owned(), [0.0, 0.0]),
        ("another class", "[100,100,200,200] nodules".to_owned(), [1.0, 0.0]),
    ] {
        assert_eq!(localization_and_category(&lesion(), &text), expected, "{name}: {text}");
    }
    let [many, _] = localization_and_category(&lesion(), &spray);
    let [whole, _] = localization_and_category(&lesion(), "[0,0,640,480] nodule");
    assert!((many - 2.0 / 97.0).abs() < 1e-6 && (whole - 10_000.0 / 307_200.0).abs() < 1e-6, "{many} {whole}");
}

#[test]
fn no_finding_phrases_are_read() {
    let mut c = Config::default();
    c.reward.abstention.weight = 1.0;
    let names = ["localization", "category", "abstention"];
    let nothing = [
        "no finding",
        "No finding.",
        "no findings",
        "**no finding**",
        "[]",
        "```json\n[]\n```",
        "<answer>no finding</answer>",
        "<think>Is that a nodule at [1,1,5,5]? No.</think> no finding",
        "No abnormality is seen.",
        "There are no abnormalities.",
        r#"{"bbox_2d": null, "label": "no finding"}"#,
    ];
    for text in nothing {
        for (record, expected) in [(empty(), 1.0), (lesion(), 0.0)] {
            let b = &score(&c, &record, &[text])[0];
            assert_eq!(names.map(|n| b.components[n].value), [Some(expected); 3], "{text} {record}");
        }
    }
    for text in [
        "",
        " ",
        "nodule",
        "No finding, but [100,100,200,200] nodule",
        "<think>no finding",
        "no finding [",
        "[1,1,5,5]",
    ] {
        let b = &score(&c, &empty(), &[text])[0];
        assert_eq!(names.map(|n| b.components[n].value), [Some(0.0); 3], "{text}");
    }
    // Boxes take precedence over a no-finding phrase.
    assert_eq!(localization_and_category(&lesion(), "No finding, but [100,100,200,200] nodule"), [1.0, 1.0]);
    c.answer.no_finding = vec!["all clear".into()];
    let value = |text: &str| score(&c, &empty(), &[text])[0].components["category"].value;
    assert_eq!((value("All clear."), value("no finding"), value("no abnormality")), (Some(1.0), Some(1.0), Some(0.0)));
}

#[test]
fn span_is_required_if_either_key_names_it() {
    let mut by_tag = Config::default();
    by_tag.answer.span = "box".into();
    let mut by_marks = Config::default();
    by_marks.reward.relevance.span = vec!["<box>".into(), "</box>".into()];
    for c in [by_tag, by_marks] {
        let texts = [
            "[1,1,5,5] mass <box>[100,100,200,200] nodule</box> [1,1,5,5]",
            "[100,100,200,200] nodule",
            "<answer>[100,100,200,200] nodule</answer>",
            "<box>[100,100,200,200] nodule",
        ];
        let b = score(&c, &lesion(), &texts);
        let values = |n: &str| b.iter().map(|b| b.components[n].value.unwrap()).collect::<Vec<_>>();
        for name in ["localization", "category", "format"] {
            assert_eq!(values(name), [1.0, 0.0, 0.0, 0.0], "{name}");
        }
    }
}

/// Training may start from a published model: all components are defined for its own form.
#[test]
fn published_forms_are_usable_from_the_first_step() {
    let mut c = Config::default();
    c.sft.steps = 0;
    c.reward.abstention.weight = 1.0;
    let right = "```json\n[\n\t{\"bbox_2d\": [100, 100, 200, 200], \"label\": \"nodule\"}\n]\n```";
    let wrong = "```json\n[\n\t{\"bbox_2d\": [400, 300, 500, 400], \"label\": \"mass\"}\n]\n```";
    let native = "[100,100,200,200] nodule";
    let prose = "The nodule is at [100, 100, 200, 200].";
    let none = "```json\n[]\n```";
    let mut input = group(&lesion(), &[right, wrong, native, prose, none]);
    for r in &mut input.responses {
        let tokens: Vec<usize> = (0..r.spans.len()).collect();
        r.attention = Some(Attention { grid: [2, 2], rows: vec![vec![0.7, 0.1, 0.1, 0.1]; tokens.len()], tokens });
    }
    let b = score_group(&Scoring::new(&c), &input);
    let values = |name: &str| b.iter().map(|b| b.components[name].value.unwrap()).collect::<Vec<_>>();
    assert_eq!(values("format"), [1.0, 1.0, 0.0, 0.0, 1.0]);
    assert_eq!(values("localization"), [1.0, 0.0, 1.0, 1.0, 0.0]);
    assert_eq!(values("category"), [1.0, 0.0, 1.0, 0.0, 0.0]);
    assert_eq!(values("abstention"), [1.0, 1.0, 1.0, 1.0, 0.0]);
    let vision = values("vision_relevance");
    assert!(vision[0] > 0.0 && vision[1] == 0.0, "{vision:?}");
    let reason = |i: usize| serde_json::to_value(&b[i].components["format"]).unwrap()["reason"].clone();
    assert_eq!((reason(0), reason(2)), (Value::Null, json!({"form": "other_form"})));
    // The same with reasoning in front, which then has to be allowed.
    let thought = format!("<think>A round opacity.</think>\n{right}");
    let format = |c: &Config| score(c, &lesion(), &[&thought])[0].components["format"].value;
    assert_eq!(format(&c), Some(0.0));
    c.answer.reasoning = Reasoning::Required;
    assert_eq!(format(&c), Some(1.0));
    // After stage 1, the native form is the expected one.
    c.sft.steps = 1;
    assert_eq!(score(&c, &lesion(), &[right])[0].components["format"].value, Some(0.0));
    let native = format!("<think>A round opacity.</think>{native}");
    assert_eq!(score(&c, &lesion(), &[&native])[0].components["format"].value, Some(1.0));
}

/// Values of every component for right and wrong answers to both kinds of record.
#[test]
fn region_components_do_not_apply_to_text_records() {
    let mut c = Config::default();
    c.reward.abstention.weight = 0.3;
    c.reward.relevance.weight = 1.0;
    c.reward.relevance.kind = RelevanceKind::Exact;
    let region = json!({"id": "e", "image_size": [640, 480], "category": "", "boxes": [], "answer": "no finding"});
    // Response, and its value in the region components (`None`: masked) and in relevance.
    for (record, response, region_value, relevance) in [
        (question(), "MRI", None, 1.0),
        (question(), "<think>CT?</think> mri.", None, 1.0),
        (question(), "no finding", None, 0.0),
        (question(), "[]", None, 0.0),
        (question(), "", None, 0.0),
        (region.clone(), "no finding", Some(1.0), 1.0),
        (region, "MRI", Some(0.0), 0.0),
    ] {
        let b = &score(&c, &record, &[response])[0];
        for name in REGION_COMPONENTS {
            let component = &b.components[name];
            let expected = if name == "vision_relevance" { None } else { region_value };
            assert_eq!(
                (component.value, component.masked),
                (expected, expected.is_none()),
                "{name} of {response:?} to {record}"
            );
            assert!(!component.masked || component.reason == Some(MaskReason::NotApplicable), "{component:?}");
        }
        assert_eq!(b.components["relevance"].value, Some(relevance), "{response:?} to {record}");
        let weight = 1.0 + 0.5 + 0.1 + 0.2 + 1.0 + 0.3;
        if region_value.is_none() {
            assert!(
                (b.total.unwrap() - weight * relevance).abs() < 1e-9,
                "the weights of masked components go to the others: {:?}",
                b.total
            );
        }
    }
    // A text record may have boxes and a class, and is still answered in text.
    let mut boxed = question();
    boxed["boxes"] = json!([[1, 1, 9, 9]]);
    boxed["category"] = json!("MRI");
    let b = &score(&c, &boxed, &["MRI"])[0];
    assert!(REGION_COMPONENTS.iter().all(|n| b.components[*n].reason == Some(MaskReason::NotApplicable)));
    // Without a component that applies to text there is no total, and no value is 0.
    let b = &score(&Config::default(), &question(), &["MRI", "no finding"]);
    assert!(b.iter().all(|b| b.total.is_none() && b.components.values().all(|c| c.masked)));
    // A gate on a component that does not apply stays open.
    c.reward.gates = vec![Gate { component: "relevance".into(), needs: "category".into(), at_least: 1.0 }];
    assert_eq!(score(&c, &question(), &["MRI"])[0].components["relevance"].value, Some(1.0));
    assert_eq!(score(&c, &lesion(), &["nodule"])[0].components["relevance"].detail.get("gated"), None);
    assert_eq!(score(&c, &lesion(), &["mass"])[0].components["relevance"].detail["gated"], 1.0);
}

#[test]
fn offline_scoring_reads_answers_alike() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("r.jsonl");
    let mut lines = String::new();
    for (index, text) in
        ["<think>[1,1,5,5]</think><answer>[100,100,200,200] Nodule.</answer>", "no finding"].iter().enumerate()
    {
        for mut record in [lesion(), question()] {
            record["index"] = json!(index);
            record["response"] = json!(text);
            lines += &format!("{record}\n");
        }
    }
    std::fs::write(&file, lines).unwrap();
    let mut out = Vec::new();
    run_score(&Config::default(), &file, &mut out).unwrap();
    let out: Vec<Value> = String::from_utf8(out).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let value = |i: usize, n: &str| out[i]["components"][n]["value"].clone();
    assert_eq!(
        (value(0, "localization"), value(0, "category"), value(2, "localization")),
        (json!(1.0), json!(1.0), json!(0.0))
    );
    for at in [1, 3] {
        assert_eq!(
            (&out[at]["total"], &out[at]["components"]["category"]["reason"]),
            (&Value::Null, &json!("not_applicable"))
        );
    }
}

/// Trains a policy over four answers by the expected gradient of the rewards: on a mixed data set, text answers do not drift to
/// "no finding".
#[test]
fn mixed_data_does_not_teach_text_records_no_finding() {
    const ANSWERS: [&str; 4] = ["MRI", "CT", "no finding", "[100,100,200,200] nodule"];
    let mut c = Config::default();
    c.reward.relevance.weight = 0.5;
    c.reward.relevance.kind = RelevanceKind::TokenF1;
    let softmax = |logits: &[f64; 4]| {
        let e = logits.map(f64::exp);
        e.map(|v| v / e.iter().sum::<f64>())
    };
    // Logits shared by all kinds of record, and logits of each kind.
    let mut shared = [0.0; 4];
    let mut specific = [[0.0; 4]; 3];
    let share = |shared: &[f64; 4], specific: &[f64; 4]| softmax(&std::array::from_fn(|a| shared[a] + specific[a]))[2];
    let before = share(&shared, &specific[0]);
    let records = [question(), empty(), lesion()];
    for _ in 0..20 {
        for (record, specific) in records.iter().zip(&mut specific) {
            let totals: Vec<f64> = score(&c, record, &ANSWERS).iter().map(|b| b.total.unwrap()).collect();
            let p = softmax(&std::array::from_fn(|a| shared[a] + specific[a]));
            let mean: f64 = p.iter().zip(&totals).map(|(p, t)| p * t).sum();
            for a in 0..4 {
                let gradient = p[a] * (totals[a] - mean);
                shared[a] += 0.1 * gradient;
                specific[a] += 1.0 * gradient;
            }
        }
    }
    let after = [0, 1, 2].map(|k| share(&shared, &specific[k]));
    assert!(after[0] < before / 2.0, "text: {before} to {}", after[0]);
    assert!(after[1] > 2.0 * before && after[2] < before, "regions: {after:?}");
}

/// Formats the fields that a prefix of reasoning must not change: value, mask and details.
fn without_reason(c: &Component) -> String {
    format!("{:?} {} {:?} {:?}", c.value, c.masked, c.detail, c.lesions)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// No content of `<think>` changes boxes, class or mentions.
    #[test]
    fn reasoning_changes_no_component(
        thought in prop::collection::vec(prop::sample::select(vec![
            "[100,100,200,200] nodule", "nodule", "no finding", "<answer>", "</answer>", "[]", "```json", "```", "<think>", "[1,2", "\"", "é",
            "{\"bbox_2d\": [100,100,200,200], \"label\": \"nodule\"}", " mass.",
        ]), 0..8),
        answer in prop::sample::select(vec![
            "[100,100,200,200] nodule", "[1,1,5,5] mass", "no finding", "", "[]", "<answer>[100,100,200,200] Nodule.</answer> nodule",
            "```json\n[{\"bbox_2d\": [100,100,200,200], \"label\": \"nodule\"}]", "No abnormality is seen.",
        ]),
        truth in prop::sample::select(vec![lesion(), empty()]),
    ) {
        let mut c = Config::default();
        c.reward.abstention.weight = 1.0;
        let thinking = format!("<think>{}</think>{answer}", thought.concat());
        let mut input = group(&truth, &[answer, &thinking]);
        for r in &mut input.responses {
            let row = vec![0.25, 0.25, 0.25, 0.25];
            let tokens: Vec<usize> = (0..r.spans.len()).collect();
            r.attention = Some(Attention { grid: [2, 2], rows: vec![row; tokens.len()], tokens });
        }
        let b = score_group(&Scoring::new(&c), &input);
        for name in ["localization", "vision_relevance", "category", "abstention"] {
            let plain = &b[0].components[name];
            let thought = &b[1].components[name];
            prop_assert_eq!(without_reason(plain), without_reason(thought), "{} of {:?}", name, thinking);
        }
    }

    /// For any text and both kinds of record, values are within range or masked.
    #[test]
    fn any_text_stays_within_range(text in "\\PC{0,200}", wrap in 0..4_usize, is_text in any::<bool>()) {
        let text = match wrap {
            0 => text,
            1 => format!("<think>{text}</think>{text}"),
            2 => format!("```json\n[{{\"bbox\": [1,2,{text}"),
            _ => format!("<answer>{text}</answer>"),
        };
        let mut c = Config::default();
        c.reward.relevance.weight = 1.0;
        c.reward.relevance.kind = RelevanceKind::TokenF1;
        let record = if is_text { question() } else { lesion() };
        for b in score(&c, &record, &[&text]) {
            prop_assert!(b.components.values().all(|c| c.value.is_none_or(|v| (0.0..=1.0).contains(&v))), "{:?}", b);
            prop_assert!(b.total.is_some_and(|t| (0.0..=2.8 + 1e-9).contains(&t)), "{:?}", b);
        }
    }
}
