//! Checks of the section `[sft]` and of `eval.best`. Each message names the key and its value.

use crate::paths::SFT_PREFIXES;
use crate::schema::{Config, Optimizer, SftLora, SftPhase, Suite};

/// Maximum number of phases.
const MAX_PHASES: usize = SFT_PREFIXES.len();

/// Metrics of the summary that are higher for a better model.
const SUMMARY_METRICS: [&str; 5] = ["accuracy", "mean_iou", "acc50", "soft_f1", "vision_lift"];

/// Adds a message to `out` for every problem.
pub(super) fn check(c: &Config, out: &mut Vec<String>) {
    let s = &c.sft;
    let mut require = |ok: bool, message: String| {
        if !ok {
            out.push(message);
        }
    };
    require(s.batch > 0, "sft.batch is 0".into());
    require(s.token_budget > 0, "sft.token_budget is 0: use 1 or more".into());
    let phases = c.sft_phases();
    for (i, phase) in phases.iter().enumerate() {
        let section = if s.stage.is_empty() { "sft".to_owned() } else { format!("sft.stage, entry {i}") };
        check_phase(&section, phase, &mut require);
    }
    if !s.stage.is_empty() {
        let sum: u64 = phases.iter().map(|p| p.steps).sum();
        require(
            s.steps == sum,
            format!("sft.steps is {}, but the phases of sft.stage have {sum} steps together: set it to {sum}", s.steps),
        );
        require(
            s.frozen.is_empty() && s.lora == SftLora::default() && s.optimizer == Optimizer::default(),
            "sft.frozen, sft.lora or sft.optimizer is set beside sft.stage: set it in the phases".into(),
        );
        require(phases.len() <= MAX_PHASES, format!("sft.stage has {} phases: use at most {MAX_PHASES}", phases.len()));
    }
    let lora = &s.lora;
    let next = &c.learner.lora;
    if next.continue_sft {
        let (mine, theirs) = (lora, next);
        require(
            s.steps > 0 && lora.rank > 0,
            "learner.lora.continue_sft is true, but stage 1 trains no adapters on the initial model: set sft.lora.rank without sft.stage, or continue_sft = false"
                .into(),
        );
        require(
            (mine.rank, mine.alpha, mine.rslora, &mine.targets) == (theirs.rank, theirs.alpha, theirs.rslora, &theirs.targets),
            "learner.lora.continue_sft is true, so rank, alpha, rslora and targets of learner.lora must be those of sft.lora".into(),
        );
        require(
            lora.modules_to_save.is_empty(),
            "learner.lora.continue_sft is true, but sft.lora.modules_to_save changes the model below the adapters: use false, which merges them".into(),
        );
    }
    let best = c.eval.best.as_str();
    require(
        best.is_empty() || best.contains('.') || SUMMARY_METRICS.contains(&best),
        format!(
            "eval.best is `{best}`: use {}, or the name of a suite, a dot and a metric",
            SUMMARY_METRICS.join(", ")
        ),
    );
    if let Some((suite, _)) = best.split_once('.') {
        let known = Suite::ALL.iter().find(|s| s.name() == suite);
        require(
            known.is_some_and(|s| c.eval.suites.contains(s)),
            format!(
                "eval.best is `{best}`, but eval.suites does not contain `{suite}`: add it, or use a summary metric"
            ),
        );
    }
}

/// Checks what a phase trains; `section` is its place.
fn check_phase(section: &str, phase: &SftPhase, require: &mut impl FnMut(bool, String)) {
    let SftPhase { steps, frozen, lora, optimizer: _ } = phase;
    require(section == "sft" || *steps > 0, format!("{section}: steps is 0: use 1 or more, or leave the phase out"));
    require(
        frozen.iter().all(|name| !name.is_empty()),
        format!(
            "{section}: frozen has an empty entry: use vision_tower, merger, language_model, or prefixes of parameter names"
        ),
    );
    let is_frozen = |module: &&str| frozen.iter().any(|name| name == module);
    require(
        lora.rank > 0 || !["vision_tower", "merger", "language_model"].iter().all(is_frozen),
        format!("{section}: nothing is trained: frozen names every module, and there are no adapters (lora.rank)"),
    );
    require(
        lora.alpha > 0.0 && lora.alpha.is_finite(),
        format!("{section}: lora.alpha is {}: use a number above 0", lora.alpha),
    );
    require(
        !lora.targets.is_empty() && lora.targets.iter().all(|t| !t.is_empty()),
        format!(
            "{section}: lora.targets must name linear layers, such as \"q_proj\"; use lora.rank = 0 for no adapters"
        ),
    );
    require(
        lora.modules_to_save.iter().all(|m| !m.is_empty()),
        format!("{section}: lora.modules_to_save has an empty entry: name modules, such as \"merger\""),
    );
    require(
        (0.0..1.0).contains(&lora.dropout),
        format!("{section}: lora.dropout is {}: use 0 up to below 1", lora.dropout),
    );
    require(
        lora.dropout == 0.0 || (lora.rank > 0 && lora.targets.iter().all(|t| !t.starts_with("visual."))),
        format!(
            "{section}: lora.dropout is {}: it needs lora.rank above 0 and lora.targets in the decoder alone",
            lora.dropout
        ),
    );
    require(
        lora.rank > 0 || lora.modules_to_save.is_empty(),
        format!(
            "{section}: lora.modules_to_save is set, but lora.rank is 0: without adapters all modules are trained; use frozen"
        ),
    );
    require(
        lora.rank == 0 || frozen.is_empty(),
        format!(
            "{section}: frozen is set and lora.rank is {}: with adapters all weights are frozen; name what is trained in lora.targets and lora.modules_to_save",
            lora.rank
        ),
    );
}

#[cfg(test)]
mod tests {
    use super::super::changed::problems_after;
    use super::*;
    use crate::validate::parallel;

    #[test]
    fn stage_1_and_the_best_metric_are_checked() {
        let after = |change: fn(&mut Config)| problems_after(check, change);
        assert_eq!(after(|_| ()), [""; 0]);
        assert_eq!(after(|c| c.sft.batch = 0), ["sft.batch is 0"]);
        assert!(after(|c| c.sft.token_budget = 0)[0].contains("sft.token_budget is 0"));
        assert!(after(|c| c.sft.frozen = vec!["visual.".into(), String::new()])[0].contains("sft: frozen"));
        assert!(after(|c| c.eval.best = "grounding.acc50".into())[0].contains("eval.suites"));
        assert!(after(|c| c.eval.best = "nothing.acc50".into())[0].contains("`nothing`"));
        let listed = |c: &mut Config| {
            c.eval.best = "grounding.acc50".into();
            c.eval.suites = vec![Suite::Grounding];
        };
        assert_eq!(after(listed), [""; 0]);
        assert_eq!(after(|c| c.eval.best = "mean_iou".into()), [""; 0]);
        assert!(after(|c| c.eval.best = "n".into())[0].contains("eval.best is `n`: use accuracy"));
        assert!(after(|c| c.sft.lora.alpha = 0.0)[0].contains("sft: lora.alpha is 0"));
        assert!(after(|c| c.sft.lora.modules_to_save = vec!["merger".into()])[0].contains("lora.rank is 0"));
        let frozen = |c: &mut Config| (c.sft.lora.rank, c.sft.frozen) = (8, vec!["visual.".into()]);
        assert!(after(frozen)[0].contains("lora.rank is 8"));
        assert!(after(|c| (c.sft.lora.rank, c.sft.lora.dropout) = (8, 1.0))[0].contains("lora.dropout is 1"));
        assert!(after(|c| c.sft.lora.dropout = 0.1)[0].contains("needs lora.rank"));
        let visual = |c: &mut Config| {
            (c.sft.lora.rank, c.sft.lora.dropout) = (8, 0.1);
            c.sft.lora.targets.push("visual.*.qkv".into());
        };
        assert!(after(visual)[0].contains("in the decoder alone"));
        let continues = |c: &mut Config| {
            (c.sft.lora.rank, c.learner.lora.rank, c.learner.lora.continue_sft) = (8, 8, true);
        };
        assert_eq!(after(continues), [""; 0]);
        assert_eq!(after(|c| c.learner.lora.continue_sft = true).len(), 1, "stage 1 trains no adapters");
        let other = |c: &mut Config| {
            (c.sft.lora.rank, c.learner.lora.rank, c.learner.lora.continue_sft) = (8, 8, true);
            c.sft.lora.alpha = 3.0;
            c.sft.lora.modules_to_save = vec!["merger".into()];
        };
        assert_eq!(after(other).len(), 2);
        let parallel = problems_after(parallel::check, |c| (c.sft.parallel.ranks, c.sft.parallel.rank) = (2, 2));
        assert!(parallel.iter().any(|m| m.contains("sft.parallel.rank is 2 of 2 ranks")), "{parallel:?}");
    }

    #[test]
    fn phases_are_checked() {
        let phase = |steps: u64, frozen: &[&str]| SftPhase {
            steps,
            frozen: frozen.iter().map(|s| (*s).to_owned()).collect(),
            lora: SftLora::default(),
            optimizer: Optimizer::default(),
        };
        let after = |change: &dyn Fn(&mut Config)| {
            let mut c = Config::default();
            c.sft.stage = vec![phase(3, &["language_model", "vision_tower"]), phase(5, &[])];
            c.sft.steps = 8;
            change(&mut c);
            let mut out = Vec::new();
            check(&c, &mut out);
            out.join("; ")
        };
        assert_eq!(after(&|_| ()), "");
        assert!(after(&|c| c.sft.steps = 400).contains("8 steps together"));
        assert!(after(&|c| c.sft.frozen = vec!["merger".into()]).contains("set it in the phases"));
        assert!(after(&|c| c.sft.optimizer.lr = 1.0).contains("set it in the phases"));
        let nothing = after(&|c| c.sft.stage[0].frozen.push("merger".into()));
        assert!(nothing.contains("sft.stage, entry 0: nothing is trained"), "{nothing}");
        assert!(after(&|c| (c.sft.stage[1].steps, c.sft.steps) = (0, 3)).contains("entry 1: steps is 0"));
        assert!(after(&|c| c.sft.stage[1].lora.modules_to_save = vec!["merger".into()]).contains("entry 1: lora."));
        assert!(after(&|c| c.learner.lora.continue_sft = true).contains("without sft.stage"));
        let many = |c: &mut Config| (c.sft.stage, c.sft.steps) = (vec![phase(1, &[]); 9], 9);
        assert!(after(&many).contains("at most 8"));
    }
}
