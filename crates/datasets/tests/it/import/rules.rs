//! Tests of the rules for all formats: class filter, questions, ids, corrupt images, splits by pixels, leaks.

use super::{DatasetFixture, Format, ImportOptions, boxes, fixtures, reasons};
use unveil_datasets::import::ClassFilter;

#[test]
fn format_names_round_trip() {
    for format in Format::ALL {
        assert_eq!(format.name().parse(), Ok(format));
    }
    let e = "vok".parse::<Format>().unwrap_err().to_string();
    assert!(e.contains("no format \"vok\"") && e.contains("voc, coco") && e.contains("llava"), "{e}");
}

#[test]
fn empty_folder_is_an_error() {
    for format in Format::ALL {
        let set = DatasetFixture::new();
        let e = set.try_import(format, &ImportOptions::default()).unwrap_err().to_string();
        assert!(e.contains("set") && e.len() > 20, "{}: {e}", format.name());
        assert!(!set.out().exists());
    }
}

#[test]
fn class_question_and_modality_options() {
    let set = fixtures::dataset(Format::Coco);
    let class = |name: &str| Some(ClassFilter { class: name.into(), category: "fluid".into() });
    let (report, r) = set.import(Format::Coco, &ImportOptions { class: class("cyst"), ..Default::default() });
    assert_eq!((r["b"].labels.as_slice(), r["a"].boxes.len()), (&["fluid".to_owned()][..], 0));
    assert_eq!((r["a"].question.as_str(), report.classes["nodule"]), ("Where is the fluid?", 2));
    let e = set.try_import(Format::Coco, &ImportOptions { class: class("x"), ..Default::default() }).unwrap_err();
    assert!(e.to_string().contains("the classes are cyst, nodule"), "{e}");
    let options = ImportOptions { question: Some("Where?".into()), modality: Some("MRI".into()), ..Default::default() };
    let (_, r) = set.import(Format::Coco, &options);
    assert_eq!((r["a"].question.as_str(), r["a"].modality.as_str()), ("Where?", "MRI"));
}

#[test]
fn images_that_are_corrupt_or_without_valid_box_are_left_out() {
    let set = fixtures::dataset(Format::Coco);
    set.write("train2017/a.jpg", b"no image").write("val2017/c.jpg", b"");
    let (report, r) = set.import(Format::Coco, &ImportOptions::default());
    assert_eq!(r.keys().collect::<Vec<_>>(), ["b"]);
    assert!(reasons(&report).contains(&("its image cannot be read", 2)));
    set.image("train2017/b.jpg", (30, 40), 9);
    let e = set.try_import(Format::Coco, &ImportOptions::default()).unwrap_err().to_string();
    assert!(e.contains("no record is left") && e.contains("1: all its boxes were left out"), "{e}");
    assert!(e.contains("another shape"), "{e}");
}

#[test]
fn equal_ids_get_numbers() {
    let set = DatasetFixture::new();
    let one = r#"{"id": "x", "image": "a.png", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}"#;
    set.image("a.png", (8, 8), 1).write("d.json", format!("[{one}, {one}, {}]", one.replace("\"x\"", "\"x-2\"")));
    let (_, r) = set.import(Format::Llava, &ImportOptions::default());
    assert_eq!(r.keys().collect::<Vec<_>>(), ["x", "x-2", "x-2-2"]);
}

/// Creates thirty images without a published split, some of them twice.
fn unsplit() -> DatasetFixture {
    let set = DatasetFixture::new();
    let mut entries = Vec::new();
    for k in 0..30_u8 {
        // Every third image is a copy of an earlier one under another name.
        set.image(&format!("i{k}.png"), (16, 8), if k % 3 == 2 { k / 3 } else { k + 60 });
        entries.push(format!(
            r#"{{"id": "{k}", "image": "i{k}.png", "conversations": [{{"from": "human", "value": "q"}}, {{"from": "gpt", "value": "a"}}]}}"#
        ));
    }
    set.image("i3.png", (16, 8), 0).write("d.json", format!("[{}]", entries.join(",")));
    set
}

#[test]
fn splits_by_pixels_keep_copies_together() {
    let set = unsplit();
    let (report, all) = set.import(Format::Llava, &ImportOptions::default());
    assert!(report.splits.len() == 3 && report.splits["train"] > 15, "{:?}", report.splits);
    assert_eq!(all["3"].split, all["2"].split, "equal pixels");
    assert_eq!(report.leaks, []);
    std::fs::write(
        set.src().join("d.json"),
        std::fs::read_to_string(set.src().join("d.json")).unwrap().replace("i7.png", "gone"),
    )
    .unwrap();
    let (_, fewer) = set.import(Format::Llava, &ImportOptions::default());
    assert!(fewer.len() == 29 && fewer.iter().all(|(id, r)| all[id].split == r.split));
    let (report, val) = set.import(Format::Llava, &ImportOptions { split: Some("val".into()), ..Default::default() });
    assert!(!val.is_empty() && val.values().all(|r| r.split == "val") && report.splits.len() == 1);
}

#[test]
fn leaked_copies_are_kept_in_test_then_val_then_train() {
    let set = DatasetFixture::new();
    let names = ["train", "val", "test"];
    for name in names {
        let line = format!(
            r#"{{"id": "{name}", "image": "{name}.png", "conversations": [{{"from": "human", "value": "q"}}, {{"from": "gpt", "value": "a"}}]}}"#
        );
        set.image(&format!("{name}.png"), (8, 8), 5).write(&format!("{name}.json"), format!("[{line}]"));
    }
    let (report, r) = set.import(Format::Llava, &ImportOptions::default());
    let leaks: Vec<_> = report.leaks.iter().map(|l| (l.copy.as_str(), l.id.as_str(), l.split.as_str())).collect();
    assert_eq!(
        (leaks, r.len()),
        (vec![("train", "test", "test"), ("val", "test", "test")], 3),
        "reported, not dropped"
    );
    let drop = ImportOptions { drop_leaks: true, ..Default::default() };
    assert_eq!(set.import(Format::Llava, &drop).1.keys().collect::<Vec<_>>(), ["test"]);
    std::fs::remove_file(set.src().join("test.json")).unwrap();
    assert_eq!(set.import(Format::Llava, &drop).1.keys().collect::<Vec<_>>(), ["val"]);
}

#[test]
fn images_under_the_output_folder_are_used_in_place() {
    let set = fixtures::dataset(Format::Coco);
    let out = set.src().join("records.jsonl");
    let report = super::import(Format::Coco, &set.src(), &out, &ImportOptions::default()).unwrap();
    assert_eq!(report.images_copied_to, None);
    let file = unveil_data::records::RecordFile::load(&out).unwrap();
    assert_eq!((file.records[0].image.as_str(), boxes(&file.records[0]).len()), ("train2017/a.jpg", 1));
}
