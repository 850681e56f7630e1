//! Preparation of a run's data: synthesised or imported once into `<run>/data`, and checked before training.

use std::path::Path;

use unveil_config::Config;
use unveil_config::schema::DataKind;
use unveil_data::image_root::PathPolicy;
use unveil_data::import::{ClassFilter, Format, ImportOptions};
use unveil_data::records::RecordFile;
use unveil_data::synth::SynthSpec;
use unveil_data::{check, import, synth};

use crate::LaunchError;

/// File in `<run>/data` that records which images an earlier start found intact.
const IMAGES_FILE: &str = "images.json";

/// Creates the record file if it does not exist, and rejects data that cannot be trained on. Progress lines go to `note`.
///
/// # Errors
/// Returns [`LaunchError::Data`] if the data cannot be created or used, and [`LaunchError::Io`] if a directory cannot be created.
pub fn prepare_data(config: &Config, note: &dyn Fn(&str)) -> Result<(), LaunchError> {
    let fail = |e: &dyn std::fmt::Display| LaunchError::Data(e.to_string());
    let records = config.records();
    if !records.exists() {
        let folder = records.parent().unwrap_or(Path::new("."));
        match config.data.kind {
            DataKind::Synth => {
                let s = &config.data.synth;
                let spec = SynthSpec {
                    seed: s.seed,
                    train: s.train,
                    val: s.val,
                    test: s.test,
                    size: s.size,
                    ..SynthSpec::default()
                };
                note(&format!("data: generating {} synthetic images", spec.n()));
                synth::generate(&spec, folder, |_, _| ()).map_err(|e| fail(&e))?;
            }
            DataKind::Voc => {
                let options = ImportOptions {
                    class: Some(ClassFilter {
                        class: config.data.class.clone(),
                        category: if config.data.category.is_empty() {
                            config.data.class.clone()
                        } else {
                            config.data.category.clone()
                        },
                    }),
                    question: Some(config.data.question.clone()),
                    ..ImportOptions::default()
                };
                std::fs::create_dir_all(folder).map_err(crate::io("cannot create", folder))?;
                let report = import::import(Format::Voc, Path::new(&config.data.root), &records, &options)
                    .map_err(|e| fail(&e))?;
                note(&format!("data: {} images, {} boxes imported", report.records, report.boxes));
                for left in &report.left_out {
                    note(&format!("data: left out {} object {}: {}", left.file, left.object, left.reason));
                }
            }
            DataKind::Jsonl => {}
        }
    }
    let file = RecordFile::load_with(&records, PathPolicy::new(config.data.outside)).map_err(|e| fail(&e))?;
    let seen =
        check::require_valid(&file, Some(&config.run_dir().join("data").join(IMAGES_FILE))).map_err(|e| fail(&e))?;
    note(&format!("data: {} images decoded, {} unchanged since an earlier run", seen.decoded, seen.cached));
    for slip in &seen.misspelled_keys {
        note(&format!("warning: {slip}"));
    }
    let count = |split: &str| file.records.iter().filter(|r| r.split == split).count();
    let d = &config.data;
    for (key, split) in [("train_split", &d.train_split), ("val_split", &d.val_split), ("test_split", &d.test_split)] {
        if count(split) == 0 {
            return Err(LaunchError::Data(format!(
                "{} has no record of split `{split}` (data.{key})",
                records.display()
            )));
        }
    }
    if config.learner.steps > 0 {
        let trained = file.records.iter().filter(|r| r.split == d.train_split);
        unveil_reward::check_records(config, trained)
            .map_err(|e| LaunchError::Data(format!("{}: {e}", records.display())))?;
    }
    note(&format!("data: {} train, {} val, {} test", count(&d.train_split), count(&d.val_split), count(&d.test_split)));
    Ok(())
}

#[cfg(test)]
mod tests {
    use unveil_config::schema::RelevanceKind;
    use unveil_data::image_store::Image;

    use super::*;

    #[test]
    fn records_without_any_reward_are_rejected() {
        let dir = tempfile::tempdir().unwrap();
        for (split, shade) in [("train", 10), ("val", 20), ("test", 30)] {
            let mut image = Image::new(96, 96);
            (0..96).for_each(|x| image.set_pixel(x, x, [shade, shade, 200]));
            std::fs::write(dir.path().join(format!("{split}.png")), image.to_png().unwrap()).unwrap();
        }
        let line = |id: &str, split: &str, rest: &str| {
            format!(r#"{{"id":"{id}","image":"{split}.png","split":"{split}",{rest}}}"#)
        };
        let lesion = r#""category":"nodule","boxes":[[1,2,30,40]]"#;
        let asked = r#""task":"vqa","question":"What modality?","answer":"MRI","boxes":[]"#;
        let lines = [
            line("a", "train", lesion),
            line("q7", "train", asked),
            line("b", "val", lesion),
            line("c", "test", lesion),
            line("d", "test", asked),
        ];
        let records = dir.path().join("records.jsonl");
        std::fs::write(&records, lines.join("\n")).unwrap();
        let mut config = Config::default();
        config.run.dir = dir.path().join("run").display().to_string();
        (config.data.kind, config.data.root) = (DataKind::Jsonl, records.display().to_string());
        let prepared = |c: &Config| prepare_data(c, &|_| ()).map_err(|e| e.to_string());
        let e = prepared(&config).unwrap_err();
        assert!(["records.jsonl", "\"q7\"", "reward.relevance.weight"].iter().all(|w| e.contains(w)), "{e}");
        // Stage 1 needs no rewards; relevance provides one.
        let mut first = config.clone();
        first.learner.steps = 0;
        prepared(&first).unwrap();
        (config.reward.relevance.weight, config.reward.relevance.kind) = (0.5, RelevanceKind::TokenF1);
        prepared(&config).unwrap();
    }
}
