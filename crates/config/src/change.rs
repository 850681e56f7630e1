//! Differences between configurations, and the keys that may change when a run is resumed.

use crate::schema::Config;

/// Sections and keys that may change on resume: they do not define what is trained (locations, speed, monitoring, retention), or are meant
/// to be adjusted during a run (learning rate, number of steps). A section includes all keys below it.
const CHANGEABLE: &[&str] = &[
    "run.dir",
    "run.resume",
    "run.device",
    "run.threads",
    "run.dump_batch",
    "data.root",
    "rollout.workers",
    "rollout.threads",
    "rollout.lease_s",
    "rollout.stall_s",
    "rollout.patience_s",
    "rollout.max_losses",
    "rollout.memory_gib",
    "rollout.max_rows",
    "rollout.groups_per_lease",
    "rollout.weight_sync",
    "rollout.broadcast_s",
    "rollout.metrics_listen",
    "reward.listen",
    "reward.address",
    "reward.deadline_s",
    "sft.parallel",
    "sft.token_budget",
    "sft.recompute",
    "learner.steps",
    "learner.optimizer.lr",
    "learner.optimizer.allow_high_lr",
    "learner.optimizer.lr_end",
    "learner.optimizer.warmup",
    "learner.optimizer.decay",
    "learner.optimizer.schedule",
    "learner.optimizer.groups",
    "learner.parallel",
    "learner.token_budget",
    "learner.recompute",
    "learner.threads",
    "learner.listen",
    "learner.address",
    "learner.metrics_listen",
    "learner.eval_every",
    "learner.max_masked",
    "learner.max_replaced",
    "learner.checkpoint_every",
    "checkpoint",
    "launch",
    "health",
    "telemetry",
    "tls",
    "auth",
];

/// A key whose value differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Dotted key, `section.key`.
    pub key: String,
    /// Previous value in TOML; `none` if the key did not exist.
    pub before: String,
    /// Current value in TOML; `none` if the key no longer exists.
    pub now: String,
    /// Whether the key may change when a run is resumed.
    pub allowed: bool,
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} = {}, was {}", self.key, self.now, self.before)
    }
}

/// Returns every dotted key with its value in TOML, in the order of the schema.
pub fn entries(config: &Config) -> Vec<(String, String)> {
    let mut out = Vec::new();
    if let Ok(value) = toml::Value::try_from(config) {
        flatten("", &value, &mut out);
    }
    out
}

fn flatten(prefix: &str, value: &toml::Value, out: &mut Vec<(String, String)>) {
    match value.as_table() {
        Some(table) => {
            for (key, value) in table {
                let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flatten(&name, value, out);
            }
        }
        None => out.push((prefix.to_owned(), value.to_string())),
    }
}

/// Returns the keys whose values differ.
pub fn changes(before: &Config, now: &Config) -> Vec<Change> {
    changes_since(&entries(before), now)
}

/// Returns the keys whose values differ from saved [`entries`], possibly written by another version: keys missing there count as having
/// their default.
pub fn changes_since(before: &[(String, String)], now: &Config) -> Vec<Change> {
    let new = entries(now);
    let defaults = entries(&Config::default());
    let find = |all: &[(String, String)], key: &str| all.iter().find(|(k, _)| k == key).map(|(_, v)| v.clone());
    let mut keys: Vec<&String> = new.iter().map(|(k, _)| k).collect();
    keys.extend(before.iter().map(|(k, _)| k).filter(|k| new.iter().all(|(n, _)| n != *k)));
    let none = || "none".to_owned();
    let change = |key: &String| {
        let before = find(before, key).or_else(|| find(&defaults, key)).unwrap_or_else(none);
        let now = find(&new, key).unwrap_or_else(none);
        let allowed =
            CHANGEABLE.iter().any(|m| key.strip_prefix(m).is_some_and(|r| r.is_empty() || r.starts_with('.')));
        (before != now).then(|| Change { key: key.clone(), before, now, allowed })
    };
    keys.into_iter().filter_map(change).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changeable_names_are_keys() {
        let all = entries(&Config::default());
        for name in CHANGEABLE {
            assert!(all.iter().any(|(k, _)| k == name || k.starts_with(&format!("{name}."))), "{name}");
        }
    }

    #[test]
    fn changes_are_allowed_or_refused_by_key() {
        let before = Config::default();
        assert_eq!(changes(&before, &before), []);
        let mut now = before.clone();
        now.learner.optimizer.lr = 0.5;
        now.learner.parallel.ranks = 4;
        now.rollout.n = 3;
        now.run.compute = unveil_core::Compute::Fast;
        let changed: Vec<(String, bool)> = changes(&before, &now).into_iter().map(|c| (c.key, c.allowed)).collect();
        let expected = [
            ("learner.optimizer.lr", true),
            ("learner.parallel.ranks", true),
            ("rollout.n", false),
            ("run.compute", false),
        ];
        let mut changed: Vec<(&str, bool)> = changed.iter().map(|(k, a)| (k.as_str(), *a)).collect();
        changed.sort_unstable();
        assert_eq!(changed, expected);
        let shown = changes(&before, &now).iter().find(|c| c.key == "rollout.n").map(ToString::to_string);
        assert_eq!(shown, Some(format!("rollout.n = 3, was {}", before.rollout.n)));
    }

    #[test]
    fn saved_entries_of_other_versions_are_compared_by_key() {
        let now = Config::default();
        let mut before = entries(&now);
        before.retain(|(k, _)| k != "rollout.min_p");
        assert_eq!(changes_since(&before, &now), [], "the key is new and has its default");
        before.push(("rollout.removed".to_owned(), "3".to_owned()));
        let changed = changes_since(&before, &now);
        assert_eq!(changed.iter().map(ToString::to_string).collect::<Vec<_>>(), ["rollout.removed = none, was 3"]);
        assert!(!changed[0].allowed);
    }
}
