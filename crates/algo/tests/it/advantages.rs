//! Compares all advantage estimators, whitening and the KL controller with PyTorch in f64.

use serde_json::json;
use tch::{Device, Kind, Tensor};
use unveil_algo::{
    Estimator, KlController, Moments, ScoredResponse, TokenLayout, estimate_advantages, group_advantages,
    leave_one_out_advantages,
};
use unveil_core::Algorithm;

use crate::batch::integers;
use crate::harness::{Cases, DOUBLE, seed};

const DOUBLES: (Kind, Device) = (Kind::Double, Device::Cpu);

const GRPO: Estimator = Estimator { algorithm: Algorithm::Grpo, scale_by_std: false, gamma: 1.0, lambda: 1.0 };
const ESTIMATORS: [(&str, Estimator); 7] = [
    ("grpo", GRPO),
    ("grpo_std", Estimator { scale_by_std: true, ..GRPO }),
    ("rloo", Estimator { algorithm: Algorithm::Rloo, ..GRPO }),
    ("reinforce_plus_plus", Estimator { algorithm: Algorithm::ReinforcePlusPlus, gamma: 0.97, ..GRPO }),
    ("reinforce_plus_plus_baseline", Estimator { algorithm: Algorithm::ReinforcePlusPlusBaseline, ..GRPO }),
    ("gae", Estimator { algorithm: Algorithm::Ppo, gamma: 0.98, lambda: 0.9, ..GRPO }),
    ("gae_monte_carlo", Estimator { algorithm: Algorithm::Ppo, ..GRPO }),
];

fn to_host(t: &Tensor) -> Vec<f64> {
    Vec::try_from(t.flatten(0, -1)).unwrap()
}

struct Rewards {
    layout: TokenLayout,
    rewards: Tensor,
    penalty: Tensor,
    values: Tensor,
}

impl Rewards {
    /// Returns ragged groups; the first group has equal rewards, the last one a single response.
    fn random(seed: u64) -> Self {
        tch::manual_seed(seed as i64);
        let mut responses = integers(2, 9, integers(2, 6, 1)[0]);
        responses.push(1);
        let ragged = |n: i64| integers(1, 12, n).into_iter().map(|l| l as usize).collect();
        let layout = TokenLayout::new(responses.iter().map(|n| ragged(*n)).collect());
        let rewards = Tensor::rand([responses.iter().sum::<i64>()], DOUBLES);
        let _ = rewards.narrow(0, 0, responses[0]).fill_(0.4);
        let n = layout.tokens() as i64;
        Self { layout, rewards, penalty: Tensor::randn([n], DOUBLES) * 0.1, values: Tensor::randn([n], DOUBLES) }
    }
}

#[test]
fn estimators_match_pytorch() {
    let mut cases = Cases::default();
    let mut ours = Vec::new();
    for (i, (name, estimator)) in ESTIMATORS.into_iter().enumerate() {
        for round in 0..6u64 {
            let r = Rewards::random(seed(6000 + 100 * i as u64 + round));
            let penalised = round % 2 == 1;
            let settings = json!({
                "what": "advantages", "estimator": name, "lengths": r.layout.lengths(), "penalised": penalised,
                "gamma": estimator.gamma, "lambda": estimator.lambda,
            });
            let case = format!("{name}-{round}");
            cases.add(&case, settings, [("rewards", &r.rewards), ("penalty", &r.penalty), ("values", &r.values)]);
            let rewards = to_host(&r.rewards);
            let penalty = to_host(&r.penalty);
            let values = to_host(&r.values);
            let mut groups = Vec::new();
            let mut begin = 0;
            let mut response = 0;
            for lengths in r.layout.lengths() {
                let mut group = Vec::new();
                for tokens in lengths {
                    let end = begin + tokens;
                    let penalty = if penalised { &penalty[begin..end] } else { &[] };
                    group.push(ScoredResponse {
                        reward: rewards[response],
                        tokens: *tokens,
                        penalty,
                        values: &values[begin..end],
                    });
                    begin = end;
                    response += 1;
                }
                groups.push(group);
            }
            let mut out = estimate_advantages(estimator, &groups).unwrap();
            let equal = r.layout.lengths()[0].iter().sum::<usize>();
            if estimator.algorithm.compares_responses() && !penalised {
                assert!(out.advantages[..equal].iter().all(|a| *a == 0.0), "equal rewards give exactly 0: {name}");
            }
            let raw = out.advantages.clone();
            let half = raw.len() / 3;
            Moments::from_values(&raw[..half]).merge(Moments::from_values(&raw[half..])).whiten(&mut out.advantages);
            ours.push((case, estimator, raw, out));
        }
    }
    let want = cases.run("golden.py");
    for (case, estimator, raw, out) in &ours {
        want.assert_close(case, "advantages", &Tensor::from_slice(raw), DOUBLE);
        want.assert_close(case, "whitened", &Tensor::from_slice(&out.advantages), DOUBLE);
        let needs_values = estimator.algorithm.needs_values();
        assert_eq!(out.targets.is_empty(), !needs_values);
        if needs_values {
            want.assert_close(case, "targets", &Tensor::from_slice(&out.targets), DOUBLE);
        }
    }
}

#[test]
fn masked_rewards_match_pytorch() {
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
        let totals: Vec<Option<f64>> = to_host(&rewards).into_iter().map(|r| (!r.is_nan()).then_some(r)).collect();
        ours.push((case, totals));
    }
    let want = cases.run("golden.py");
    for (case, totals) in &ours {
        let flat =
            |a: Vec<Option<f64>>| Tensor::from_slice(&a.iter().map(|a| a.unwrap_or(f64::NAN)).collect::<Vec<_>>());
        want.assert_close(case, "grpo", &flat(group_advantages(totals, false)), DOUBLE);
        want.assert_close(case, "grpo_std", &flat(group_advantages(totals, true)), DOUBLE);
        want.assert_close(case, "rloo", &flat(leave_one_out_advantages(totals)), DOUBLE);
    }
}

#[test]
fn adaptive_controller_matches_pytorch() {
    tch::manual_seed(seed(8000) as i64);
    let observed = Tensor::rand([40], DOUBLES) * 8.0;
    let mut cases = Cases::default();
    cases.add("c", json!({"what": "controller", "coef": 0.05, "target": 3.0, "gain": 0.1}), [("observed", &observed)]);
    let mut c = KlController::Adaptive { coef: 0.05, target: 3.0, gain: 0.1 };
    let mut coefs = Vec::new();
    for kl in to_host(&observed) {
        c.observe(kl);
        coefs.push(c.coef());
    }
    cases.run("golden.py").assert_close("c", "coefs", &Tensor::from_slice(&coefs), DOUBLE);
}
