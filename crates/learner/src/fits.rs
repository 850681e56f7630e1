//! Looks at all records of a run before its first update: one that does not fit the model would else end the run when it comes up,
//! and again after each restart.

use std::collections::HashSet;

use unveil_config::Config;
use unveil_core::Record;
use unveil_data::fits::{Limits, Use, misfits, require};
use unveil_data::prepare::Preparer;
use unveil_data::records::RecordFile;
use unveil_service::CancellationToken;

use crate::error::Result;

/// What records of the training split must fit into, in a model whose context is `context` tokens: with their answers, and with
/// what stage 2 may generate.
pub fn limits(config: &Config, context: usize) -> Limits {
    let new_tokens = if config.learner.steps > 0 { config.rollout.max_new_tokens } else { 0 };
    Limits { context, new_tokens, question: config.data.question.clone() }
}

/// Judges every record that the run trains on or evaluates, by the headers of their images. A stop ends it early, as if all fitted.
///
/// # Errors
/// Names the first records that do not fit, with their places and reasons.
pub fn check_records(
    config: &Config,
    file: &RecordFile,
    preparer: &Preparer,
    context: usize,
    cancel: &CancellationToken,
) -> Result<()> {
    let data = &config.data;
    let trained = limits(config, context);
    let asked = Limits { new_tokens: config.rollout.max_new_tokens, ..trained.clone() };
    // Of the validation split only those that evaluation takes.
    let val: Vec<&Record> = file.records.iter().filter(|r| r.split == data.val_split).collect();
    let keep = if config.eval.val_limit == 0 { val.len() } else { config.eval.val_limit.min(val.len()) };
    let evaluated: HashSet<&str> = (0..keep).map(|i| val[i * val.len() / keep].id.as_str()).collect();
    let stopped = || cancel.is_cancelled();
    let of_training = |r: &Record| if r.split == data.train_split { Use::Trained } else { Use::Unused };
    let of_evaluation = |r: &Record| {
        let there = r.split != data.train_split && (r.split == data.test_split || evaluated.contains(r.id.as_str()));
        if there { Use::Asked } else { Use::Unused }
    };
    let mut found = misfits(file, preparer, &trained, of_training, &stopped);
    found.extend(misfits(file, preparer, &asked, of_evaluation, &stopped));
    Ok(require(found)?)
}

#[cfg(test)]
mod tests {
    use unveil_data::root::Reach;
    use unveil_data::store::Image;
    use unveil_data::tokenizer::tiny::{TinyProcessorSpec, write_tiny};

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
        let (file, token) = (RecordFile::load_with(&path, Reach::Folder).unwrap(), CancellationToken::new());
        if cancelled {
            token.cancel();
        }
        let preparer = Preparer::load(dir.path()).unwrap();
        check_records(&config, &file, &preparer, 400, &token).map_err(|e| e.to_string())
    }

    #[test]
    fn the_splits_of_a_run_are_looked_at_as_they_are_used() {
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
        assert_eq!(check(&two, |_| {}, true), Ok(()), "a stop is obeyed");
        // An answer that cannot be written matters where it is learnt.
        let bad = |split: &str| {
            format!(
                r#"{{"id":"c","image":"a.png","question":"q","category":"x [y]","boxes":[[1,1,9,9]],"split":"{split}"}}"#
            )
        };
        assert!(check(&[&bad("train")], |_| {}, false).unwrap_err().contains("x [y]"));
        assert_eq!(check(&[&bad("test")], |_| {}, false), Ok(()));
        // What stage 2 may generate must fit only where there is a stage 2.
        let plain = r#"{"id":"p","image":"a.png","question":"q","split":"train"}"#;
        let long = |steps| move |c: &mut Config| (c.rollout.max_new_tokens, c.learner.steps) = (390, steps);
        assert_eq!(check(&[plain], long(0), false), Ok(()));
        assert!(check(&[plain], long(1), false).unwrap_err().contains("up to 390 new ones"));
    }
}
