//! Adapters in stage 1: on several ranks, beside a module that is trained whole, resumed, exported, and continued in stage 2.

use std::path::Path;

use serde_json::Value;
use tch::Tensor;
use unveil_learner::{LearnerError, SilentProgress, run_rl};
use unveil_model::{check_adapter_base, export, read_adapter_files, read_safetensors};
use unveil_service::CancellationToken;

use crate::common::small_run::{SmallRun, StopAt, experience, work};
use crate::sft_ranks::{fixture, train_all};

fn adapted() -> SmallRun {
    let mut small = fixture();
    small.config.sft.frozen.clear();
    let lora = &mut small.config.sft.lora;
    (lora.rank, lora.rslora) = (3, true);
    lora.targets.push("visual.blocks.*.attn.qkv".into());
    lora.modules_to_save = vec!["merger".into()];
    small
}

fn weights(dir: &Path, file: &str) -> Vec<(String, Tensor)> {
    read_safetensors(&dir.join(file)).unwrap()
}

/// Sharded over two ranks and resumed, adapters and module are those of one rank. They can be merged into the base model again, and into
/// no other one.
#[test]
fn sharded_adapters_of_stage_1_equal_one_rank() {
    let plain = adapted();
    let (outcome, _) = train_all(&plain.config, plain.dir.path(), u64::MAX);
    assert_eq!((outcome.interrupted, outcome.step, outcome.exported), (false, 4, Some(4)));
    let adapter = plain.dir.path().join("sft-out-adapter");
    let files = read_adapter_files(&adapter).unwrap();
    assert_eq!((files.spec.rank, files.modules), (3, vec!["visual.merger".to_owned()]));
    let base = weights(&plain.model(), "model.safetensors");
    let merger = files.parameters.iter().find(|(n, _)| n == "visual.merger.mlp.0.weight").map(|(_, t)| t).unwrap();
    assert_ne!(*merger, base.iter().find(|(n, _)| n == "visual.merger.mlp.0.weight").unwrap().1, "it is trained");
    // The exported model has the adapters merged and the module replaced.
    let again = plain.dir.path().join("again");
    export(&plain.model(), &again, None, Some(&adapter)).unwrap();
    let bytes = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
    assert!(
        bytes(&again) == bytes(&plain.dir.path().join("sft-out")),
        "merging the adapters again gives another model"
    );

    let mut sharded = adapted();
    (sharded.config.sft.parallel.ranks, sharded.config.sft.parallel.zero) = (2, 3);
    (sharded.config.sft.packing, sharded.config.sft.recompute) = (true, true);
    let (outcome, _) = train_all(&sharded.config, sharded.dir.path(), 2);
    assert_eq!((outcome.interrupted, outcome.step), (true, 2));
    let (outcome, _) = train_all(&sharded.config, sharded.dir.path(), u64::MAX);
    assert_eq!((outcome.step, outcome.exported), (4, Some(4)));
    let file = "sft-out-adapter/adapter_model.safetensors";
    for ((name, found), (_, wanted)) in weights(sharded.dir.path(), file).iter().zip(weights(plain.dir.path(), file)) {
        let off = (found - &wanted).norm().double_value(&[]) / wanted.norm().double_value(&[]).max(1e-9);
        assert!(off < 1e-3, "{name} is {off:e} away");
    }

    let model = plain.model().join("model.safetensors");
    let mut changed = std::fs::read(&model).unwrap();
    *changed.last_mut().unwrap() ^= 1;
    std::fs::write(&model, changed).unwrap();
    let e = check_adapter_base(&adapter, &plain.model()).unwrap_err().to_string();
    assert!(e.contains("BLAKE3") && e.contains("trained on"), "{e}");
    let e = export(&plain.model(), &again, None, Some(&adapter)).unwrap_err().to_string();
    assert!(e.contains("BLAKE3"), "{e}");
}

/// Stage 2 starts from the adapters of stage 1 on the initial model, to which KL is computed.
#[test]
fn stage_2_continues_the_adapters_of_stage_1() {
    let mut small = adapted();
    small.config.sft.lora.modules_to_save.clear();
    small.config.sft.steps = 3;
    let lora = &mut small.config.learner.lora;
    (lora.rank, lora.rslora, lora.continue_sft) = (3, true, true);
    lora.targets = small.config.sft.lora.targets.clone();
    (small.config.learner.steps, small.config.learner.kl_coef) = (1, 0.1);
    train_all(&small.config, small.dir.path(), u64::MAX);
    let run = |small: &SmallRun| -> Result<Vec<Value>, LearnerError> {
        let model = small.model();
        let out = small.dir.path().join("out/model");
        let cancel = CancellationToken::new();
        let mut events = StopAt { kind: "none", step: 0, cancel: cancel.clone(), seen: vec![] };
        let mut silent = SilentProgress;
        let mut worker = None;
        let stage = small.stage(&model, &out, &mut events, &mut silent, cancel);
        run_rl(stage, |ready| worker = Some(work(experience(ready), small.model(), "w1")))?;
        worker.unwrap().join().unwrap();
        Ok(events.seen)
    };
    let e = run(&small).unwrap_err().to_string();
    assert!(e.contains("stage1-adapter"), "the adapters are not where the run keeps them: {e}");
    std::fs::create_dir_all(small.run()).unwrap();
    std::fs::rename(small.dir.path().join("sft-out-adapter"), small.config.stage1_adapter()).unwrap();
    let events = run(&small).unwrap();
    let update = events.iter().find(|e| e["kind"] == "train").unwrap();
    assert!(update["kl_reference"].as_f64().unwrap() > 1e-6, "the first policy is not the initial model: {update}");
    assert!(update["agreement"].as_f64().is_some_and(|a| a < 1e-5), "{update}");
    // The wrong settings are named.
    small.config.run.dir.push_str("-again");
    std::fs::create_dir_all(small.run()).unwrap();
    let adapter = small.dir.path().join("run/stage1-adapter");
    std::fs::rename(adapter, small.config.stage1_adapter()).unwrap();
    small.config.learner.lora.alpha = 5.0;
    let e = run(&small).unwrap_err().to_string();
    assert!(e.contains("alpha = 16") && e.contains("alpha = 5"), "{e}");
}
