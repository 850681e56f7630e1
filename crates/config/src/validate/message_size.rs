//! Checks that the responses of a group fit into the messages that carry them, so that no message of a valid configuration is refused for
//! its size.

use crate::schema::Config;

/// Maximum size in bytes of a message to or from the learner.
const MAX_LEARNER_MESSAGE: usize = 64 << 20;
/// Bytes of one token in a message: id, log-probability, version, span and text (at most 128 bytes in all known tokenizers).
const BYTES_PER_TOKEN: usize = 160;
/// Bytes of a response besides its tokens.
const BYTES_PER_RESPONSE: usize = 256;
/// Maximum number of responses in a group.
const MAX_RESPONSES: usize = 1024;
/// Maximum number of groups in a lease.
const MAX_GROUPS: usize = 4096;

/// Adds a message to `out` for every problem.
pub(super) fn check(c: &Config, out: &mut Vec<String>) {
    let n = c.rollout.n;
    let tokens = c.rollout.max_new_tokens;
    if n > MAX_RESPONSES {
        out.push(format!("rollout.n is {n}: a group has at most {MAX_RESPONSES} responses"));
    }
    if c.rollout.groups_per_lease > MAX_GROUPS {
        out.push(format!(
            "rollout.groups_per_lease is {}: a lease has at most {MAX_GROUPS} groups",
            c.rollout.groups_per_lease
        ));
    }
    let needed = n.saturating_mul(tokens.saturating_mul(BYTES_PER_TOKEN).saturating_add(BYTES_PER_RESPONSE));
    let service = c.reward.service.max_message_mib.saturating_mul(1 << 20);
    // One eighth is reserved for the record, the scores and the encoding.
    let usable = |limit: usize| limit - limit / 8;
    let request =
        format!("rollout.n x rollout.max_new_tokens ({n} x {tokens}) may take {} MiB", needed.div_ceil(1 << 20));
    if needed > usable(service) {
        let mib = c.reward.service.max_message_mib;
        out.push(format!(
            "{request}, too much for reward.service.max_message_mib = {mib}: raise it to {} on the service and the workers",
            (needed / 7 * 8).div_ceil(1 << 20) + 1
        ));
    }
    if needed > usable(MAX_LEARNER_MESSAGE) {
        out.push(format!(
            "{request}, but a message to the learner is limited to {} MiB: lower one of them",
            MAX_LEARNER_MESSAGE >> 20
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::validate::changed::problems_after;

    fn problems(change: impl FnOnce(&mut Config)) -> Vec<String> {
        problems_after(check, change)
    }

    #[test]
    fn oversized_groups_are_refused_with_advice() {
        assert!(problems(|_| ()).is_empty());
        assert!(problems(|c| (c.rollout.n, c.rollout.max_new_tokens) = (16, 8192)).is_empty());
        let long = problems(|c| (c.rollout.n, c.rollout.max_new_tokens) = (32, 8192));
        assert!(
            long.len() == 1 && long[0].contains("max_message_mib = 32") && long[0].contains("32 x 8192"),
            "{long:?}"
        );
        let words = long[0].split("raise it to ").nth(1).and_then(|t| t.split(' ').next()).unwrap();
        let raised: usize = words.parse().unwrap();
        let raised = problems(|c| {
            c.rollout.n = 32;
            c.rollout.max_new_tokens = 8192;
            c.reward.service.max_message_mib = raised;
        });
        assert!(raised.is_empty(), "{raised:?}");
        let far = problems(|c| {
            c.rollout.n = 512;
            c.rollout.max_new_tokens = 8192;
            c.reward.service.max_message_mib = 1024;
        });
        assert!(far.len() == 1 && far[0].contains("to the learner"), "{far:?}");
        assert!(problems(|c| c.rollout.n = 1025)[0].contains("1024"));
        assert!(problems(|c| c.rollout.groups_per_lease = 4097)[0].contains("4096"));
    }
}
