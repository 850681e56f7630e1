//! Every advantage and loss, values and gradients, against an independent computation in Python (`golden.py`).

use std::path::{Path, PathBuf};
use std::process::Command;

use tch::{Device, Kind, Tensor};
use unveil_algo::{MentionBatch, Objective, TokenBatch, TokenStats, gae, group_advantages, policy_loss, whiten};

fn python() -> PathBuf {
    let p = std::env::var_os("UNVEIL_PYTHON")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.venv/bin/python"), PathBuf::from);
    assert!(p.exists(), "no Python with torch at {}: run `make setup` or set UNVEIL_PYTHON", p.display());
    p
}

fn floats(t: &Tensor) -> Vec<f32> {
    Vec::try_from(t.to_kind(Kind::Float).flatten(0, -1)).unwrap()
}

fn longs(t: &Tensor) -> Vec<i64> {
    Vec::try_from(t.flatten(0, -1)).unwrap()
}

struct Case {
    objective: Objective,
    gamma: f64,
    lambda: f64,
    groups: i64,
    n: i64,
    cells: i64,
    seed: i64,
}

/// Random inputs: two responses in three attend, some of them without a mention; the first group's rewards are equal.
fn inputs(c: &Case) -> Vec<(&'static str, Tensor)> {
    tch::manual_seed(c.seed);
    let opt = (Kind::Float, Device::Cpu);
    let responses = c.groups * c.n;
    let lengths = Tensor::randint_low(1, 9, [responses], (Kind::Int64, Device::Cpu));
    let tokens = lengths.sum(Kind::Int64).int64_value(&[]);
    let rewards = Tensor::rand([c.groups, c.n], opt);
    let _ = rewards.get(0).fill_(0.4);
    let reward_mask = Tensor::rand([c.groups, c.n], opt).gt(0.2).to_kind(Kind::Float);
    let attending: Vec<i64> = (0..responses).filter(|r| r % 3 != 2).collect();
    let starts = lengths.cumsum(0, Kind::Int64) - &lengths;
    let (mut mention_tokens, mut mention_response) = (vec![], vec![]);
    for (k, r) in attending.iter().enumerate() {
        if k % 4 != 3 {
            for t in 0..lengths.int64_value(&[*r]).min(2) {
                mention_tokens.push(starts.int64_value(&[*r]) + t);
                mention_response.push(k as i64);
            }
        }
    }
    let coverage = Tensor::rand([attending.len() as i64, c.cells], opt).square();
    let baseline = coverage.mean_dim([1i64].as_slice(), false, Kind::Float);
    let logprobs = -Tensor::rand([tokens], opt) * 4.0;
    let near = |t: &Tensor, s: f64| t + Tensor::randn([tokens], opt) * s;
    let old_values = Tensor::randn([tokens], opt);
    vec![
        ("rewards", rewards),
        ("reward_mask", reward_mask),
        ("lengths", lengths),
        ("final_rewards", Tensor::rand([responses], opt)),
        ("old_logprobs", near(&logprobs, 0.4)),
        ("reference", near(&logprobs, 0.5)),
        ("logprobs", logprobs),
        ("advantages", Tensor::randn([tokens], opt)),
        ("entropy", Tensor::rand([tokens], opt)),
        ("values", near(&old_values, 0.5)),
        ("value_targets", near(&old_values, 0.7)),
        ("old_values", old_values),
        ("scores", Tensor::randn([tokens, c.cells], opt)),
        ("mention_tokens", Tensor::from_slice(&mention_tokens)),
        ("mention_response", Tensor::from_slice(&mention_response)),
        ("coverage", coverage),
        ("baseline", baseline),
    ]
}

fn close(name: &str, ours: &Tensor, theirs: &Tensor) {
    let (a, b) = (floats(ours), floats(theirs));
    assert_eq!(a.len(), b.len(), "{name}");
    for (i, (x, y)) in a.iter().zip(&b).enumerate() {
        let both_masked = x.is_nan() && y.is_nan();
        assert!(both_masked || (x - y).abs() <= 1e-5 * (1.0 + y.abs()), "{name}[{i}]: ours {x}, PyTorch {y}");
    }
}

fn check(c: &Case) {
    let dir = std::env::temp_dir().join(format!("unveil-algo-golden-{}-{}", std::process::id(), c.seed));
    std::fs::create_dir_all(&dir).unwrap();
    let (src, dst, set) = (dir.join("in.safetensors"), dir.join("out.safetensors"), dir.join("settings.json"));
    let named = inputs(c);
    Tensor::write_safetensors(&named, &src).unwrap();
    let o = c.objective;
    let settings = format!(
        r#"{{"gamma":{},"lambda":{},"clip_low":{},"clip_high":{},"value_coef":{},"value_clip":{},"entropy_coef":{},"kl_coef":{},"attention_coef":{}}}"#,
        c.gamma,
        c.lambda,
        o.clip_low,
        o.clip_high,
        o.value_coef,
        o.value_clip,
        o.entropy_coef,
        o.kl_coef,
        o.attention_coef
    );
    std::fs::write(&set, settings).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden.py");
    let run = Command::new(python()).arg(script).args([&src, &dst, &set]).env("OMP_NUM_THREADS", "1").output().unwrap();
    assert!(run.status.success(), "golden.py: {}", String::from_utf8_lossy(&run.stderr));
    let want: std::collections::HashMap<String, Tensor> = Tensor::read_safetensors(&dst).unwrap().into_iter().collect();
    let get = |k: &str| &named.iter().find(|(n, _)| *n == k).unwrap().1;

    let (rewards, mask) = (floats(get("rewards")), floats(get("reward_mask")));
    let totals: Vec<Option<f64>> =
        rewards.iter().zip(&mask).map(|(r, m)| (*m > 0.0).then_some(f64::from(*r))).collect();
    for scale in [false, true] {
        let ours: Vec<f32> = totals
            .chunks(c.n as usize)
            .flat_map(|g| group_advantages(g, scale))
            .map(|a| a.map_or(f32::NAN, |a| a as f32))
            .collect();
        close("group advantages", &Tensor::from_slice(&ours), &want[&format!("group_advantages_{}", i32::from(scale))]);
    }
    let values = floats(get("old_values"));
    let (mut adv, mut targets, mut begin) = (vec![], vec![], 0);
    for (len, r) in longs(get("lengths")).iter().zip(floats(get("final_rewards"))) {
        let end = begin + *len as usize;
        let (a, t) = gae(f64::from(r), &values[begin..end], c.gamma, c.lambda);
        adv.extend(a);
        targets.extend(t);
        begin = end;
    }
    close("gae", &Tensor::from_slice(&adv), &want["gae"]);
    close("targets", &Tensor::from_slice(&targets), &want["targets"]);
    close("whitened", &whiten(&Tensor::from_slice(&adv)), &want["whitened"]);

    let leaf = |k: &str| get(k).copy().set_requires_grad(true);
    let (lp, entropy, v, scores) = (leaf("logprobs"), leaf("entropy"), leaf("values"), leaf("scores"));
    let attention = scores.softmax(-1, Kind::Float);
    let mentions = MentionBatch {
        tokens: get("mention_tokens").shallow_clone(),
        response: get("mention_response").shallow_clone(),
        coverage: get("coverage").shallow_clone(),
        baseline: get("baseline").shallow_clone(),
    };
    let batch = TokenBatch {
        logprobs: Some(&lp),
        old_logprobs: Some(get("old_logprobs")),
        advantages: Some(get("advantages")),
        entropy: Some(&entropy),
        values: Some(&v),
        old_values: Some(get("old_values")),
        targets: Some(get("value_targets")),
        reference: Some(get("reference")),
        attention: Some((&attention, &mentions)),
    };
    let stats = TokenStats { tokens: lp.numel() as f64, attended: mentions.baseline.numel() as f64 };
    let parts = policy_loss(&o, &batch, stats).unwrap();
    parts.loss.backward();
    let mut scalars = vec![("policy", &parts.policy), ("entropy", &parts.entropy), ("loss", &parts.loss)];
    scalars.extend([("clip_fraction", &parts.clip_fraction), ("approx_kl", &parts.approx_kl)]);
    scalars.extend((o.value_coef > 0.0).then_some(("value", &parts.value)));
    scalars.extend((o.kl_coef > 0.0).then_some(("kl", &parts.kl)));
    scalars.extend((o.attention_coef > 0.0).then_some(("attention", &parts.attention)));
    for (k, t) in scalars {
        close(k, t, &want[&format!("part_{k}")]);
    }
    for (k, t) in [("logprobs", &lp), ("entropy", &entropy), ("values", &v), ("scores", &scores)] {
        let grad = t.grad();
        let ours = if grad.defined() { grad } else { t.zeros_like() };
        close(&format!("gradient of {k}"), &ours, &want[&format!("grad_{k}")]);
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

fn objective(value_clip: f64) -> Objective {
    Objective {
        clip_low: 0.2,
        clip_high: 0.28,
        value_coef: 0.5,
        value_clip,
        entropy_coef: 0.01,
        kl_coef: 0.05,
        attention_coef: 0.3,
    }
}

#[test]
fn whole_loss_with_value_clipping() {
    for seed in 0..3 {
        let o = objective(0.2);
        check(&Case { objective: o, gamma: 0.99, lambda: 0.95, groups: 3 + seed, n: 4 + seed, cells: 12 + seed, seed });
    }
}

#[test]
fn whole_loss_without_value_clipping() {
    check(&Case { objective: objective(0.0), gamma: 1.0, lambda: 1.0, groups: 2, n: 2, cells: 6, seed: 11 });
}

#[test]
fn policy_alone() {
    let o = Objective { value_coef: 0.0, entropy_coef: 0.0, kl_coef: 0.0, attention_coef: 0.0, ..objective(0.0) };
    check(&Case { objective: o, gamma: 0.9, lambda: 0.0, groups: 5, n: 8, cells: 9, seed: 12 });
}
