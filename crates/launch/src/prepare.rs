//! Preparation of a run's data, and the check that every trained record can be rewarded.

use unveil_config::Config;

use crate::LaunchError;

/// Creates the record file if it does not exist, and rejects data that cannot be trained on. Progress lines go to `note`.
///
/// # Errors
/// Returns [`LaunchError::Prepare`] if the data cannot be created or used, and [`LaunchError::Data`] if a record has no reward.
pub fn prepare_data(config: &Config, note: &dyn Fn(&str)) -> Result<(), LaunchError> {
    let file = unveil_datasets::prepare::prepare_data(config, note)?;
    if config.learner.steps > 0 {
        let trained = file.records.iter().filter(|r| r.split == config.data.train_split);
        unveil_reward::check_records(config, trained)
            .map_err(|e| LaunchError::Data(format!("{}: {e}", file.path.display())))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use unveil_config::schema::{DataKind, RelevanceKind};
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
        config.data.kind = DataKind::Jsonl;
        config.data.root = records.display().to_string();
        let prepared = |c: &Config| prepare_data(c, &|_| ()).map_err(|e| e.to_string());
        let e = prepared(&config).unwrap_err();
        assert!(["records.jsonl", "\"q7\"", "reward.relevance.weight"].iter().all(|w| e.contains(w)), "{e}");
        // Stage 1 needs no rewards; relevance provides one.
        let mut first = config.clone();
        first.learner.steps = 0;
        prepared(&first).unwrap();
        config.reward.relevance.weight = 0.5;
        config.reward.relevance.kind = RelevanceKind::TokenF1;
        prepared(&config).unwrap();
    }
}
