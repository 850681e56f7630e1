//! Splits where none are published: by a hash of the patient or image, so that they depend on nothing else. Pure.

/// Share of train, and of train and val together.
const TRAIN: f64 = 0.8;
const TRAIN_AND_VAL: f64 = 0.9;

/// The split of a unit that must stay together. Equal keys give equal splits, whatever else is imported.
pub(super) fn assigned(key: &[u8]) -> &'static str {
    let hash = blake3::hash(key);
    let mut first = [0; 8];
    first.copy_from_slice(&hash.as_bytes()[..8]);
    let at = u64::from_le_bytes(first) as f64 / u64::MAX as f64;
    if at < TRAIN {
        "train"
    } else if at < TRAIN_AND_VAL {
        "val"
    } else {
        "test"
    }
}

/// The split that a file, folder or field names, in the words of the record format; empty when it names none, or several.
pub(super) fn named(text: &str) -> &'static str {
    let text = text.to_lowercase();
    let words = text.split(|c: char| !c.is_alphanumeric()).map(|w| w.trim_end_matches(|c: char| c.is_ascii_digit()));
    let mut found = words.filter_map(|w| match w {
        "train" | "training" | "trainset" => Some("train"),
        "val" | "valid" | "validate" | "validation" | "valset" | "dev" => Some("val"),
        "test" | "testing" | "testset" => Some("test"),
        _ => None,
    });
    let first = found.next().unwrap_or_default();
    if found.all(|other| other == first) { first } else { "" }
}

/// Order in which copies of an image stay: what a result is reported on is worth most.
pub(super) fn rank(split: &str) -> usize {
    ["test", "val", "train"].iter().position(|s| *s == split).unwrap_or(3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_as_stated_and_stable() {
        let mut count = std::collections::BTreeMap::new();
        for i in 0..10_000_u32 {
            *count.entry(assigned(&i.to_le_bytes())).or_insert(0) += 1;
        }
        // Standard deviations are 40 (train) and 30 (val, test).
        assert!((7_800..8_200).contains(&count["train"]), "{count:?}");
        assert!((850..1_150).contains(&count["val"]) && (850..1_150).contains(&count["test"]), "{count:?}");
        assert_eq!(assigned(b"patient 7"), assigned(b"patient 7"));
    }

    #[test]
    fn names() {
        let of =
            ["Training", "a/valid/x", "validate.json", "instances_val2017", "test_clean", "TBX11K_train"].map(named);
        assert_eq!(of, ["train", "val", "val", "val", "test", "train"]);
        assert_eq!(
            ["x", "latest", "intervals", "train_val", "test/train.json", "test/testset"].map(named),
            ["", "", "", "", "", "test"]
        );
        assert!(rank("test") < rank("val") && rank("val") < rank("train") && rank("train") < rank(""));
    }
}
