//! Names of splits, and the assignment of splits where none are published: by a hash of the patient or image alone.

/// Share of records that go to train.
const TRAIN: f64 = 0.8;
/// Share of records that go to train or val.
const TRAIN_AND_VAL: f64 = 0.9;

/// Returns the split of a unit that must stay together: equal keys get equal splits, whatever else is imported.
pub(super) fn assign_split(key: &[u8]) -> &'static str {
    let hash = blake3::hash(key);
    let mut first = [0; 8];
    first.copy_from_slice(&hash.as_bytes()[..8]);
    let position = u64::from_le_bytes(first) as f64 / u64::MAX as f64;
    if position < TRAIN {
        "train"
    } else if position < TRAIN_AND_VAL {
        "val"
    } else {
        "test"
    }
}

/// Returns the split (`train`, `val` or `test`) that the name of a file, folder or field contains; empty if it contains none or several.
pub(super) fn split_from_name(text: &str) -> &'static str {
    let text = text.to_lowercase();
    let words = text.split(|c: char| !c.is_alphanumeric()).map(|w| w.trim_end_matches(|c: char| c.is_ascii_digit()));
    let mut splits = words.filter_map(|w| match w {
        "train" | "training" | "trainset" => Some("train"),
        "val" | "valid" | "validate" | "validation" | "valset" | "dev" => Some("val"),
        "test" | "testing" | "testset" => Some("test"),
        _ => None,
    });
    let first = splits.next().unwrap_or_default();
    if splits.all(|other| other == first) { first } else { "" }
}

/// Ranks splits by which copy of a leaked image is kept: 0 for test, on which results are reported, then val, then train.
pub(super) fn leak_priority(split: &str) -> usize {
    ["test", "val", "train"].iter().position(|s| *s == split).unwrap_or(3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashed_splits_have_the_stated_shares() {
        let mut count = std::collections::BTreeMap::new();
        for i in 0..10_000_u32 {
            *count.entry(assign_split(&i.to_le_bytes())).or_insert(0) += 1;
        }
        // Standard deviations are 40 (train) and 30 (val, test).
        assert!((7_800..8_200).contains(&count["train"]), "{count:?}");
        assert!((850..1_150).contains(&count["val"]) && (850..1_150).contains(&count["test"]), "{count:?}");
        assert_eq!(assign_split(b"patient 7"), assign_split(b"patient 7"));
    }

    #[test]
    fn splits_are_read_from_names() {
        let splits = ["Training", "a/valid/x", "validate.json", "instances_val2017", "test_clean", "TBX11K_train"]
            .map(split_from_name);
        assert_eq!(splits, ["train", "val", "val", "val", "test", "train"]);
        assert_eq!(
            ["x", "latest", "intervals", "train_val", "test/train.json", "test/testset"].map(split_from_name),
            ["", "", "", "", "", "test"]
        );
        assert!(
            leak_priority("test") < leak_priority("val")
                && leak_priority("val") < leak_priority("train")
                && leak_priority("train") < leak_priority("")
        );
    }
}
