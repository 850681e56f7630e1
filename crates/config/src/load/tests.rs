//! Tests of the loader as a whole: layers, types, combinations and error messages.

mod messages;

use super::*;
use crate::schema::WeightSync;

fn with(text: &str, env: &[(&str, &str)], sets: &[&str]) -> Result<Config, ConfigError> {
    let dir =
        std::env::temp_dir().join(format!("unveil-config-{}-{:?}", std::process::id(), std::thread::current().id()));
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join("c.toml");
    std::fs::write(&path, text).unwrap();
    let sets: Vec<String> = sets.iter().map(|s| (*s).to_owned()).collect();
    load_from(Some(&path), env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())), &sets)
}

#[test]
fn later_layers_override_earlier_ones() {
    let text = "[run]\nseed = 1\ndir = \"a\"\n[learner]\nsteps = 5";
    let c = with(text, &[("UNVEIL__RUN__SEED", "2"), ("UNVEIL__RUN__DIR", "b")], &["run.seed=3"]).unwrap();
    assert_eq!((c.run.seed, c.run.dir.as_str(), c.learner.steps), (3, "b", 5));
    assert_eq!(c.rollout, crate::schema::Rollout::default());
}

#[test]
fn invalid_staleness_is_refused() {
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
fn keeping_caches_needs_stale_weights() {
    assert!(!with("", &[], &[]).unwrap().rollout.keep_cache);
    let kept = with("", &[], &["rollout.keep_cache=true", "rollout.max_staleness=1"]).unwrap();
    assert!(kept.rollout.keep_cache);
    let m = with("", &[], &["rollout.keep_cache=true", "rollout.max_staleness=0"]).unwrap_err().to_string();
    assert!(m.contains("rollout.keep_cache has no effect with rollout.max_staleness = 0"), "{m}");
}

#[test]
fn nondeterministic_settings_are_refused() {
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
fn weight_sync_is_checked() {
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
    assert!(m.contains("model.boxes") && m.contains("pixels") && m.contains("per_mille") && m.contains("auto"), "{m}");
    assert!(e("", &["run.seed"]).contains("section.key=value"));
    assert!(e("[sft]\nsteps = -1", &[]).contains("steps"));
}

#[test]
fn learner_choices_are_checked() {
    let text = "[learner]\nalgorithm = \"reinforce_plus_plus_baseline\"\nratio = \"sequence\"\nratio_to = \"learner\"\nimportance = \"mask\"\nloss_mean = \"sequence_max_length\"\nkl_form = \"k2\"\nkl_in = \"reward\"\nwhiten = \"always\"";
    let l = with(text, &[], &["learner.clip_dual=3", "learner.kl_coef=0.1", "learner.kl_target=6"]).unwrap().learner;
    use crate::schema::{KlPlacement, RatioBase, Whiten};
    use unveil_core::{Algorithm, Importance, KlForm, LossReduction, RatioLevel};
    assert_eq!(
        (l.algorithm, l.ratio, l.ratio_to, l.importance, l.loss_mean),
        (
            Algorithm::ReinforcePlusPlusBaseline,
            RatioLevel::Sequence,
            RatioBase::Learner,
            Importance::Mask,
            LossReduction::SequenceMaxLength
        )
    );
    assert_eq!((l.kl_form, l.kl_in, l.whiten, l.clip_dual), (KlForm::K2, KlPlacement::Reward, Whiten::Always, 3.0));
    let faults: [(&[&str], &[&str]); 35] = [
        (&["algorithm=grpoo"], &["grpoo", "rloo", "reinforce_plus_plus_baseline"]),
        (&["loss_mean=tokens"], &["tokens", "sequence_max_length"]),
        (&["kl_form=k4"], &["k4", "k3"]),
        (&["clip_dual=0.5"], &["learner.clip_dual", "0.5", "above 1"]),
        (&["max_replaced=1000001"], &["learner.max_replaced is 1000001", "to 1000000"]),
        (&["algorithm=ppo", "max_replaced=4"], &["learner.max_replaced is 4", "ppo", "use 0"]),
        (&["surrogate=ppo"], &["ppo", "cispo"]),
        (&["surrogate=cispo", "clip_dual=3"], &["learner.clip_dual is 3", "cispo", "use 0"]),
        (
            &["overlong_filter=true", "kl_coef=0.1", "kl_in=reward"],
            &["learner.overlong_filter", "grpo", "learner.kl_in = \"loss\""],
        ),
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
        (&["parallel.ranks=4", "parallel.zero=1", "parallel.shards=3"], &["learner.parallel.shards", "3", "4 ranks"]),
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
fn eval_suites_are_checked() {
    use crate::schema::Suite;
    let suites = with("[eval]\nsuites = [\"grounding\", \"mau\"]", &[], &[]).unwrap().eval.suites;
    assert_eq!(suites, Suite::ALL);
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
fn numbers_and_options_are_parsed() {
    let c = with("[learner.optimizer]\nlr = 1", &[], &["reward.vision_relevance.layers=[2]", "run.resume=40"]).unwrap();
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
fn reward_choices_are_checked() {
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
    let faults: [(&[&str], &[&str]); 21] = [
        (&["localization.curriculum=[[5,0.1],[5,0.2]]"], &["curriculum", "increase"]),
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
        (&["overlong.weight=-1"], &["reward.overlong.weight is -1", "0 or more"]),
        (
            &["overlong.weight=1", "overlong.interval_tokens=99"],
            &["overlong.interval_tokens is 99", "max_new_tokens (40)"],
        ),
        (&["custom=[{name=\"overlong\", address=\"http://x\"}]"], &["overlong", "taken"]),
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
fn collect_settings_are_checked() {
    for (sets, words) in [
        (&["collect.base_url=http://x/v1"][..], &["collect.base_url", "collect.model"][..]),
        (&["collect.max_side=8"], &["collect.max_side", "64 to 8192"]),
        (&["collect.max_tokens=0", "collect.tries=0"], &["collect.max_tokens", "collect.tries"]),
        (&["collect.concurrency=0", "collect.page_size=0"], &["collect.concurrency", "collect.page_size"]),
        (&["collect.attempt_s=0", "collect.deadline_s=-1"], &["collect.attempt_s", "collect.deadline_s"]),
        (&["collect.per_minute=-1", "collect.temperature=-1"], &["collect.per_minute", "collect.temperature"]),
        (&["collect.price_prompt=-1", "collect.price_answer=-2"], &["collect.price_prompt", "collect.price_answer"]),
        (&["collect.budget=5"], &["collect.budget", "without prices"]),
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
    assert_eq!(with(&toml::to_string(&c).unwrap(), &[], &[]).unwrap(), c, "the effective configuration loads again");
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
fn published_models_start_from_the_shipped_file() {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/instruct.toml");
    let dir = tempfile::tempdir().unwrap();
    let own = dir.path().join("own.toml");
    std::fs::write(&own, "[data]\nroot = \"r.jsonl\"\n[model]\nmin_pixels = 3136\n").unwrap();
    let loaded = Loaded::new(&[shipped, own], std::iter::empty(), &[]).unwrap();
    let c = &loaded.config;
    assert_eq!((c.answer_form(), c.sft.steps), (unveil_core::AnswerForm::Json, 0));
    assert!(c.prompt.suffix.starts_with([' ', '\n']) && c.prompt.suffix.contains("bbox_2d"), "{:?}", c.prompt.suffix);
    assert_eq!((c.model.min_pixels, c.model.max_pixels), (3136, 602_112));
}

#[test]
fn shown_defaults_load_back() {
    let text = toml::to_string(&Config::default()).unwrap();
    assert_eq!(with(&text, &[], &[]).unwrap(), Config::default());
}

/// Returns the error message for a file `c.toml` with this text, without the directory.
fn error_message(text: &str, env: &[(&str, &str)], sets: &[&str]) -> String {
    let message = with(text, env, sets).unwrap_err().to_string();
    let file = message.find("/unveil-config-").and_then(|at| Some((at, at + message[at..].find("c.toml")?)));
    let Some((at, end)) = file else { return message };
    let start = message[..at].rfind([' ', '(']).map_or(0, |space| space + 1);
    message.replace(&message[start..end], "")
}

#[test]
fn partial_sections_keep_their_other_defaults() {
    let c = with("[reward.format]\nnormalise = \"max\"", &[], &["learner.optimizer.lr=1e-4"]).unwrap();
    let defaults = Config::default();
    assert_eq!(c.learner.optimizer.lr, 1e-4);
    assert_eq!(c.learner.optimizer.weight_decay, defaults.learner.optimizer.weight_decay);
    assert_eq!(c.learner.optimizer.warmup, defaults.learner.optimizer.warmup);
    assert_eq!(c.reward.format.weight, defaults.reward.format.weight);
}

#[test]
fn strings_are_kept_as_written_for_string_keys() {
    let c = with(
        "",
        &[("UNVEIL__RUN__DIR", "007")],
        &["run.resume=40", "data.train_split=2024-05-01", "data.val_split=1_000"],
    )
    .unwrap();
    let split = (c.data.train_split.as_str(), c.data.val_split.as_str());
    assert_eq!((c.run.dir.as_str(), c.run.resume.as_str(), split), ("007", "40", ("2024-05-01", "1_000")));
    let c = with("", &[], &["data.question=true", "run.dir=\"a b\""]).unwrap();
    assert_eq!((c.data.question.as_str(), c.run.dir.as_str()), ("true", "a b"));
    let c = with("", &[], &["data.question=1\nsft.steps=3"]).unwrap();
    assert_eq!((c.data.question.as_str(), c.sft.steps), ("1\nsft.steps=3", Config::default().sft.steps));
    let c = with("", &[("UNVEIL__REWARD__VISION_RELEVANCE__HEADS", "[[3,1]]")], &[]).unwrap();
    assert_eq!(c.reward.vision_relevance.heads, [[3, 1]]);
    for wrong in ["=1", "run..seed=1", ".run=1", "run.=1"] {
        assert!(with("", &[], &[wrong]).unwrap_err().to_string().contains("section.key=value"), "{wrong}");
    }
}

#[test]
fn tables_are_merged_and_lists_replaced() {
    let text = "[data.synonyms]\nnodule = [\"nodules\"]\n[rollout]\nstop = [\"a\", \"b\"]";
    let c = with(text, &[], &["data.synonyms.mass=[\"masses\"]", "rollout.stop=[\"c\"]"]).unwrap();
    assert_eq!(c.data.synonyms.keys().collect::<Vec<_>>(), ["mass", "nodule"]);
    assert_eq!(c.rollout.stop, ["c"]);
}

#[test]
fn otlp_headers_over_plaintext_are_refused() {
    let sets = ["telemetry.otlp_endpoint=http://collector:4317"];
    let headers = ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20abcdefgh");
    let m = error_message("", &[headers], &sets);
    assert!(m.contains("telemetry.otlp_endpoint") && m.contains("OTEL_EXPORTER_OTLP_HEADERS"), "{m}");
    assert!(!m.contains("abcdefgh"), "{m}");
    with("", &[], &sets).unwrap();
    with("", &[headers], &["telemetry.otlp_endpoint=https://collector:4317"]).unwrap();
    with("", &[headers], &[sets[0], "tls.insecure=true"]).unwrap();
}

#[test]
fn messages_contain_no_credentials() {
    let secret = "hunter2hunter2";
    for set in [
        "telemetry.otlp_endpoint=http://me:SECRET@collector",
        "telemetry.otlp_endpoint=collector?token=SECRET",
        "reward.custom=[{name=\"a\", address=\"ftp://me:SECRET@x\"}]",
        "reward.judge.base_url=https://host/v1?api_key=SECRET",
        "learner.steps=https://me:SECRET@host",
        "reward.relevance.kind=https://host?sig=SECRET",
    ] {
        let m = error_message("", &[], &[&set.replace("SECRET", secret)]);
        assert!(!unveil_core::redact(&m).contains(secret), "{m}");
    }
}

#[test]
fn saved_configurations_are_parsed_without_validation() {
    let mut c = Config::default();
    c.rollout.top_p = 7.0;
    assert_eq!(parse("config.toml", &c.to_toml().unwrap()).unwrap(), c);
    let m = parse("config.toml", "[rollout]\nremoved = 3\ntop_p = 1").unwrap_err().to_string();
    assert_eq!(m, "unknown key `rollout.removed` in config.toml:2");
}

#[test]
fn lease_times_are_checked() {
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
