//! Whether what a group makes fits into the messages that carry it: a configuration that is accepted here sends none that is refused for
//! its size.

use crate::schema::Config;

/// Bytes of the largest message to and from the learner.
const LEARNER: usize = 64 << 20;
/// Bytes of one token in a message: its id, log-probability, version, span, and text. No tokenizer's tokens are longer than 128 bytes.
const TOKEN: usize = 160;
/// Bytes of a response beside its tokens.
const RESPONSE: usize = 256;
/// Responses of a group that are scored together, and groups of a lease.
const MOST: [usize; 2] = [1024, 4096];

/// Adds every fault to `out`.
pub(super) fn faults(c: &Config, out: &mut Vec<String>) {
    let (n, tokens) = (c.rollout.n, c.rollout.max_new_tokens);
    let [responses, groups] = MOST;
    if n > responses {
        out.push(format!("rollout.n is {n}: at most {responses} responses are scored together"));
    }
    if c.rollout.groups_per_lease > groups {
        out.push(format!(
            "rollout.groups_per_lease is {}: at most {groups} are leased at once",
            c.rollout.groups_per_lease
        ));
    }
    let needed = n.saturating_mul(tokens.saturating_mul(TOKEN).saturating_add(RESPONSE));
    let service = c.reward.service.max_message_mib.saturating_mul(1 << 20);
    // An eighth is for the record, the scores and what stands around them.
    let room = |limit: usize| limit - limit / 8;
    let asked =
        format!("rollout.n x rollout.max_new_tokens ({n} x {tokens}) may take {} MiB", needed.div_ceil(1 << 20));
    if needed > room(service) {
        let mib = c.reward.service.max_message_mib;
        out.push(format!(
            "{asked}, too much for reward.service.max_message_mib = {mib}: raise it to {} on the service and the workers",
            (needed / 7 * 8).div_ceil(1 << 20) + 1
        ));
    }
    if needed > room(LEARNER) {
        out.push(format!("{asked}, and a message to the learner holds {} MiB: lower one of them", LEARNER >> 20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(change: impl FnOnce(&mut Config)) -> Vec<String> {
        let mut c = Config::default();
        change(&mut c);
        let mut out = Vec::new();
        faults(&c, &mut out);
        out
    }

    #[test]
    fn what_does_not_fit_is_said_with_what_to_do() {
        assert!(said(|_| ()).is_empty());
        assert!(said(|c| (c.rollout.n, c.rollout.max_new_tokens) = (16, 8192)).is_empty());
        let long = said(|c| (c.rollout.n, c.rollout.max_new_tokens) = (32, 8192));
        assert!(
            long.len() == 1 && long[0].contains("max_message_mib = 32") && long[0].contains("32 x 8192"),
            "{long:?}"
        );
        let words = long[0].split("raise it to ").nth(1).and_then(|t| t.split(' ').next()).unwrap();
        let raised: usize = words.parse().unwrap();
        let raised = said(|c| {
            (c.rollout.n, c.rollout.max_new_tokens) = (32, 8192);
            c.reward.service.max_message_mib = raised;
        });
        assert!(raised.is_empty(), "{raised:?}");
        let far = said(|c| {
            (c.rollout.n, c.rollout.max_new_tokens) = (512, 8192);
            c.reward.service.max_message_mib = 1024;
        });
        assert!(far.len() == 1 && far[0].contains("to the learner"), "{far:?}");
        assert!(said(|c| c.rollout.n = 1025)[0].contains("1024"));
        assert!(said(|c| c.rollout.groups_per_lease = 4097)[0].contains("4096"));
    }
}
