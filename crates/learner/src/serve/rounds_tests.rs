//! Rounds without a network: who takes part, who is left out and for how long.

use tch::{Kind, Tensor};

use super::super::weights::NewWeights;
use super::*;

const NOW: Duration = Duration::from_secs(100);
const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

fn held(version: u64) -> v1::HeldWeights {
    v1::HeldWeights { version, checksum: 7 }
}

fn published(version: u64) -> Published {
    let named = [("a".to_owned(), Tensor::from_slice(&[version as f32; 3]))];
    let new = NewWeights { version, named: &named, kind: Kind::Float, adapters: None, changes: &|_| true };
    Published::make(&new, None).unwrap()
}

fn ask(rounds: &mut Rounds, worker: &str, version: u64, round: u64, local: IpAddr) {
    let joins = v1::Joins { backend: "gloo".into(), round };
    rounds.note(worker, Some(&joins), Some(held(version)), Some(local), NOW);
}

fn following(workers: &[&str]) -> Rounds {
    let mut rounds = Rounds::new("gloo");
    for worker in workers {
        rounds.follow(worker);
        ask(&mut rounds, worker, 0, 0, HERE);
    }
    rounds
}

fn missing(ranks: &[usize]) -> Result<()> {
    let (address, seconds) = ("here:1".into(), 1.0);
    Err(CollectiveError::Missing { ranks: ranks.to_vec(), world: 3, address, seconds, found_by: 0 }.into())
}

/// The members of the next round and whether it has a new world.
fn begin(rounds: &mut Rounds, version: u64) -> Option<(Job, Vec<String>, bool)> {
    let job = rounds.begin(&published(version), NOW)?;
    let members = rounds.round.as_ref().unwrap().members.keys().cloned().collect();
    let fresh = job.meet.is_some();
    Some((job, members, fresh))
}

#[test]
fn who_follows_takes_part_and_a_world_serves_while_they_stay() {
    let mut rounds = following(&["a", "b"]);
    // Without a stream, or by another backend, nobody is counted on.
    ask(&mut rounds, "c", 0, 0, HERE);
    rounds.follow("d");
    let other = v1::Joins { backend: "nccl".into(), round: 0 };
    rounds.note("d", Some(&other), Some(held(0)), Some(HERE), NOW);
    let (job, members, fresh) = begin(&mut rounds, 1).unwrap();
    assert_eq!((job.round, job.workers, job.bytes, fresh), (1, 2, 12, true));
    assert_eq!(members, ["a", "b"]);
    assert!(begin(&mut rounds, 2).is_none(), "one at a time");
    assert!(matches!(rounds.ticket("a", Some(held(0))), Ticket::Soon));
    rounds.met("127.0.0.1:5".parse().unwrap());
    let Ticket::Head(head) = rounds.ticket("b", Some(held(0))) else { panic!("b takes part") };
    let told = head.broadcast.unwrap();
    assert_eq!((told.rank, told.world, told.address.as_str(), head.version), (2, 3, "127.0.0.1:5", 1));
    for (worker, base) in [("c", Some(held(0))), ("a", None), ("a", Some(held(1)))] {
        assert!(matches!(rounds.ticket(worker, base), Ticket::None), "{worker}, {base:?}");
    }
    rounds.ended(&job, &Ok(()));
    assert_eq!(rounds.drain().iter().map(|s| (s.version, s.workers)).collect::<Vec<_>>(), [(1, 2)]);
    let again = |rounds: &mut Rounds, round| ["a", "b"].iter().for_each(|w| ask(rounds, w, 1, round, HERE));
    again(&mut rounds, 1);
    let (job, _, fresh) = begin(&mut rounds, 2).unwrap();
    assert_eq!((job.round, fresh), (1, false));
    rounds.ended(&job, &Ok(()));
    // One has left the world of the round.
    again(&mut rounds, 1);
    ask(&mut rounds, "a", 2, 0, HERE);
    let (job, _, fresh) = begin(&mut rounds, 3).unwrap();
    assert_eq!((job.round, fresh), (2, true));
}

#[test]
fn who_is_gone_is_not_counted_on() {
    let mut rounds = following(&["a", "b", "c", "d"]);
    let old = rounds.follow("d");
    rounds.follow("d");
    rounds.ended_stream("d", old);
    rounds.lost("a");
    let stream = rounds.streams["b"];
    rounds.ended_stream("b", stream);
    rounds.followers.get_mut("c").unwrap().until = NOW - Duration::from_millis(1);
    assert_eq!(begin(&mut rounds, 1).unwrap().1, ["d"], "a newer stream of d is open");
    let mut rounds = following(&["a"]);
    rounds.lost("a");
    assert!(begin(&mut rounds, 1).is_none());
}

#[test]
fn who_failed_a_round_is_left_out_for_longer_each_time() {
    let mut rounds = following(&["a", "b"]);
    let mut parts: Vec<(u64, Vec<String>)> = Vec::new();
    for version in 1..=12 {
        ["a", "b"].iter().for_each(|w| ask(&mut rounds, w, version - 1, 0, HERE));
        let (job, members, _) = begin(&mut rounds, version).unwrap();
        let with_b = members.contains(&"b".to_owned());
        rounds.ended(&job, &if with_b && version < 12 { missing(&[2]) } else { Ok(()) });
        assert_eq!(rounds.followers.contains_key("a"), !with_b || version == 12, "who is to be counted on asks again");
        parts.push((version, members));
    }
    let with_b: Vec<u64> = parts.iter().filter(|(_, m)| m.len() == 2).map(|(v, _)| *v).collect();
    assert_eq!(with_b, [1, 3, 6, 10]);
    assert_eq!(rounds.blamed["b"].times, 4);
}

#[test]
fn blame_falls_on_who_left_and_on_all_where_nobody_is_named_and_ends_with_a_success() {
    let blamed = |rounds: &Rounds| rounds.blamed.keys().cloned().collect::<Vec<_>>();
    for (left, ranks, through) in [(None, &[0][..], &["a", "b"][..]), (Some("b"), &[], &["b"]), (None, &[1], &["a"])] {
        let mut rounds = following(&["a", "b"]);
        let (job, ..) = begin(&mut rounds, 1).unwrap();
        left.into_iter().for_each(|worker| rounds.lost(worker));
        rounds.ended(&job, &missing(ranks));
        assert_eq!(blamed(&rounds), through);
        ["a", "b"].iter().for_each(|w| {
            rounds.follow(w);
            ask(&mut rounds, w, 2, 0, HERE);
        });
        let (job, members, _) = begin(&mut rounds, 3).unwrap();
        assert_eq!(members, ["a", "b"]);
        rounds.ended(&job, &Ok(()));
        assert!(blamed(&rounds).is_empty());
    }
}

#[test]
fn the_world_meets_where_workers_of_other_hosts_come_in() {
    let mut rounds = following(&["a", "z"]);
    let lan: IpAddr = "10.0.0.7".parse().unwrap();
    rounds.follow("m");
    ask(&mut rounds, "m", 0, 0, lan);
    assert_eq!(begin(&mut rounds, 1).unwrap().0.meet, Some(lan));
}
