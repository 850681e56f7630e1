//! Tests of the Pascal VOC importer, on BCCD and on small folders.

use std::path::{Path, PathBuf};

use unveil_core::BoxForm;
use unveil_data::image_store::Image;
use unveil_data::records::RecordFile;
use unveil_preprocess::codec::{Sizes, answer_text, codec, read_answer};
use unveil_testkit::bccd;

use super::{Format, ImportError, ImportOptions, ImportReport};
use unveil_datasets::import::ClassFilter;

fn import(src: &Path, out: &Path, options: &ImportOptions) -> Result<ImportReport, ImportError> {
    super::import(Format::Voc, src, out, options)
}

#[test]
fn bccd_is_imported_completely() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("all.jsonl");
    let report = import(&bccd(), &out, &ImportOptions::default()).unwrap();
    assert_eq!((report.records, report.objects, report.boxes), (364, 4888, 4886));
    let splits = ["train", "val", "test"].map(|s| report.splits[s]);
    assert_eq!(splits, [205, 87, 72]);
    let left: Vec<&str> = report.left_out.iter().map(|l| l.file.rsplit('/').next().unwrap()).collect();
    assert_eq!(left, ["BloodImage_00338.xml", "BloodImage_00343.xml"]);
    assert!(report.left_out.iter().all(|l| l.reason == "has no area"), "{:?}", report.left_out);
    let file = RecordFile::load(&out).unwrap();
    assert_eq!(file.records.len(), 364);
    assert!(file.records.iter().all(|r| r.labels.len() == r.boxes.len() && r.faults(None).is_empty()));
    let image = file.open_image(&file.records[0]).unwrap();
    assert_eq!([image.width(), image.height()], file.records[0].image_size.unwrap());
    assert!(file.records[0].image.starts_with("all_images/"), "{}", file.records[0].image);
    assert!(file.records[0].category.contains("RBC, WBC"), "{}", file.records[0].category);
    let size = file.records.iter().map(|r| r.boxes.len()).sum::<usize>();
    assert_eq!(size, 4886);
}

#[test]
fn bccd_white_blood_cells_of_the_test_split() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("wbc.jsonl");
    let options = ImportOptions {
        split: Some("test".into()),
        class: Some(ClassFilter { class: "WBC".into(), category: "white blood cell".into() }),
        ..ImportOptions::default()
    };
    let report = import(&bccd(), &out, &options).unwrap();
    let file = RecordFile::load(&out).unwrap();
    let count = |k: usize| file.records.iter().filter(|r| r.boxes.len() == k).count();
    assert_eq!((report.records, count(1), count(2), count(0)), (72, 65, 3, 4));
    assert!(
        file.records.iter().all(|r| r.category == "white blood cell" && r.question == "Where is the white blood cell?")
    );
}

/// Boxes of a real data set survive import, record file and every codec.
#[test]
fn bccd_boxes_round_trip_in_every_form() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("all.jsonl");
    import(&bccd(), &out, &ImportOptions::default()).unwrap();
    let file = RecordFile::load(&out).unwrap();
    assert!(unveil_datasets::check::require_valid(&file, None).is_ok());
    for r in &file.records {
        let [w, h] = r.image_size.unwrap();
        // Qwen2.5-VL resizes 640 x 480 to multiples of 28.
        let sizes = Sizes { original: (w, h), resized: (644, 476) };
        for form in BoxForm::ALL {
            let text = answer_text(codec(form), r, &sizes).unwrap();
            let back = read_answer(codec(form), &unveil_core::AnswerReader::default(), &text, &sizes);
            assert_eq!((back.boxes.len(), back.fault), (r.boxes.len(), None), "{text}");
            // Each edge is rounded by at most half a step, 0.52 pixels.
            for truth in &r.boxes {
                let best = back.boxes.iter().map(|b| b.iou(truth)).fold(0.0, f64::max);
                let side = f64::from((truth.x2 - truth.x1).min(truth.y2 - truth.y1));
                assert!(best >= 1.0 - 4.0 * 0.52 / side.max(3.0), "{} {form}: {truth:?} {best}", r.id);
            }
        }
    }
}

/// Creates a small VOC folder: `a` with a valid, a flat, an inverted and an overhanging box, `b` without objects.
fn small_folder(root: &Path) -> PathBuf {
    let src = root.join("voc");
    for d in ["Annotations", "JPEGImages", "ImageSets/Main"] {
        std::fs::create_dir_all(src.join(d)).unwrap();
    }
    for stem in ["a", "b"] {
        std::fs::write(src.join(format!("JPEGImages/{stem}.png")), Image::new(20, 10).to_png().unwrap()).unwrap();
    }
    let object = |c: [i32; 4]| {
        format!(
            "<object><name>x</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>",
            c[0], c[1], c[2], c[3]
        )
    };
    let all: String = [[1, 1, 20, 10], [3, 3, 3, 8], [9, 1, 2, 5], [0, 0, 21, 5]].map(object).concat();
    std::fs::write(src.join("Annotations/a.xml"), format!("<annotation>{all}</annotation>")).unwrap();
    let size = "<size><width>19</width><height>10</height></size>";
    std::fs::write(src.join("Annotations/b.xml"), format!("<annotation>{size}</annotation>")).unwrap();
    std::fs::write(src.join("ImageSets/Main/train.txt"), "a\n").unwrap();
    src
}

#[test]
fn invalid_boxes_are_left_out_and_reported() {
    let dir = tempfile::tempdir().unwrap();
    let src = small_folder(dir.path());
    let report = import(&src, &dir.path().join("out.jsonl"), &ImportOptions::default()).unwrap();
    let reasons: Vec<_> = report.left_out.iter().map(|l| (l.object, l.reason.as_str())).collect();
    assert_eq!(reasons, [(1, "has no area"), (2, "is inverted"), (3, "lies outside the image")]);
    assert_eq!((report.boxes, report.size_mismatch.len(), report.images_copied_to), (1, 1, None));
    let file = RecordFile::load(&dir.path().join("out.jsonl")).unwrap();
    assert_eq!((file.records[0].image.as_str(), file.records[0].split.as_str()), ("voc/JPEGImages/a.png", "train"));
    assert_eq!((file.records[1].category.as_str(), file.records[1].boxes.len()), ("", 0));
    assert_eq!(file.records[0].source, "voc");
}

#[test]
fn errors_name_the_file_and_write_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let src = small_folder(dir.path());
    let out = dir.path().join("out.jsonl");
    let run = |o: &ImportOptions| import(&src, &out, o).unwrap_err().to_string();
    let class = Some(ClassFilter { class: "y".into(), category: "y".into() });
    assert!(run(&ImportOptions { class, ..ImportOptions::default() }).contains("the classes are x"));
    assert!(run(&ImportOptions { split: Some("test".into()), ..ImportOptions::default() }).contains("test.txt"));
    std::fs::write(src.join("Annotations/b.xml"), "<annotation><obj").unwrap();
    assert!(run(&ImportOptions::default()).contains("b.xml: corrupt XML"));
    std::fs::write(src.join("Annotations/b.xml"), "<annotation></annotation>").unwrap();
    std::fs::write(src.join("JPEGImages/b.png"), "no image").unwrap();
    assert!(run(&ImportOptions::default()).contains("b.png"));
    std::fs::remove_file(src.join("JPEGImages/b.png")).unwrap();
    assert!(run(&ImportOptions::default()).contains("JPEGImages/b: no image"));
    std::fs::write(src.join("ImageSets/Main/test.txt"), "a\n").unwrap();
    assert!(run(&ImportOptions::default()).contains("a is in both train.txt and test.txt"));
    assert!(
        import(&dir.path().join("gone"), &out, &ImportOptions::default()).unwrap_err().to_string().contains("gone")
    );
    assert!(!out.exists());
}
