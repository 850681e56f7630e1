//! Tests of annotation formats: COCO, YOLO, VIA, ms-swift.

use super::{Format, ImportOptions, UNREAD, boxes, fixtures, reasons};

fn options() -> ImportOptions {
    ImportOptions::default()
}

#[test]
fn coco() {
    let set = fixtures::dataset(Format::Coco);
    let (report, r) = set.import(Format::Coco, &options());
    assert_eq!(r.keys().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(
        (boxes(&r["a"]), r["a"].category.as_str(), r["a"].split.as_str()),
        (vec![[4.0, 2.0, 14.0, 7.0]], "nodule", "train")
    );
    // The file says 40 x 20, the image has 80 x 40; the box overhangs by two of its twenty-two rows then.
    assert_eq!((boxes(&r["b"]), report.scaled, report.clipped), (vec![[20.0, 20.0, 40.0, 40.0]], 1, 1));
    assert_eq!((r["c"].boxes.len(), r["c"].split.as_str(), r["c"].source.as_str()), (0, "val", "set"));
    assert_eq!(r["a"].question, "Where is the cyst, nodule?");
    assert_eq!(report.size_mismatch.len(), 1);
    assert_eq!(
        reasons(&report),
        [
            ("has no area", 1),
            ("has no box", 1),
            ("is a crowd", 1),
            ("its category is not listed", 1),
            ("its image is missing", 1),
            ("its image is not listed or was left out", 1),
            ("its image path leaves the source folder", 1),
            (UNREAD, 1),
        ]
    );
    let (report, r) = set.import(Format::Coco, &ImportOptions { split: Some("val".into()), ..options() });
    assert_eq!((report.records, r.len()), (1, 1));
    let missing = set.try_import(Format::Coco, &ImportOptions { split: Some("test".into()), ..options() }).unwrap_err();
    assert!(missing.to_string().contains("no record in split \"test\""), "{missing}");
}

#[test]
fn coco_file_next_to_its_images() {
    let set = super::DatasetFixture::new();
    let file = r#"{"images": [{"id": 0, "file_name": "x.jpg", "width": 10, "height": 10}],
        "annotations": [{"id": 0, "image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4], "area": 12, "segmentation": [], "iscrowd": 0}],
        "categories": [{"id": 0, "name": "all"}, {"id": 1, "name": "stone"}]}"#;
    set.image("valid/x.jpg", (10, 10), 1).write("valid/_annotations.coco.json", file).write("notes.json", "{}");
    let (_, r) = set.import(Format::Coco, &options());
    assert_eq!((r["x"].split.as_str(), boxes(&r["x"])), ("val", vec![[1.0, 2.0, 4.0, 6.0]]));
}

#[test]
fn yolo() {
    let set = fixtures::dataset(Format::Yolo);
    let (report, r) = set.import(Format::Yolo, &options());
    let a = &r["train/images/a"];
    assert_eq!(a.labels, ["cyst", "nodule", "nodule"]);
    for (b, want) in boxes(a).iter().zip([[40.0, 15.0, 60.0, 35.0], [0.0, 15.0, 15.0, 35.0], [10.0, 5.0, 90.0, 45.0]]) {
        assert!(b.iter().zip(want).all(|(x, y)| (x - y).abs() < 1e-3), "{b:?} {want:?}");
    }
    assert_eq!((report.clipped, r["train/images/b"].boxes.len(), r["valid/images/c"].split.as_str()), (1, 0, "val"));
    assert_eq!(r["valid/images/c"].boxes.len(), 1, "a confidence is ignored");
    assert_eq!(
        reasons(&report),
        [
            ("its class has no name", 1),
            ("its folder is missing or outside", 1),
            (UNREAD, 1),
            ("the line is not a class and a box", 2)
        ]
    );
}

#[test]
fn yolo_names_as_map_and_classes_file() {
    let set = super::DatasetFixture::new();
    set.write("data.yaml", "path: .\ntrain: lists/train.txt\nval: [images/val]\nnames:\n  0: cyst\n  3: mass\n");
    set.write("lists/train.txt", "./images/train/a.png\nimages/train/gone.png\n../../etc/passwd\n");
    set.image("images/train/a.png", (10, 10), 1).write("labels/train/a.txt", "3 0.5 0.5 0.5 0.5");
    set.image("images/val/b.png", (10, 10), 2);
    let (report, r) = set.import(Format::Yolo, &options());
    assert_eq!((r["images/train/a"].category.as_str(), r["images/val/b"].split.as_str()), ("mass", "val"));
    assert_eq!(reasons(&report), [("its image is missing", 2)]);
    std::fs::remove_file(set.src().join("data.yaml")).unwrap();
    assert!(set.try_import(Format::Yolo, &options()).unwrap_err().to_string().contains("no data.yaml"));
    set.write("classes.txt", "cyst\n\nx\nmass\n");
    let (_, r) = set.import(Format::Yolo, &options());
    assert_eq!((r["images/train/a"].category.as_str(), r["images/train/a"].split.as_str()), ("mass", "train"));
}

#[test]
fn via() {
    let set = fixtures::dataset(Format::Via);
    let (report, r) = set.import(Format::Via, &options());
    assert_eq!(r["a"].labels, ["mass", "mass", "cyst", "cyst"]);
    let got = boxes(&r["a"]);
    assert_eq!(got[..3], [[10.0, 20.0, 40.0, 60.0], [5.0, 7.0, 25.0, 30.0], [40.0, 40.0, 60.0, 60.0]]);
    // Rotation by a quarter swaps the radii.
    assert!(got[3].iter().zip([40.0, 30.0, 60.0, 70.0]).all(|(x, y)| (x - y).abs() < 1e-4), "{got:?}");
    assert_eq!((boxes(&r["b"]), boxes(&r["c"])), (vec![[1.0, 2.0, 4.0, 6.0]], vec![[2.0, 3.0, 6.0, 8.0]]));
    assert_eq!(
        reasons(&report),
        [("a point is not a box", 1), (UNREAD, 1), ("the region has no label", 1), ("the shape has no numbers", 1)]
    );
}

#[test]
fn ms_swift() {
    let set = fixtures::dataset(Format::MsSwift);
    let (report, r) = set.import(Format::MsSwift, &options());
    let a = &r["train-0"];
    assert_eq!(a.labels, ["a cyst", "a mass"]);
    assert_eq!(boxes(a), [[31.5, 61.4, 53.5, 94.8], [76.5, 5.8, 99.5, 27.4]]);
    assert_eq!((a.question.as_str(), a.answer.as_str()), ("Describe the image.", "a cyst and a mass are seen"));
    let b = &r["train-1"];
    assert_eq!(
        (b.question.as_str(), b.labels.as_slice()),
        ("Find the stone in the image", &["stone".to_owned(), "stone".to_owned()][..])
    );
    assert_eq!(boxes(b)[1], [100.0, 50.0, 200.0, 100.0]);
    let thousand = &boxes(&r["train-2"])[0];
    assert!(thousand.iter().zip([20.0, 20.0, 60.0, 40.0]).all(|(x, y)| (x - y).abs() < 1e-4), "{thousand:?}");
    assert!(r["train-5"].is_text() && r["train-5"].answer == "No." && !a.is_text());
    assert_eq!(
        reasons(&report),
        [
            ("a box has no label", 1),
            ("a box is not four numbers (a point has two)", 1),
            ("it has no image or several", 1)
        ]
    );
}
