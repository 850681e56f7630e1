//! Data of a run: synthesised or imported once into `<run>/data`, checked before anything is trained.

use std::path::Path;

use unveil_config::Config;
use unveil_config::schema::DataKind;
use unveil_data::import::{ClassFilter, Format, ImportOptions};
use unveil_data::records::RecordFile;
use unveil_data::root::Reach;
use unveil_data::synth::SynthSpec;
use unveil_data::{check, import, synth};

use crate::LaunchError;

/// Name of the file in `<run>/data` that says which images an earlier start found whole.
const IMAGES_FILE: &str = "images.json";

/// Makes the record file if it is not there yet, then refuses data that cannot be trained on.
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
                note(&format!("data: drawing {} synthetic images", spec.n()));
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
    let file = RecordFile::load_with(&records, Reach::new(config.data.outside)).map_err(|e| fail(&e))?;
    let seen = check::require(&file, Some(&config.run_dir().join("data").join(IMAGES_FILE))).map_err(|e| fail(&e))?;
    note(&format!("data: {} images decoded, {} known to be whole", seen.decoded, seen.known));
    for slip in &seen.slips {
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
    note(&format!("data: {} train, {} val, {} test", count(&d.train_split), count(&d.val_split), count(&d.test_split)));
    Ok(())
}
