//! Checks all records of a run before its first update: a record that does not fit the model would otherwise end the run when its turn
//! comes, and again after each restart.

use std::collections::HashSet;

use unveil_config::Config;
use unveil_core::Record;
use unveil_data::records::RecordFile;
use unveil_preprocess::context_fit::{RecordUse, TokenLimits, find_misfits, reject_misfits};
use unveil_preprocess::preprocessor::Preprocessor;
use unveil_service::CancellationToken;

use crate::error::Result;

/// Returns the limits for records of the training split, in a model with a context of `context` tokens: a prompt must fit together with
/// its answer, and with what stage 2 may generate.
pub fn training_limits(config: &Config, context: usize) -> TokenLimits {
    let new_tokens = if config.learner.steps > 0 { config.rollout.max_new_tokens } else { 0 };
    TokenLimits { context, new_tokens }
}

/// Checks every record that the run trains on or evaluates, reading only the headers of images. If `cancel` is cancelled, the check ends
/// early and succeeds.
///
/// # Errors
/// Returns [`crate::LearnerError::Fit`] naming the first records that do not fit, with their positions and reasons.
pub fn check_records(
    config: &Config,
    file: &RecordFile,
    preprocessor: &Preprocessor,
    context: usize,
    cancel: &CancellationToken,
) -> Result<()> {
    let data = &config.data;
    let trained = training_limits(config, context);
    let prompted = TokenLimits { new_tokens: config.rollout.max_new_tokens, ..trained.clone() };
    // Only the evaluated part of the validation split matters.
    let val: Vec<&Record> = file.records.iter().filter(|r| r.split == data.val_split).collect();
    let keep = if config.eval.val_limit == 0 { val.len() } else { config.eval.val_limit.min(val.len()) };
    let evaluated: HashSet<&str> = (0..keep).map(|i| val[i * val.len() / keep].id.as_str()).collect();
    let stopped = || cancel.is_cancelled();
    let training_use = |r: &Record| if r.split == data.train_split { RecordUse::Trained } else { RecordUse::Unused };
    let evaluation_use = |r: &Record| {
        let is_evaluated =
            r.split != data.train_split && (r.split == data.test_split || evaluated.contains(r.id.as_str()));
        if is_evaluated { RecordUse::Prompted } else { RecordUse::Unused }
    };
    let mut misfits = find_misfits(file, preprocessor, &trained, training_use, &stopped);
    misfits.extend(find_misfits(file, preprocessor, &prompted, evaluation_use, &stopped));
    Ok(reject_misfits(misfits)?)
}

#[cfg(test)]
mod tests {
    use unveil_data::image_root::PathPolicy;
    use unveil_data::image_store::Image;
    use unveil_preprocess::tokenizer::tiny::{TinyProcessorSpec, write_tiny};

    use super::*;

    fn check(lines: &[&str], change: impl Fn(&mut Config), cancelled: bool) -> Result<(), String> {
        let dir = tempfile::tempdir().unwrap();
        write_tiny(dir.path(), &TinyProcessorSpec::default()).unwrap();
        for (name, w, h) in [("a.png", 96, 96), ("wide.png", 1200, 4)] {
            std::fs::write(dir.path().join(name), Image::new(w, h).to_png().unwrap()).unwrap();
        }
        let path = dir.path().join("r.jsonl");
        std::fs::write(&path, lines.join("\n")).unwrap();
        let mut config = Config::default();
        change(&mut config);
        let file = RecordFile::load_with(&path, PathPolicy::Folder).unwrap();
        let token = CancellationToken::new();
        if cancelled {
            token.cancel();
        }
        let preprocessor = Preprocessor::load(dir.path()).unwrap();
        check_records(&config, &file, &preprocessor, 400, &token).map_err(|e| e.to_string())
    }

    #[test]
    fn each_split_is_checked_for_its_use() {
        let wide =
            |id: &str, split: &str| format!(r#"{{"id":"{id}","image":"wide.png","question":"q","split":"{split}"}}"#);
        for split in ["train", "val", "test"] {
            let e = check(&[&wide("w", split)], |_| {}, false).unwrap_err();
            assert!(e.contains("r.jsonl:1: record \"w\"") && e.contains("aspect ratio of 300.0"), "{split}: {e}");
        }
        assert_eq!(check(&[&wide("w", "other")], |_| {}, false), Ok(()));
        let two = [wide("a", "val").replace("wide", "a"), wide("b", "val")];
        let two: Vec<&str> = two.iter().map(String::as_str).collect();
        assert_eq!(check(&two, |c| c.eval.val_limit = 1, false), Ok(()));
        assert!(check(&two, |c| c.eval.val_limit = 2, false).is_err());
        assert_eq!(check(&two, |_| {}, true), Ok(()), "cancellation ends the check");
        // An answer that cannot be encoded matters only in training.
        let unencodable = |split: &str| {
            format!(
                r#"{{"id":"c","image":"a.png","question":"q","category":"x [y]","boxes":[[1,1,9,9]],"split":"{split}"}}"#
            )
        };
        assert!(check(&[&unencodable("train")], |_| {}, false).unwrap_err().contains("x [y]"));
        assert_eq!(check(&[&unencodable("test")], |_| {}, false), Ok(()));
        // Generated tokens must fit only if stage 2 runs.
        let plain = r#"{"id":"p","image":"a.png","question":"q","split":"train"}"#;
        let long = |steps| move |c: &mut Config| (c.rollout.max_new_tokens, c.learner.steps) = (390, steps);
        assert_eq!(check(&[plain], long(0), false), Ok(()));
        assert!(check(&[plain], long(1), false).unwrap_err().contains("up to 390 new tokens"));
    }
}
