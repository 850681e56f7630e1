//! What a key that does not exist was meant to be: a neighbour that is written alike, or the key that does what another trainer's
//! key of that name does. No hint is better than a wrong one.

use toml::Table;

use crate::layer::leaves;
use crate::words::either;

/// How alike a key of the same section must be (Jaro-Winkler).
const NEAR: f64 = 0.8;
/// How alike a key of another section must be, and how few of its letters may differ (normalised Damerau-Levenshtein).
const ELSEWHERE: (f64, f64) = (0.85, 0.75);

/// How many keys of one name are proposed.
const MOST: usize = 3;

/// Names that other trainers have for what is named otherwise here. Where there are several keys, those of the section that is written
/// in are meant.
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
    ("adam_beta1", &["learner.optimizer.betas", "sft.optimizer.betas"]),
    ("adam_beta2", &["learner.optimizer.betas", "sft.optimizer.betas"]),
    ("adam_epsilon", &["learner.optimizer.eps", "sft.optimizer.eps"]),
    ("max_grad_norm", &["learner.optimizer.clip_norm", "sft.optimizer.clip_norm"]),
    ("gradient_checkpointing", &["learner.recompute"]),
    ("bf16", &["run.dtype"]),
    ("torch_dtype", &["run.dtype"]),
    ("output_dir", &["run.dir"]),
    ("save_steps", &["learner.checkpoint_every", "sft.checkpoint_every"]),
    ("eval_steps", &["learner.eval_every", "sft.eval_every"]),
    ("save_total_limit", &["checkpoint.keep"]),
    ("resume_from_checkpoint", &["run.resume"]),
    ("model_name_or_path", &["model.dir"]),
    ("dataset", &["data.root"]),
    ("dataset_name", &["data.root"]),
    ("lora_r", &["learner.lora.rank"]),
    ("lora_rank", &["learner.lora.rank"]),
    ("lora_alpha", &["learner.lora.alpha"]),
    ("lora_target_modules", &["learner.lora.targets"]),
    ("target_modules", &["learner.lora.targets"]),
    ("use_rslora", &["learner.lora.rslora"]),
    ("rlhf_type", &["learner.algorithm"]),
    ("freeze_vit", &["learner.frozen"]),
    ("stop_words", &["rollout.stop"]),
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
    ("val_freq", &["learner.eval_every", "sft.eval_every"]),
    ("save_limit", &["checkpoint.keep"]),
    ("model_path", &["model.dir"]),
    ("train_files", &["data.root"]),
    ("freeze_vision_tower", &["learner.frozen"]),
    ("world_size", &["learner.parallel.ranks"]),
];

/// The known keys, to look for near ones among them.
pub(crate) struct Hints {
    /// Sections and keys, dotted.
    known: Vec<String>,
}

impl Hints {
    /// Those of the defaults.
    pub fn new(defaults: &Table) -> Self {
        let mut found = Vec::new();
        leaves(defaults, "", &mut found);
        let mut known: Vec<String> = found.into_iter().map(|(key, _)| key).collect();
        let sections = |key: &String| key.match_indices('.').map(|(at, _)| key[..at].to_owned()).collect::<Vec<_>>();
        known.extend(known.iter().flat_map(sections).collect::<Vec<_>>());
        known.sort_unstable();
        known.dedup();
        Self { known }
    }

    /// `: did you mean …?` for a key that does not exist beside `siblings`, or nothing. A section is compared with sections.
    pub fn of(&self, key: &str, siblings: &[&str], section: bool) -> String {
        let meant = self.meant(key, siblings, section);
        let quoted: Vec<String> = meant.iter().map(|k| format!("`{k}`")).collect();
        let quoted: Vec<&str> = quoted.iter().map(String::as_str).collect();
        if quoted.is_empty() { String::new() } else { format!(": did you mean {}?", either(&quoted)) }
    }

    fn meant(&self, key: &str, siblings: &[&str], section: bool) -> Vec<String> {
        let (parent, last) = key.rsplit_once('.').unwrap_or(("", key));
        let last = &last.to_lowercase().replace('-', "_");
        if key.contains('[') {
            // In a list of sections the keys of one are all that is known.
            let near = nearest(last, siblings.iter().copied(), NEAR);
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
        let beside = || nearest(last, below(parent).into_iter().filter(|k| k.matches('.').count() == depth), NEAR);
        let within =
            |around: &str| if around.is_empty() { None } else { nearest(last, below(around).into_iter(), NEAR) };
        let word = |key: &str| key.rsplit('.').next().unwrap_or(key).to_owned();
        let anywhere = || {
            let all = below("");
            let best = nearest(last, all.iter().copied(), ELSEWHERE.0).map(word)?;
            let near = strsim::normalized_damerau_levenshtein(last, &best) >= ELSEWHERE.1;
            // Of two stages that have such a key the wrong one is worse than none: all are named, or nothing is.
            many(all.into_iter().filter(|k| near && word(k) == best).collect()).filter(|keys| keys.len() <= MOST)
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

/// The key whose last word is most like `word`, and like enough.
fn nearest<'a>(word: &str, keys: impl Iterator<Item = &'a str>, least: f64) -> Option<&'a str> {
    let score = |key: &str| strsim::jaro_winkler(word, key.rsplit('.').next().unwrap_or(key));
    keys.map(|key| (key, score(key)))
        .filter(|(_, s)| *s >= least)
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .map(|(key, _)| key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::Layer;

    fn hints() -> Hints {
        Hints::new(&Layer::defaults().unwrap().table)
    }

    #[test]
    fn every_alias_names_keys_that_exist_and_none_that_is_one() {
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
    fn the_same_section_comes_first() {
        let hints = hints();
        for (key, meant) in [
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
            assert_eq!(hints.of(key, &[], false), meant, "{key}");
        }
    }

    #[test]
    fn names_of_other_trainers_are_known() {
        let hints = hints();
        for (key, meant) in [
            ("learner.num_generations", "rollout.n"),
            ("num_generations", "rollout.n"),
            ("learner.beta", "learner.kl_coef"),
            ("rollout.max_completion_length", "rollout.max_new_tokens"),
            ("learner.batch_size", "learner.groups"),
            ("sft.batch_size", "sft.batch"),
            ("learner.max_grad_norm", "learner.optimizer.clip_norm"),
            ("learner.LEARNING-RATE", "learner.optimizer.lr"),
        ] {
            assert_eq!(hints.of(key, &[], false), format!(": did you mean `{meant}`?"), "{key}");
        }
        assert_eq!(
            hints.of("learner.clip_ratio", &[], false),
            ": did you mean `learner.clip_low` or `learner.clip_high`?"
        );
    }

    #[test]
    fn what_is_like_nothing_gets_no_hint() {
        let hints = hints();
        for key in
            ["actor", "wandb", "trainer", "critic_model", "learner.wandb", "vllm", "learner.actor", "deepspeed", "peft"]
        {
            assert_eq!(hints.of(key, &[], false), "", "{key}");
            assert_eq!(hints.of(key, &[], true), "", "{key}");
        }
        assert_eq!(hints.of("weight", &[], false), "", "there are too many");
        let both = ": did you mean `learner.optimizer` or `sft.optimizer`?";
        assert_eq!(hints.of("optimiser", &[], true), both, "not that of one stage alone");
        assert_eq!(hints.of("rewards", &[], true), ": did you mean `reward`?");
        assert_eq!(hints.of("learner.optim", &[], true), ": did you mean `learner.optimizer`?");
    }

    #[test]
    fn in_a_list_the_keys_of_its_sections_are_looked_at() {
        let hints = hints();
        let siblings = ["name", "address", "weight", "deadline_s"];
        assert_eq!(hints.of("reward.custom[0].wieght", &siblings, false), ": did you mean `reward.custom[0].weight`?");
        assert_eq!(hints.of("reward.custom[0].lr", &siblings, false), "");
    }
}
