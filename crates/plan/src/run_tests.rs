//! Tests of whole plans against numbers computed by hand and against each other.

use unveil_config::Config;
use unveil_config::schema::{Critic, DataKind};
use unveil_core::{Compute, Dtype};

use crate::fixture::{shape_3b, shape_7b, shape_32b};
use crate::{Device, ModelShape, PlanError, PlanInput, RolePlan, RunPlan, plan};

fn config() -> Config {
    let mut config = Config::default();
    config.run.dtype = Dtype::Bfloat16;
    config.run.compute = Compute::Fast;
    config.data.kind = DataKind::Jsonl;
    config.model.max_pixels = 602_112;
    config.sft.steps = 0;
    config.rollout.max_new_tokens = 256;
    config.rollout.max_staleness = 1;
    config.learner.recompute = true;
    config.learner.token_budget = 8192;
    config
}

fn planned(config: &Config, shape: &ModelShape, gpu: &str, gpus: Option<u64>) -> Result<RunPlan, PlanError> {
    plan(&PlanInput { config, shape, device: Device::gpu(gpu)?, gpus, nodes: 1, max_pixels: None })
}

fn role<'a>(plan: &'a RunPlan, name: &str) -> &'a RolePlan {
    plan.roles.iter().find(|r| r.role == name).unwrap()
}

#[test]
fn full_training_of_7b_needs_eight_gpus() {
    let mut c = config();
    let one = planned(&c, &shape_7b(), "H100", None).unwrap();
    let learner = role(&one, "learner");
    // Two bytes of weights, twelve of moments and master weights, and four of gradients per parameter.
    assert!(!learner.fits && learner.total_gib > 8.29e9 * 18.0 / (1 << 30) as f64, "{learner:?}");
    assert!(role(&one, "rollout").fits);
    assert!(
        one.advice.iter().any(|a| a.contains("learner.parallel.ranks = 8") && a.contains("fits")),
        "{:?}",
        one.advice
    );
    assert!(one.advice.iter().any(|a| a.contains("learner.lora.rank = 16") && a.contains("fits")), "{:?}", one.advice);
    c.learner.parallel.ranks = 8;
    c.learner.parallel.zero = 3;
    c.rollout.workers = 8;
    let all = planned(&c, &shape_7b(), "H100", Some(16)).unwrap();
    assert!(all.fits() && all.problem().is_none(), "{all:?}");
}

#[test]
fn adapters_of_7b_fit_beside_a_worker() {
    let mut c = config();
    c.learner.lora.rank = 16;
    c.launch.share_gpus = true;
    c.rollout.memory_gib = 12.0;
    let shared = planned(&c, &shape_7b(), "A100-80", Some(1)).unwrap();
    assert!(shared.fits(), "{shared:?}");
    let learner = role(&shared, "learner");
    assert!(learner.weights_gib > 15.4 && learner.optimizer_gib < 1.0 && learner.total_gib < 40.0, "{learner:?}");
    // Each has less than the whole device.
    assert!(shared.roles.iter().all(|r| r.capacity_gib < 64.0 && r.total_gib <= r.capacity_gib), "{shared:?}");
    let small = planned(&c, &shape_7b(), "RTX-4090", Some(1)).unwrap();
    assert!(!small.fits());
    let problem = small.problem().unwrap();
    assert!(problem.contains("learner needs about") && problem.contains("launch.share_gpus = false"), "{problem}");
}

/// The rule of LLaMA-Factory's table of hardware requirements: 18 GB per billion parameters for full training in bf16 with fp32 state, 2 GB
/// with adapters, each without activations.
#[test]
fn state_follows_the_published_rule() {
    for (shape, billions) in [(shape_3b(), 3.755), (shape_7b(), 8.292), (shape_32b(), 33.453)] {
        let mut c = config();
        let learner = role(&planned(&c, &shape, "B200", None).unwrap(), "learner").clone();
        let gb = |gib: f64| gib * (1u64 << 30) as f64 / 1e9;
        // The optimiser's step needs eight bytes per parameter more.
        let state = gb(learner.weights_gib + learner.gradients_gib + learner.optimizer_gib) / billions;
        assert!((state - 26.0).abs() < 0.1, "{state} bytes per parameter: {learner:?}");
        c.learner.lora.rank = 8;
        let adapters = role(&planned(&c, &shape, "B200", None).unwrap(), "learner").clone();
        let state = gb(adapters.weights_gib + adapters.gradients_gib + adapters.optimizer_gib) / billions;
        assert!((2.0..2.2).contains(&state), "{state} bytes per parameter: {adapters:?}");
    }
}

#[test]
fn largest_phase_of_stage_1_is_planned() {
    let total = |edit: fn(&mut Config)| {
        let mut c = config();
        c.sft.steps = 20;
        edit(&mut c);
        role(&planned(&c, &shape_3b(), "H200", None).unwrap(), "sft").total_gib
    };
    let phase = |frozen: &[&str]| unveil_config::schema::SftPhase {
        steps: 10,
        frozen: frozen.iter().map(|s| (*s).to_owned()).collect(),
        lora: Default::default(),
        optimizer: Default::default(),
    };
    let all = total(|_| ());
    let merger = total(|c| c.sft.frozen = vec!["vision_tower".into(), "language_model".into()]);
    // Activations remain, and the weights; gradients and moments of the rest go.
    assert!(merger < all / 2.0, "{merger} {all}");
    let mut c = config();
    c.sft.steps = 20;
    c.sft.stage = vec![phase(&["vision_tower", "language_model"]), phase(&[])];
    assert_eq!(role(&planned(&c, &shape_3b(), "H200", None).unwrap(), "sft").total_gib, all);
}

#[test]
fn parts_add_up_and_little_is_unaccounted_for() {
    for (shape, gpu) in [(shape_3b(), "L40S"), (shape_7b(), "H200"), (shape_32b(), "B200")] {
        let mut c = config();
        c.sft.steps = 10;
        for rank in [0, 16] {
            c.learner.lora.rank = rank;
            for r in &planned(&c, &shape, gpu, None).unwrap().roles {
                let parts =
                    r.weights_gib + r.gradients_gib + r.optimizer_gib + r.activations_gib + r.kv_gib + r.other_gib;
                assert!((parts - r.total_gib).abs() < 1e-6 * parts, "{r:?}");
                assert!(r.other_gib <= 0.1 * r.total_gib * (1.0 + 1e-9), "{r:?}");
                assert_eq!(r.fits, r.total_gib <= r.capacity_gib, "{r:?}");
            }
        }
    }
}

#[test]
fn further_models_are_counted() {
    let total = |edit: fn(&mut Config)| {
        let mut c = config();
        edit(&mut c);
        role(&planned(&c, &shape_3b(), "H200", None).unwrap(), "learner").total_gib
    };
    let base = total(|_| ());
    let reference = total(|c| c.learner.kl_coef = 0.01);
    assert!((reference - base - 3.755e9 * 2.0 * 1.05 / (1 << 30) as f64).abs() < 0.1, "{reference} {base}");
    let critic = total(|c| {
        c.learner.algorithm = unveil_core::Algorithm::Ppo;
        c.learner.critic = Critic::Separate;
    });
    assert!(critic > 1.9 * base, "{critic} {base}");
    // With adapters, the reference is the same model.
    let adapters = total(|c| c.learner.lora.rank = 8);
    let with_reference = total(|c| {
        c.learner.lora.rank = 8;
        c.learner.kl_coef = 0.01;
    });
    assert_eq!(with_reference, adapters);
}

#[test]
fn processes_without_gpus_are_refused() {
    let c = config();
    let shape = shape_3b();
    let e = planned(&c, &shape, "H100", Some(1)).unwrap_err();
    assert_eq!(e, PlanError::TooFewGpus { ranks: 1, workers: 1, gpus: 1 });
    for word in ["2 processes", "rollout.workers", "launch.share_gpus = true"] {
        assert!(e.to_string().contains(word), "{e}");
    }
    assert_eq!(planned(&c, &shape, "H100", Some(0)).unwrap_err(), PlanError::NoGpus);
    let two_nodes = PlanInput {
        config: &c,
        shape: &shape,
        device: Device::gpu("H100").unwrap(),
        gpus: Some(1),
        nodes: 2,
        max_pixels: None,
    };
    assert_eq!(plan(&two_nodes).unwrap().roles.len(), 2);
}

#[test]
fn processes_on_a_cpu_share_its_memory() {
    let mut c = Config::default();
    c.learner.parallel.ranks = 2;
    let shape = shape_3b();
    let on = |gib: u64| {
        plan(&PlanInput {
            config: &c,
            shape: &shape,
            device: Device::cpu(gib << 30, 8),
            gpus: None,
            nodes: 1,
            max_pixels: None,
        })
    };
    let large = on(2000).unwrap();
    assert!(large.fits(), "{large:?}");
    let learner = role(&large, "learner");
    assert!(learner.capacity_gib < 2000.0 - learner.total_gib, "{learner:?}");
    assert!(!on(100).unwrap().fits());
}

#[test]
fn assumed_images_are_mentioned() {
    let mut c = config();
    c.model.max_pixels = 0;
    let assumed = planned(&c, &shape_3b(), "H200", None).unwrap();
    assert!(
        assumed.advice.iter().any(|a| a.contains("1280 tokens") && a.contains("model.max_pixels")),
        "{:?}",
        assumed.advice
    );
    assert!(planned(&config(), &shape_3b(), "H200", None).unwrap().advice.is_empty());
}

#[test]
fn plan_has_the_documented_keys() {
    let c = config();
    let json = serde_json::to_value(planned(&c, &shape_3b(), "H200", None).unwrap()).unwrap();
    let keys = |v: &serde_json::Value| v.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&json), ["roles", "step_s", "bound_by", "tokens_per_s", "efficiency", "advice"]);
    let expected = [
        "role",
        "count",
        "weights_gib",
        "gradients_gib",
        "optimizer_gib",
        "activations_gib",
        "kv_gib",
        "other_gib",
        "total_gib",
        "capacity_gib",
        "fits",
    ];
    assert_eq!(keys(&json["roles"][0]), expected);
    let efficiency = json["efficiency"].as_f64().unwrap();
    assert!(efficiency > 0.01 && efficiency < 0.5, "{json}");
}
