//! Which parameters are trained at which update, by name. Must not know: tensors.

use unveil_config::schema::{Freeze, Learner};

/// What is never trained, and what is not trained for a while.
#[derive(Debug, Clone, Default)]
pub struct Freezing {
    always: Vec<String>,
    spans: Vec<Freeze>,
}

/// Whether a parameter belongs to `what`: a module's word or a prefix of names.
fn belongs(name: &str, what: &str) -> bool {
    let merger = name.starts_with("visual.merger.") || name.starts_with("visual.deepstack_merger_list.");
    match what {
        "merger" => merger,
        "vision_tower" => name.starts_with("visual.") && !merger,
        "language_model" => name.starts_with("model.") || name.starts_with("lm_head."),
        prefix => name.starts_with(prefix),
    }
}

impl Freezing {
    /// As the configuration has it.
    pub fn new(l: &Learner) -> Self {
        Self { always: l.frozen.clone(), spans: l.freeze.clone() }
    }

    /// Whether something changes between updates.
    pub fn changes(&self) -> bool {
        !self.spans.is_empty()
    }

    /// Whether a parameter is trained at some update.
    pub fn ever(&self, name: &str) -> bool {
        self.always.iter().all(|what| !belongs(name, what))
    }

    /// Whether a parameter is trained at update `step`, from 0.
    pub fn at(&self, name: &str, step: u64) -> bool {
        let held =
            |f: &Freeze| (f.from..f.until).contains(&step) && f.parameters.iter().any(|what| belongs(name, what));
        self.ever(name) && !self.spans.iter().any(held)
    }

    /// Whether these names make sense for a model with parameters `names`.
    ///
    /// # Errors
    /// A word that no parameter belongs to, or an update that trains nothing; the message names the key.
    pub fn check<'n>(&self, names: impl Iterator<Item = &'n str> + Clone) -> Result<(), String> {
        let spans = self.spans.iter().flat_map(|f| &f.parameters).map(|what| ("learner.freeze", what));
        for (key, what) in self.always.iter().map(|what| ("learner.frozen", what)).chain(spans) {
            if !names.clone().any(|n| belongs(n, what)) {
                return Err(format!(
                    "{key} has `{what}`, but no parameter's name starts so; vision_tower, merger and language_model are known too"
                ));
            }
        }
        let turns = std::iter::once(0).chain(self.spans.iter().flat_map(|f| [f.from, f.until]));
        match turns.into_iter().find(|step| !names.clone().any(|n| self.at(n, *step))) {
            Some(0) if !names.clone().any(|n| self.ever(n)) => {
                Err("learner.frozen: nothing is trained: every parameter is frozen".into())
            }
            Some(step) => Err(format!("learner.freeze: update {step} (from 0) trains nothing: leave something to it")),
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
        (0..NAMES.len()).filter(|i| f.at(NAMES[*i], step)).collect()
    }

    fn freezing(frozen: &[&str], spans: &[(&[&str], u64, u64)]) -> Freezing {
        let words = |w: &[&str]| w.iter().map(|s| (*s).to_owned()).collect();
        let span = |(w, from, until): &(&[&str], u64, u64)| Freeze { parameters: words(w), from: *from, until: *until };
        Freezing { always: words(frozen), spans: spans.iter().map(span).collect() }
    }

    #[test]
    fn modules_and_schedules() {
        let f = freezing(&["model.embed_tokens."], &[(&["vision_tower"], 0, 3), (&["language_model", "merger"], 5, 6)]);
        f.check(NAMES.iter().copied()).unwrap();
        assert_eq!(trained(&f, 0), [1, 3, 4]);
        assert_eq!(trained(&f, 3), [1, 2, 3, 4]);
        assert_eq!(trained(&f, 5), [2]);
        assert_eq!(trained(&f, 6), [1, 2, 3, 4]);
        assert!(f.changes() && !f.ever(NAMES[0]) && f.ever(NAMES[2]));
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let fault = |f: Freezing| f.check(NAMES.iter().copied()).unwrap_err();
        let e = fault(freezing(&["vision"], &[]));
        assert!(e.contains("learner.frozen has `vision`"), "{e}");
        assert!(fault(freezing(&["visual_tower"], &[])).contains("`visual_tower`"));
        assert!(fault(freezing(&["language_model", "visual."], &[])).contains("every parameter is frozen"));
        let e = fault(freezing(&["visual."], &[(&["language_model"], 4, 8)]));
        assert!(e.contains("update 4") && e.contains("learner.freeze"), "{e}");
    }
}
