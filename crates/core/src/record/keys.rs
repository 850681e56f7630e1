//! Keys of a record, and suggestions for unknown keys.

/// Keys that are fields of [`Record`](super::Record).
pub(super) const FIELDS: [&str; 12] = [
    "id",
    "image",
    "image_size",
    "question",
    "answer",
    "category",
    "boxes",
    "labels",
    "modality",
    "source",
    "split",
    "task",
];

/// Keys in [`Record::extra`](super::Record::extra) that some part of Unveil reads; misspellings of them are recognised too.
const EXTRA_KEYS: [&str; 8] = ["patient", "options", "turns", "images", "box_image", "mask", "pair", "suite_task"];

/// Common keys of other formats, folded, and the key they correspond to.
const ALIASES: [(&str, &str); 45] = [
    ("bbox", "boxes"),
    ("bboxes", "boxes"),
    ("bbox2d", "boxes"),
    ("box", "boxes"),
    ("boundingbox", "boxes"),
    ("boundingboxes", "boxes"),
    ("gtbox", "boxes"),
    ("gtboxes", "boxes"),
    ("gtbbox", "boxes"),
    ("gtbboxes", "boxes"),
    ("rois", "boxes"),
    ("label", "category"),
    ("class", "category"),
    ("classname", "category"),
    ("classes", "category"),
    ("categoryname", "category"),
    ("categories", "category"),
    ("imagepath", "image"),
    ("imagefile", "image"),
    ("imagename", "image"),
    ("img", "image"),
    ("imgpath", "image"),
    ("imgname", "image"),
    ("filename", "image"),
    ("filepath", "image"),
    ("path", "image"),
    ("imagewh", "image_size"),
    ("imgsize", "image_size"),
    ("patientid", "patient"),
    ("patientname", "patient"),
    ("subject", "patient"),
    ("subjectid", "patient"),
    ("query", "question"),
    ("prompt", "question"),
    ("answers", "answer"),
    ("solution", "answer"),
    ("groundtruth", "answer"),
    ("dataset", "source"),
    ("subset", "split"),
    ("fold", "split"),
    ("partition", "split"),
    ("tasktype", "task"),
    ("taskname", "task"),
    ("choices", "options"),
    ("conversations", "turns"),
];

/// Returns the key that `key` is probably meant to be; `None` if `key` is a known key or close to none.
pub fn intended_key(key: &str) -> Option<&'static str> {
    let known = || FIELDS.into_iter().chain(EXTRA_KEYS);
    if known().any(|k| k == key) {
        return None;
    }
    let key_folded = fold_key(key);
    if let Some((_, field)) = ALIASES.into_iter().find(|(alias, _)| *alias == key_folded) {
        return Some(field);
    }
    // Allows one edit, two in a long word, and none in a short one, which is close to too many words.
    known().find(|k| {
        let k = fold_key(k);
        let max_distance = match k.len() {
            ..4 => 0,
            4..8 => 1,
            _ => 2,
        };
        strsim::osa_distance(&key_folded, &k) <= max_distance
    })
}

/// Returns the letters and digits of a key in lower case.
fn fold_key(key: &str) -> String {
    key.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misspelled_keys_are_recognised() {
        for (key, field) in [
            ("bbox", "boxes"),
            ("bboxes", "boxes"),
            ("bbox_2d", "boxes"),
            ("Boxes", "boxes"),
            ("boxs", "boxes"),
            ("label", "category"),
            ("catgory", "category"),
            ("image_path", "image"),
            ("file_name", "image"),
            ("imageSize", "image_size"),
            ("patient_id", "patient"),
            ("PatientID", "patient"),
            ("qeustion", "question"),
            ("spilt", "split"),
            ("anwser", "answer"),
            ("ID", "id"),
        ] {
            assert_eq!(intended_key(key), Some(field), "{key}");
        }
        // Known keys, keys that importers write, and unrelated words are left alone.
        for key in FIELDS.into_iter().chain(EXTRA_KEYS).chain([
            "answer_type",
            "question_type",
            "answer_option",
            "suggested_answer",
            "organ",
            "window",
            "collect",
            "technique",
            "test",
            "index",
            "response",
            "tokens",
            "attention",
            "spans",
            "version",
            "age",
            "sex",
            "view",
            "comment",
            "url",
        ]) {
            assert_eq!(intended_key(key), None, "{key}");
        }
    }
}
