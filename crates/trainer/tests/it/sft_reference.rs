//! Stage 1 against independent computations in Python (`sft.py`): a plain loop in PyTorch on transformers' model, with and without
//! adapters of peft, and TRL's SFTTrainer.

use std::path::Path;
use std::process::Command;

use serde_json::json;
use tch::{Device, Kind, Tensor};
use unveil_config::schema::Optimizer;
use unveil_core::{Grid, GroupInput, Prompt};
use unveil_model::{LoraSpec, Vlm, write_safetensors};
use unveil_testkit::python;
use unveil_testkit_model::{patches, record, write_model_directory};
use unveil_trainer::{Ranks, SftBatch, SftSettings, SftTrainer, lora};

const UPDATES: usize = 3;
const SAMPLES: usize = 5;

fn seed() -> u64 {
    std::env::var("UNVEIL_SEED").map_or(1, |s| s.parse().expect("UNVEIL_SEED is a number"))
}

/// Returns sample `k`: a prompt, mostly with an image, and an answer.
fn sample(vlm: &Vlm, k: usize) -> (GroupInput, Vec<u32>) {
    let config = vlm.config();
    let merge = config.vision.spatial_merge_size;
    let (height, width) = (merge * (2 + k as i64 % 2), merge * (2 + k as i64 % 3));
    let word = |i: usize| 40 + ((k * 31 + i * i * 7 + seed() as usize) % 60) as u32;
    let mut tokens: Vec<u32> = (0..2 + k % 3).map(word).collect();
    let mut grids = Vec::new();
    if k % 4 != 3 {
        tokens.extend(vec![config.image_token_id; (height * width / merge / merge) as usize]);
        grids.push([1, height, width]);
    }
    tokens.extend((0..3).map(|i| word(i + 10)));
    let count = grids.iter().map(|g: &[i64; 3]| g.iter().product::<i64>()).sum();
    let input = GroupInput {
        record: record(&format!("r{k}")),
        image_size: (64, 64),
        prompt: Prompt { tokens, grids },
        patches: patches(vlm, count, k),
        merged: Grid { rows: 2, cols: 2 },
        encoded: Default::default(),
    };
    (input, (0..2 + k % 6).map(|i| word(i + 20)).collect())
}

fn batch(vlm: &Vlm, step: usize) -> SftBatch {
    let mut out = SftBatch::default();
    for k in step * SAMPLES..(step + 1) * SAMPLES {
        let (input, target) = sample(vlm, k);
        out.inputs.push(input.into());
        out.targets.push(target);
    }
    out
}

/// Writes the batches for Python, and the result of training on them in each dtype: padded in one pass, and packed in micro-batches.
fn train(dir: &Path) {
    let base = dir.join("base");
    write_model_directory(&base, seed());
    tch::set_num_threads(1);
    let optimizer = Optimizer {
        lr: 1e-3,
        warmup: 1,
        decay: 0.0,
        weight_decay: 0.1,
        clip_norm: 0.5,
        eps: 1e-5,
        ..Optimizer::default()
    };
    for (name, kind, packing) in [
        ("float64", Kind::Double, false),
        ("float64-packed", Kind::Double, true),
        ("float64-adapters", Kind::Double, true),
        ("float32", Kind::Float, true),
    ] {
        let out = dir.join(name);
        std::fs::create_dir(&out).unwrap();
        let mut vlm = Vlm::load(&base, Device::Cpu, kind).unwrap();
        if name.ends_with("adapters") {
            write_adapter(&base, &out.join("adapter"));
            adapt(&mut vlm);
            lora::load(&mut vlm, &out.join("adapter"), "sft").unwrap();
        }
        let patch_len = vlm.config().vision.patch_len();
        let mut optimizer = optimizer.clone();
        if kind == Kind::Float {
            optimizer.weight_decay = 0.0;
        }
        let options = json!({
            "lr": optimizer.lr, "weight_decay": optimizer.weight_decay, "clip_norm": optimizer.clip_norm, "eps": optimizer.eps,
            "betas": optimizer.betas, "updates": UPDATES,
        });
        let mut settings = SftSettings::new(optimizer, UPDATES as u64);
        if packing {
            (settings.packing, settings.recompute, settings.token_budget) = (true, true, 60);
        }
        let mut trainer = SftTrainer::distributed(Ranks::solo(), vlm, settings).unwrap();
        trainer.record_gradients();
        let mut reports = Vec::new();
        let mut samples = Vec::new();
        let mut pixels = Vec::new();
        for step in 0..UPDATES {
            let batch = batch(trainer.vlm(), step);
            for (i, (input, target)) in batch.inputs.iter().zip(&batch.targets).enumerate() {
                let grids: Vec<i64> = input.prompt.grids.iter().flatten().copied().collect();
                if !grids.is_empty() {
                    let values = Tensor::from_slice(&input.patches).view([-1, patch_len]);
                    pixels.push((format!("{step}.{i}.pixel_values"), values));
                    pixels.push((format!("{step}.{i}.image_grid_thw"), Tensor::from_slice(&grids).view([-1, 3])));
                }
                samples.push(json!({"step": step, "index": i, "prompt": input.prompt.tokens, "answer": target}));
            }
            let report = trainer.update(&batch).unwrap();
            reports.push(json!({"loss": report.loss, "grad_norm": report.grad_norm, "tokens": report.tokens}));
        }
        let result = json!({"optimizer": options, "samples": samples, "updates": reports});
        std::fs::write(out.join("result.json"), result.to_string()).unwrap();
        write_safetensors(&out.join("pixels.safetensors"), &pixels).unwrap();
        write_safetensors(&out.join("gradients.safetensors"), trainer.recorded_gradients()).unwrap();
        write_safetensors(&out.join("weights.safetensors"), &trainer.state().unwrap().0).unwrap();
        if trainer.vlm().adapters().is_some() {
            lora::export(trainer.vlm_mut(), &base, &out.join("merged"), &out.join("trained")).unwrap();
        }
    }
}

/// Attaches adapters in both towers, beside the merger, which is trained whole.
fn adapt(vlm: &mut Vlm) {
    let targets = ["q_proj", "v_proj", "up_proj", "visual.*.qkv"].map(str::to_owned).to_vec();
    vlm.init_adapters(&LoraSpec { rank: 3, alpha: 5.0, rank_stabilised: true, targets }, 0).unwrap();
    vlm.save_modules(&["merger".to_owned()]).unwrap();
}

/// Writes adapters of noise, and a merger that differs from the base model's.
fn write_adapter(base: &Path, out: &Path) {
    let mut vlm = Vlm::load(base, Device::Cpu, Kind::Float).unwrap();
    adapt(&mut vlm);
    tch::manual_seed(seed() as i64);
    let noisy = |(n, t): &(String, Tensor)| (n.clone(), t.detach() + t.randn_like() * 0.1);
    let noise: Vec<(String, Tensor)> = vlm.adapters().unwrap().saved_tensors().map(noisy).collect();
    vlm.load_adapters(&noise).unwrap();
    vlm.adapters().unwrap().save(out, "base").unwrap();
}

/// One test, because importing the libraries takes Python longer than all updates.
#[test]
fn stage_1_equals_pytorch_and_trl() {
    let dir = tempfile::tempdir().unwrap();
    train(dir.path());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sft.py");
    let output = Command::new(python()).arg(script).arg(dir.path()).env("OMP_NUM_THREADS", "2").output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "seed {}: {text}", seed());
    for compared in
        ["float64 padded and PyTorch", "float64 packed and PyTorch", "float64 adapters and peft", "float32 and TRL"]
    {
        assert!(text.contains(&format!("{compared}: equal")), "{compared} was not compared: {text}");
    }
}
