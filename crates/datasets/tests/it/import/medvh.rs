//! Tests of MedVH in both layouts, with images in the folder and in the data sets they were taken from.

use std::path::PathBuf;

use super::{DatasetFixture, Format, ImportOptions, fixtures, pixels, reasons};

const IN_OTHER_DATASET: &str = "its image belongs to another data set (give that with --images)";

/// Creates the folder as the repository has it, with published rows in other words. Only the wrongful images are in it.
fn repository() -> DatasetFixture {
    let set = DatasetFixture::new();
    let row = |n: u32, question: &str, choices: &str, rest: &str| {
        format!(
            r#"{{"question_id": {n}, "img_id": {n}, "img_name": "medvh_{n}.jpg", "question": "{question}", "choices": "{choices}", {rest}}}"#
        )
    };
    let diff = |id: &str, gt: &str| format!(r#""gt": "{gt}", "img_source": "Medical-Diff-VQA", "ori_id": "{id}""#);
    let write = |name: &str, rows: &[String]| {
        set.write(name, format!("[{}]", rows.join(",")));
    };
    let level = "what level is the hernia?";
    write(
        "multi_choices/NOTA/test_nota_src.json",
        &[
            row(1, level, "A: severe. B: mild. C: None of the above.", &diff("aaaa-1111", "C")),
            row(
                2,
                "which?",
                "A:  Left . B: None of the above.",
                r#""gt": "B", "img_source": "PMC-VQA", "ori_id": "PMC93_fig-0001.jpg""#,
            ),
        ],
    );
    write(
        "multi_choices/NOTA/test_nota_baseline.json",
        &[
            row(2, "which?", "A:  Left . B:  Right . C: None of the above.", r#""gt": "B""#),
            row(1, level, "A: severe. B: mild. C: moderate. D: None of the above.", r#""gt": "C""#),
        ],
    );
    let side = "A: left side. B: right side. C: this question contains an incorrect clinical statement.";
    let wrong = "C: this question contains an incorrect clinical statement.";
    write("multi_choices/cli/test_cli_src.json", &[row(1, "on which side is it?", side, &diff("bbbb-2222", wrong))]);
    write(
        "multi_choices/baseline_cli/test_cli_baseline_src.json",
        &[row(1, "on which side is it?", side, &diff("cccc-3333", "B"))],
    );
    let opacity = "is there lung opacity?";
    for name in ["pre/test_pre_src", "baseline_pre/test_pre_baseline_src"] {
        write(&format!("multi_choices/{name}.json"), &[row(1, opacity, "A: no, B: yes", &diff("dddd-4444", "A"))]);
    }
    let nodule = "Can a nodule be observed?";
    let asked = "A: Yes. B: No. C: Not a suitable question for the image.";
    write("multi_choices/wrongful_image/test_wrongful_image.json", &[row(1, nodule, asked, r#""gt": "C""#)]);
    set.image("multi_choices/wrongful_image/medvh_1.jpg", (30, 30), 1);
    let slake = |n: u32| format!(r#""gt": "A: Yes", "img_source": "SLAKE", "ori_id": "xmlab{n}/source.jpg""#);
    write(
        "multi_choices/baseline_worngful_image/test_wrongful_image_baseline_src.json",
        &[row(1, nodule, asked, &slake(344)), row(2, nodule, asked, &slake(304))],
    );
    let claim = format!(r#"{}, "suggested_answer": "B: No.""#, slake(344));
    write("text_generation/FCJ/test_FCJ_src.json", &[row(1, nodule, "A: Yes. B: No.", &claim)]);
    write("text_generation/report_generation/test_report_generation_src.json", &[
        r#"{"report_id": 0, "src_img": "eeee-5555", "image_name": "medvh_0.jpg", "gt_labels": ["Cardiomegaly", "Pleural Other"], "img_source": "MIMIC-CXR-JPG"}"#.to_owned(),
    ]);
    set
}

/// Writes the images of the other data sets and returns their folder.
fn write_other_datasets(set: &DatasetFixture) -> PathBuf {
    let mimic = |id: &str| format!("../others/mimic-cxr-jpg/2.0.0/files/p10/p1000/s500/{id}.jpg");
    for (k, name) in ["aaaa-1111", "bbbb-2222", "cccc-3333", "dddd-4444", "eeee-5555"].iter().enumerate() {
        set.image(&mimic(name), (30, 30), 10 + k as u8);
    }
    set.image("../others/pmc/PMC93_fig-0001.jpg", (30, 30), 20);
    set.image("../others/slake/imgs/xmlab344/source.jpg", (30, 30), 21);
    set.image("../others/slake/imgs/xmlab3440/source.jpg", (30, 30), 22);
    set.dir.path().join("others")
}

#[test]
fn repository_with_images_of_other_data_sets() {
    let set = repository();
    let images = Some(write_other_datasets(&set));
    let (report, r) = set.import(Format::MedVh, &ImportOptions { images, ..ImportOptions::default() });
    let rows = [
        // id, task, baseline, pair, answer, option
        ("nota-1", "nota", false, 1, "None of the above", "C"),
        ("nota_baseline-1", "nota", true, 1, "moderate", "C"),
        ("nota-2", "nota", false, 2, "None of the above", "B"),
        ("nota_baseline-2", "nota", true, 2, "Right", "B"),
        ("cli-1", "cli", false, 1, "this question contains an incorrect clinical statement", "C"),
        ("cli_baseline-1", "cli", true, 1, "right side", "B"),
        ("pre-1", "pre", false, 1, "no", "A"),
        ("pre_baseline-1", "pre", true, 1, "no", "A"),
        ("wrongful_image-1", "wrongful_image", false, 1, "Not a suitable question for the image", "C"),
        ("wrongful_image_baseline-1", "wrongful_image", true, 1, "Yes", "A"),
        ("FCJ-1", "fcj", false, 1, "Yes", "A"),
    ];
    for (id, task, baseline, pair, answer, option) in rows {
        let q = &r[id];
        assert_eq!((&q.extra["suite_task"], &q.extra["baseline"]), (&task.into(), &baseline.into()), "{id}");
        assert_eq!((&q.extra["pair"], q.answer.as_str()), (&pair.into(), answer), "{id}");
        assert_eq!((&q.extra["answer_option"], q.split.as_str()), (&option.into(), "test"), "{id}");
    }
    let report_record = &r["report_generation-0"];
    assert_eq!(
        (report_record.answer.as_str(), report_record.extra["gt_labels"][1].as_str()),
        ("Cardiomegaly, Pleural Other", Some("Pleural Other"))
    );
    assert_eq!(
        (&report_record.extra["suite_task"], report_record.extra.get("pair")),
        (&"report_generation".into(), None)
    );
    assert_eq!(r["FCJ-1"].extra["suggested_answer"], "B: No.");
    assert_eq!(r.len(), rows.len() + 1);
    assert_eq!(
        reasons(&report),
        [(IN_OTHER_DATASET, 1)],
        "xmlab304 has no image, and the one of xmlab344 does not replace it"
    );
    let same = |a: &str, b: &str| pixels(&set, &r[a]) == pixels(&set, &r[b]);
    assert!(same("nota-1", "nota_baseline-1") && same("pre-1", "pre_baseline-1"), "twins share one image");
    assert!(
        !same("cli-1", "cli_baseline-1") && !same("wrongful_image-1", "wrongful_image_baseline-1"),
        "twins with two images"
    );
    assert!(same("wrongful_image_baseline-1", "FCJ-1"));
    let all =
        ["nota-1", "nota-2", "cli-1", "cli_baseline-1", "pre-1", "wrongful_image-1", "FCJ-1", "report_generation-0"];
    for (k, a) in all.iter().enumerate() {
        assert!(all[k + 1..].iter().all(|b| !same(a, b)), "{a} shows another's image");
    }
}

#[test]
fn repository_without_other_data_sets() {
    let set = repository();
    let (report, r) = set.import(Format::MedVh, &ImportOptions::default());
    assert_eq!(r.keys().collect::<Vec<_>>(), ["wrongful_image-1"]);
    // The rows of nota's twins do not name their image in other data sets.
    assert_eq!(reasons(&report), [(IN_OTHER_DATASET, 10), ("its image is missing", 2)]);
}

#[test]
fn images_are_found_by_name_within_a_task() {
    let set = repository();
    for (k, folder) in ["NOTA", "cli", "baseline_cli"].iter().enumerate() {
        set.image(&format!("../own/multi_choices/{folder}/medvh_1.jpg"), (30, 30), 30 + k as u8);
    }
    // Two unambiguous names, and one that several images share.
    set.image("../own/medvh_2.jpg", (30, 30), 40).image("../own/medvh_0.jpg", (30, 30), 41);
    set.image("../own/medvh_1.jpg", (30, 30), 42);
    let images = Some(set.dir.path().join("own"));
    let (_, r) = set.import(Format::MedVh, &ImportOptions { images, ..ImportOptions::default() });
    let expected = ["cli-1", "cli_baseline-1", "nota-1", "nota_baseline-1", "report_generation-0", "wrongful_image-1"];
    assert_eq!(r.keys().collect::<Vec<_>>(), expected);
    assert_ne!(pixels(&set, &r["cli-1"]), pixels(&set, &r["cli_baseline-1"]));
}

#[test]
fn baseline_with_another_image_does_not_use_the_twins() {
    let set = fixtures::dataset(Format::MedVh);
    let row =
        r#"[{"question_id": 0, "img_name": "medvh_1.jpg", "question": "q?", "choices": "A: Yes. B: No.", "gt": "A"}]"#;
    set.write("multi_choices/test_wrongful_image_baseline.json", row);
    let (report, r) = set.import(Format::MedVh, &ImportOptions::default());
    assert!(!r.contains_key("wrongful_image_baseline-0") && reasons(&report).contains(&("its image is missing", 2)));
    let nota = &r["NOTA_baseline-0"];
    assert_eq!((&nota.extra["suite_task"], &nota.extra["baseline"]), (&"nota".into(), &true.into()));
    set.image("multi_choices/baseline_wrongful_image/medvh_1.jpg", (30, 30), 9);
    assert!(set.import(Format::MedVh, &ImportOptions::default()).1.contains_key("wrongful_image_baseline-0"));
}
