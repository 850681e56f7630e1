//! DeepLesion (<https://nihcc.app.box.com/v/DeepLesion>; Yan et al., J. Med. Imaging 5(3), 2018).
//!
//! Files: `DL_info.csv` with one row per lesion; key slices at `Images_png/PPPPPP_SS_RR/KKK.png`, or flat as `PPPPPP_SS_RR_KKK.png` in
//! `Images_png/`, `Key_slices/` or `images/`.
//!
//! Fields: each slice becomes a record. `Bounding_boxes` are boxes in the frame of `Image_size`; those that leave it are clipped, those
//! mostly outside (of other frames) are left out. `Coarse_lesion_type` is the label; lesions of unknown type (-1: only val and test are
//! typed) are called "lesion". The slices are 16-bit PNG of Hounsfield units plus 32768 and are written as 8-bit images in the window
//! `DICOM_windows`, which is kept as the key `window`. `Patient_index` is the patient, `Train_Val_Test` the published split (by patient).
//!
//! Left out: rows marked `Possibly_noisy`, and slices with a row whose box cannot be read.

use std::collections::BTreeMap;

use serde_json::json;

use super::ImportError;
use super::draft::{Coords, DraftRecord, Object, ParsedDataset};
use super::source::stem;

/// Names of `Coarse_lesion_type`, which counts from 1 (the data set's README).
const TYPES: [&str; 8] = [
    "bone lesion",
    "abdominal lesion",
    "mediastinal lesion",
    "liver lesion",
    "lung lesion",
    "kidney lesion",
    "soft tissue lesion",
    "pelvic lesion",
];
const SPLITS: [&str; 3] = ["train", "val", "test"];
const NO_BOX: &str = "its box is not four numbers";

pub(super) fn read(dataset: &mut ParsedDataset) -> Result<(), ImportError> {
    dataset.question = Some("What is abnormal, and where?");
    let file = dataset.source.root.join("DL_info.csv");
    let table = dataset.source.read_csv(&file)?;
    let [name, patient, boxes, kind, noisy, size, window, split] = [
        "File_name",
        "Patient_index",
        "Bounding_boxes",
        "Coarse_lesion_type",
        "Possibly_noisy",
        "Image_size",
        "DICOM_windows",
        "Train_Val_Test",
    ]
    .map(|c| table.column(c));
    let [name, patient, boxes, kind] = [name?, patient?, boxes?, kind?];
    let [noisy, size, window, split] = [noisy?, size?, window?, split?];
    let mut draft_of_slice: BTreeMap<String, usize> = BTreeMap::new();
    // Slice and label of the lesions that were left out: those that could not be read, and those that are marked.
    let mut unread = Vec::new();
    let mut dropped = Vec::new();
    for (row, r) in table.rows.iter().enumerate() {
        let field = |c: usize| r.get(c).unwrap_or_default();
        let image = field(name).to_owned();
        let kind = field(kind).parse::<usize>().unwrap_or(0);
        let label = (*kind.checked_sub(1).and_then(|k| TYPES.get(k)).unwrap_or(&"lesion")).to_owned();
        if field(noisy) == "1" {
            dropped.push((image.clone(), label));
            dataset.leave_out(&file, row, &image, "is marked possibly noisy");
            continue;
        }
        let numbers = parse_numbers(field(boxes));
        let (four, rest) = numbers.as_chunks::<4>();
        if four.is_empty() || !rest.is_empty() {
            unread.push((image.clone(), label));
            dataset.leave_out(&file, row, &image, NO_BOX);
            continue;
        }
        let objects = four.iter().map(|c| Object { label: label.clone(), coords: Coords::Pixels(*c) });
        if let Some(item) = draft_of_slice.get(&image).and_then(|k| dataset.items.get_mut(*k)) {
            item.objects.extend(objects);
            continue;
        }
        let nested = image.rsplit_once('_').map(|(series, slice)| format!("{series}/{slice}")).unwrap_or_default();
        let slice = dataset.source.find_image(&["Images_png"], &nested);
        let path = match slice.or_else(|_| dataset.source.find_image(&["Images_png", "Key_slices", "images"], &image)) {
            Ok(path) => path,
            Err(reason) => {
                dataset.leave_out(&file, row, &image, reason);
                continue;
            }
        };
        let window = match parse_numbers(field(window)).as_slice() {
            [low, high] if low < high => (*low, *high),
            _ => (-175.0, 275.0),
        };
        let mut extra = serde_json::Map::new();
        extra.insert("window".to_owned(), json!([window.0, window.1]));
        draft_of_slice.insert(image.clone(), dataset.items.len());
        dataset.items.push(DraftRecord {
            id: stem(std::path::Path::new(&image)),
            image: path,
            file: file.clone(),
            row,
            objects: objects.collect(),
            frame: match parse_numbers(field(size)).as_slice() {
                // Rows, then columns; all published slices are square or nearly so.
                [h, w] => Some((*w as u32, *h as u32)),
                _ => None,
            },
            modality: "CT".to_owned(),
            split: field(split)
                .parse::<usize>()
                .ok()
                .and_then(|s| SPLITS.get(s.checked_sub(1)?))
                .map_or("", |s| s)
                .to_owned(),
            patient: field(patient).to_owned(),
            window: Some(window),
            extra,
            ..DraftRecord::default()
        });
    }
    for (slice, label) in unread {
        if let Some(item) = draft_of_slice.get(&slice).and_then(|k| dataset.items.get_mut(*k)) {
            item.unread.push(label);
        }
    }
    for (slice, label) in dropped {
        if let Some(item) = draft_of_slice.get(&slice).and_then(|k| dataset.items.get_mut(*k)) {
            item.dropped.push(label);
        }
    }
    Ok(())
}

/// Parses the numbers of a field such as `"226.169, 90.0204, 241.252, 111.977"`; empty if one is not a number.
fn parse_numbers(field: &str) -> Vec<f32> {
    let parts = field.split([',', ';', ' ', '[', ']']).filter(|p| !p.is_empty());
    parts.map(str::parse).collect::<Result<_, _>>().unwrap_or_default()
}
