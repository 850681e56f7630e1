//! What an update reports: rewards, masks, lengths, staleness, and how far rollout and learner agree. Host arithmetic only.

use std::collections::BTreeMap;

use serde::Serialize;
use unveil_core::{GroupId, WeightVersion};
use unveil_experience::{Fate, by_pass};

use crate::batch::{Member, TrainGroup};

/// Numbers of one update; the `train` event.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct UpdateReport {
    /// Number of the update, from 1.
    pub step: u64,
    /// Pass over the data that the batch's first group belongs to.
    pub pass: u64,
    /// Record ids in the batch.
    pub groups: Vec<String>,
    /// Record ids by pass, where the batch straddles two.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub passes: Vec<(u64, Vec<String>)>,
    /// Version of the weights after the update.
    pub version: WeightVersion,
    /// Why the update was skipped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
    /// Updates skipped so far.
    pub skipped_total: u64,
    /// The loss and its parts, weights not applied to the parts.
    pub loss: BTreeMap<String, f64>,
    /// Mean reward by component over the responses where it is not masked, and `total`.
    pub reward: BTreeMap<String, f64>,
    /// Responses for which a component is masked.
    pub masked: BTreeMap<String, u64>,
    /// Mean lift of attention on the lesion over chance, where measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vision_lift: Option<f64>,
    /// Records of groups without any reward, which train nothing.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub wholly_masked: Vec<String>,
    /// Groups whose rewards are all equal: no group-relative advantage.
    pub flat_groups: usize,
    /// Approximate KL of the policy before the update to the policy at the loss.
    pub kl: f64,
    /// KL to the reference model per token, in the configured form.
    pub kl_reference: f64,
    /// Weight of that KL at this update; none without a reference model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_coef: Option<f64>,
    /// Mean importance weight, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub importance: Option<f64>,
    /// Share of tokens whose importance weight was truncated or that were dropped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub importance_bounded: Option<f64>,
    /// Share of tokens whose ratio was clipped.
    pub clip_fraction: f64,
    /// Mean entropy per token in nats.
    pub entropy: f64,
    /// Mean |delta log p| between rollout and learner on tokens of the same version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agreement: Option<f64>,
    /// The same by worker, where several made the batch.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub agreement_by_worker: BTreeMap<String, f64>,
    /// The same on stale tokens.
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
    /// Share of responses that ended with the end token.
    pub stopped: f64,
    /// Largest number of versions that a token is behind.
    pub staleness: u64,
    /// Groups thrown away as too stale and leased again, since the learner was started.
    pub stale_groups: u64,
    /// Mean time that workers took to generate a group, in ms.
    pub generate_ms: f64,
    /// Mean time that scoring a group took, in ms.
    pub reward_ms: f64,
    /// Time spent waiting for the batch, in ms.
    pub wait_ms: f64,
    /// Time of the update in which sums of gradients over ranks were under way, in ms.
    pub reduce_ms: f64,
    /// Of this, the time that was spent waiting for them, in ms: the rest is hidden behind computing.
    pub reduce_wait_ms: f64,
    /// Time that the update took, in ms.
    pub step_ms: f64,
}

impl UpdateReport {
    pub(crate) fn take_agreement(&mut self, found: &Agreement) {
        (self.agreement, self.drift) = (found.mean, found.drift);
        if found.workers.len() > 1 {
            self.agreement_by_worker.clone_from(&found.workers);
        }
    }

    /// What the update made of each group of its batch.
    pub(crate) fn fates(&self, batch: &[TrainGroup]) -> Vec<(GroupId, Fate)> {
        let fate = |g: &TrainGroup| match (g.is_rewarded(), &self.skipped) {
            (false, _) => Fate::Masked,
            (true, Some(_)) => Fate::Skipped,
            (true, None) => Fate::Trained,
        };
        batch.iter().map(|g| (g.id.clone(), fate(g))).collect()
    }
}

/// How rollout and learner compare.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Agreement {
    /// Mean |delta log p| of tokens made by the present version; none when there is none.
    pub mean: Option<f64>,
    /// The same by worker; one without such tokens is not there.
    pub workers: BTreeMap<String, f64>,
    /// The same of older tokens.
    pub drift: Option<f64>,
    /// The worst responses, worst first.
    pub worst: Vec<String>,
}

/// Compares the rollout's log-probabilities with recomputed ones, flat over `members`.
pub(crate) fn agreement(members: &[&Member<'_>], recomputed: &[f64], version: WeightVersion) -> Agreement {
    let (mut same, mut stale) = ((0.0, 0u64), (0.0, 0u64));
    let mut worst: Vec<(f64, String)> = Vec::new();
    let mut workers: BTreeMap<&str, (f64, u64)> = BTreeMap::new();
    let mut begin = 0;
    for m in members {
        for (row, range) in m.rows.iter().zip(m.ranges()) {
            let mut own = (0.0, 0u64);
            for i in range {
                let delta = (m.old[i] - recomputed[begin + i]).abs();
                let sum = if m.versions[i] == version { &mut own } else { &mut stale };
                *sum = (sum.0 + delta, sum.1 + 1);
            }
            if own.1 > 0 {
                let mean = own.0 / own.1 as f64;
                worst.push((mean, format!("record `{}` response {} ({mean:.2e})", m.group.id.record, row.response)));
                let sum = workers.entry(&m.group.worker).or_default();
                *sum = (sum.0 + own.0, sum.1 + own.1);
            }
            same = (same.0 + own.0, same.1 + own.1);
        }
        begin += m.tokens();
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

/// Versions that a group's oldest token is behind `version`.
pub(crate) fn staleness(group: &TrainGroup, version: WeightVersion) -> u64 {
    let oldest = group.responses.iter().flat_map(|r| r.versions.iter().copied()).min();
    version.saturating_sub(oldest.unwrap_or(version))
}

/// Everything of the report that needs neither the model nor usable numbers. `version` is that of the weights before the update.
pub(crate) fn describe(groups: &[TrainGroup], version: WeightVersion) -> UpdateReport {
    let mut r = UpdateReport { pass: groups.first().map_or(0, |g| g.id.pass), ..Default::default() };
    let ids: Vec<_> = groups.iter().map(|g| g.id.clone()).collect();
    r.groups = ids.iter().map(|id| id.record.clone()).collect();
    let masked = groups.iter().filter(|g| !g.is_rewarded());
    r.wholly_masked = masked.map(|g| g.id.record.clone()).collect();
    let passes = by_pass(&ids);
    if passes.len() > 1 {
        r.passes = passes;
    }
    let (mut sums, mut lift): (BTreeMap<String, (f64, u64)>, (f64, u64)) = (BTreeMap::new(), (0.0, 0));
    let (mut length, mut stopped) = (0usize, 0usize);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::one_response;

    fn group(record: &str, total: Option<f64>) -> TrainGroup {
        one_response(record, total, Default::default())
    }

    #[test]
    fn what_an_update_made_of_each_group_is_told_apart() {
        let batch = [group("a", Some(0.5)), group("b", None)];
        let fates = |skipped: Option<&str>| {
            let report = UpdateReport { skipped: skipped.map(str::to_owned), ..Default::default() };
            report.fates(&batch).into_iter().map(|(id, fate)| (id.record, fate)).collect::<Vec<_>>()
        };
        assert_eq!(fates(None), [("a".to_owned(), Fate::Trained), ("b".to_owned(), Fate::Masked)]);
        let skipped = fates(Some("the loss is not finite"));
        assert_eq!(skipped, [("a".to_owned(), Fate::Skipped), ("b".to_owned(), Fate::Masked)]);
    }
}
