//! Cases from public bug reports: locations of labels, file names, encodings, conversations of several turns.

use std::os::unix::ffi::OsStrExt;

use super::{DatasetFixture, Format, ImportOptions, UNREAD, boxes, fixtures, reasons};
use unveil_datasets::import::ClassFilter;

fn options() -> ImportOptions {
    ImportOptions::default()
}

/// Creates a data set with an image of 64 x 48 pixels at each path.
fn with_images(images: &[&str]) -> DatasetFixture {
    let set = DatasetFixture::new();
    images.iter().enumerate().for_each(|(k, name)| {
        set.image(name, (64, 48), k as u8);
    });
    set
}

fn error(set: &DatasetFixture, format: Format) -> String {
    set.try_import(format, &options()).unwrap_err().to_string()
}

#[test]
fn yolo_labels_next_to_the_images() {
    let set = with_images(&["images/a.jpg"]);
    set.write("classes.txt", "nodule\n").write("images/a.txt", "0 0.5 0.5 0.2 0.2\n");
    let (_, r) = set.import(Format::Yolo, &options());
    assert_eq!(boxes(&r["images/a"]), [[25.6, 19.2, 38.4, 28.8]]);
    // A folder `images` above the source is not part of the data set.
    let set = with_images(&["images/set/train/a.jpg", "images/set/images/b.jpg"]);
    set.write("images/set/classes.txt", "nodule\n").write("images/set/train/a.txt", "0 0.5 0.5 0.2 0.2\n");
    set.write("images/set/labels/b.txt", "0 0.5 0.5 0.5 0.5\n").write("images/set/images/b.txt", "0 0.1 0.1 0.1 0.1\n");
    super::import(Format::Yolo, &set.src().join("images/set"), &set.out(), &options()).unwrap();
    let file = unveil_data::records::RecordFile::load(&set.out()).unwrap();
    let all: Vec<_> = file.records.iter().map(|r| (r.id.as_str(), boxes(r)[0])).collect();
    assert_eq!(all, [("images/b", [16.0, 12.0, 48.0, 36.0]), ("train/a", [25.6, 19.2, 38.4, 28.8])]);
}

#[test]
fn data_set_without_labels_is_an_error() {
    let set = with_images(&["images/a.jpg", "images/b.jpg"]);
    set.write("classes.txt", "nodule\n").write("annotations/a.txt", "0 0.5 0.5 0.2 0.2\n");
    let e = error(&set, Format::Yolo);
    assert!(e.contains("no label for 2 images (2 of them have no label file)") && e.contains("labels/"), "{e}");
    set.write("labels/a.txt", "\n");
    assert!(error(&set, Format::Yolo).contains("(1 of them"), "an empty label file has no label");
    set.write("labels/a.txt", "0 0.5 0.5 0.2 0.2\n");
    let (report, r) = set.import(Format::Yolo, &options());
    assert_eq!((r["images/a"].boxes.len(), r["images/b"].boxes.len()), (1, 0));
    assert!(report.notes[0].contains("1 of 2 images have no label file"), "{:?}", report.notes);

    let set = with_images(&["a.jpg"]);
    set.write("train.json", r#"{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [], "categories": []}"#);
    set.write("via/via.json", r#"{"a.jpg1": {"filename": "a.jpg", "regions": []}}"#);
    set.write("Annotations/a.xml", "<annotation></annotation>").image("JPEGImages/a.jpg", (64, 48), 3);
    for format in [Format::Coco, Format::Voc] {
        let e = error(&set, format);
        assert!(e.contains("the data set has no object"), "{}: {e}", format.name());
    }
    std::fs::remove_file(set.src().join("train.json")).unwrap();
    assert!(error(&set, Format::Via).contains("the data set has no object"));
}

#[test]
fn split_without_objects_asks_for_all_classes() {
    let set = fixtures::dataset(Format::Coco);
    let (_, r) = set.import(Format::Coco, &ImportOptions { split: Some("val".into()), ..options() });
    assert_eq!(r["c"].question, "Where is the cyst, nodule?");
}

#[test]
fn yolo_names_are_kept_as_written() {
    let set = with_images(&["images/train/a.jpg"]);
    set.write("labels/train/a.txt", "1 0.5 0.5 0.2 0.2\n0 0.2 0.2 0.1 0.1\n2 0.5 0.5 0.2 0.2\n");
    set.write("data.yaml", "train: images/train\nnames: [3.5, polyp, \"1e3\"]\n");
    assert_eq!(set.import(Format::Yolo, &options()).1["images/train/a"].labels, ["polyp", "3.5", "1e3"]);
    set.write("data.yaml", "train: images/train\nnames:\n  0: 010\n  1: yes\n  2: 1.50\n");
    assert_eq!(set.import(Format::Yolo, &options()).1["images/train/a"].labels, ["yes", "010", "1.50"]);
    // An entry without a name keeps its index.
    set.write("data.yaml", "train: images/train\nnames: [a, ~, c]\n").image("images/train/b.jpg", (64, 48), 9);
    set.write("labels/train/b.txt", "2 0.5 0.5 0.2 0.2\n");
    let (report, r) = set.import(Format::Yolo, &options());
    assert_eq!((r.len(), r["images/train/b"].labels.as_slice()), (1, &["c".to_owned()][..]));
    assert_eq!(reasons(&report), [("its class has no name", 1), (UNREAD, 1)]);
}

#[test]
fn yolo_accepts_other_yaml_files() {
    let set = with_images(&["images/train/a.jpg"]);
    set.write("labels/train/a.txt", "0 0.5 0.5 0.2 0.2\n").write("hyper.yaml", "lr: 0.1\n").write("odd.yml", "a: [\n");
    let described = "path: .\ntrain: images/train\nval: images/train\nnames:\n  0: polyp\n";
    for name in ["dataset.yaml", "polyps.yml"] {
        set.write(name, described);
        let (_, r) = set.import(Format::Yolo, &options());
        assert_eq!((r.len(), r["images/train/a"].category.as_str()), (2, "polyp"), "{name}");
        std::fs::remove_file(set.src().join(name)).unwrap();
    }
    set.write("a.yaml", described).write("b.yaml", described);
    let e = error(&set, Format::Yolo);
    assert!(e.contains("both a.yaml and b.yaml have `names`"), "{e}");
    // Without `train`, `val` and `test`, the split is read from folder names.
    set.write("data.yaml", "names: [polyp]\n");
    assert_eq!(set.import(Format::Yolo, &options()).1["images/train/a"].split, "train");
}

#[test]
fn yaml_aliases_are_refused() {
    let set = with_images(&["images/a.jpg"]);
    let bomb = (1..30).fold("a0: &a0 [x, x]\n".to_owned(), |b, k| format!("{b}a{k}: &a{k} [*a{0}, *a{0}]\n", k - 1));
    set.write("labels/a.txt", "0 0.5 0.5 0.2 0.2\n").write("data.yaml", format!("{bomb}names: *a29\ntrain: images\n"));
    let e = error(&set, Format::Yolo);
    assert!(e.contains("data.yaml: line 2: aliases (*name) are not supported"), "{e}");
    set.write("data.yaml", format!("names: [polyp]\n{}", "# x\n".repeat(1 << 18)));
    assert!(error(&set, Format::Yolo).contains("data.yaml: the file is longer than 1048576 bytes"));
}

#[test]
fn yolo_pose_lines_start_with_the_box() {
    let set = with_images(&["images/a.jpg", "images/b.jpg", "images/c.jpg"]);
    set.write("data.yaml", "train: images\nkpt_shape: [2, 3]\nnames: [person]\n");
    set.write("labels/a.txt", "0 0.5 0.5 0.2 0.2 0.01 0.99 2 0.99 0.01 2\n")
        .write("labels/b.txt", "0 0.5 0.5 0.2 0.2\n");
    set.write("labels/c.txt", "0 0.5 0.5 0.2 0.2 0.01 0.99 0.99 0.01\n");
    let (report, r) = set.import(Format::Yolo, &options());
    assert_eq!(
        (boxes(&r["images/a"]), boxes(&r["images/b"])),
        (vec![[25.6, 19.2, 38.4, 28.8]], vec![[25.6, 19.2, 38.4, 28.8]])
    );
    assert_eq!((reasons(&report), r.len()), (vec![(UNREAD, 1), ("the line is not a class and a box", 1)], 2));
    for input in ["17", "[2]", "[2, 9]", "[two, 3]", "[99999999999, 3]"] {
        set.write("data.yaml", format!("train: images\nkpt_shape: {input}\nnames: [person]\n"));
        assert!(error(&set, Format::Yolo).contains("`kpt_shape` is not"), "{input}");
    }
}

#[test]
fn images_with_non_utf8_paths_are_left_out() {
    let set = with_images(&["images/a.jpg"]);
    set.write("classes.txt", "polyp\n").write("images/a.txt", "0 0.5 0.5 0.2 0.2\n");
    let name = |ending: &[u8]| {
        set.src().join("images").join(std::ffi::OsStr::from_bytes(&[b"\xcf\xa2\xc8\xe2", ending].concat()))
    };
    std::fs::copy(set.src().join("images/a.jpg"), name(b".jpg")).unwrap();
    std::fs::copy(set.src().join("images/a.txt"), name(b".txt")).unwrap();
    let (report, r) = set.import(Format::Yolo, &options());
    assert_eq!(r.keys().collect::<Vec<_>>(), ["images/a"]);
    assert_eq!(reasons(&report), [("its image's path is not UTF-8 (rename the file)", 1)]);
}

#[test]
fn undecodable_texts_are_reported() {
    let set = with_images(&["images/a.jpg"]);
    set.write("classes.txt", b"\xcf\xa2\xc8\xe2\n").write("images/a.txt", "0 0.5 0.5 0.2 0.2\n");
    let e = error(&set, Format::Yolo);
    assert!(e.contains("classes.txt: the file is not UTF-8: convert it") && e.contains("iconv -f GBK"), "{e}");
    // Labels that cannot be read do not mean "no finding".
    set.write("classes.txt", "polyp\n").image("images/b.jpg", (64, 48), 9);
    set.write("images/b.txt", b"0 0.5 0.5 0.2 0.2 \xff\n");
    let (report, r) = set.import(Format::Yolo, &options());
    assert_eq!(r.keys().collect::<Vec<_>>(), ["images/a"]);
    assert_eq!(reasons(&report), [("its label file is not UTF-8", 1), (UNREAD, 1)]);
}

const OBJECT: &str = "<bndbox><xmin>5</xmin><ymin>5</ymin><xmax>25</xmax><ymax>25</ymax></bndbox></object>";

#[test]
fn voc_is_read_in_the_declared_encoding() {
    let utf16: Vec<u8> = format!(
        "\u{feff}<?xml version=\"1.0\" encoding=\"UTF-16\"?><annotation><object><name>息肉</name>{OBJECT}</annotation>"
    )
    .encode_utf16()
    .flat_map(u16::to_le_bytes)
    .collect();
    let annotation = |label: &str, name: &[u8]| {
        let head = format!("<?xml version=\"1.0\" encoding=\"{label}\"?><annotation><object><name>");
        [head.as_bytes(), name, b"</name>", OBJECT.as_bytes(), b"</annotation>"].concat()
    };
    let set = with_images(&["JPEGImages/a.jpg"]);
    for (bytes, want) in [
        (annotation("GB2312", b"\xcf\xa2\xc8\xe2"), "息肉"),
        (annotation("GBK", b"\xcf\xa2\xc8\xe2"), "息肉"),
        (annotation("ISO-8859-1", b"l\xe9sion"), "lésion"),
        (annotation("utf-8", "息肉".as_bytes()), "息肉"),
        (utf16, "息肉"),
    ] {
        set.write("Annotations/a.xml", &bytes);
        let (_, r) = set.import(Format::Voc, &options());
        assert_eq!((r["a"].category.as_str(), boxes(&r["a"])), (want, vec![[5.0, 5.0, 25.0, 25.0]]));
    }
    set.write("Annotations/a.xml", annotation("UTF-8", b"\xcf\xa2\xc8\xe2"));
    assert!(error(&set, Format::Voc).contains("a.xml: the file is not UTF-8, though its XML declaration says so"));
}

#[test]
fn voc_image_without_a_valid_box_is_left_out() {
    let set = with_images(&["JPEGImages/a.jpg", "JPEGImages/b.jpg", "JPEGImages/c.jpg"]);
    let good = format!("<object><name>cyst</name>{OBJECT}");
    let flat = good.replace("<xmax>25</xmax>", "<xmax>5</xmax>").replace("cyst", "mass");
    set.write("Annotations/a.xml", format!("<annotation>{good}</annotation>"));
    set.write("Annotations/b.xml", format!("<annotation>{flat}</annotation>"));
    set.write("Annotations/c.xml", format!("<annotation>{}</annotation>", good.replace("<xmin>5</xmin>", "")));
    let (report, r) = set.import(Format::Voc, &options());
    assert_eq!(r.keys().collect::<Vec<_>>(), ["a"]);
    let side = "a side is missing in its <bndbox>";
    assert_eq!(reasons(&report), [(side, 1), ("all its boxes were left out", 1), ("has no area", 1), (UNREAD, 1)]);
    // `b` has an invalid mass and `c` an unreadable cyst: either matters only if its class is asked for.
    let class = |class: &str| ImportOptions {
        class: Some(ClassFilter { class: class.into(), category: "x".into() }),
        ..options()
    };
    let (_, r) = set.import(Format::Voc, &class("cyst"));
    assert!(r.len() == 2 && r["a"].boxes.len() == 1 && r["b"].boxes.is_empty());
    let (_, r) = set.import(Format::Voc, &class("mass"));
    assert!(r.len() == 2 && r.contains_key("c") && !r.contains_key("b"), "the unreadable cyst is not a mass");
}

#[test]
fn coco_files_without_annotations_are_left_out() {
    let set = with_images(&["images/a.jpg", "images/b.jpg"]);
    let images = |name: &str| {
        format!(r#"{{"images": [{{"id": 1, "file_name": "{name}"}}], "categories": [{{"id": 1, "name": "n"}}]"#)
    };
    let train =
        format!(r#"{}, "annotations": [{{"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}}]}}"#, images("a.jpg"));
    set.write("annotations/train.json", train).write("annotations/test.json", images("b.jpg") + "}");
    set.write("annotations/results.json", "[]")
        .write("annotations/null.json", images("b.jpg") + r#", "annotations": null}"#);
    let (report, r) = set.import(Format::Coco, &options());
    assert_eq!(r.keys().collect::<Vec<_>>(), ["a"]);
    assert_eq!(reasons(&report), [("the file has no annotations", 3)]);
    assert!(report.left_out.iter().any(|l| l.file.ends_with("annotations/test.json")), "{:?}", report.left_out);
    std::fs::remove_file(set.src().join("annotations/train.json")).unwrap();
    assert!(error(&set, Format::Coco).contains("no COCO file with a list \"annotations\""));
    set.write("annotations/train.json", r#"{"annotations": [], "categories": []}"#);
    assert!(error(&set, Format::Coco).contains("train.json: there is no list \"images\""));
}

#[test]
fn coco_polygons_and_repeated_ids() {
    let set = with_images(&["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"]);
    set.write(
        "train.json",
        r#"{"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}, {"id": 2, "file_name": "c.jpg"},
              {"id": null, "file_name": "d.jpg"}, {"id": 5, "file_name": "e.jpg"}],
            "categories": [{"id": 1, "name": "n"}, {"id": 2, "name": "m"}],
            "annotations": [
              {"image_id": 1, "category_id": 1, "segmentation": [[5, 6, 20, 6, 20.5, 30], [2, 7, 9, 7, 9, 8]]},
              {"image_id": 1, "category_id": 1, "bbox": [], "segmentation": [[1, 1, 3, 1, 3, 3]]},
              {"image_id": 2, "category_id": 1, "bbox": [1, 1, 3, 3]},
              {"image_id": 5, "category_id": 1, "bbox": [1, 1, 3, 3], "iscrowd": 1},
              {"image_id": 5, "category_id": 2, "bbox": [1, 1, 3, 3]}]}"#,
    );
    let (report, r) = set.import(Format::Coco, &options());
    assert_eq!(boxes(&r["a"]), [[2.0, 6.0, 20.5, 30.0], [1.0, 1.0, 3.0, 3.0]]);
    assert_eq!(r.keys().collect::<Vec<_>>(), ["a", "e"], "the image of a box with id 2 is ambiguous");
    assert_eq!(reasons(&report), [("another image has the same id", 2), ("is a crowd", 1), ("it has no id", 1)]);
    let class = Some(ClassFilter { class: "n".into(), category: "n".into() });
    let (report, r) = set.import(Format::Coco, &ImportOptions { class, ..options() });
    assert!(r.len() == 1 && reasons(&report).contains(&("all its boxes were left out", 1)), "the crowd has class n");
    set.write(
        "train.json",
        r#"{"images": [{"id": 1, "file_name": "a.jpg"}], "categories": [], "annotations": [{"bbox": [1, 1, 3, 3]}]}"#,
    );
    assert!(error(&set, Format::Coco).contains("annotation 0 has no `image_id`"));
}

#[test]
fn ms_swift_turns_have_their_own_boxes() {
    let set = with_images(&["a.png"]);
    let message = |role: &str, text: &str| format!(r#"{{"role": "{role}", "content": "{text}"}}"#);
    let two = [
        message("system", "Be brief."),
        message("user", "<image>Where is the <ref-object>?"),
        message("assistant", "<bbox>"),
    ];
    let two = two.iter().cloned().chain([message("user", "And the <ref-object>?"), message("assistant", "<bbox>")]);
    let two = two.collect::<Vec<_>>().join(",");
    let line = |messages: &str, objects: &str| {
        format!(r#"{{"messages": [{messages}], "images": ["a.png"], "objects": {objects}}}"#)
    };
    let named = r#"{"ref": ["nodule", "mass"], "bbox": [[5, 5, 15, 15], [30, 30, 40, 40]]}"#;
    let pointed = two.replace("And the <ref-object>?", "What is <bbox>?");
    let lines = [
        line(&two, named),
        line(&two.replace("<bbox>", "here"), named),
        line(&pointed, r#"{"ref": ["nodule"], "bbox": [[5, 5, 15, 15], [30, 30, 40, 40], [1, 1, 4, 4]]}"#),
        line(
            &format!("{},{}", message("user", "What is <bbox>?"), message("assistant", "A <ref-object>.")),
            r#"{"ref": ["cyst"], "bbox": [[1, 1, 4, 4]]}"#,
        ),
        line(&format!("{},{}", message("user", "<image>Find it"), message("user", "again")), "null"),
    ];
    set.write("train.jsonl", lines.join("\n"));
    let (report, r) = set.import(Format::MsSwift, &options());
    assert_eq!(r.keys().collect::<Vec<_>>(), ["train-0-0", "train-0-1", "train-2-0"]);
    let first = &r["train-0-0"];
    let second = &r["train-0-1"];
    assert_eq!(
        (first.question.as_str(), boxes(first), first.category.as_str()),
        ("Where is the nodule?", vec![[5.0, 5.0, 15.0, 15.0]], "nodule")
    );
    assert_eq!(
        (second.question.as_str(), boxes(second), second.category.as_str()),
        ("And the mass?", vec![[30.0, 30.0, 40.0, 40.0]], "mass")
    );
    assert!([first, second].iter().all(|r| r.extra["system"] == "Be brief."));
    assert_eq!(boxes(&r["train-2-0"]), [[5.0, 5.0, 15.0, 15.0]]);
    assert_eq!(
        reasons(&report),
        [
            ("it has several turns, and boxes without a <bbox>", 1),
            ("its question contains a box", 2),
            ("its turns are not user, then assistant", 1)
        ]
    );
}

#[test]
fn ms_swift_query_and_response() {
    let set = with_images(&["a.png"]);
    let caption =
        |name: &str, b: &str| format!(r#"{{"caption": "{name}", "bbox": {b}, "bbox_type": "real", "image": 0}}"#);
    let lines = [
        format!(r#"{{"query": "<image>Find the nodule", "response": "<bbox>", "images": ["a.png"], "objects": [{}]}}"#, caption("nodule", "[5, 5, 25, 25]")),
        format!(
            r#"{{"system": "Be brief.", "query": "And the <ref-object>?", "response": "<bbox>", "history": [["<image>Is it normal?", "No."]], "images": ["a.png"],
                "objects": [{}]}}"#,
            caption("mass", "[[1, 2, 3, 4], [5, 6, 7, 8]]")
        )
        .replace('\n', ""),
        r#"{"query": "<image>What is it?", "response": "A scan.", "images": ["a.png"]}"#.to_owned(),
        r#"{"response": "A scan.", "images": ["a.png"]}"#.to_owned(),
    ];
    set.write("train.jsonl", lines.join("\n"));
    let (report, r) = set.import(Format::MsSwift, &options());
    assert_eq!(
        (boxes(&r["train-0"]), r["train-0"].labels.as_slice()),
        (vec![[5.0, 5.0, 25.0, 25.0]], &["nodule".to_owned()][..])
    );
    assert_eq!((r["train-0"].question.as_str(), r["train-0"].answer.as_str()), ("Find the nodule", ""));
    assert!(
        r["train-1-0"].is_text() && r["train-1-0"].answer == "No." && r["train-1-0"].extra["system"] == "Be brief."
    );
    assert_eq!((boxes(&r["train-1-1"]).len(), r["train-1-1"].category.as_str()), (2, "mass"));
    assert!(r["train-2"].is_text());
    assert_eq!(reasons(&report), [("it has no question", 1)]);
}

#[test]
fn llava_variants_of_names_and_roles() {
    let set = with_images(&["images/a.jpg"]);
    let turns = |user: &str, assistant: &str| {
        format!(
            r#"{{"from": "{user}", "value": "<image>\nWhat is it?"}}, {{"from": "{assistant}", "value": "A scan."}}"#
        )
    };
    let rows = [
        format!(r#"{{"id": "typo", "image": "a.jpg", "conversatons": [{}]}}"#, turns("human", "gpt")),
        format!(
            r#"{{"id": 1, "image": "a.jpg", "conversations": [{{"from": "system", "value": "Be brief."}}, {}]}}"#,
            turns("human", "gpt")
        ),
        format!(r#"{{"id": 2, "image": ["a.jpg"], "conversations": [{}]}}"#, turns("user", "assistant")),
        format!(r#"{{"id": 3, "image": ["a.jpg", "a.jpg"], "conversations": [{}]}}"#, turns("human", "gpt")),
        format!(
            r#"{{"id": 4, "image": "a.jpg", "conversations": [{}, {{"from": "system", "value": "x"}}]}}"#,
            turns("human", "gpt")
        ),
        format!(
            r#"{{"id": 5, "image": "a.jpg", "conversations": [{}, {{"from": "human", "value": "x"}}]}}"#,
            turns("human", "gpt")
        ),
    ];
    set.write("train.json", format!("[{}]", rows.join(",")));
    let (report, r) = set.import(Format::Llava, &options());
    assert_eq!(r.keys().collect::<Vec<_>>(), ["1", "2", "typo"]);
    assert!(r.values().all(|r| r.question == "What is it?" && r.answer == "A scan." && r.is_text()));
    assert_eq!((&r["1"].extra["system"], r["2"].extra.get("system")), (&"Be brief.".into(), None));
    assert_eq!(reasons(&report), [("it has no image or several", 1), ("its turns are not human, then gpt", 2)]);
}

#[test]
fn med_grit_tasks_and_turns() {
    let set = fixtures::dataset(Format::MedGrit);
    let name = "ct_00--AMOS2022--amos_0001--x_0010";
    let row = |q: &str, a: &str| format!(r#"[{{"id": "{name}", "conversations": [["{q}", "{a}"]]}}]"#);
    set.write("Test_VG.json", row("Where is the <ref>liver</ref>?", "<box>(1,2),(3,4)</box>"));
    set.write("Test_ROC.json", row("What is <box>(1,2),(3,4)</box>?", "liver"));
    set.write("Test_GC.json", row("Describe <box>(1,2),(3,4)</box>.", "a liver"));
    set.write("Test_MII.json", row("What is shown?", "a scan of the liver"));
    let (report, r) = set.import(Format::MedGrit, &options());
    let mut tasks: Vec<_> = r.values().filter_map(|r| r.extra.get("suite_task")?.as_str()).collect();
    tasks.sort_unstable();
    assert_eq!(tasks, ["MIA", "RC", "ROC", "VG"]);
    assert_eq!(r[&format!("{name}-3")].extra["turn"], 3);
    assert!(
        report.notes.len() == 1 && report.notes[0].contains("train.json: the file name contains no task"),
        "{:?}",
        report.notes
    );
    let task = |task: &str| ImportOptions { task: Some(task.into()), ..options() };
    let (report, r) = set.import(Format::MedGrit, &task("RC"));
    assert!(r.values().all(|r| r.extra["suite_task"] == "RC") && report.notes.is_empty());
    let e = set.try_import(Format::MedGrit, &task("QA")).unwrap_err().to_string();
    assert!(e.contains("unknown task \"QA\": the tasks are VG, ROC, RC, MIA"), "{e}");
}

#[test]
fn images_of_another_folder_are_found() {
    let set = DatasetFixture::new();
    let entry = |id: &str| {
        format!(
            r#"{{"id": "{id}", "image": "{id}.png", "conversations": [{{"from": "human", "value": "q"}}, {{"from": "gpt", "value": "a"}}]}}"#
        )
    };
    set.write("d.json", format!("[{}, {}]", entry("x"), entry("sub/y"))).image("x.png", (8, 8), 1);
    set.image("../far/sub/y.png", (8, 8), 2).image("../far/x.png", (8, 8), 3);
    let images = Some(set.dir.path().join("far"));
    let (_, r) = set.import(Format::Llava, &ImportOptions { images: images.clone(), ..options() });
    assert_eq!(r["x"].image, "records_images/x.png", "images of the data set come first");
    assert_eq!(r["sub/y"].image, "records_images/other_images/sub/y.png");
    set.write("d.json", format!("[{}, {}]", entry("../../set/x"), entry("x")));
    let (report, r) = set.import(Format::Llava, &ImportOptions { images: images.clone(), ..options() });
    assert_eq!((r.len(), reasons(&report)), (1, vec![("its image path leaves the source folder", 1)]));
    let e =
        fixtures::dataset(Format::Yolo).try_import(Format::Yolo, &ImportOptions { images, ..options() }).unwrap_err();
    assert!(e.to_string().contains("leave out --images"), "{e}");
    let missing =
        set.try_import(Format::Llava, &ImportOptions { images: Some("/no/such".into()), ..options() }).unwrap_err();
    assert_eq!(missing.to_string(), "/no/such does not exist");
}

#[test]
fn nih_image_with_boxes_and_no_finding() {
    let set = fixtures::dataset(Format::NihChestXray);
    let file = set.src().join("Data_Entry_2017.csv");
    let text = std::fs::read_to_string(&file).unwrap().replace("Atelectasis|Infiltration", "No Finding");
    std::fs::write(&file, text).unwrap();
    let (report, r) = set.import(Format::NihChestXray, &options());
    assert_eq!(r["00000013_005"].boxes.len(), 2);
    assert!(reasons(&report).contains(&("it has a box and no finding", 1)) && r.len() == 2);
}

#[test]
fn deeplesion_noisy_lesions_count_for_their_class() {
    let set = fixtures::dataset(Format::DeepLesion);
    let file = set.src().join("DL_info.csv");
    let text = std::fs::read_to_string(&file).unwrap().replace("-1,1,\"103", "5,1,\"103");
    std::fs::write(&file, text).unwrap();
    let class = Some(ClassFilter { class: "lung lesion".into(), category: "lesion".into() });
    let (report, r) = set.import(Format::DeepLesion, &ImportOptions { class, ..options() });
    assert_eq!(
        r.keys().collect::<Vec<_>>(),
        ["000001_01_01_109"],
        "the lung lesion of the other slice is marked noisy"
    );
    assert!(reasons(&report).contains(&("all its boxes were left out", 1)));
}

#[test]
fn questions_about_other_classes_are_left_out() {
    let set = fixtures::dataset(Format::MedGrit);
    let class = Some(ClassFilter { class: "liver".into(), category: "liver".into() });
    let (report, r) = set.import(Format::MedGrit, &ImportOptions { class, ..options() });
    assert!(r.values().all(|r| r.is_text() || r.category == "liver" && r.boxes.len() == 1), "{r:?}");
    assert!(reasons(&report).contains(&("its question is about other classes", 2)), "{:?}", reasons(&report));
}
