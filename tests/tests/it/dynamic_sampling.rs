//! Dynamic sampling and the length limit in complete runs: counts in every place that shows them, a clear end, and repetition.

use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use unveil_testkit::{Finished, Lineage, Sandbox, events_of, read_json};

const SOON: Duration = Duration::from_secs(180);
/// Only the class counts, and the model knows it half: about half of the groups have equal rewards.
const HALF_FLAT: [&str; 7] = [
    "reward.localization.weight=0",
    "reward.vision_relevance.weight=0",
    "reward.format.weight=0",
    "reward.category.weight=1",
    "sft.steps=25",
    "rollout.temperature=1.5",
    "learner.max_replaced=12",
];

fn train(s: &Sandbox, sets: &[&str]) -> Finished {
    s.start_micro("train", sets).wait(SOON)
}

fn accounting(s: &Sandbox, run: &Path) -> Value {
    s.unveil(&["checkpoint", "show", &run.to_string_lossy()]).ok().json().remove(0)["accounting"].clone()
}

fn sum(run: &Path, key: &str) -> u64 {
    events_of(run, "train").iter().map(|e| e[key].as_u64().expect("a count")).sum()
}

#[test]
fn replaced_groups_are_counted_everywhere() {
    let s = Sandbox::new();
    let run = s.path("run");
    train(&s, &[&HALF_FLAT[..], &["learner.steps=3"]].concat()).ok();
    let first = accounting(&s, &run);
    assert_eq!(first["replaced"], sum(&run, "replaced"), "{first}");
    // The run continues, and everything is looked at once over both parts.
    train(&s, &[&HALF_FLAT[..], &["learner.steps=8"]].concat()).ok();
    let replaced = sum(&run, "replaced");
    assert!(replaced > 0, "the runs need groups of equal rewards to say anything");
    let whole = accounting(&s, &run);
    let expected = json!([16, replaced, 0, 0, true]);
    let found: Value =
        ["trained", "replaced", "twice", "lost", "exactly_once"].map(|k| whole[k].clone()).to_vec().into();
    assert_eq!(found, expected, "{whole}");

    let trained: Vec<(u64, String)> = Lineage::read(&run).steps.into_iter().flat_map(|step| step.groups).collect();
    let noted: Vec<Value> = events_of(&run, "experience").into_iter().filter(|e| e["event"] == "replaced").collect();
    assert_eq!(noted.len() as u64, replaced);
    let place = |g: &Value| (g["pass"].as_u64().expect("a pass"), g["record"].as_str().expect("a record").to_owned());
    let mut looked_at: Vec<(u64, String)> = noted.iter().map(|e| place(&e["group"])).collect();
    looked_at.extend(trained);
    let distinct: HashSet<&(u64, String)> = looked_at.iter().collect();
    assert_eq!(distinct.len(), looked_at.len(), "a group was looked at twice in a pass: {looked_at:?}");
    let last = looked_at.iter().map(|(pass, _)| *pass).max().expect("groups");
    for pass in 0..last {
        assert_eq!(looked_at.iter().filter(|(p, _)| *p == pass).count(), 8, "pass {pass}");
    }

    assert_eq!(read_json(&run.join("summary.json"))["replaced_groups"], replaced);
    let report = std::fs::read_to_string(run.join("report.html")).expect("report.html");
    assert!(report.contains("groups replaced per update") && report.contains(&format!("{replaced} groups replaced")));
}

#[test]
fn a_run_of_equal_rewards_ends_with_the_reason() {
    let s = Sandbox::new();
    let sets = [
        "reward.localization.weight=0",
        "reward.vision_relevance.weight=0",
        "reward.format.weight=0",
        "reward.category.weight=0",
        "reward.length.weight=1",
        "reward.length.min_chars=0",
        "reward.length.max_chars=1000000",
        "learner.max_replaced=3",
    ];
    let done = train(&s, &sets).exits(1);
    for part in ["step 1", "all 5 groups", "3 of them", "learner.max_replaced", "rollouts/step-1.jsonl"] {
        assert!(done.stderr.contains(part), "{part}: {}", done.stderr);
    }
    assert!(!done.stderr.contains("panicked"), "{}", done.stderr);
    assert!(events_of(&s.path("run"), "train").is_empty() && s.path("run/rollouts/step-1.jsonl").exists());
}

#[test]
fn replaced_groups_do_not_depend_on_the_workers() {
    let updates = |workers: &str| {
        let s = Sandbox::new();
        let sets =
            ["run.deterministic=true", "rollout.max_staleness=0", "rollout.groups_per_lease=2", "learner.steps=5"];
        train(&s, &[&HALF_FLAT[..], &sets, &[workers]].concat()).ok();
        let mut all = events_of(&s.path("run"), "train");
        for event in &mut all {
            let fields = event.as_object_mut().expect("an object");
            fields.retain(|key, _| !key.ends_with("_ms") && !matches!(key.as_str(), "time" | "agreement_by_worker"));
        }
        (all, std::fs::read(s.path("run/model/model.safetensors")).expect("the final model"))
    };
    let one = updates("rollout.workers=2");
    let two = updates("rollout.workers=2");
    assert!(one.0.iter().any(|e| e["replaced"] != 0), "the runs need groups of equal rewards to say anything");
    assert_eq!(one.0, two.0);
    assert!(one.1 == two.1, "the weights differ");
}

#[test]
fn cut_responses_are_punished_and_left_out_of_the_loss() {
    let s = Sandbox::new();
    let run = s.path("run");
    let sets = [
        "rollout.max_new_tokens=12",
        "rollout.temperature=1.2",
        "learner.overlong_filter=true",
        "reward.overlong.weight=0.5",
        "reward.overlong.interval_tokens=8",
    ];
    train(&s, &sets).ok();
    let filtered = sum(&run, "filtered_responses");
    assert!(filtered > 0, "the run needs cut responses to say anything");
    assert_eq!(read_json(&run.join("summary.json"))["filtered_responses"], filtered);
    let samples: Vec<Value> = (1..=6)
        .map(|step| std::fs::read_to_string(run.join(format!("rollouts/step-{step}.jsonl"))).expect("samples"))
        .flat_map(|text| unveil_testkit::json_lines(&text))
        .collect();
    let cut = samples.iter().filter(|l| l["finish"] == "length").count();
    assert_eq!(cut as u64, filtered, "all groups of these updates are in the samples");
    for line in &samples {
        let component = &line["components"]["overlong"];
        let tokens = component["detail"]["tokens"].as_f64().expect("tokens");
        let expected = if tokens <= 4.0 { 0.0 } else { (4.0 - tokens) / 8.0 };
        assert_eq!(component["value"], expected, "{line}");
        assert!(line["finish"] != "length" || component["value"] == -1.0, "{line}");
    }
    let report = std::fs::read_to_string(run.join("report.html")).expect("report.html");
    assert!(report.contains("cut at the length limit") && report.contains("overlong"));
    let account = accounting(&s, &run);
    let counted = ["trained", "filtered", "skipped"].map(|k| account[k].as_u64().expect("a count")).iter().sum::<u64>();
    assert_eq!(counted, 12, "{account}");
}
