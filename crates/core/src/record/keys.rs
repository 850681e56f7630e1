//! The keys of a record, and which of them somebody meant who wrote another.

/// Keys that are fields of [`Record`](super::Record).
pub(super) const OWN: [&str; 12] = [
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

/// Keys that are kept among the others and read somewhere; a key close to one of them may be a slip as well.
const READ: [&str; 8] = ["patient", "options", "turns", "images", "box_image", "mask", "pair", "suite_task"];

/// Keys of other formats, and of people who did not look it up, with what they stand for here.
const OTHERS: [(&str, &str); 45] = [
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

/// The key that `key` is likely a slip for; none where it is one that is read, or close to none.
pub fn meant(key: &str) -> Option<&'static str> {
    let known = || OWN.into_iter().chain(READ);
    if known().any(|k| k == key) {
        return None;
    }
    let plain = folded(key);
    if let Some((_, stands_for)) = OTHERS.into_iter().find(|(other, _)| *other == plain) {
        return Some(stands_for);
    }
    // One letter more, less, wrong or out of place; two in a long word. Short words are close to too many.
    known().find(|k| {
        let k = folded(k);
        let most = match k.len() {
            ..4 => 0,
            4..8 => 1,
            _ => 2,
        };
        strsim::osa_distance(&plain, &k) <= most
    })
}

fn folded(key: &str) -> String {
    key.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_told_from_other_words() {
        for (key, stands_for) in [
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
            assert_eq!(meant(key), Some(stands_for), "{key}");
        }
        // What is read, what importers write, and what is none of the record's business.
        for key in OWN.into_iter().chain(READ).chain([
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
            assert_eq!(meant(key), None, "{key}");
        }
    }
}
