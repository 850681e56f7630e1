//! Freezing: which parameters are trained at which update, by name.

use unveil_config::schema::{Freeze, Learner};
use unveil_core::selects_parameter;

/// Prefix of the names of the critic's parameters.
pub const CRITIC_PREFIX: &str = "critic.";

/// Parameters that are never trained, and those that are frozen for some updates.
#[derive(Debug, Clone, Default)]
pub struct Freezing {
    /// Key of the configuration that lists `always`.
    key: String,
    always: Vec<String>,
    schedule: Vec<Freeze>,
}

impl Freezing {
    /// Reads `learner.frozen` and `learner.freeze`.
    pub fn new(l: &Learner) -> Self {
        Self { schedule: l.freeze.clone(), ..Self::always("learner.frozen", &l.frozen) }
    }

    /// Never trains the parameters that the configuration's `key` lists as `frozen`, and always trains the others.
    pub fn always(key: &str, frozen: &[String]) -> Self {
        Self { key: key.to_owned(), always: frozen.to_vec(), schedule: Vec::new() }
    }

    /// Returns whether the trained parameters change between updates.
    pub fn has_schedule(&self) -> bool {
        !self.schedule.is_empty()
    }

    /// Returns whether a parameter is trained at any update.
    pub fn is_ever_trained(&self, name: &str) -> bool {
        self.always.iter().all(|selector| !selects_parameter(selector, name))
    }

    /// Returns whether a parameter is trained at update `step`, from 0.
    pub fn is_trained_at(&self, name: &str, step: u64) -> bool {
        let is_frozen = |f: &Freeze| {
            (f.from..f.until).contains(&step) && f.parameters.iter().any(|selector| selects_parameter(selector, name))
        };
        self.is_ever_trained(name) && !self.schedule.iter().any(is_frozen)
    }

    /// Checks the settings against a model with parameters `names`.
    ///
    /// # Errors
    /// Returns a message that names the key if a selector matches no parameter, or if an update would train nothing.
    pub fn check<'n>(&self, names: impl Iterator<Item = &'n str> + Clone) -> Result<(), String> {
        let scheduled = self.schedule.iter().flat_map(|f| &f.parameters).map(|selector| ("learner.freeze", selector));
        let always = self.always.iter().map(|selector| (self.key.as_str(), selector));
        for (key, selector) in always.chain(scheduled) {
            if !names.clone().any(|n| selects_parameter(selector, n)) {
                return Err(format!(
                    "{key} has `{selector}`, but no parameter name starts with it; vision_tower, merger and language_model are accepted too"
                ));
            }
        }
        let changes = std::iter::once(0).chain(self.schedule.iter().flat_map(|f| [f.from, f.until]));
        match changes.into_iter().find(|step| !names.clone().any(|n| self.is_trained_at(n, *step))) {
            Some(0) if !names.clone().any(|n| self.is_ever_trained(n)) => {
                Err(format!("{}: nothing is trained: every parameter is frozen", self.key))
            }
            Some(step) => {
                Err(format!("learner.freeze: update {step} (from 0) trains nothing: leave some parameters unfrozen"))
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 5] = [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight",
        "visual.blocks.0.norm1.weight",
        "visual.merger.ln_q.weight",
        "lm_head.weight",
    ];

    fn trained(f: &Freezing, step: u64) -> Vec<usize> {
        (0..NAMES.len()).filter(|i| f.is_trained_at(NAMES[*i], step)).collect()
    }

    fn freezing(frozen: &[&str], schedule: &[(&[&str], u64, u64)]) -> Freezing {
        let words = |w: &[&str]| w.iter().map(|s| (*s).to_owned()).collect();
        let freeze =
            |(w, from, until): &(&[&str], u64, u64)| Freeze { parameters: words(w), from: *from, until: *until };
        Freezing {
            schedule: schedule.iter().map(freeze).collect(),
            ..Freezing::always("learner.frozen", &words(frozen))
        }
    }

    #[test]
    fn modules_and_schedules() {
        let f = freezing(&["model.embed_tokens."], &[(&["vision_tower"], 0, 3), (&["language_model", "merger"], 5, 6)]);
        f.check(NAMES.iter().copied()).unwrap();
        assert_eq!(trained(&f, 0), [1, 3, 4]);
        assert_eq!(trained(&f, 3), [1, 2, 3, 4]);
        assert_eq!(trained(&f, 5), [2]);
        assert_eq!(trained(&f, 6), [1, 2, 3, 4]);
        assert!(f.has_schedule() && !f.is_ever_trained(NAMES[0]) && f.is_ever_trained(NAMES[2]));
    }

    #[test]
    fn senseless_settings_are_named() {
        let error = |f: Freezing| f.check(NAMES.iter().copied()).unwrap_err();
        let e = error(freezing(&["vision"], &[]));
        assert!(e.contains("learner.frozen has `vision`"), "{e}");
        assert!(error(freezing(&["visual_tower"], &[])).contains("`visual_tower`"));
        assert!(error(freezing(&["language_model", "visual."], &[])).contains("every parameter is frozen"));
        let e = error(freezing(&["visual."], &[(&["language_model"], 4, 8)]));
        assert!(e.contains("update 4") && e.contains("learner.freeze"), "{e}");
    }
}
