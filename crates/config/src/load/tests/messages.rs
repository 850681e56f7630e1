//! Tests of error messages: every problem of every layer, with key, origin and expectation.

use super::*;

#[test]
fn problems_of_all_layers_are_reported_with_their_lines() {
    let text = "[run]\nsede = 1\n\n[learner]\nlr = 1\nsteps = \"many\"\n\n[wandb]\nproject = 1\n\n[[reward.custom]]\nname = \"a\"\n\
                address = \"http://x\"\nwieght = 2\nrnage = [0, 1]\n";
    let message =
        error_message(text, &[("UNVEIL__SFT__STEP", "4"), ("UNVEIL_LEARNER_STEPS", "5")], &["actor=3", "rollout.n=x"]);
    let expected = "the configuration cannot be read:
  the environment variable UNVEIL_LEARNER_STEPS has no effect: write UNVEIL__LEARNER__STEPS, with two underscores between the parts
  unknown key `learner.lr` in c.toml:5: did you mean `learner.optimizer.lr`?
  `learner.steps` in c.toml:6 is a string (\"many\"); expected an integer
  unknown key `reward.custom[0].rnage` in c.toml:15: did you mean `reward.custom[0].range`?
  unknown key `reward.custom[0].wieght` in c.toml:14: did you mean `reward.custom[0].weight`?
  unknown key `run.sede` in c.toml:2: did you mean `run.seed`?
  unknown key `wandb` in c.toml:8
  unknown key `sft.step` in the environment (UNVEIL__SFT__STEP): did you mean `sft.steps`?
  unknown key `actor` in --set
  `rollout.n` in --set is a string (\"x\"); expected an integer";
    assert_eq!(message, expected);
}

#[test]
fn wrong_values_are_reported_with_key_origin_and_expectation() {
    for (text, sets, expected) in [
        ("", &["learner.steps=-3"][..], "`learner.steps` in --set is -3: use 0 or more"),
        ("", &["learner.parallel.zero=256"], "`learner.parallel.zero` in --set is 256: use 0 to 255"),
        ("", &["rollout.max_staleness=1.5"], "`rollout.max_staleness` in --set is a number (1.5); expected an integer"),
        (
            "",
            &["learner.optimizer.lr=fast"],
            "`learner.optimizer.lr` in --set is a string (\"fast\"); expected a number",
        ),
        ("", &["learner.recompute=1"], "`learner.recompute` in --set is an integer (1); expected true or false"),
        ("", &["learner.recompute=yes"], "`learner.recompute` in --set is a string (\"yes\"); expected true or false"),
        (
            "[learner]\nalgorithm = \"dapo\"",
            &[],
            "`learner.algorithm` in c.toml:2 is \"dapo\": use grpo, ppo, rloo, reinforce_plus_plus or reinforce_plus_plus_baseline",
        ),
        ("", &["run.compute=half"], "`run.compute` in --set is \"half\": use exact, fast or tf32"),
        ("", &["run.dtype=fp16"], "`run.dtype` in --set is \"fp16\": use float32 or bfloat16"),
        (
            "",
            &["learner.frozen=vision_tower"],
            "`learner.frozen` in --set is a string (\"vision_tower\"); expected a list: write it as [\"vision_tower\"]",
        ),
        (
            "",
            &["learner.optimizer.betas=[0.9]"],
            "`learner.optimizer.betas` in --set is a list ([0.9]); expected a list of 2 values",
        ),
        ("sft = 3", &[], "`sft` in c.toml:1 is an integer (3); expected a section"),
        ("[model]\ndir = [\"a\"]", &[], "`model.dir` in c.toml:2 is a list ([\"a\"]); expected a string"),
        (
            "[model]\nboxes = \"pixels\"",
            &[],
            "`model.boxes` in c.toml:2: `pixels` is not a box form: use absolute, per_mille, qwen2_vl or llava, or auto",
        ),
        ("", &["reward.custom=[{name=\"a\"}]"], "`reward.custom[0]` in --set has no `address`"),
        (
            "",
            &["learner.algorithm=3"],
            "`learner.algorithm` in --set is \"3\": use grpo, ppo, rloo, reinforce_plus_plus or reinforce_plus_plus_baseline",
        ),
        ("", &["learner.algorithm=[3]"], "`learner.algorithm` in --set is a list ([3]); expected a string"),
        ("", &["learner.algorithm={}"], "`learner.algorithm` in --set is a section; expected a string"),
        ("", &["reward=3"], "`reward` in --set is an integer (3); expected a section"),
    ] {
        assert_eq!(error_message(text, &[], sets), expected);
    }
    let long = error_message("", &[], &[&format!("learner.steps={}", "x".repeat(500))]);
    assert!(long.len() < 160 && long.contains("…"), "{long}");
}

#[test]
fn overridden_values_are_checked_too() {
    let m = error_message("[sft]\nsteps = \"many\"", &[], &["sft.steps=5"]);
    assert_eq!(m, "`sft.steps` in c.toml:2 is a string (\"many\"); expected an integer");
    assert_eq!(
        error_message("sft = 3", &[], &["sft.steps=5"]),
        "`sft` in c.toml:1 is an integer (3); expected a section"
    );
}

#[test]
fn values_out_of_range_are_reported_with_their_origin() {
    let m =
        error_message("[rollout]\ntop_p = 2.0\nmax_rows = 2\n", &[("UNVEIL__ROLLOUT__N", "4")], &["run.device=tpu"]);
    let expected = "the configuration is invalid:
  run.device is `tpu`: use auto, cpu, cuda or cuda:N (in --set)
  rollout.top_p is 2: use a number above 0 up to 1 (in c.toml:2)
  rollout.max_rows (2) must hold one group of rollout.n (4) (rollout.max_rows in c.toml:3, rollout.n in the environment (UNVEIL__ROLLOUT__N))";
    assert_eq!(m, expected);
}

#[test]
fn tf32_needs_a_gpu() {
    let m = error_message("[run]\ncompute = \"tf32\"", &[], &["run.device=cpu"]);
    assert!(m.contains("run.compute = \"tf32\" needs a GPU, but run.device is `cpu`: use exact or fast"), "{m}");
    assert_eq!(with("[run]\ncompute = \"tf32\"", &[], &[]).unwrap().run.compute, unveil_core::Compute::Tf32);
}
