//! Suggestions for unknown keys: a similar key nearby, or the equivalent of another trainer's key. No suggestion is better than a wrong one.

use toml::Table;

use crate::layer::leaves;

/// Minimum similarity of a key in the same section (Jaro-Winkler).
const MIN_SIMILARITY: f64 = 0.8;
/// Minimum similarities of a key in another section (Jaro-Winkler, normalised Damerau-Levenshtein).
const MIN_SIMILARITY_ELSEWHERE: (f64, f64) = (0.85, 0.75);

/// Maximum number of keys suggested.
const MAX_SUGGESTIONS: usize = 3;

/// Keys of other trainers with their equivalents here. Of several equivalents, those in the section of the unknown key are suggested.
const ALIASES: &[(&str, &[&str])] = &[
    // TRL, ms-swift
    ("learning_rate", &["learner.optimizer.lr", "sft.optimizer.lr"]),
    ("num_generations", &["rollout.n"]),
    ("beta", &["learner.kl_coef"]),
    ("epsilon", &["learner.clip_low"]),
    ("epsilon_low", &["learner.clip_low"]),
    ("epsilon_high", &["learner.clip_high"]),
    ("max_completion_length", &["rollout.max_new_tokens"]),
    ("max_new_token", &["rollout.max_new_tokens"]),
    ("max_tokens", &["rollout.max_new_tokens"]),
    ("batch_size", &["learner.groups", "sft.batch"]),
    ("per_device_train_batch_size", &["learner.groups", "sft.batch"]),
    ("per_device_eval_batch_size", &["eval.batch"]),
    ("num_iterations", &["learner.inner_epochs"]),
    ("loss_type", &["learner.loss_mean"]),
    ("scale_rewards", &["learner.scale_by_std"]),
    ("importance_sampling_level", &["learner.ratio"]),
    ("max_steps", &["learner.steps", "sft.steps"]),
    ("warmup_steps", &["learner.optimizer.warmup", "sft.optimizer.warmup"]),
    ("lr_scheduler_type", &["learner.optimizer.schedule", "sft.optimizer.schedule"]),
    ("vision_tower_lr", &["learner.optimizer.groups", "sft.optimizer.groups"]),
    ("mm_projector_lr", &["learner.optimizer.groups", "sft.optimizer.groups"]),
    ("adam_beta1", &["learner.optimizer.betas", "sft.optimizer.betas"]),
    ("adam_beta2", &["learner.optimizer.betas", "sft.optimizer.betas"]),
    ("adam_epsilon", &["learner.optimizer.eps", "sft.optimizer.eps"]),
    ("max_grad_norm", &["learner.optimizer.clip_norm", "sft.optimizer.clip_norm"]),
    ("gradient_checkpointing", &["learner.recompute"]),
    ("bf16", &["run.dtype"]),
    ("torch_dtype", &["run.dtype"]),
    ("tf32", &["run.compute"]),
    ("output_dir", &["run.dir"]),
    ("save_steps", &["learner.checkpoint_every", "sft.checkpoint_every"]),
    ("eval_steps", &["learner.eval_every", "sft.eval_every"]),
    ("save_total_limit", &["checkpoint.keep"]),
    ("resume_from_checkpoint", &["run.resume"]),
    ("model_name_or_path", &["model.dir"]),
    ("dataset", &["data.root"]),
    ("dataset_name", &["data.root"]),
    ("lora_r", &["learner.lora.rank", "sft.lora.rank"]),
    ("lora_rank", &["learner.lora.rank", "sft.lora.rank"]),
    ("lora_alpha", &["learner.lora.alpha", "sft.lora.alpha"]),
    ("lora_target_modules", &["learner.lora.targets", "sft.lora.targets"]),
    ("target_modules", &["learner.lora.targets", "sft.lora.targets"]),
    ("use_rslora", &["learner.lora.rslora", "sft.lora.rslora"]),
    ("rlhf_type", &["learner.algorithm"]),
    ("freeze_vit", &["learner.frozen"]),
    ("stop_words", &["rollout.stop"]),
    ("system_prompt", &["prompt.system"]),
    // verl, EasyR1
    ("clip_ratio", &["learner.clip_low", "learner.clip_high"]),
    ("clip_ratio_low", &["learner.clip_low"]),
    ("clip_ratio_high", &["learner.clip_high"]),
    ("clip_ratio_c", &["learner.clip_dual"]),
    ("clip_ratio_dual", &["learner.clip_dual"]),
    ("entropy_coeff", &["learner.entropy_coef"]),
    ("kl_loss_coef", &["learner.kl_coef"]),
    ("init_kl_coef", &["learner.kl_coef"]),
    ("kl_loss_type", &["learner.kl_form"]),
    ("kl_penalty", &["learner.kl_form"]),
    ("use_kl_in_reward", &["learner.kl_in"]),
    ("target_kl", &["learner.kl_target"]),
    ("ppo_epochs", &["learner.inner_epochs"]),
    ("ppo_mini_batch_size", &["learner.minibatches"]),
    ("train_batch_size", &["learner.groups", "sft.batch"]),
    ("rollout_batch_size", &["learner.groups"]),
    ("max_response_length", &["rollout.max_new_tokens"]),
    ("response_length", &["rollout.max_new_tokens"]),
    ("adv_estimator", &["learner.algorithm"]),
    ("loss_agg_mode", &["learner.loss_mean"]),
    ("norm_adv_by_std_in_grpo", &["learner.scale_by_std"]),
    ("cliprange_value", &["learner.value_clip"]),
    ("lam", &["learner.lambda"]),
    ("grad_clip", &["learner.optimizer.clip_norm", "sft.optimizer.clip_norm"]),
    ("lr_warmup_steps", &["learner.optimizer.warmup", "sft.optimizer.warmup"]),
    ("enable_gradient_checkpointing", &["learner.recompute"]),
    ("total_training_steps", &["learner.steps"]),
    ("save_freq", &["learner.checkpoint_every", "sft.checkpoint_every"]),
    ("test_freq", &["learner.eval_every", "sft.eval_every"]),
    ("format_prompt", &["prompt.template"]),
    ("val_freq", &["learner.eval_every", "sft.eval_every"]),
    ("save_limit", &["checkpoint.keep"]),
    ("model_path", &["model.dir"]),
    ("train_files", &["data.root"]),
    ("freeze_vision_tower", &["learner.frozen"]),
    ("world_size", &["learner.parallel.ranks"]),
];

/// Known keys, searched for similar ones.
pub(crate) struct Hints {
    /// Dotted sections and keys.
    known: Vec<String>,
}

impl Hints {
    /// Collects the known keys from the defaults.
    pub(crate) fn new(defaults: &Table) -> Self {
        let mut keys = Vec::new();
        leaves(defaults, "", &mut keys);
        let mut known: Vec<String> = keys.into_iter().map(|(key, _)| key).collect();
        let sections = |key: &String| key.match_indices('.').map(|(dot, _)| key[..dot].to_owned()).collect::<Vec<_>>();
        known.extend(known.iter().flat_map(sections).collect::<Vec<_>>());
        known.sort_unstable();
        known.dedup();
        Self { known }
    }

    /// Returns `: did you mean …?` for an unknown key with the given `siblings`, or an empty string. Sections are compared with sections only.
    pub(crate) fn suggest(&self, key: &str, siblings: &[&str], section: bool) -> String {
        let similar = self.similar_keys(key, siblings, section);
        let quoted: Vec<String> = similar.iter().map(|k| format!("`{k}`")).collect();
        let quoted: Vec<&str> = quoted.iter().map(String::as_str).collect();
        if quoted.is_empty() { String::new() } else { format!(": did you mean {}?", join_with_or(&quoted)) }
    }

    /// Returns the keys that an unknown key may be meant to be, from the most to the least specific rule.
    fn similar_keys(&self, key: &str, siblings: &[&str], section: bool) -> Vec<String> {
        let (parent, last) = key.rsplit_once('.').unwrap_or(("", key));
        let last = &last.to_lowercase().replace('-', "_");
        if key.contains('[') {
            // Within a list of sections, only the keys of the section are known.
            let near = nearest(last, siblings.iter().copied(), MIN_SIMILARITY);
            return near.map(|k| format!("{parent}.{k}")).into_iter().collect();
        }
        let many =
            |keys: Vec<&str>| (!keys.is_empty()).then(|| keys.into_iter().map(str::to_owned).collect::<Vec<_>>());
        let one = |k: Option<&str>| k.map(|k| vec![k.to_owned()]);
        let top = key.split('.').next().unwrap_or_default();
        let below = |around: &str| -> Vec<&str> {
            let prefix = format!("{around}.");
            let inside = |k: &&str| around.is_empty() || k.starts_with(&prefix);
            self.known.iter().map(String::as_str).filter(inside).filter(|k| !section || self.is_section(k)).collect()
        };
        let same =
            |around: &str| below(around).into_iter().find(|k| !around.is_empty() && k.rsplit('.').next() == Some(last));
        let aliases = ALIASES.iter().find(|(name, _)| name == last).map_or(&[][..], |(_, keys)| keys);
        let own = || {
            many(aliases.iter().copied().filter(|k| parent.is_empty() || k.split('.').next() == Some(top)).collect())
        };
        let words = |key: &str| key.to_lowercase().replace('.', "_");
        let flat = || self.known.iter().find(|k| k.contains('.') && words(k) == words(key)).map(String::as_str);
        let depth = key.matches('.').count();
        let beside =
            || nearest(last, below(parent).into_iter().filter(|k| k.matches('.').count() == depth), MIN_SIMILARITY);
        let within = |around: &str| {
            if around.is_empty() { None } else { nearest(last, below(around).into_iter(), MIN_SIMILARITY) }
        };
        let word = |key: &str| key.rsplit('.').next().unwrap_or(key).to_owned();
        let anywhere = || {
            let all = below("");
            let best = nearest(last, all.iter().copied(), MIN_SIMILARITY_ELSEWHERE.0).map(word)?;
            let near = strsim::normalized_damerau_levenshtein(last, &best) >= MIN_SIMILARITY_ELSEWHERE.1;
            // If several sections have such a key, suggest all of them or none: a key of the wrong stage is worse than none.
            many(all.into_iter().filter(|k| near && word(k) == best).collect())
                .filter(|keys| keys.len() <= MAX_SUGGESTIONS)
        };
        one(flat())
            .or_else(own)
            .or_else(|| one(same(parent).or_else(|| same(top))))
            .or_else(|| one(beside()))
            .or_else(|| one(within(parent)))
            .or_else(|| one(within(if parent.is_empty() { "" } else { top })))
            .or_else(|| many(aliases.to_vec()))
            .or_else(anywhere)
            .unwrap_or_default()
    }

    fn is_section(&self, key: &str) -> bool {
        self.known.iter().any(|k| k.strip_prefix(key).is_some_and(|rest| rest.starts_with('.')))
    }
}

/// Returns the key whose last part is most similar to `word`, with at least the given similarity.
fn nearest<'a>(word: &str, keys: impl Iterator<Item = &'a str>, min_similarity: f64) -> Option<&'a str> {
    let score = |key: &str| strsim::jaro_winkler(word, key.rsplit('.').next().unwrap_or(key));
    keys.map(|key| (key, score(key)))
        .filter(|(_, s)| *s >= min_similarity)
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .map(|(key, _)| key)
}

/// Joins names as `a, b or c`.
pub(crate) fn join_with_or(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [one] => (*one).to_owned(),
        [all @ .., last] => format!("{} or {last}", all.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::Layer;

    fn hints() -> Hints {
        Hints::new(&Layer::defaults().unwrap().table)
    }

    #[test]
    fn aliases_name_existing_keys_once() {
        let hints = hints();
        for (name, keys) in ALIASES {
            assert!(!keys.is_empty(), "{name}");
            for key in *keys {
                assert!(hints.known.iter().any(|k| k == key), "{name}: {key}");
            }
        }
        let names: std::collections::BTreeSet<_> = ALIASES.iter().map(|(name, _)| name).collect();
        assert_eq!(names.len(), ALIASES.len(), "a name is listed once");
    }

    #[test]
    fn keys_of_the_same_section_come_first() {
        let hints = hints();
        for (key, expected) in [
            ("learner.lr", ": did you mean `learner.optimizer.lr`?"),
            ("sft.lr", ": did you mean `sft.optimizer.lr`?"),
            ("learner.optimizer.learning_rate", ": did you mean `learner.optimizer.lr`?"),
            ("sft.learning_rate", ": did you mean `sft.optimizer.lr`?"),
            ("lr", ": did you mean `learner.optimizer.lr` or `sft.optimizer.lr`?"),
            ("learning_rate", ": did you mean `learner.optimizer.lr` or `sft.optimizer.lr`?"),
            ("learner.clip_hihg", ": did you mean `learner.clip_high`?"),
            ("learner.kl_gian", ": did you mean `learner.kl_gain`?"),
            ("learner.stepz", ": did you mean `learner.steps`?"),
            ("sft.step", ": did you mean `sft.steps`?"),
            ("learner.optimizer.steps", ": did you mean `learner.steps`?"),
            ("eval.batch_size", ": did you mean `eval.batch`?"),
            ("rollout.temprature", ": did you mean `rollout.temperature`?"),
            ("rewards", ": did you mean `reward`?"),
            ("lerner", ": did you mean `learner`?"),
            ("learner_steps", ": did you mean `learner.steps`?"),
            ("max_staleness", ": did you mean `rollout.max_staleness`?"),
        ] {
            assert_eq!(hints.suggest(key, &[], false), expected, "{key}");
        }
    }

    #[test]
    fn keys_of_other_trainers_are_known() {
        let hints = hints();
        for (key, expected) in [
            ("learner.num_generations", "rollout.n"),
            ("num_generations", "rollout.n"),
            ("learner.beta", "learner.kl_coef"),
            ("rollout.max_completion_length", "rollout.max_new_tokens"),
            ("learner.batch_size", "learner.groups"),
            ("sft.batch_size", "sft.batch"),
            ("learner.max_grad_norm", "learner.optimizer.clip_norm"),
            ("learner.LEARNING-RATE", "learner.optimizer.lr"),
        ] {
            assert_eq!(hints.suggest(key, &[], false), format!(": did you mean `{expected}`?"), "{key}");
        }
        assert_eq!(
            hints.suggest("learner.clip_ratio", &[], false),
            ": did you mean `learner.clip_low` or `learner.clip_high`?"
        );
    }

    #[test]
    fn unrelated_keys_get_no_suggestion() {
        let hints = hints();
        for key in
            ["actor", "wandb", "trainer", "critic_model", "learner.wandb", "vllm", "learner.actor", "deepspeed", "peft"]
        {
            assert_eq!(hints.suggest(key, &[], false), "", "{key}");
            assert_eq!(hints.suggest(key, &[], true), "", "{key}");
        }
        assert_eq!(hints.suggest("weight", &[], false), "", "too many candidates");
        let both = ": did you mean `learner.optimizer` or `sft.optimizer`?";
        assert_eq!(hints.suggest("optimiser", &[], true), both, "both stages are suggested");
        assert_eq!(hints.suggest("rewards", &[], true), ": did you mean `reward`?");
        assert_eq!(hints.suggest("learner.optim", &[], true), ": did you mean `learner.optimizer`?");
    }

    #[test]
    fn keys_in_lists_of_sections_are_suggested() {
        let hints = hints();
        let siblings = ["name", "address", "weight", "deadline_s"];
        assert_eq!(
            hints.suggest("reward.custom[0].wieght", &siblings, false),
            ": did you mean `reward.custom[0].weight`?"
        );
        assert_eq!(hints.suggest("reward.custom[0].lr", &siblings, false), "");
    }
}
