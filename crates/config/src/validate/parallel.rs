//! Faults of the section `[learner.parallel]`.

use crate::schema::Config;

/// Adds every fault of the section to `out`.
pub(super) fn faults(c: &Config, out: &mut Vec<String>) {
    let p = &c.learner.parallel;
    let mut need = |ok: bool, what: String| {
        if !ok {
            out.push(what);
        }
    };
    let (ranks, rank, shards) = (p.ranks, p.rank, p.shards);
    need(ranks > 0, "learner.parallel.ranks is 0: the learner is one rank at least".into());
    need(
        rank < ranks.max(1),
        format!(
            "learner.parallel.rank is {rank} of {ranks} ranks: ranks count from 0 and are below learner.parallel.ranks"
        ),
    );
    need(p.zero <= 3, format!("learner.parallel.zero is {}: use 0, 1, 2 or 3", p.zero));
    need(
        shards == 0 || ranks.is_multiple_of(shards),
        format!(
            "learner.parallel.shards is {shards}, which does not divide {ranks} ranks: use 0 (all) or a divisor of {ranks}"
        ),
    );
    need(
        p.zero > 0 || shards <= 1,
        format!(
            "learner.parallel.shards is {shards}, but with zero = 0 nothing is divided: set zero to 1, 2 or 3, or shards to 0"
        ),
    );
    let port = p.rendezvous.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)));
    need(
        port.is_some_and(|(host, _)| !host.is_empty()),
        format!("learner.parallel.rendezvous is `{}`: use host:port", p.rendezvous),
    );
    need(
        rank == 0 || port.is_none_or(|(_, port)| port > 0),
        format!("learner.parallel.rendezvous is `{}`: rank {rank} must be told rank 0's port", p.rendezvous),
    );
    for (name, s) in [("join_s", p.join_s), ("call_s", p.call_s)] {
        need(s > 0.0 && s <= 86400.0, format!("learner.parallel.{name} is {s}: use seconds above 0, up to a day"));
    }
    need(
        (5.0..=3600.0).contains(&p.lost_s),
        format!("learner.parallel.lost_s is {}: use 5 to 3600 seconds; signs of life come every half second", p.lost_s),
    );
}
