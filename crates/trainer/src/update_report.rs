//! The report of an update: rewards, masks, lengths, staleness, and the agreement of rollout and learner.

use std::collections::BTreeMap;

use serde::Serialize;
use unveil_core::{TrainGroup, WeightVersion, records_by_pass};

use crate::batch::TrainableGroup;
use crate::micro_batch::BatchItem;

/// Report of one update, written as the `train` event.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct UpdateReport {
    /// Number of the update, from 1.
    pub step: u64,
    /// Pass over the data that the batch's first group belongs to.
    pub pass: u64,
    /// Record ids in the batch.
    pub groups: Vec<String>,
    /// Record ids by pass, if the batch straddles two.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub passes: Vec<(u64, Vec<String>)>,
    /// Version of the weights after the update.
    pub version: WeightVersion,
    /// Why the update was skipped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
    /// Updates skipped so far.
    pub skipped_total: u64,
    /// The loss and its parts; the parts are not multiplied by their coefficients.
    pub loss: BTreeMap<String, f64>,
    /// Mean reward by component, and `total`, over the responses for which it is not masked.
    pub reward: BTreeMap<String, f64>,
    /// Number of responses for which a component is masked, by component.
    pub masked: BTreeMap<String, u64>,
    /// Mean lift of attention on the lesion over chance, if measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vision_lift: Option<f64>,
    /// Records of groups without any reward, which are not trained on.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub wholly_masked: Vec<String>,
    /// Number of groups whose rewards are all equal, so that they have no group-relative advantage.
    pub flat_groups: usize,
    /// Number of groups that were looked at and replaced, because their responses teach nothing (dynamic sampling).
    pub replaced: usize,
    /// Records of these groups.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub replaced_groups: Vec<String>,
    /// Number of responses left out of the loss because they were cut at the length limit (overlong filter).
    pub filtered_responses: usize,
    /// Approximate KL of the policy before the update to the policy that the loss was computed with.
    pub kl: f64,
    /// KL to the reference model per token, in the configured form.
    pub kl_reference: f64,
    /// KL coefficient of this update; `None` without a reference model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_coef: Option<f64>,
    /// Mean importance weight, if importance weights are used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub importance: Option<f64>,
    /// Share of tokens whose importance weight was truncated or that were dropped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub importance_bounded: Option<f64>,
    /// Share of tokens with a clipped ratio.
    pub clip_fraction: f64,
    /// Mean entropy per token in nats.
    pub entropy: f64,
    /// Mean |delta log p| between rollout and learner on tokens of the same weight version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agreement: Option<f64>,
    /// `agreement` by worker, if the batch comes from several.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub agreement_by_worker: BTreeMap<String, f64>,
    /// Mean |delta log p| between rollout and learner on stale tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drift: Option<f64>,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Share of positions in packed sequences that are padding.
    pub padding: f64,
    /// Response tokens trained on.
    pub tokens: usize,
    /// Responses.
    pub responses: usize,
    /// Mean response length in tokens.
    pub response_len: f64,
    /// Share of responses that end with the end token.
    pub stopped: f64,
    /// Largest number of weight versions that a token is behind.
    pub staleness: u64,
    /// Groups discarded as too stale and leased again, since the learner was started.
    pub stale_groups: u64,
    /// Mean duration of generating a group, in ms.
    pub generate_ms: f64,
    /// Mean duration of scoring a group, in ms.
    pub reward_ms: f64,
    /// Time spent waiting for the batch, in ms.
    pub wait_ms: f64,
    /// Time of the update in which gradient reductions were in flight, in ms.
    pub reduce_ms: f64,
    /// The part of it that was spent waiting, in ms; the rest overlaps with computation.
    pub reduce_wait_ms: f64,
    /// Duration of the update in ms.
    pub step_ms: f64,
}

impl UpdateReport {
    /// Copies the agreement of rollout and learner.
    pub(crate) fn set_agreement(&mut self, agreement: &Agreement) {
        self.agreement = agreement.mean;
        self.drift = agreement.drift;
        if agreement.workers.len() > 1 {
            self.agreement_by_worker.clone_from(&agreement.workers);
        }
    }
}

/// Agreement of the log-probabilities of rollout and learner.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Agreement {
    /// Mean |delta log p| over tokens of the present weight version; `None` if there are none.
    pub mean: Option<f64>,
    /// Agreement by worker; workers without such tokens are left out.
    pub workers: BTreeMap<String, f64>,
    /// Mean |delta log p| over tokens of older weight versions.
    pub drift: Option<f64>,
    /// Descriptions of the responses that disagree most, the worst first.
    pub worst: Vec<String>,
}

/// Compares the log-probabilities of the rollout with `recomputed` ones, flat over `groups`; `version` is that of the weights.
pub(crate) fn measure_agreement(
    groups: &[&TrainableGroup<'_>],
    recomputed: &[f64],
    version: WeightVersion,
) -> Agreement {
    // Sums with the number of tokens in them.
    let mut same = (0.0, 0u64);
    let mut stale = (0.0, 0u64);
    let mut worst: Vec<(f64, String)> = Vec::new();
    let mut workers: BTreeMap<&str, (f64, u64)> = BTreeMap::new();
    let mut begin = 0;
    for g in groups {
        for (response, range) in g.responses.iter().zip(g.response_ranges()) {
            let mut in_response = (0.0, 0u64);
            for i in range {
                let delta = (g.rollout_logprobs[i] - recomputed[begin + i]).abs();
                let sum = if g.versions[i] == version { &mut in_response } else { &mut stale };
                *sum = (sum.0 + delta, sum.1 + 1);
            }
            if in_response.1 > 0 {
                let mean = in_response.0 / in_response.1 as f64;
                let record = &g.group.id.record;
                worst.push((mean, format!("record `{record}` response {} ({mean:.2e})", response.response)));
                let sum = workers.entry(&g.group.worker).or_default();
                *sum = (sum.0 + in_response.0, sum.1 + in_response.1);
            }
            same = (same.0 + in_response.0, same.1 + in_response.1);
        }
        begin += g.token_count();
    }
    worst.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mean = |(sum, n): (f64, u64)| (n > 0).then(|| sum / n as f64);
    let workers = workers.into_iter().map(|(name, (sum, n))| (name.to_owned(), sum / n as f64)).collect();
    Agreement {
        mean: mean(same),
        workers,
        drift: mean(stale),
        worst: worst.into_iter().take(3).map(|(_, w)| w).collect(),
    }
}

/// Returns by how many versions the oldest token of a group is behind `version`.
pub fn staleness(group: &TrainGroup, version: WeightVersion) -> u64 {
    let oldest = group.responses.iter().flat_map(|r| r.versions.iter().copied()).min();
    version.saturating_sub(oldest.unwrap_or(version))
}

/// Returns the number of rewarded responses that the overlong filter leaves out of the loss.
pub(crate) fn filtered_responses(groups: &[TrainGroup], overlong_filter: bool) -> usize {
    let left_out = |g: &TrainGroup| g.responses_in_loss(false).len() - g.responses_in_loss(overlong_filter).len();
    groups.iter().map(left_out).sum()
}

/// Fills the part of the report that needs neither the model nor finite values; `version` is that of the weights before the update.
pub(crate) fn summarize_batch(groups: &[TrainGroup], version: WeightVersion) -> UpdateReport {
    let mut r = UpdateReport { pass: groups.first().map_or(0, |g| g.id.pass), ..Default::default() };
    let ids: Vec<_> = groups.iter().map(|g| g.id.clone()).collect();
    r.groups = ids.iter().map(|id| id.record.clone()).collect();
    let masked = groups.iter().filter(|g| !g.is_rewarded());
    r.wholly_masked = masked.map(|g| g.id.record.clone()).collect();
    let passes = records_by_pass(&ids);
    if passes.len() > 1 {
        r.passes = passes;
    }
    let mut sums: BTreeMap<String, (f64, u64)> = BTreeMap::new();
    let mut lift = (0.0, 0u64);
    let mut length = 0usize;
    let mut stopped = 0usize;
    for g in groups {
        let mut add = |name: &str, v: Option<f64>| match v.filter(|v| v.is_finite()) {
            Some(v) => {
                let s = sums.entry(name.to_owned()).or_default();
                *s = (s.0 + v, s.1 + 1);
            }
            None => *r.masked.entry(name.to_owned()).or_default() += 1,
        };
        for b in &g.breakdowns {
            add("total", b.total);
            for (name, c) in &b.components {
                add(name, c.value.filter(|_| !c.masked));
                if let Some(v) = c.detail.get("lift").filter(|v| v.is_finite()) {
                    lift = (lift.0 + v, lift.1 + 1);
                }
            }
        }
        for resp in &g.responses {
            r.responses += 1;
            length += resp.tokens.len();
            stopped += usize::from(resp.finish == unveil_core::Finish::Stop);
        }
        r.staleness = r.staleness.max(staleness(g, version));
        r.generate_ms += g.generate_ms / groups.len() as f64;
        r.reward_ms += g.reward_ms / groups.len() as f64;
    }
    r.reward = sums.into_iter().map(|(k, (sum, n))| (k, sum / n as f64)).collect();
    r.vision_lift = (lift.1 > 0).then(|| lift.0 / lift.1 as f64);
    r.response_len = length as f64 / r.responses.max(1) as f64;
    r.stopped = stopped as f64 / r.responses.max(1) as f64;
    r
}
