//! Learning rates that fit a model's size. The defaults are those of a model from scratch with some million parameters; they would
//! ruin a pretrained one without a word.

use crate::load::{ConfigError, Loaded};
use crate::schema::Optimizer;
use crate::size::shown_count;

/// Parameters above which a model is taken for a pretrained one.
const LARGE: u64 = 500_000_000;
/// Highest rate at which all weights of such a model are trained unless it is said that it is meant.
const HIGH: f64 = 5e-5;

/// A stage that trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Stage 1, instruction tuning.
    Sft,
    /// Stage 2, reinforcement.
    Learner,
}

impl Stage {
    /// Both of them.
    pub const ALL: [Self; 2] = [Self::Sft, Self::Learner];
}

impl Loaded {
    /// Checks the learning rates of the stages that run against the size of the model that they train.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`]: the model is large, and a rate is the default or one that full training does not survive.
    pub fn rates(&self, parameters: u64, stages: &[Stage]) -> Result<(), ConfigError> {
        let faults: Vec<String> = stages.iter().filter_map(|stage| self.rate(parameters, *stage)).collect();
        if faults.is_empty() { Ok(()) } else { Err(self.refuse(faults)) }
    }

    fn rate(&self, parameters: u64, stage: Stage) -> Option<String> {
        let c = &self.config;
        let (section, steps, optimizer, adapters): (&str, u64, &Optimizer, bool) = match stage {
            Stage::Sft => ("sft", c.sft.steps, &c.sft.optimizer, false),
            Stage::Learner => ("learner", c.learner.steps, &c.learner.optimizer, c.learner.lora.rank > 0),
        };
        if parameters <= LARGE || steps == 0 {
            return None;
        }
        let (key, lr, size) = (format!("{section}.optimizer.lr"), optimizer.lr, shown_count(parameters));
        let usual = match (stage, adapters) {
            (Stage::Sft, _) => "1e-5",
            (Stage::Learner, false) => "1e-6",
            (Stage::Learner, true) => "1e-5",
        };
        if self.origin(&key).is_none() {
            return Some(format!(
                "{key} is not set, and its default of {lr:e} is for models from scratch with some million parameters; this one has \
                 {size}: set it ({usual} is usual{})",
                if adapters { " with adapters" } else { "" }
            ));
        }
        (lr > HIGH && !adapters && !optimizer.allow_high_lr).then(|| {
            format!(
                "{key} is {lr:e}, and all weights of a model of {size} parameters are trained: use {HIGH:e} at most ({usual} is usual), or \
                 say that it is meant by {section}.optimizer.allow_high_lr = true"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(parameters: u64, sets: &[&str]) -> String {
        let sets: Vec<String> = sets.iter().map(|s| (*s).to_owned()).collect();
        let loaded = Loaded::new(None, std::iter::empty(), &sets).unwrap();
        loaded.rates(parameters, &Stage::ALL).map_or_else(|e| e.to_string(), |()| String::new())
    }

    const SEVEN: u64 = 8_292_166_656;

    #[test]
    fn a_default_rate_is_for_small_models() {
        assert_eq!(said(1_260_000, &[]), "");
        assert_eq!(said(LARGE, &[]), "");
        let both = said(SEVEN, &[]);
        for words in
            ["sft.optimizer.lr is not set", "1e-3", "learner.optimizer.lr is not set", "3e-4", "8.3 B", "1e-5", "1e-6"]
        {
            assert!(both.contains(words), "{words}: {both}");
        }
        let one = said(SEVEN, &["sft.optimizer.lr=1e-5"]);
        assert!(one.contains("learner.optimizer.lr") && !one.contains("sft.optimizer.lr"), "{one}");
        assert_eq!(said(SEVEN, &["sft.optimizer.lr=1e-5", "learner.optimizer.lr=1e-6"]), "");
        // A stage that does not run has no rate, and the rest of its section is not a rate.
        assert_eq!(said(SEVEN, &["sft.steps=0", "learner.optimizer.lr=1e-6"]), "");
        assert_eq!(said(SEVEN, &["sft.steps=0", "learner.steps=0"]), "");
        assert!(said(SEVEN, &["sft.steps=0", "learner.optimizer.warmup=3"]).contains("not set"));
        // Adapters need a rate, too.
        assert!(said(SEVEN, &["sft.steps=0", "learner.lora.rank=16"]).contains("1e-5 is usual with adapters"));
    }

    #[test]
    fn a_high_rate_is_meant_or_refused() {
        let high = said(SEVEN, &["sft.steps=0", "learner.optimizer.lr=1e-3"]);
        for words in ["learner.optimizer.lr is 1e-3", "5e-5", "learner.optimizer.allow_high_lr = true", "(in --set)"] {
            assert!(high.contains(words), "{words}: {high}");
        }
        assert_eq!(said(SEVEN, &["sft.steps=0", "learner.optimizer.lr=5e-5"]), "");
        assert_eq!(
            said(SEVEN, &["sft.steps=0", "learner.optimizer.lr=1e-3", "learner.optimizer.allow_high_lr=true"]),
            ""
        );
        assert_eq!(said(SEVEN, &["sft.steps=0", "learner.optimizer.lr=2e-4", "learner.lora.rank=8"]), "");
        // Stage 1 has no adapters.
        let first = said(SEVEN, &["sft.optimizer.lr=2e-4", "learner.optimizer.lr=2e-4", "learner.lora.rank=8"]);
        assert!(first.contains("sft.optimizer.lr is 2e-4") && !first.contains("learner.optimizer.lr is"), "{first}");
        assert_eq!(said(1_260_000, &["learner.optimizer.lr=1e-1"]), "");
    }

    #[test]
    fn one_stage_alone_can_be_asked_about() {
        let loaded = Loaded::new(None, std::iter::empty(), &["sft.optimizer.lr=1e-5".to_owned()]).unwrap();
        loaded.rates(SEVEN, &[Stage::Sft]).unwrap();
        assert!(loaded.rates(SEVEN, &[Stage::Learner]).is_err());
    }
}
