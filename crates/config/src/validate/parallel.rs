//! Checks of the sections `[learner.parallel]` and `[sft.parallel]`.

use crate::schema::{Config, Parallel};

/// Adds a message to `out` for every problem.
pub(super) fn check(c: &Config, out: &mut Vec<String>) {
    check_section("sft", &c.sft.parallel, out);
    check_section("learner", &c.learner.parallel, out);
}

fn check_section(section: &str, p: &Parallel, out: &mut Vec<String>) {
    let mut require = |ok: bool, message: String| {
        if !ok {
            out.push(message);
        }
    };
    let ranks = p.ranks;
    let rank = p.rank;
    let shards = p.shards;
    require(ranks > 0, format!("{section}.parallel.ranks is 0: use 1 or more"));
    require(
        rank < ranks.max(1),
        format!(
            "{section}.parallel.rank is {rank} of {ranks} ranks: ranks are numbered from 0 to {section}.parallel.ranks - 1"
        ),
    );
    require(p.zero <= 3, format!("{section}.parallel.zero is {}: use 0, 1, 2 or 3", p.zero));
    require(
        shards == 0 || ranks.is_multiple_of(shards),
        format!(
            "{section}.parallel.shards is {shards}, which does not divide {ranks} ranks: use 0 (all) or a divisor of {ranks}"
        ),
    );
    require(
        p.zero > 0 || shards <= 1,
        format!(
            "{section}.parallel.shards is {shards}, but with zero = 0 nothing is sharded: set zero to 1, 2 or 3, or shards to 0"
        ),
    );
    let port = p.rendezvous.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)));
    require(
        port.is_some_and(|(host, _)| !host.is_empty()),
        format!("{section}.parallel.rendezvous is `{}`: use host:port", p.rendezvous),
    );
    require(
        rank == 0 || port.is_none_or(|(_, port)| port > 0),
        format!("{section}.parallel.rendezvous is `{}`: rank {rank} needs the port of rank 0", p.rendezvous),
    );
    for (name, s) in [("join_s", p.join_s), ("call_s", p.call_s)] {
        require(
            s > 0.0 && s <= 86400.0,
            format!("{section}.parallel.{name} is {s}: use seconds above 0 up to a day (86400)"),
        );
    }
    require(
        (5.0..=3600.0).contains(&p.lost_s),
        format!(
            "{section}.parallel.lost_s is {}: use 5 to 3600 seconds; heartbeats are sent every half second",
            p.lost_s
        ),
    );
}
