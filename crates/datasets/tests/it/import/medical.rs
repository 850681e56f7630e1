//! Tests of data sets with boxes: DeepLesion, NIH ChestX-ray, TBX11K, Kvasir-SEG, kidney stones.

use super::{Format, ImportOptions, boxes, fixtures, pixels, reasons};

#[test]
fn deeplesion() {
    let set = fixtures::dataset(Format::DeepLesion);
    let (report, r) = set.import(Format::DeepLesion, &ImportOptions::default());
    let a = &r["000001_01_01_109"];
    assert_eq!(a.labels, ["mediastinal lesion", "lung lesion"]);
    assert_eq!(boxes(a), [[10.5, 11.0, 20.25, 21.5], [0.0, 30.0, 12.0, 44.0]]);
    assert_eq!((a.split.as_str(), a.modality.as_str(), &a.extra["patient"]), ("test", "CT", &"1".into()));
    assert_eq!((r["000002_01_01_014"].category.as_str(), r["000002_01_01_014"].split.as_str()), ("lesion", "train"));
    assert_eq!(
        reasons(&report),
        [
            ("is marked possibly noisy", 1),
            ("its box is not four numbers", 1),
            ("its image is missing", 1),
            ("lies outside the image by more than half", 1),
        ]
    );
    assert_eq!((report.clipped, report.leaks.len(), report.split_patients.len()), (1, 0, 0));
    let image = pixels(&set, a);
    let row: Vec<u8> = [0, 16, 32, 48].map(|x| image.pixel(x, 5)[0]).into();
    assert_eq!(row, [0, 128, 255, 255], "soft tissue between -175 and 275 Hounsfield units");
}

#[test]
fn nih() {
    let set = fixtures::dataset(Format::NihChestXray);
    let (report, r) = set.import(Format::NihChestXray, &ImportOptions::default());
    let a = &r["00000013_005"];
    assert_eq!(a.labels, ["atelectasis", "infiltration"]);
    let first = boxes(a)[0];
    assert!((first[2] - 311.8644).abs() < 1e-3 && (first[3] - 626.2056).abs() < 1e-3, "{first:?}");
    let none = &r["00000013_007"];
    assert_eq!((none.boxes.len(), none.extra["patient"].as_str(), none.split == a.split), (0, Some("13"), true));
    assert_eq!(
        reasons(&report),
        [("it has findings but no box", 1), ("its box is not four numbers", 1), ("its image is missing", 1)]
    );
    std::fs::remove_file(set.src().join("Data_Entry_2017.csv")).unwrap();
    let (_, alone) = set.import(Format::NihChestXray, &ImportOptions::default());
    assert_eq!((alone.len(), &alone["00000013_005"].split), (1, &a.split), "the file name also contains the patient");
}

#[test]
fn tbx11k() {
    let set = fixtures::dataset(Format::Tbx11k);
    let (report, r) = set.import(Format::Tbx11k, &ImportOptions::default());
    assert_eq!(r.keys().collect::<Vec<_>>(), ["h0001", "tb0005", "tb0007"]);
    assert_eq!(r["tb0005"].labels, ["active tuberculosis", "latent tuberculosis"]);
    assert_eq!((boxes(&r["tb0005"])[0], r["tb0007"].split.as_str()), ([5.0, 6.0, 25.0, 36.0], "val"));
    assert_eq!((r["h0001"].boxes.len(), r["h0001"].split.as_str()), (0, "train"));
    assert_eq!(
        reasons(&report),
        [("has tuberculosis but no box", 1), ("is sick without tuberculosis", 1), ("its image is missing", 1)]
    );
    set.write("lists/TBX11K_val.txt", "tb/tb0005.png\n");
    let both = set.try_import(Format::Tbx11k, &ImportOptions::default()).unwrap_err().to_string();
    assert!(both.contains("is in both lists/TBX11K_train.txt and TBX11K_val.txt"), "{both}");
    set.write("lists/TBX11K_val.txt", "");
    let (report, _) = set.import(Format::Tbx11k, &ImportOptions::default());
    assert!(reasons(&report).contains(&("is in no list", 1)));
}

#[test]
fn kvasir() {
    let set = fixtures::dataset(Format::KvasirSeg);
    let (report, r) = set.import(Format::KvasirSeg, &ImportOptions::default());
    assert_eq!(boxes(&r["cju0qkwl35piu0993l0dewei2"]), [[3.0, 5.0, 43.0, 33.0], [50.0, 40.0, 62.0, 52.0]]);
    // Stated as 31 x 26, stored as 62 x 52.
    assert_eq!((boxes(&r["cju0roawvklrq0799vmjorwfv"]), report.scaled), (vec![[8.0, 10.0, 28.0, 30.0]], 1));
    assert_eq!(r["cju0roawvklrq0799vmjorwfv"].split, "val");
    assert_eq!(reasons(&report), [("has no box", 1), ("its box is not four numbers", 1), ("its image is missing", 1)]);
}

#[test]
fn kidney_stone() {
    let set = fixtures::dataset(Format::KidneyStone);
    let (report, r) = set.import(Format::KidneyStone, &ImportOptions::default());
    let a = &r["train/images/p1_12_jpg.rf.0a1"];
    assert_eq!(
        (a.category.as_str(), boxes(a), a.modality.as_str()),
        ("kidney stone", vec![[24.0, 28.0, 40.0, 36.0]], "CT")
    );
    assert_eq!(report.split_patients, ["p1_12_jpg"], "augmented copies of one image in train and val");
    let (report, r) = set.import(Format::KidneyStone, &ImportOptions { resplit: true, ..Default::default() });
    assert_eq!(report.split_patients.len(), 0);
    assert_eq!(r["train/images/p1_12_jpg.rf.0a1"].split, r["valid/images/p1_12_jpg.rf.9ff"].split);
}
