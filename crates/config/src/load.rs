//! The one loader: layers, then types, then combinations. Owns the wording of every configuration error.

use std::path::Path;

use toml::{Table, Value};
use unveil_core::Secret;

use crate::schema::Config;
use crate::{outside, validate};

/// What is wrong with a configuration; each message names the key and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML.
    #[error("{path} is not valid TOML: {message}")]
    Syntax {
        /// The file.
        path: String,
        /// Line, column and what was expected.
        message: String,
    },
    /// A key that does not exist.
    #[error("unknown key `{key}` in {layer}{hint}")]
    Unknown {
        /// Dotted key.
        key: String,
        /// Which layer it came from.
        layer: String,
        /// `: did you mean ...?`, or nothing.
        hint: String,
    },
    /// A value of the wrong type.
    #[error("`{key}` in {layer} is {found}, but {expected} is needed")]
    Type {
        /// Dotted key.
        key: String,
        /// Which layer it came from.
        layer: String,
        /// What was found.
        found: String,
        /// What is needed.
        expected: String,
    },
    /// `--set` without `=`.
    #[error("`--set {0}`: write it as section.key=value")]
    Set(String),
    /// Values that cannot work.
    #[error("the configuration cannot run:\n  {}", .0.join("\n  "))]
    Invalid(Vec<String>),
}

/// Loads a configuration: defaults, then `file`, then the environment, then `sets` (`a.b=c`), and checks it.
pub fn load(file: Option<&Path>, sets: &[String]) -> Result<Config, ConfigError> {
    load_from(file, environment().into_iter(), sets)
}

/// The environment, for libraries that read their own variables from it (object store credentials). What of it is a credential is
/// remembered as a secret, so that [`unveil_core::redact`] knows it.
pub fn environment() -> Vec<(String, String)> {
    let all: Vec<(String, String)> = std::env::vars().collect();
    all.iter().filter(|(name, _)| outside::is_credential(name)).for_each(|(_, value)| drop(Secret::new(value)));
    all
}

/// [`load`] with the environment given.
pub fn load_from(
    file: Option<&Path>,
    environment: impl Iterator<Item = (String, String)>,
    sets: &[String],
) -> Result<Config, ConfigError> {
    let template = template();
    let mut merged = Table::new();
    if let Some(path) = file {
        let shown = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: shown.clone(), source })?;
        let table: Table = text
            .parse()
            .map_err(|e: toml::de::Error| ConfigError::Syntax { path: shown.clone(), message: e.to_string() })?;
        merge(&mut merged, table, &template, "", &shown)?;
    }
    let mut variables: Vec<(String, String)> = environment.filter(|(k, _)| k.starts_with("UNVEIL__")).collect();
    variables.sort();
    for (name, value) in variables {
        let key = name.trim_start_matches("UNVEIL__").to_lowercase().replace("__", ".");
        merge(&mut merged, nested(&key, &value), &template, "", &format!("the environment ({name})"))?;
    }
    for set in sets {
        let (key, value) = set.split_once('=').ok_or_else(|| ConfigError::Set(set.clone()))?;
        merge(&mut merged, nested(key.trim(), value.trim()), &template, "", "--set")?;
    }
    let mut config: Config = Value::Table(merged)
        .try_into()
        .map_err(|e: toml::de::Error| ConfigError::Invalid(vec![e.to_string().trim().to_owned()]))?;
    outside::fill_heads(&mut config)?;
    let faults = validate::faults(&config);
    if faults.is_empty() { Ok(config) } else { Err(ConfigError::Invalid(faults)) }
}

/// The defaults as a table, which is also the list of known keys.
fn template() -> Table {
    match Value::try_from(Config::default()) {
        Ok(Value::Table(t)) => t,
        _ => Table::new(),
    }
}

/// One `a.b.c = text` as nested tables; the text is read as a TOML value, else taken as a string.
fn nested(key: &str, text: &str) -> Table {
    let parsed = format!("v = {text}").parse::<Table>().ok().and_then(|mut t| t.remove("v"));
    let mut value = parsed.unwrap_or_else(|| Value::String(text.to_owned()));
    let mut parts: Vec<&str> = key.split('.').collect();
    let first = parts.remove(0);
    for part in parts.into_iter().rev() {
        value = Value::Table(Table::from_iter([(part.to_owned(), value)]));
    }
    Table::from_iter([(first.to_owned(), value)])
}

fn merge(into: &mut Table, from: Table, known: &Table, prefix: &str, layer: &str) -> Result<(), ConfigError> {
    let free = prefix == "data.synonyms";
    for (key, value) in from {
        let dotted = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        let Some(expected) = known.get(&key) else {
            if free {
                into.insert(key, value);
                continue;
            }
            return Err(ConfigError::Unknown { hint: hint(&dotted, prefix), key: dotted, layer: layer.to_owned() });
        };
        match (value, expected) {
            (Value::Table(t), Value::Table(k)) => {
                let slot = into.entry(key).or_insert_with(|| Value::Table(Table::new()));
                if let Value::Table(slot) = slot {
                    merge(slot, t, k, &dotted, layer)?;
                }
            }
            (value, expected) => {
                let value = coerce(value, expected).map_err(|value| ConfigError::Type {
                    key: dotted,
                    layer: layer.to_owned(),
                    found: format!("{} ({value})", value.type_str()),
                    expected: expected.type_str().to_owned(),
                })?;
                into.insert(key, value);
            }
        }
    }
    Ok(())
}

/// Accepts an integer where a float is needed, and a bare word of any type where a string is.
fn coerce(value: Value, expected: &Value) -> Result<Value, Value> {
    match (value, expected) {
        (Value::Integer(i), Value::Float(_)) => Ok(Value::Float(i as f64)),
        (Value::Integer(i), Value::String(_)) => Ok(Value::String(i.to_string())),
        (v, e) if v.same_type(e) => Ok(v),
        (v, _) => Err(v),
    }
}

/// The nearest known key in the same table, else anywhere.
fn hint(dotted: &str, prefix: &str) -> String {
    let mut all = Vec::new();
    collect(&template(), "", &mut all);
    let last = dotted.rsplit('.').next().unwrap_or(dotted);
    let score = |k: &String| {
        let same_table = k.rsplit_once('.').map_or("", |(p, _)| p) == prefix;
        let near = strsim::jaro_winkler(last, k.rsplit('.').next().unwrap_or(k));
        near + if same_table { 0.1 } else { 0.0 }
    };
    all.iter()
        .max_by(|a, b| score(a).total_cmp(&score(b)))
        .filter(|k| score(k) > 0.75)
        .map_or_else(String::new, |k| format!(": did you mean `{k}`?"))
}

fn collect(t: &Table, prefix: &str, out: &mut Vec<String>) {
    for (k, v) in t {
        let dotted = if prefix.is_empty() { k.clone() } else { format!("{prefix}.{k}") };
        if let Value::Table(inner) = v {
            collect(inner, &dotted, out);
        }
        out.push(dotted);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::WeightSync;

    fn with(text: &str, env: &[(&str, &str)], sets: &[&str]) -> Result<Config, ConfigError> {
        let dir = std::env::temp_dir().join(format!(
            "unveil-config-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("c.toml");
        std::fs::write(&path, text).unwrap();
        let sets: Vec<String> = sets.iter().map(|s| (*s).to_owned()).collect();
        load_from(Some(&path), env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())), &sets)
    }

    #[test]
    fn layers_in_order() {
        let text = "[run]\nseed = 1\ndir = \"a\"\n[learner]\nsteps = 5";
        let c = with(text, &[("UNVEIL__RUN__SEED", "2"), ("UNVEIL__RUN__DIR", "b")], &["run.seed=3"]).unwrap();
        assert_eq!((c.run.seed, c.run.dir.as_str(), c.learner.steps), (3, "b", 5));
        assert_eq!(c.rollout, crate::schema::Rollout::default());
    }

    #[test]
    fn staleness_that_makes_no_sense_is_refused() {
        let e = |sets: &[&str]| with("", &[], sets).unwrap_err().to_string();
        for (sets, word) in [
            (&["rollout.max_staleness=-1"][..], "max_staleness"),
            (&["rollout.max_staleness=1.5"], "max_staleness"),
            (&["rollout.max_staleness=1001", "learner.steps=5000"], "0 (strictly on-policy) to 1000"),
            (&["rollout.max_staleness=6", "learner.steps=5"], "learner.steps 5"),
        ] {
            let m = e(sets);
            assert!(m.contains(word) && m.contains("max_staleness"), "{m}");
        }
        for sets in [["rollout.max_staleness=5", "learner.steps=5"], ["rollout.max_staleness=2", "learner.steps=0"]] {
            assert!(with("", &[], &sets).is_ok(), "{sets:?}");
        }
    }

    #[test]
    fn what_cannot_be_the_same_again_is_refused() {
        let fault = |sets: &[&str]| {
            let sets = [&["run.deterministic=true"][..], sets].concat();
            with("", &[], &sets).unwrap_err().to_string()
        };
        let m = fault(&["rollout.max_staleness=1"]);
        assert!(m.contains("run.deterministic") && m.contains("max_staleness = 0 (now 1)"), "{m}");
        let m = fault(&["rollout.max_staleness=0", "rollout.groups_per_lease=3", "learner.groups=16"]);
        assert!(m.contains("groups_per_lease (3)") && m.contains("(16)"), "{m}");
        with("", &[], &["run.deterministic=true", "rollout.max_staleness=0", "rollout.groups_per_lease=4"]).unwrap();
    }

    #[test]
    fn weight_sync_is_one_of_two() {
        let c = with("", &[], &["rollout.weight_sync=broadcast", "rollout.broadcast_s=2.5"]).unwrap();
        assert_eq!((c.rollout.weight_sync, c.rollout.broadcast_s), (WeightSync::Broadcast, 2.5));
        assert_eq!(with("", &[], &[]).unwrap().rollout.weight_sync, WeightSync::Grpc);
        let m = with("", &[], &["rollout.weight_sync=pigeon"]).unwrap_err().to_string();
        assert!(m.contains("pigeon") && m.contains("broadcast"), "{m}");
        for bad in ["0.5", "601", "nan"] {
            let m = with("", &[], &[&format!("rollout.broadcast_s={bad}")]).unwrap_err().to_string();
            assert!(m.contains("rollout.broadcast_s"), "{bad}: {m}");
        }
    }

    #[test]
    fn times_of_leases_are_checked_and_scoring_is_no_stall() {
        let c = with("", &[], &[]).unwrap();
        assert_eq!((c.rollout.lease_s, c.rollout.stall_s, c.rollout.patience_s), (60.0, 300.0, 60.0));
        for key in ["lease_s", "stall_s", "patience_s"] {
            for bad in ["0", "-1", "inf", "nan", "1e9"] {
                let m = with("", &[], &[&format!("rollout.{key}={bad}")]).unwrap_err().to_string();
                assert!(m.contains(&format!("rollout.{key} is")) && m.contains("seconds"), "{key}={bad}: {m}");
            }
        }
        let m = with("", &[], &["reward.deadline_s=40", "rollout.stall_s=40"]).unwrap_err().to_string();
        assert!(m.contains("rollout.stall_s is 40") && m.contains("reward.deadline_s (40)"), "{m}");
        with("", &[], &["reward.deadline_s=40", "rollout.stall_s=41", "rollout.lease_s=0.1"]).unwrap();
    }

    #[test]
    fn errors_name_the_key() {
        let e = |t: &str, s: &[&str]| with(t, &[], s).unwrap_err().to_string();
        let m = e("[learner]\nclip_hihg = 0.3", &[]);
        assert!(m.contains("learner.clip_hihg") && m.contains("did you mean `learner.clip_high`"), "{m}");
        let m = e("", &["rewards.format.weight=1"]);
        assert!(m.contains("rewards") && m.contains("`reward`"), "{m}");
        let m = e("[sft]\nsteps = \"many\"", &[]);
        assert!(m.contains("sft.steps") && m.contains("integer"), "{m}");
        let m = e("[rollout]\nn = 1", &[]);
        assert!(m.contains("rollout.n"), "{m}");
        let m = e("[reward.format]\nnormalise = \"min\"", &[]);
        assert!(m.contains("min") && m.contains("zscore"), "{m}");
        let m = e("[run\n", &[]);
        assert!(m.contains("TOML"), "{m}");
        let m = e("[model]\nboxes = \"pixels\"", &[]);
        assert!(
            m.contains("model.boxes") && m.contains("pixels") && m.contains("per_mille") && m.contains("auto"),
            "{m}"
        );
        assert!(e("", &["run.seed"]).contains("section.key=value"));
        assert!(e("[sft]\nsteps = -1", &[]).contains("steps"));
    }

    #[test]
    fn choices_of_the_learner_are_read_and_checked() {
        let text = "[learner]\nalgorithm = \"reinforce_plus_plus_baseline\"\nratio = \"sequence\"\nratio_to = \"learner\"\nimportance = \"mask\"\nloss_mean = \"sequence_max_length\"\nkl_form = \"k2\"\nkl_in = \"reward\"\nwhiten = \"always\"";
        let l =
            with(text, &[], &["learner.clip_dual=3", "learner.kl_coef=0.1", "learner.kl_target=6"]).unwrap().learner;
        use crate::schema::*;
        assert_eq!(
            (l.algorithm, l.ratio, l.ratio_to, l.importance, l.loss_mean),
            (
                Algorithm::ReinforcePlusPlusBaseline,
                RatioLevel::Sequence,
                RatioBase::Learner,
                Importance::Mask,
                LossMean::SequenceMaxLength
            )
        );
        assert_eq!((l.kl_form, l.kl_in, l.whiten, l.clip_dual), (KlForm::K2, KlPlace::Reward, Whiten::Always, 3.0));
        let faults: [(&[&str], &[&str]); 30] = [
            (&["algorithm=grpoo"], &["grpoo", "rloo", "reinforce_plus_plus_baseline"]),
            (&["loss_mean=tokens"], &["tokens", "sequence_max_length"]),
            (&["kl_form=k4"], &["k4", "k3"]),
            (&["clip_dual=0.5"], &["learner.clip_dual", "0.5", "above 1"]),
            (&["importance_cap=1"], &["learner.importance_cap", "above 1"]),
            (&["importance=truncate"], &["learner.importance", "truncate", "learner.ratio_to"]),
            (&["algorithm=reinforce_plus_plus", "whiten=never"], &["learner.whiten", "reinforce_plus_plus", "auto"]),
            (&["critic_warmup=5"], &["learner.critic_warmup", "5", "ppo", "grpo"]),
            (&["kl_target=6"], &["learner.kl_target", "learner.kl_coef"]),
            (&["kl_in=reward", "kl_gradient=reverse"], &["learner.kl_gradient", "loss"]),
            (&["policy_coef=0"], &["learner.policy_coef", "above 0"]),
            (&["kl_coef=-1"], &["learner.kl_coef", "-1", "0 or more"]),
            (&["kl_gian=0.1"], &["learner.kl_gian", "`learner.kl_gain`"]),
            (&["lora.alpha=0"], &["learner.lora.alpha", "above 0"]),
            (&["lora.targets=[]"], &["learner.lora.targets", "q_proj"]),
            (&["lora.rank=-1"], &["learner.lora.rank"]),
            (&["lora.rank=4", "frozen=[\"visual.\"]"], &["learner.frozen", "learner.lora.rank is 4", "targets"]),
            (&["lora.dropout=0.1"], &["learner.lora.dropout"]),
            (
                &["parallel.ranks=4", "parallel.zero=1", "parallel.shards=3"],
                &["learner.parallel.shards", "3", "4 ranks"],
            ),
            (&["parallel.ranks=4", "parallel.shards=2"], &["learner.parallel.shards", "zero = 0"]),
            (&["parallel.ranks=2", "parallel.rank=2"], &["learner.parallel.rank is 2", "2 ranks"]),
            (&["parallel.ranks=2", "parallel.rank=1"], &["learner.parallel.rendezvous", "rank 1", "port"]),
            (&["parallel.rendezvous=nowhere"], &["learner.parallel.rendezvous", "`nowhere`", "host:port"]),
            (&["parallel.zero=4"], &["learner.parallel.zero is 4", "0, 1, 2 or 3"]),
            (&["parallel.lost_s=1"], &["learner.parallel.lost_s is 1", "5 to 3600"]),
            (&["critic=separate"], &["learner.critic", "ppo", "grpo"]),
            (&["freeze=[{parameters=[\"merger\"], from=4, until=4}]"], &["learner.freeze, entry 0", "from = 4"]),
            (&["freeze=[{parameters=[], until=4}]"], &["learner.freeze, entry 0", "empty"]),
            (&["freeze=[{parameter=[\"merger\"], until=4}]"], &["parameter"]),
            (&["token_budget=0"], &["learner.token_budget"]),
        ];
        for (sets, words) in faults {
            let sets: Vec<String> = sets.iter().map(|s| format!("learner.{s}")).collect();
            let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
            let m = with("", &[], &sets).unwrap_err().to_string();
            assert!(words.iter().all(|w| m.contains(w)), "{sets:?}: {m}");
        }
        let m = with("", &[], &["learner.algorithm=rloo", "rollout.n=1"]).unwrap_err().to_string();
        assert!(m.contains("rloo") && m.contains("rollout.n"), "{m}");
        with("", &[], &["learner.algorithm=reinforce_plus_plus", "rollout.n=1"]).unwrap();
    }

    #[test]
    fn suites_are_read_and_checked() {
        use crate::schema::Suite;
        let found = with("[eval]\nsuites = [\"grounding\", \"mau\"]", &[], &[]).unwrap().eval.suites;
        assert_eq!(found, Suite::ALL);
        for suite in Suite::ALL {
            let text = format!("[eval]\nsuites = [\"{}\"]", suite.name());
            assert_eq!(with(&text, &[], &[]).unwrap().eval.suites, [suite]);
        }
        let e = with("[eval]\nsuites = [\"mau\", \"mau\"]", &[], &[]).unwrap_err().to_string();
        assert!(e.contains("eval.suites") && e.contains("twice"), "{e}");
        let e = with("[eval]\nsuites = [\"pope\"]", &[], &[]).unwrap_err().to_string();
        assert!(e.contains("pope") && e.contains("grounding") && e.contains("mau"), "{e}");
    }

    #[test]
    fn numbers_and_options() {
        let c =
            with("[learner.optimizer]\nlr = 1", &[], &["reward.vision_relevance.layers=[2]", "run.resume=40"]).unwrap();
        assert_eq!(c.learner.optimizer.lr, 1.0);
        assert_eq!(c.reward.vision_relevance.layers, [2]);
        assert_eq!(c.run.resume, "40");
        for form in unveil_core::BoxForm::ALL {
            let c = with("", &[], &[&format!("model.boxes={form}")]).unwrap();
            assert_eq!(c.model.boxes, Some(form));
            assert_eq!(with(&toml::to_string(&c).unwrap(), &[], &[]).unwrap(), c);
        }
        let c = with("[data.synonyms]\nnodule = [\"nodules\"]", &[], &[]).unwrap();
        assert_eq!(c.data.synonyms["nodule"], ["nodules"]);
    }

    #[test]
    fn choices_of_the_reward_are_read_and_checked() {
        let text = r#"
            [reward.localization]
            overlap = "giou"
            curriculum = [[0, 0.1], [100, 0.5]]
            [reward.relevance]
            weight = 1
            kind = "rouge_l"
            span = ["<answer>", "</answer>"]
            [[reward.custom]]
            name = "tone"
            address = "grpc://127.0.0.1:9"
            [[reward.gates]]
            component = "vision_relevance"
            needs = "category"
        "#;
        let r = with(text, &[], &[]).unwrap().reward;
        use crate::schema::*;
        assert_eq!(r.localization.curriculum, [(0, 0.1), (100, 0.5)]);
        assert_eq!((r.localization.overlap, r.relevance.kind), (Overlap::Giou, RelevanceKind::RougeL));
        assert_eq!((r.custom[0].weight, r.custom[0].range, r.gates[0].at_least), (1.0, [0.0, 1.0], 1.0));
        let names: Vec<&str> = r.components().iter().map(|(n, ..)| *n).collect();
        assert_eq!(names, ["localization", "vision_relevance", "format", "category", "relevance", "tone"]);
        let faults: [(&[&str], &[&str]); 18] = [
            (&["localization.curriculum=[[5,0.1],[5,0.2]]"], &["curriculum", "rise"]),
            (&["localization.curriculum=[[5,1.5]]"], &["curriculum", "0 to 1"]),
            (&["localization.overlap=diou"], &["diou", "ciou"]),
            (&["vision_relevance.sink=0.5"], &["sink", "above 1"]),
            (&["relevance.weight=1"], &["judge.base_url", "judge.model"]),
            (&["relevance.weight=1", "relevance.kind=embedding"], &["embedding_dir"]),
            (&["relevance.span=[\"<a>\"]"], &["relevance.span", "closing"]),
            (&["judge.scale=[5, 5]"], &["judge.scale", "highest"]),
            (&["judge.hedge=1"], &["judge.hedge", "below 1"]),
            (&["judge.deadline_s=0", "judge.tries=0"], &["judge.deadline_s", "above 0", "judge.tries"]),
            (&["judge.base_url=http://x/v1"], &["judge.base_url", "judge.model"]),
            (&["judge.temperature=3", "judge.per_minute=-1"], &["judge.temperature", "0 to 2", "judge.per_minute"]),
            (&["length.min_chars=900"], &["length.min_chars", "900"]),
            (&["symbolic.weight=1"], &["symbolic.table"]),
            (&["custom=[{name=\"format\", address=\"http://x\"}]"], &["format", "taken"]),
            (&["custom=[{name=\"a\", address=\"ftp://x\"}]"], &["ftp://x", "grpc://"]),
            (&["custom=[{name=\"a\", address=\"http://x\", wieght=2}]"], &["wieght"]),
            (&["gates=[{component=\"length\", needs=\"category\"}]"], &["gates", "`length`", "not computed"]),
        ];
        for (sets, words) in faults {
            let sets: Vec<String> = sets.iter().map(|s| format!("reward.{s}")).collect();
            let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
            let m = with("", &[], &sets).unwrap_err().to_string();
            assert!(words.iter().all(|w| m.contains(w)), "{sets:?}: {m}");
        }
    }

    #[test]
    fn faults_of_collecting_are_named() {
        for (sets, words) in [
            (&["collect.base_url=http://x/v1"][..], &["collect.base_url", "collect.model"][..]),
            (&["collect.max_side=8"], &["collect.max_side", "64 to 8192"]),
            (&["collect.max_tokens=0", "collect.tries=0"], &["collect.max_tokens", "collect.tries"]),
            (&["collect.concurrency=0", "collect.page_size=0"], &["collect.concurrency", "collect.page_size"]),
            (&["collect.attempt_s=0", "collect.deadline_s=-1"], &["collect.attempt_s", "collect.deadline_s"]),
            (&["collect.per_minute=-1", "collect.temperature=-1"], &["collect.per_minute", "collect.temperature"]),
            (
                &["collect.price_prompt=-1", "collect.price_answer=-2"],
                &["collect.price_prompt", "collect.price_answer"],
            ),
            (&["collect.budget=5"], &["collect.budget", "without a price"]),
        ] {
            let m = with("", &[], sets).unwrap_err().to_string();
            assert!(words.iter().all(|w| m.contains(w)), "{sets:?}: {m}");
        }
        let good = ["collect.base_url=http://x/v1", "collect.model=m", "collect.budget=5", "collect.price_answer=2"];
        assert_eq!(with("", &[], &good).unwrap().collect.budget, 5.0);
    }

    #[test]
    fn calibrated_heads_are_read_and_frozen() {
        let path = std::env::temp_dir().join(format!("unveil-heads-{}.toml", std::process::id()));
        std::fs::write(&path, "heads = [[3, 1], [4, 0]]\nsamples = 9").unwrap();
        let file = format!("reward.vision_relevance.heads_file={}", path.display());
        let c = with("", &[], &[&file]).unwrap();
        assert_eq!(c.reward.vision_relevance.heads, [[3, 1], [4, 0]]);
        assert_eq!(with(&toml::to_string(&c).unwrap(), &[], &[]).unwrap(), c, "what is effective loads again");
        for other in ["reward.vision_relevance.heads=[[0,0]]", "reward.vision_relevance.layers=[1]"] {
            let e = with("", &[], &[&file, other]).unwrap_err().to_string();
            assert!(e.contains("heads_file") && e.contains("other heads"), "{e}");
        }
        for bad in ["heads = []", "heads = 3", "x"] {
            std::fs::write(&path, bad).unwrap();
            assert!(with("", &[], &[&file]).unwrap_err().to_string().contains("heads_file"), "{bad}");
        }
        let gone = with("", &[], &["reward.vision_relevance.heads_file=/no/such.toml"]).unwrap_err().to_string();
        assert!(gone.contains("/no/such.toml"), "{gone}");
    }

    #[test]
    fn shown_defaults_load_back() {
        let text = toml::to_string(&Config::default()).unwrap();
        assert_eq!(with(&text, &[], &[]).unwrap(), Config::default());
    }
}
