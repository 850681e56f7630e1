//! Every advantage, whitening and the KL controller against PyTorch in f64.

use serde_json::json;
use tch::{Device, Kind, Tensor};
use unveil_algo::{Estimator, KlController, Layout, Moments, Sampled, estimate, group_advantages, leave_one_out};

use crate::batch::integers;
use crate::harness::{Cases, DOUBLE, seed};

const DOUBLES: (Kind, Device) = (Kind::Double, Device::Cpu);

const ESTIMATORS: [(&str, Estimator); 7] = [
    ("grpo", Estimator::Grpo { scale_by_std: false }),
    ("grpo_std", Estimator::Grpo { scale_by_std: true }),
    ("rloo", Estimator::Rloo),
    ("reinforce_plus_plus", Estimator::ReinforcePlusPlus { gamma: 0.97 }),
    ("reinforce_plus_plus_baseline", Estimator::ReinforcePlusPlusBaseline),
    ("gae", Estimator::Gae { gamma: 0.98, lambda: 0.9 }),
    ("gae_monte_carlo", Estimator::Gae { gamma: 1.0, lambda: 1.0 }),
];

fn host(t: &Tensor) -> Vec<f64> {
    Vec::try_from(t.flatten(0, -1)).unwrap()
}

struct Rewards {
    layout: Layout,
    rewards: Tensor,
    penalty: Tensor,
    values: Tensor,
}

impl Rewards {
    /// Ragged groups; the first group's rewards are equal, the last one has a single response.
    fn random(seed: u64) -> Self {
        tch::manual_seed(seed as i64);
        let mut responses = integers(2, 9, integers(2, 6, 1)[0]);
        responses.push(1);
        let ragged = |n: i64| integers(1, 12, n).into_iter().map(|l| l as usize).collect();
        let layout = Layout::new(responses.iter().map(|n| ragged(*n)).collect());
        let rewards = Tensor::rand([responses.iter().sum::<i64>()], DOUBLES);
        let _ = rewards.narrow(0, 0, responses[0]).fill_(0.4);
        let n = layout.tokens() as i64;
        Self { layout, rewards, penalty: Tensor::randn([n], DOUBLES) * 0.1, values: Tensor::randn([n], DOUBLES) }
    }
}

#[test]
fn estimators() {
    let mut cases = Cases::default();
    let mut ours = Vec::new();
    for (i, (name, estimator)) in ESTIMATORS.into_iter().enumerate() {
        for round in 0..6u64 {
            let r = Rewards::random(seed(6000 + 100 * i as u64 + round));
            let penalised = round % 2 == 1;
            let (gamma, lambda) = match estimator {
                Estimator::Gae { gamma, lambda } => (gamma, lambda),
                Estimator::ReinforcePlusPlus { gamma } => (gamma, 1.0),
                _ => (1.0, 1.0),
            };
            let settings = json!({
                "what": "advantages", "estimator": name, "lengths": r.layout.lengths(), "penalised": penalised,
                "gamma": gamma, "lambda": lambda,
            });
            let case = format!("{name}-{round}");
            cases.add(&case, settings, [("rewards", &r.rewards), ("penalty", &r.penalty), ("values", &r.values)]);
            let (rewards, penalty, values) = (host(&r.rewards), host(&r.penalty), host(&r.values));
            let (mut groups, mut begin, mut response) = (Vec::new(), 0, 0);
            for lengths in r.layout.lengths() {
                let mut group = Vec::new();
                for tokens in lengths {
                    let end = begin + tokens;
                    let penalty = if penalised { &penalty[begin..end] } else { &[] };
                    group.push(Sampled {
                        reward: rewards[response],
                        tokens: *tokens,
                        penalty,
                        values: &values[begin..end],
                    });
                    (begin, response) = (end, response + 1);
                }
                groups.push(group);
            }
            let mut out = estimate(estimator, &groups).unwrap();
            let flat = r.layout.lengths()[0].iter().sum::<usize>();
            let compares = !matches!(estimator, Estimator::Gae { .. } | Estimator::ReinforcePlusPlus { .. });
            if compares && !penalised {
                assert!(out.advantages[..flat].iter().all(|a| *a == 0.0), "equal rewards give exactly 0: {name}");
            }
            let raw = out.advantages.clone();
            let half = raw.len() / 3;
            Moments::of(&raw[..half]).merge(Moments::of(&raw[half..])).whiten(&mut out.advantages);
            ours.push((case, estimator, raw, out));
        }
    }
    let want = cases.run("golden.py");
    for (case, estimator, raw, out) in &ours {
        want.close(case, "advantages", &Tensor::from_slice(raw), DOUBLE);
        want.close(case, "whitened", &Tensor::from_slice(&out.advantages), DOUBLE);
        assert_eq!(out.targets.is_empty(), !estimator.needs_values());
        if estimator.needs_values() {
            want.close(case, "targets", &Tensor::from_slice(&out.targets), DOUBLE);
        }
    }
}

#[test]
fn masked_rewards() {
    let mut cases = Cases::default();
    let mut ours = Vec::new();
    for round in 0..8u64 {
        tch::manual_seed(seed(7000 + round) as i64);
        let n = integers(1, 10, 1)[0];
        let rewards = Tensor::rand([n], DOUBLES);
        let masked = Tensor::rand([n], DOUBLES).lt(0.3);
        let rewards = rewards.masked_fill(&masked, f64::NAN);
        let case = format!("{round}");
        cases.add(&case, json!({"what": "masked"}), [("rewards", &rewards)]);
        let totals: Vec<Option<f64>> = host(&rewards).into_iter().map(|r| (!r.is_nan()).then_some(r)).collect();
        ours.push((case, totals));
    }
    let want = cases.run("golden.py");
    for (case, totals) in &ours {
        let flat =
            |a: Vec<Option<f64>>| Tensor::from_slice(&a.iter().map(|a| a.unwrap_or(f64::NAN)).collect::<Vec<_>>());
        want.close(case, "grpo", &flat(group_advantages(totals, false)), DOUBLE);
        want.close(case, "grpo_std", &flat(group_advantages(totals, true)), DOUBLE);
        want.close(case, "rloo", &flat(leave_one_out(totals)), DOUBLE);
    }
}

#[test]
fn adaptive_controller() {
    tch::manual_seed(seed(8000) as i64);
    let observed = Tensor::rand([40], DOUBLES) * 8.0;
    let mut cases = Cases::default();
    cases.add("c", json!({"what": "controller", "coef": 0.05, "target": 3.0, "gain": 0.1}), [("observed", &observed)]);
    let mut c = KlController::Adaptive { coef: 0.05, target: 3.0, gain: 0.1 };
    let mut coefs = Vec::new();
    for kl in host(&observed) {
        c.observe(kl);
        coefs.push(c.coef());
    }
    cases.run("golden.py").close("c", "coefs", &Tensor::from_slice(&coefs), DOUBLE);
}
