//! Malformed input that every importer must handle: objects that cannot be read or named, missing values, files that macOS adds, UTF-16
//! texts, missing folders.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value;
use unveil_data::records::RecordFile;

use super::{DatasetFixture, Format, ImportOptions, fixtures};

/// Adds images named `bad…` to a data set, each with an object that cannot be read or named or with no usable one, alone or besides a
/// valid object. Returns their number.
fn add_bad_images(format: Format, set: &DatasetFixture) -> usize {
    let image = |name: &str| set.image(name, (64, 64), name.len() as u8);
    let add = |name: &str, text: &str| {
        let old = std::fs::read_to_string(set.src().join(name)).unwrap_or_default();
        set.write(name, old + text);
    };
    let edit = |name: &str, edit: &dyn Fn(&mut Value)| {
        let mut doc: Value = serde_json::from_slice(&std::fs::read(set.src().join(name)).unwrap()).unwrap();
        edit(&mut doc);
        set.write(name, doc.to_string());
    };
    let push = |name: &str, key: &str, row: &str| {
        edit(name, &|doc: &mut Value| {
            let list = if key.is_empty() { doc } else { &mut doc[key] };
            list.as_array_mut().unwrap().push(serde_json::from_str(row).unwrap());
        });
    };
    match format {
        Format::Voc => {
            let good = "<object><name>cyst</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object>";
            let bad = [
                good.replace("<name>cyst</name>", ""),
                good.replace("cyst", " ") + good,
                good.replace("<xmin>1</xmin>", "<xmin>left</xmin>"),
                good.replace("<xmin>1</xmin>", "") + good,
                good.replace("<xmax>9</xmax>", "<xmax>1</xmax>"),
            ];
            for (k, object) in bad.iter().enumerate() {
                image(&format!("JPEGImages/bad{k}.jpg"));
                set.write(&format!("Annotations/bad{k}.xml"), format!("<annotation>{object}</annotation>"));
                add("ImageSets/Main/train.txt", &format!("bad{k}\n"));
            }
            bad.len()
        }
        Format::Coco | Format::Tbx11k => {
            let (file, folder) = match format {
                Format::Coco => ("annotations/instances_train2017.json", "train2017"),
                _ => ("annotations/json/TBX11K_train.json", "imgs/health"),
            };
            let bad = [
                r#""category_id": 1"#,
                r#""category_id": 1, "bbox": null, "segmentation": {"counts": [1], "size": [1, 1]}"#,
                r#""category_id": 77, "bbox": [1, 2, 3, 4]"#,
                r#""category_id": null, "bbox": [1, 2, 3, 4]"#,
                r#""category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 1"#,
                r#""category_id": 1, "bbox": [1, 2, 0, 4]"#,
                r#""category_id": 1, "bbox": [1, null, 3, 4]}, {"image_id": 906, "category_id": 1, "bbox": [1, 2, 3, 4]"#,
            ];
            for (k, annotation) in bad.iter().enumerate() {
                image(&format!("{folder}/bad{k}.png"));
                let name = folder.strip_prefix("imgs/").map_or(format!("bad{k}.png"), |f| format!("{f}/bad{k}.png"));
                push(
                    file,
                    "images",
                    &format!(r#"{{"id": {}, "file_name": "{name}", "width": 64, "height": 64}}"#, 900 + k),
                );
                let rows: Value =
                    serde_json::from_str(&format!(r#"[{{"image_id": {}, {annotation}}}]"#, 900 + k)).unwrap();
                rows.as_array().unwrap().iter().for_each(|row| push(file, "annotations", &row.to_string()));
                add("lists/TBX11K_train.txt", &format!("{name}\n"));
            }
            bad.len()
        }
        Format::Yolo | Format::KidneyStone => {
            let bad = [
                "9 0.5 0.5 0.1 0.1",
                "lesion 0.5 0.5 0.1 0.1\n0 0.5 0.5 0.1 0.1",
                "0 0.5 ? 0.1 0.1",
                "0 0.5 0.5 0.1",
                "0 0.5 0.5 0 0",
            ];
            for (k, label) in bad.iter().enumerate() {
                image(&format!("train/images/bad{k}.jpg"));
                set.write(&format!("train/labels/bad{k}.txt"), label);
            }
            image("train/images/bad_text.jpg");
            set.write("train/labels/bad_text.txt", b"0 0.5 0.5 0.1 0.1 \xcf\xa2\n");
            bad.len() + 1
        }
        Format::Via => {
            let rect = r#"{"shape_attributes": {"name": "rect", "x": 1, "y": 2, "width": 3, "height": 4}, "region_attributes": {"label": "mass"}}"#;
            let bad = [
                format!("[{}]", rect.replace("mass", "")),
                format!("[{}, {rect}]", rect.replace("\"mass\"", "null")),
                format!("[{}]", rect.replace("\"x\": 1", "\"x\": null")),
                format!("[{}]", rect.replace("rect", "cloud")),
                r#""lost""#.to_owned(),
                format!("[{}]", rect.replace("\"width\": 3", "\"width\": 0")),
            ];
            for (k, regions) in bad.iter().enumerate() {
                image(&format!("images/bad{k}.png"));
                edit("via.json", &|doc: &mut Value| {
                    doc["_via_img_metadata"][format!("bad{k}")] =
                        serde_json::from_str(&format!(r#"{{"filename": "bad{k}.png", "regions": {regions}}}"#))
                            .unwrap();
                });
            }
            image("images/bad_row.png").image("images/bad_count.png", (64, 64), 99);
            add("via.csv", "bad_row.png,9,{},1,0,{\"name\": cut,{}\nbad_count.png,9,{},1,0,{},{}\n");
            bad.len() + 2
        }
        Format::DeepLesion => {
            let row = |name: &str, boxes: &str| {
                format!(
                    "{name},9,1,1,1,\"1\",\"{boxes}\",\"2, 1\",\"0.1\",3,0,\"1, 2\",\"1, 1, 5\",\"64, 64\",\"-175, 275\",F,62,1\n"
                )
            };
            for name in ["bad_01_01_001.png", "bad_01_01_002.png", "bad_01_01_003.png"] {
                image(&format!("Images_png/{name}"));
            }
            add("DL_info.csv", &row("bad_01_01_001.png", "1, 2, x, 9"));
            add("DL_info.csv", &(row("bad_01_01_002.png", "1, 2, 9, 9") + &row("bad_01_01_002.png", "1, 2, 9")));
            add("DL_info.csv", &row("bad_01_01_003.png", "9, 9, 9, 9"));
            3
        }
        Format::NihChestXray => {
            for k in 0..4 {
                image(&format!("images_001/images/bad{k}.png"));
                add("Data_Entry_2017.csv", &format!("bad{k}.png,No Finding,0,9{k},60,M,AP,1,1,0.1,0.1,\n"));
            }
            add("BBox_List_2017.csv", "bad0.png,Mass,1,2,x,4,,,\nbad1.png,,1,2,3,4,,,\nbad2.png,Mass,1,2,0,4,,,\n");
            add("BBox_List_2017.csv", "bad3.png,Mass,1,2,3,4,,,\nbad3.png,Mass,,,,,,,\n");
            4
        }
        Format::KvasirSeg => {
            for (k, boxes) in [
                r#"[{"label": "polyp", "xmin": 1, "ymin": 1, "xmax": null, "ymax": 5}]"#,
                r#"[{"label": "polyp", "xmin": 1, "ymin": 1, "xmax": 9, "ymax": 5}, {"label": "polyp"}]"#,
                "null",
            ]
            .iter()
            .enumerate()
            {
                image(&format!("images/bad{k}.jpg"));
                edit("kavsir_bboxes.json", &|doc: &mut Value| {
                    doc[format!("bad{k}")] =
                        serde_json::from_str(&format!(r#"{{"height": 64, "width": 64, "bbox": {boxes}}}"#)).unwrap();
                });
            }
            3
        }
        Format::Slake => {
            let bad = [
                r#"[{"Liver": [1, 2, null, 4]}]"#,
                r#"[{"": [1, 2, 3, 4]}]"#,
                r#"[{"Liver": [1, 2, 3, 4]}, "Spleen"]"#,
                r#"[{"Liver": [1, 2, 0, 4]}]"#,
            ];
            for (k, objects) in bad.iter().enumerate() {
                image(&format!("imgs/bad{k}/source.jpg"));
                set.write(&format!("imgs/bad{k}/detection.json"), objects);
                push(
                    "train.json",
                    "",
                    &format!(r#"{{"img_name": "bad{k}/source.jpg", "question": "q?", "answer": "a", "qid": 9{k}}}"#),
                );
            }
            bad.len()
        }
        Format::MedGrit => {
            let bad = [
                r#"["Where is the <ref>liver</ref>?", "<box>(1,2),(3,x)</box>"]"#,
                r#"["Where is it?", "<box>(1,2),(30,40)</box>"]"#,
                r#"["Where is the <ref>liver</ref>?", "<box>(1,2),(30,40)"]"#,
                r#"["Where is the <ref>liver</ref>?", null]"#,
                r#"["Where is the <ref>liver</ref>?", "<box>(1,2),(1,40)</box>"]"#,
            ];
            for (k, turn) in bad.iter().enumerate() {
                image(&format!("images/bad{k}.png"));
                push("train.json", "", &format!(r#"{{"id": "bad{k}", "conversations": [{turn}]}}"#));
            }
            bad.len()
        }
        Format::MsSwift => {
            let bad = [
                r#""<bbox>"}], "objects": {"ref": ["cyst"], "bbox": []}"#,
                r#""here <bbox>"}], "objects": {"ref": ["cyst"], "bbox": null}"#,
                r#""<bbox>"}], "objects": {"ref": [null], "bbox": [[1, 2, 3, 4]]}"#,
                r#""<ref-object> <bbox>"}], "objects": {"ref": [], "bbox": [[1, 2, 3, 4]]}"#,
                r#""<bbox><bbox>"}], "objects": {"ref": ["cyst"], "bbox": [[1, 2, 3, 4], [1, 2, null, 4]]}"#,
                r#"null}], "objects": {"ref": ["cyst"], "bbox": []}"#,
                r#""<bbox>"}], "objects": {"ref": ["cyst"], "bbox": [[1, 2, 1, 4]]}"#,
            ];
            for (k, rest) in bad.iter().enumerate() {
                image(&format!("images/bad{k}.png"));
                let asked = r#"{"role": "user", "content": "<image>Where?"}"#;
                add(
                    "train.jsonl",
                    &format!(
                        "\n{{\"images\": [\"images/bad{k}.png\"], \"messages\": [{asked}, {{\"role\": \"assistant\", \"content\": {rest}}}"
                    ),
                );
            }
            bad.len()
        }
        Format::VqaRad => {
            image("VQA_RAD Image Folder/bad0.jpg").image("VQA_RAD Image Folder/bad1.jpg", (64, 64), 98);
            for (k, rest) in
                [r#""question": "q?", "answer": null"#, r#""question": null, "answer": "a""#].iter().enumerate()
            {
                push(
                    "VQA_RAD Dataset Public.json",
                    "",
                    &format!(r#"{{"qid": 9{k}, "image_name": "bad{k}.jpg", {rest}}}"#),
                );
            }
            2
        }
        Format::PmcVqa => {
            image("images/bad0.jpg").image("images/bad1.jpg", (64, 64), 98);
            add(
                "train.csv",
                "bad0.jpg,What?,, A:Mass , B:Cyst , C:Stone , D:None ,\nbad1.jpg,,Mass, A:Mass , B:Cyst , C:Stone , D:None ,A\n",
            );
            2
        }
        Format::OmniMedVqa => {
            for (k, rest) in
                [r#""question": "q?", "gt_answer": null"#, r#""question": null, "gt_answer": "Yes""#].iter().enumerate()
            {
                image(&format!("Images/bad{k}.png"));
                let row = format!(
                    r#"{{"question_id": "bad{k}", "image_path": "Images/bad{k}.png", "option_A": "Yes", "option_B": null, {rest}}}"#
                );
                push("QA_information/Open-access/ACRIMA.json", "", &row);
            }
            2
        }
        Format::MedVh => {
            for (k, rest) in [
                r#""question": "q?", "gt": null"#,
                r#""question": null, "gt": "A""#,
                r#""question": "q?", "gt": "A", "choices": null"#,
            ]
            .iter()
            .enumerate()
            {
                image(&format!("text_generation/FCJ/bad{k}.jpg"));
                let row = format!(
                    r#"{{"question_id": 9{k}, "img_name": "bad{k}.jpg", "choices": "A: Yes. B: No.", {rest}}}"#
                );
                push("text_generation/test_FCJ.json", "", &row);
            }
            image("text_generation/report_generation/bad3.jpg");
            push(
                "text_generation/test_report_generation.json",
                "",
                r#"{"report_id": 9, "image_name": "bad3.jpg", "gt_labels": [null]}"#,
            );
            4
        }
        Format::Llava => {
            for (k, (q, a)) in [("null", "\"a\""), ("\"q\"", "null"), ("\"<image>\"", "\"a\"")].iter().enumerate() {
                image(&format!("part-000001/bad{k}.jpg"));
                let row = format!(
                    r#"{{"id": "bad{k}", "image": "part-000001/bad{k}.jpg", "conversations": [{{"from": "human", "value": {q}}}, {{"from": "gpt", "value": {a}}}]}}"#
                );
                push("train.json", "", &row);
            }
            3
        }
    }
}

#[test]
fn unreadable_objects_never_become_no_finding() {
    for format in Format::ALL {
        let set = fixtures::dataset(format);
        let (before, good) = set.import(format, &ImportOptions::default());
        let bad = add_bad_images(format, &set);
        let (report, records) = set.import(format, &ImportOptions::default());
        for r in records.values().filter(|r| r.image.contains("bad")) {
            // Questions about an image remain, because they are answered in text.
            let question = format == Format::Slake && r.is_text() && r.answer == "a";
            assert!(question, "{}: {} says {:?} {:?}", format.name(), r.image, r.boxes, r.answer);
        }
        let reported = report.left_out_count() - before.left_out_count();
        assert!(reported >= bad, "{}: {reported} of {bad} in {:?}", format.name(), report.left_out_by_reason);
        let kept: Vec<&String> = good.keys().filter(|id| !records.contains_key(*id)).collect();
        assert_eq!(kept, Vec::<&String>::new(), "{}: intact images remain", format.name());
    }
}

/// Returns all files of a data set except its images.
fn annotations(set: &DatasetFixture) -> Vec<PathBuf> {
    files(&set.src())
        .into_iter()
        .filter(|p| !p.extension().is_some_and(|e| e.eq_ignore_ascii_case("png") || e.eq_ignore_ascii_case("jpg")))
        .collect()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut out = Vec::new();
    for path in std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()) {
        if path.is_dir() { out.extend(files(&path)) } else { out.push(path) }
    }
    out.sort();
    out
}

/// Returns the images whose records mean "no finding".
fn no_findings(set: &DatasetFixture) -> BTreeSet<String> {
    let records = RecordFile::load(&set.out()).unwrap().records;
    records.into_iter().filter(|r| !r.is_text() && r.boxes.is_empty()).map(|r| r.image).collect()
}

/// Returns each variant of a file's text with one value removed.
fn without_one_value(file: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(file).unwrap();
    let ending = file.extension().and_then(|e| e.to_str()).unwrap_or_default();
    match ending {
        "json" => {
            let doc: Value = serde_json::from_str(&text).unwrap();
            with_one_null(&doc).iter().map(Value::to_string).collect()
        }
        "jsonl" => {
            let lines: Vec<&str> = text.lines().collect();
            let each = lines.iter().enumerate().flat_map(|(k, line)| {
                let doc: Value = serde_json::from_str(line).unwrap();
                let lines = &lines;
                with_one_null(&doc).into_iter().map(move |doc| {
                    let new = doc.to_string();
                    let all = lines.iter().enumerate().map(|(i, l)| if i == k { new.as_str() } else { l });
                    all.collect::<Vec<_>>().join("\n")
                })
            });
            each.collect()
        }
        "csv" => {
            let mut reader = csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(text.as_bytes());
            let rows: Vec<Vec<String>> =
                reader.records().map(|r| r.unwrap().iter().map(str::to_owned).collect()).collect();
            let cells = rows.iter().enumerate().skip(1).flat_map(|(r, row)| (0..row.len()).map(move |c| (r, c)));
            let each = cells.filter(|(r, c)| !rows[*r][*c].is_empty()).map(|(r, c)| {
                let mut rows = rows.clone();
                rows[r][c].clear();
                let mut out = csv::WriterBuilder::new().flexible(true).from_writer(Vec::new());
                rows.iter().for_each(|row| out.write_record(row).unwrap());
                String::from_utf8(out.into_inner().unwrap()).unwrap()
            });
            each.collect()
        }
        "xml" => {
            let parts: Vec<&str> = text.split_inclusive('>').collect();
            let full = |p: &str| p.find('<').filter(|at| *at > 0);
            let each = parts.iter().enumerate().filter_map(|(k, p)| Some((k, full(p)?)));
            each.map(|(k, at)| parts.iter().enumerate().map(|(i, p)| if i == k { &p[at..] } else { p }).collect())
                .collect()
        }
        "txt" => {
            let words: Vec<&str> = text.split_inclusive(char::is_whitespace).collect();
            let blanked = |w: &str| w.replace(|c: char| !c.is_whitespace(), "?");
            let each = (0..words.len()).map(|k| {
                words.iter().enumerate().map(|(i, w)| if i == k { blanked(w) } else { (*w).to_owned() }).collect()
            });
            each.collect()
        }
        "yaml" => {
            // Quoted scalars are names.
            let parts: Vec<&str> = text.split('\'').collect();
            let with_null = |k: usize| format!("{}~{}", parts[..k].join("'"), parts[k + 1..].join("'"));
            (1..parts.len()).step_by(2).map(with_null).collect()
        }
        other => panic!("a fixture holds .{other}"),
    }
}

/// Returns each variant of a document with one value set to null.
fn with_one_null(doc: &Value) -> Vec<Value> {
    fn walk(value: &Value, at: String, out: &mut Vec<String>) {
        let escaped = |key: &str| key.replace('~', "~0").replace('/', "~1");
        match value {
            Value::Object(map) => map.iter().for_each(|(k, v)| walk(v, format!("{at}/{}", escaped(k)), out)),
            Value::Array(list) => list.iter().enumerate().for_each(|(k, v)| walk(v, format!("{at}/{k}"), out)),
            _ => {}
        }
        out.push(at);
    }
    let mut places = Vec::new();
    walk(doc, String::new(), &mut places);
    let with_null = |at: &String| {
        let mut doc = doc.clone();
        *doc.pointer_mut(at).unwrap() = Value::Null;
        doc
    };
    places.iter().map(with_null).collect()
}

#[test]
fn missing_values_never_become_no_finding() {
    for format in Format::ALL {
        let set = fixtures::dataset(format);
        set.try_import(format, &ImportOptions::default()).unwrap();
        let expected = no_findings(&set);
        for file in annotations(&set) {
            let whole = std::fs::read(&file).unwrap();
            for text in without_one_value(&file) {
                std::fs::write(&file, &text).unwrap();
                if set.try_import(format, &ImportOptions::default()).is_ok() {
                    let new: Vec<_> = no_findings(&set).into_iter().filter(|image| !expected.contains(image)).collect();
                    assert_eq!(new, Vec::<String>::new(), "{}: {} as {text}", format.name(), file.display());
                }
            }
            std::fs::write(&file, whole).unwrap();
        }
    }
}

#[test]
fn files_that_macos_adds_are_ignored() {
    for format in Format::ALL {
        let set = fixtures::dataset(format);
        let (report, records) = set.import(format, &ImportOptions::default());
        for file in files(&set.src()) {
            let junk = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        \xff\xfe";
            std::fs::write(file.with_file_name(format!("._{}", file.file_name().unwrap().to_string_lossy())), junk)
                .unwrap();
            let below = file.strip_prefix(set.src()).unwrap().to_string_lossy().into_owned();
            set.write(&format!("__MACOSX/{below}"), junk);
            let (folder, name) = below.rsplit_once('/').unwrap_or((".", &below));
            set.write(&format!("{folder}/__MACOSX/{name}"), junk);
        }
        assert_eq!(set.import(format, &ImportOptions::default()), (report, records), "{}", format.name());
    }
}

#[test]
fn utf16_texts_are_read() {
    for format in Format::ALL {
        let set = fixtures::dataset(format);
        let whole = set.import(format, &ImportOptions::default());
        for (k, file) in annotations(&set).into_iter().enumerate() {
            let text = std::fs::read_to_string(&file).unwrap();
            let units = format!("\u{feff}{text}").encode_utf16().collect::<Vec<_>>();
            let bytes: Vec<u8> =
                units.iter().flat_map(|u| if k % 2 == 0 { u.to_le_bytes() } else { u.to_be_bytes() }).collect();
            std::fs::write(&file, bytes).unwrap();
        }
        assert_eq!(set.import(format, &ImportOptions::default()), whole, "{}", format.name());
    }
}

#[test]
fn missing_source_folder_is_an_error() {
    for format in Format::ALL {
        let set = DatasetFixture::new();
        let import =
            |src: &Path| super::import(format, src, &set.out(), &ImportOptions::default()).unwrap_err().to_string();
        let missing = set.src().join("such");
        assert_eq!(import(&missing), format!("{} does not exist", missing.display()));
        set.write("set.zip", "");
        let file = set.src().join("set.zip");
        assert_eq!(import(&file), format!("{} is a file, not a folder", file.display()));
    }
}
