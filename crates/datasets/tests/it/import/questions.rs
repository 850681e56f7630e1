//! Tests of data sets of questions: SLAKE, VQA-RAD, PMC-VQA, OmniMedVQA, MedVH, Med-GRIT, LLaVA.

use super::{Format, ImportOptions, UNREAD, boxes, fixtures, pixels, reasons};

fn options() -> ImportOptions {
    ImportOptions::default()
}

#[test]
fn slake() {
    let set = fixtures::dataset(Format::Slake);
    let (report, r) = set.import(Format::Slake, &options());
    let q = &r["slake-9"];
    assert_eq!((q.question.as_str(), q.answer.as_str(), q.is_text()), ("What modality is used?", "MRI", true));
    assert_eq!(
        (&q.extra["language"], &q.extra["answer_type"], q.modality.as_str()),
        (&"en".into(), &"open".into(), "MRI")
    );
    assert_eq!((r["slake-10"].answer.as_str(), r["slake-13"].split.as_str()), ("肝", "val"));
    let regions = &r["xmlab0"];
    assert_eq!((regions.labels.as_slice(), regions.is_text()), (&["Liver".to_owned(), "Cyst".to_owned()][..], false));
    assert_eq!(boxes(regions), [[10.0, 20.0, 40.0, 60.0], [90.0, 70.0, 100.0, 80.0]]);
    assert_eq!(boxes(&r["xmlab169"]), [[212.0, 587.0, 459.0, 788.0]], "a published file");
    assert!(!r.contains_key("xmlab1") && !r.contains_key("xmlab2") && regions.split == "train");
    assert_ne!(pixels(&set, q), pixels(&set, &r["slake-13"]), "images with the same name in two folders differ");
    assert_eq!(
        reasons(&report),
        [
            ("it has no question or no answer", 1),
            ("its box is not four numbers", 1),
            ("its image is missing", 1),
            (UNREAD, 1)
        ]
    );
}

#[test]
fn vqa_rad() {
    let set = fixtures::dataset(Format::VqaRad);
    let (report, r) = set.import(Format::VqaRad, &options());
    assert_eq!((r["vqa-rad-1"].answer.as_str(), r["vqa-rad-1"].split.as_str()), ("4", "test"));
    assert_eq!((r["vqa-rad-2"].answer.as_str(), r["vqa-rad-2"].question.as_str()), ("left", "Which side?"));
    assert_eq!(r["vqa-rad-0"].extra["answer_type"], "closed");
    assert_eq!(reasons(&report), [("it has no question or no answer", 1), ("its image is missing", 1)]);
    let leak = &report.leaks[0];
    assert_eq!((report.leaks.len(), leak.id.as_str(), leak.copy.as_str()), (1, "vqa-rad-1", "vqa-rad-0"));
    let (report, r) = set.import(Format::VqaRad, &ImportOptions { drop_leaks: true, ..options() });
    assert_eq!(r.keys().collect::<Vec<_>>(), ["vqa-rad-1", "vqa-rad-2"]);
    assert!(reasons(&report).contains(&("its image is also in another split", 1)));
}

#[test]
fn pmc_vqa() {
    let set = fixtures::dataset(Format::PmcVqa);
    let (report, r) = set.import(Format::PmcVqa, &options());
    let q = &r["train-0"];
    assert_eq!(q.question, "What is shown?\nA: Mass\nB: Cyst\nC: Stone, small\nD: None");
    assert_eq!((q.answer.as_str(), &q.extra["answer_option"]), ("Cyst", &"B".into()));
    assert_eq!((r["test_clean-0"].answer.as_str(), r["test_clean-0"].split.as_str()), ("Stone", "test"));
    assert_eq!((r["test_2-0"].answer.as_str(), r.contains_key("test-0")), ("Four", false));
    assert_eq!(reasons(&report), [("its answer is none of its choices", 1), ("its image is missing", 1)]);
}

#[test]
fn omnimedvqa() {
    let set = fixtures::dataset(Format::OmniMedVqa);
    let (report, r) = set.import(Format::OmniMedVqa, &options());
    let q = &r["ACRIMA_0000"];
    assert_eq!(
        (q.answer.as_str(), &q.extra["answer_option"], q.modality.as_str()),
        ("Fundus photography.", &"A".into(), "Fundus Photography")
    );
    let ct = &r["Chest CT Scan_0000"];
    assert_eq!((ct.modality.as_str(), ct.question.as_str()), ("CT", "Is it normal?\nA: Yes\nB: No"));
    assert!(["train", "val", "test"].contains(&ct.split.as_str()) && q.source == "omnimedvqa");
    assert_eq!(reasons(&report), [("its answer is none of its choices", 1), ("its image is missing", 1)]);
}

#[test]
fn medvh() {
    let set = fixtures::dataset(Format::MedVh);
    let (report, r) = set.import(Format::MedVh, &options());
    let nota = &r["NOTA_baseline-0"];
    assert_eq!(
        (nota.answer.as_str(), nota.split.as_str(), &nota.extra["test"]),
        ("mild", "test", &"NOTA_baseline".into())
    );
    let wrong = &r["wrongful_image-0"];
    assert_eq!(wrong.answer, "This is not a suitable question for this image");
    assert_ne!(pixels(&set, nota), pixels(&set, wrong), "the same name in two tasks means two images");
    assert_eq!((r["FCJ-0"].answer.as_str(), &r["FCJ-0"].extra["suggested_answer"]), ("Yes", &"B: No.".into()));
    assert_eq!(r["report_generation-0"].answer, "Cardiomegaly, Lung Opacity");
    assert_eq!(
        reasons(&report),
        [("it has no positive label", 1), ("its answer is none of its choices", 1), ("its image is missing", 1)]
    );
}

#[test]
fn med_grit() {
    let set = fixtures::dataset(Format::MedGrit);
    let (report, r) = set.import(Format::MedGrit, &options());
    let id = |k: usize| format!("ct_00--AMOS2022--amos_0001--x_0010-{k}");
    let first = &r[&id(0)];
    assert_eq!((boxes(first), first.question.as_str()), (vec![[50.0, 50.0, 100.0, 75.0]], "Where is the left kidney?"));
    assert_eq!(
        (first.modality.as_str(), &first.extra["patient"], first.split.as_str()),
        ("CT", &"ct_00--AMOS2022--amos_0001".into(), "train")
    );
    let two = &r[&id(1)];
    assert_eq!(
        (two.labels.as_slice(), two.category.as_str()),
        (&["liver".to_owned(), "spleen".to_owned()][..], "liver, spleen")
    );
    let got = boxes(two)[0];
    assert!(got.iter().zip([20.0, 20.0, 60.0, 40.0]).all(|(x, y)| (x - y).abs() < 1e-4), "{got:?}");
    assert_eq!(r[&id(2)].labels, ["aorta"], "the name in the question");
    assert!(r[&id(3)].is_text() && r[&id(3)].answer == "The liver.");
    assert_eq!(
        reasons(&report),
        [
            ("a box is not four numbers up to 1000", 1),
            ("a turn is not question and answer", 1),
            ("its image is missing", 1)
        ]
    );
}

#[test]
fn llava() {
    let set = fixtures::dataset(Format::Llava);
    let (report, r) = set.import(Format::Llava, &options());
    assert_eq!(r.keys().collect::<Vec<_>>(), ["997bb945-0", "997bb945-1"]);
    assert_eq!((r["997bb945-0"].question.as_str(), r["997bb945-0"].answer.as_str()), ("What is seen?", "A nodule."));
    assert!(r["997bb945-1"].is_text() && r["997bb945-1"].boxes.is_empty() && r["997bb945-1"].split == "train");
    assert_eq!(
        reasons(&report),
        [("it has no image or several", 1), ("its image is missing", 1), ("its turns are not human, then gpt", 1)]
    );
}
