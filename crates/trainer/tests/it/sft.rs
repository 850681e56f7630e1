//! Stage 1 on one rank: the same bits as a plain computation, micro-batches, packing, recomputation, masters, freezing, resuming.

use std::sync::Arc;

use tch::{Device, Kind, Tensor};
use unveil_config::schema::Optimizer;
use unveil_core::{Grid, GroupInput, Prompt};
use unveil_model::{LoraSpec, PackedBatch, PackedGroup, Tape, TapeMode, Vlm, logprobs};
use unveil_testkit_model::{add_noise, image_prompt, lora_spec, model, record, text_input, weights, write_model};
use unveil_trainer::lr_at;
use unveil_trainer::optim::AdamW;
use unveil_trainer::{Freezing, Ranks, SftBatch, SftReport, SftSettings, SftTrainer, TrainerError};

/// Returns `count` samples from number `first` on: prompts with and without an image, and answers of different lengths.
pub(crate) fn batch(vlm: &Vlm, first: usize, count: usize) -> SftBatch {
    let input = |k: usize| {
        if k % 3 == 1 {
            return Arc::new(text_input(&format!("r{k}"), k));
        }
        let (prompt, patches) = image_prompt(vlm, k % 8);
        Arc::new(GroupInput {
            record: record(&format!("r{k}")),
            image_size: (64, 64),
            prompt,
            patches,
            merged: Grid { rows: 2, cols: 2 },
            encoded: Default::default(),
        })
    };
    let target = |k: usize| (0..2 + k % 7).map(|i| (10 + (k * 7 + i * i * 5) % 40) as u32).chain([1]).collect();
    let samples = first..first + count;
    SftBatch { inputs: samples.clone().map(input).collect(), targets: samples.map(target).collect(), pass: 0 }
}

fn optimizer() -> Optimizer {
    Optimizer { lr: 1e-3, warmup: 2, weight_decay: 0.1, clip_norm: 0.5, ..Optimizer::default() }
}

fn settings(change: impl FnOnce(&mut SftSettings)) -> SftSettings {
    let mut settings = SftSettings::new(optimizer(), 10);
    change(&mut settings);
    settings
}

/// Trains three batches; returns the reports, and the weights and moments after them.
fn train(vlm: Vlm, settings: SftSettings) -> (Vec<SftReport>, Vec<(String, Tensor)>) {
    let mut trainer = SftTrainer::distributed(Ranks::solo(), vlm, settings).unwrap();
    let reports = (0..3)
        .map(|step| {
            let samples = batch(trainer.vlm(), 7 * step, 6);
            trainer.update(&samples).unwrap()
        })
        .collect();
    let (mut state, moments) = trainer.state().unwrap();
    state = state.into_iter().map(|(n, t)| (n, t.copy())).collect();
    state.extend(moments);
    (reports, state)
}

fn double_model() -> Vlm {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), 7);
    tch::set_num_threads(1);
    Vlm::load(dir.path(), Device::Cpu, Kind::Double).unwrap()
}

/// One rank, fp32, everything in one pass: the mean over the answer tokens in one graph, bit for bit.
#[test]
fn one_pass_equals_plain_computation_bit_for_bit() {
    let (reports, state) = train(model(7), settings(|_| ()));
    let vlm = model(7);
    vlm.set_trainable(|_| true);
    let mut adam = AdamW::new(&optimizer(), vlm.named_parameters()).unwrap();
    for (step, report) in reports.iter().enumerate() {
        let samples = batch(&vlm, 7 * step, 6);
        let group = |(i, t): (&Arc<GroupInput>, &Vec<u32>)| PackedGroup {
            prompt: i.prompt.clone(),
            responses: vec![t.clone()],
        };
        let groups: Vec<PackedGroup> = samples.inputs.iter().zip(&samples.targets).map(group).collect();
        let packed = PackedBatch::build(&groups, vlm.config(), Device::Cpu).unwrap();
        let patches: Vec<f32> = samples.inputs.iter().flat_map(|i| i.patches.iter().copied()).collect();
        let grids: Vec<_> = samples.inputs.iter().flat_map(|i| i.prompt.grids.iter().copied()).collect();
        let pixels = Tensor::from_slice(&patches).view([-1, vlm.config().vision.patch_len()]);
        adam.zero_grad().unwrap();
        let mut tape = Tape::new(TapeMode::Graph);
        let (hidden, _) = vlm.train_packed(&mut tape, &packed, Some((&pixels, &grids)), None).unwrap();
        let loss = -logprobs(&vlm.lm_head(&hidden.tensor), &packed.targets, 1.0, &[]).mean(Kind::Float);
        loss.backward();
        let gradient = adam.collect_gradient().unwrap();
        assert_eq!((report.loss, report.grad_norm), (loss.double_value(&[]), gradient.norm), "update {step}");
        adam.step(gradient, lr_at(&optimizer(), step as u64, 10)).unwrap();
    }
    let expected = adam.weights().unwrap().into_iter().chain(adam.state().unwrap());
    for ((name, found), (other, wanted)) in state.iter().zip(expected) {
        assert!(*name == other && *found == wanted, "{name}");
    }
}

/// Padded, packed, in micro-batches and with recomputation, an update has the same loss, gradient and result.
#[test]
fn every_division_equals_one_pass() {
    let (wanted, state) = train(double_model(), settings(|_| ()));
    assert!(wanted[0].padding > 0.05, "the samples have different lengths: {wanted:?}");
    for (packing, token_budget, recompute) in
        [(false, 1, false), (false, 60, true), (true, usize::MAX, false), (true, 50, true), (true, 1, false)]
    {
        let what = format!("packing {packing}, budget {token_budget}, recompute {recompute}");
        let (found, weights) = train(
            double_model(),
            settings(|s| (s.packing, s.token_budget, s.recompute) = (packing, token_budget, recompute)),
        );
        for (a, b) in found.iter().zip(&wanted) {
            assert_eq!((a.tokens, a.lr), (b.tokens, b.lr));
            assert!((a.loss - b.loss).abs() <= 1e-9 * b.loss, "{what}: {a:?}, wanted {b:?}");
            assert!((a.grad_norm - b.grad_norm).abs() <= 1e-9 * b.grad_norm, "{what}: {a:?}, wanted {b:?}");
            assert!(!packing || a.padding == 0.0, "{what}: {}", a.padding);
        }
        for ((name, a), (_, b)) in weights.iter().zip(&state) {
            let off = (a - b).norm().double_value(&[]);
            assert!(off <= 1e-9 * b.norm().double_value(&[]).max(1e-9), "{what}: {name} is {off:e} away");
        }
    }
}

#[test]
fn bf16_weights_have_fp32_masters_in_stage_1() {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), 3);
    let vlm = Vlm::load(dir.path(), Device::Cpu, Kind::BFloat16).unwrap();
    let mut trainer = SftTrainer::distributed(Ranks::solo(), vlm, settings(|s| s.packing = true)).unwrap();
    let exact = Vlm::load(dir.path(), Device::Cpu, Kind::Float).unwrap();
    trainer.broadcast_from_rank_0(exact.named_parameters()).unwrap();
    let samples = batch(trainer.vlm(), 0, 6);
    let first = trainer.update(&samples).unwrap();
    for _ in 0..8 {
        trainer.update(&samples).unwrap();
    }
    let last = trainer.update(&samples).unwrap();
    assert!(last.loss < first.loss, "{} -> {}", first.loss, last.loss);
    let mut between = 0;
    for (name, master) in trainer.state().unwrap().0 {
        let rounded = trainer.vlm().parameter(&name).unwrap();
        assert_eq!((rounded.kind(), master.kind()), (Kind::BFloat16, Kind::Float));
        assert_eq!(*rounded, master.to_kind(Kind::BFloat16), "{name}");
        between += master.ne_tensor(&rounded.to_kind(Kind::Float)).any().int64_value(&[]);
    }
    assert!(between > 10, "masters have values that bf16 cannot represent");
}

#[test]
fn frozen_parameters_of_stage_1_do_not_change() {
    let vlm = model(2);
    let before = weights(&vlm);
    let frozen = ["vision_tower", "model.embed_tokens."].map(str::to_owned);
    let mut trainer =
        SftTrainer::distributed(Ranks::solo(), vlm, settings(|s| s.freezing = Freezing::always("sft.frozen", &frozen)))
            .unwrap();
    let samples = batch(trainer.vlm(), 0, 4);
    trainer.update(&samples).unwrap();
    let after = weights(trainer.vlm());
    for ((name, a), (_, b)) in before.iter().zip(&after) {
        let is_frozen = name.starts_with("model.embed_tokens.")
            || (name.starts_with("visual.") && !name.starts_with("visual.merger."));
        assert_eq!(a == b, is_frozen, "{name}");
    }
}

/// A trainer that resumes from the state of another one reaches the same bits.
#[test]
fn resumed_trainer_equals_the_uninterrupted_one() {
    let new = || SftTrainer::distributed(Ranks::solo(), model(5), settings(|s| s.token_budget = 40)).unwrap();
    let mut straight = new();
    for step in 0..4 {
        let samples = batch(straight.vlm(), 5 * step, 5);
        straight.update(&samples).unwrap();
    }
    let mut first = new();
    for step in 0..2 {
        let samples = batch(first.vlm(), 5 * step, 5);
        first.update(&samples).unwrap();
    }
    let mut second = new();
    for (from, to) in first.state_to_save().unwrap().slices.iter().zip(second.state_to_load().unwrap().slices) {
        assert_eq!((from.kind, &from.slice.name, from.slice.begin), (to.kind, &to.slice.name, to.slice.begin));
        tch::no_grad(|| to.slice.values.shallow_clone().copy_(&from.slice.values));
    }
    second.resume_from(&first.progress()).unwrap();
    assert_eq!(second.step(), 2);
    for step in 2..4 {
        let samples = batch(second.vlm(), 5 * step, 5);
        second.update(&samples).unwrap();
    }
    assert!(weights(second.vlm()) == weights(straight.vlm()), "2 + 2 updates are not 4");
}

#[test]
fn unusable_batches_of_stage_1_are_named() {
    let mut trainer = SftTrainer::new(model(1), &optimizer(), 10).unwrap();
    let e = trainer.update(&SftBatch::default()).unwrap_err().to_string();
    assert!(e.contains("0 inputs and 0 answers"), "{e}");
    let mut samples = batch(trainer.vlm(), 0, 3);
    samples.targets.pop();
    let e = trainer.update(&samples).unwrap_err().to_string();
    assert!(e.contains("3 inputs and 2 answers"), "{e}");
    let mut samples = batch(trainer.vlm(), 0, 3);
    samples.targets[1].clear();
    let e = trainer.update(&samples).unwrap_err().to_string();
    assert!(e.contains("response 0 is empty"), "{e}");
    let nothing = ["visual.", "model.", "lm_head."].map(str::to_owned);
    let refused =
        |freezing| SftTrainer::distributed(Ranks::solo(), model(1), settings(|s| s.freezing = freezing)).err();
    let e = refused(Freezing::always("sft.frozen", &nothing));
    assert!(matches!(&e, Some(TrainerError::Setting(m)) if m.contains("sft.frozen")), "{e:?}");
    let e = refused(Freezing::always("sft.frozen", &["vision".to_owned()])).map(|e| e.to_string());
    assert!(e.is_some_and(|e| e.contains("sft.frozen has `vision`")));
    let prompt = Prompt { tokens: vec![4, 5], grids: vec![[1, 4, 4]] };
    let mut samples = batch(trainer.vlm(), 0, 1);
    let input = GroupInput { prompt, ..(*samples.inputs[0]).clone() };
    samples.inputs[0] = Arc::new(input);
    assert!(trainer.update(&samples).is_err(), "a grid without placeholders");
}

/// However a batch is divided, the same inputs are dropped, and recomputation drops them again.
#[test]
fn dropout_is_the_same_in_every_division() {
    let run = |dropout: f64, (packing, token_budget, recompute): (bool, usize, bool)| {
        let mut vlm = double_model();
        vlm.init_adapters(&lora_spec(4), 1).unwrap();
        add_noise(&mut vlm, 3);
        train(
            vlm,
            settings(|s| {
                (s.packing, s.token_budget, s.recompute) = (packing, token_budget, recompute);
                (s.dropout, s.seed) = (dropout, 9);
            }),
        )
    };
    let (wanted, state) = run(0.3, (false, usize::MAX, false));
    let (plain, _) = run(0.0, (false, usize::MAX, false));
    assert!(wanted.iter().zip(&plain).all(|(a, b)| (a.loss - b.loss).abs() > 1e-4), "nothing is dropped: {wanted:?}");
    for division in [(false, 40, true), (true, usize::MAX, true), (true, 50, false)] {
        let (found, weights) = run(0.3, division);
        for (a, b) in found.iter().zip(&wanted) {
            assert!((a.loss - b.loss).abs() <= 1e-9 * b.loss, "{division:?}: {a:?}, wanted {b:?}");
        }
        for ((name, a), (_, b)) in weights.iter().zip(&state) {
            let off = (a - b).norm().double_value(&[]);
            assert!(off <= 1e-9 * b.norm().double_value(&[]).max(1e-9), "{division:?}: {name} is {off:e} away");
        }
    }
    let refused = |vlm: Vlm| SftTrainer::distributed(Ranks::solo(), vlm, settings(|s| s.dropout = 0.1)).err();
    let e = refused(model(1)).map(|e| e.to_string());
    assert!(e.is_some_and(|e| e.contains("sft.lora.dropout")), "there are no adapters");
    let mut visual = model(1);
    visual.init_adapters(&LoraSpec { targets: vec!["visual.*.qkv".into()], ..lora_spec(2) }, 1).unwrap();
    assert!(refused(visual).is_some());
}
