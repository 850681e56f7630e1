//! Checks that learning rates fit the size of the model. The defaults suit a model with a few million parameters that is trained from
//! scratch; they would silently ruin a pretrained one.

use crate::error::ConfigError;
use crate::load::Loaded;
use crate::schema::{Optimizer, SftPhase};
use crate::size::format_count;

/// Number of parameters above which a model is assumed to be pretrained.
const LARGE_MODEL: u64 = 500_000_000;
/// Maximum learning rate for full training of such a model without `allow_high_lr`.
const MAX_FULL_TRAINING_LR: f64 = 5e-5;

/// Training stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrainingStage {
    /// Stage 1: supervised fine-tuning.
    Sft,
    /// Stage 2: reinforcement learning.
    Learner,
}

impl TrainingStage {
    /// Both stages.
    pub const ALL: [Self; 2] = [Self::Sft, Self::Learner];
}

impl Loaded {
    /// Checks the learning rates of `stages` for a model with this number of parameters.
    ///
    /// # Errors
    /// Returns [`ConfigError::Invalid`] if the model is large and a learning rate is the default or too high for full training.
    pub fn check_learning_rates(&self, parameters: u64, stages: &[TrainingStage]) -> Result<(), ConfigError> {
        let problems: Vec<String> =
            stages.iter().filter_map(|stage| self.learning_rate_problem(parameters, *stage)).collect();
        if problems.is_empty() { Ok(()) } else { Err(self.invalid(problems)) }
    }

    /// Returns why the learning rate of a stage does not fit; `None` if it does or the stage is skipped.
    fn learning_rate_problem(&self, parameters: u64, stage: TrainingStage) -> Option<String> {
        let c = &self.config;
        let (section, steps, optimizer, adapters): (&str, u64, &Optimizer, bool) = match stage {
            TrainingStage::Sft => ("sft", c.sft.steps, &c.sft.optimizer, c.sft.lora.rank > 0),
            TrainingStage::Learner => ("learner", c.learner.steps, &c.learner.optimizer, c.learner.lora.rank > 0),
        };
        if parameters <= LARGE_MODEL || steps == 0 {
            return None;
        }
        if stage == TrainingStage::Sft && !c.sft.stage.is_empty() {
            return self.phase_rate_problem();
        }
        let key = format!("{section}.optimizer.lr");
        let lr = optimizer.lr;
        let highest = optimizer.groups.iter().map(|g| g.lr).fold(lr, f64::max);
        let size = format_count(parameters);
        let usual = match (stage, adapters) {
            (TrainingStage::Sft, false) => "1e-5",
            (TrainingStage::Sft, true) => "1e-4",
            (TrainingStage::Learner, false) => "1e-6",
            (TrainingStage::Learner, true) => "1e-5",
        };
        if self.origin(&key).is_none() {
            return Some(format!(
                "{key} is not set, and its default of {lr:e} is for models with a few million parameters trained from scratch; this \
                 one has {size}: set it ({usual} is usual{})",
                if adapters { " with adapters" } else { "" }
            ));
        }
        (highest > MAX_FULL_TRAINING_LR && !adapters && !optimizer.allow_high_lr).then(|| {
            let key = if highest > lr { format!("{section}.optimizer.groups: a rate") } else { key };
            format!(
                "{key} is {highest:e}, and all weights of a model with {size} parameters are trained: use at most {MAX_FULL_TRAINING_LR:e} \
                 ({usual} is usual), or confirm it by {section}.optimizer.allow_high_lr = true"
            )
        })
    }
}

impl Loaded {
    /// Returns why the learning rate of a phase of stage 1 does not fit a large model.
    fn phase_rate_problem(&self) -> Option<String> {
        let is_wrong = |p: &SftPhase| {
            let highest = p.optimizer.groups.iter().map(|g| g.lr).fold(p.optimizer.lr, f64::max);
            let is_high = highest > MAX_FULL_TRAINING_LR && p.lora.rank == 0 && !p.optimizer.allow_high_lr;
            is_high || p.optimizer.lr == Optimizer::default().lr
        };
        let index = self.config.sft.stage.iter().position(is_wrong)?;
        let lr = self.config.sft.stage[index].optimizer.lr;
        Some(format!(
            "sft.stage[{index}].optimizer.lr is {lr:e}, for a large model: set it to at most {MAX_FULL_TRAINING_LR:e} (1e-5 is usual; 1e-4 with \
             adapters), or confirm a higher one by allow_high_lr = true"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(parameters: u64, sets: &[&str]) -> String {
        let sets: Vec<String> = sets.iter().map(|s| (*s).to_owned()).collect();
        let loaded = Loaded::new(&[], std::iter::empty(), &sets).unwrap();
        loaded.check_learning_rates(parameters, &TrainingStage::ALL).map_or_else(|e| e.to_string(), |()| String::new())
    }

    const QWEN_7B: u64 = 8_292_166_656;

    #[test]
    fn default_rates_are_for_small_models() {
        assert_eq!(message(1_260_000, &[]), "");
        assert_eq!(message(LARGE_MODEL, &[]), "");
        let both = message(QWEN_7B, &[]);
        for words in
            ["sft.optimizer.lr is not set", "1e-3", "learner.optimizer.lr is not set", "3e-4", "8.3 B", "1e-5", "1e-6"]
        {
            assert!(both.contains(words), "{words}: {both}");
        }
        let one = message(QWEN_7B, &["sft.optimizer.lr=1e-5"]);
        assert!(one.contains("learner.optimizer.lr") && !one.contains("sft.optimizer.lr"), "{one}");
        assert_eq!(message(QWEN_7B, &["sft.optimizer.lr=1e-5", "learner.optimizer.lr=1e-6"]), "");
        // Skipped stages are not checked, and other keys of the section do not set the rate.
        assert_eq!(message(QWEN_7B, &["sft.steps=0", "learner.optimizer.lr=1e-6"]), "");
        assert_eq!(message(QWEN_7B, &["sft.steps=0", "learner.steps=0"]), "");
        assert!(message(QWEN_7B, &["sft.steps=0", "learner.optimizer.warmup=3"]).contains("not set"));
        // Adapters need an explicit rate too.
        assert!(message(QWEN_7B, &["sft.steps=0", "learner.lora.rank=16"]).contains("1e-5 is usual with adapters"));
    }

    #[test]
    fn high_rates_need_confirmation() {
        let high = message(QWEN_7B, &["sft.steps=0", "learner.optimizer.lr=1e-3"]);
        for words in ["learner.optimizer.lr is 1e-3", "5e-5", "learner.optimizer.allow_high_lr = true", "(in --set)"] {
            assert!(high.contains(words), "{words}: {high}");
        }
        assert_eq!(message(QWEN_7B, &["sft.steps=0", "learner.optimizer.lr=5e-5"]), "");
        assert_eq!(
            message(QWEN_7B, &["sft.steps=0", "learner.optimizer.lr=1e-3", "learner.optimizer.allow_high_lr=true"]),
            ""
        );
        assert_eq!(message(QWEN_7B, &["sft.steps=0", "learner.optimizer.lr=2e-4", "learner.lora.rank=8"]), "");
        // Stage 1 trains all weights.
        let first = message(QWEN_7B, &["sft.optimizer.lr=2e-4", "learner.optimizer.lr=2e-4", "learner.lora.rank=8"]);
        assert!(first.contains("sft.optimizer.lr is 2e-4") && !first.contains("learner.optimizer.lr is"), "{first}");
        assert_eq!(message(1_260_000, &["learner.optimizer.lr=1e-1"]), "");
        let group = "learner.optimizer.groups=[{parameters=['merger'],lr=1e-3}]";
        let high = message(QWEN_7B, &["sft.steps=0", "learner.optimizer.lr=1e-6", group]);
        assert!(high.contains("learner.optimizer.groups: a rate is 1e-3"), "{high}");
    }

    #[test]
    fn stages_are_checked_separately() {
        let loaded = Loaded::new(&[], std::iter::empty(), &["sft.optimizer.lr=1e-5".to_owned()]).unwrap();
        loaded.check_learning_rates(QWEN_7B, &[TrainingStage::Sft]).unwrap();
        assert!(loaded.check_learning_rates(QWEN_7B, &[TrainingStage::Learner]).is_err());
    }
}
