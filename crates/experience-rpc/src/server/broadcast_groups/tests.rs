//! Tests of broadcast membership without a network.

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
    let new = NewWeights { version, named: &named, kind: Kind::Float, adapters: None, may_change: &|_| true };
    Published::pack(&new, None).unwrap()
}

fn request(groups: &mut BroadcastGroups, worker: &str, version: u64, round: u64, local: IpAddr) {
    let capability = v1::BroadcastCapability { backend: "gloo".into(), round };
    groups.record_request(worker, Some(&capability), Some(held(version)), Some(local), NOW);
}

fn subscribed(workers: &[&str]) -> BroadcastGroups {
    let mut groups = BroadcastGroups::new("gloo");
    for worker in workers {
        groups.subscribe(worker);
        request(&mut groups, worker, 0, 0, HERE);
    }
    groups
}

fn missing(ranks: &[usize]) -> Result<()> {
    let address = "here:1".into();
    let seconds = 1.0;
    Err(CollectiveError::Missing { ranks: ranks.to_vec(), world: 3, address, seconds, found_by: 0 }.into())
}

/// Starts a broadcast; returns its job, its members, and whether they form a new collective group.
fn start(groups: &mut BroadcastGroups, version: u64) -> Option<(BroadcastJob, Vec<String>, bool)> {
    let job = groups.start(&published(version), NOW)?;
    let members = groups.current.as_ref().unwrap().members.keys().cloned().collect();
    let is_new = job.rendezvous_ip.is_some();
    Some((job, members, is_new))
}

#[test]
fn subscribers_take_part_and_their_group_is_reused() {
    let mut groups = subscribed(&["a", "b"]);
    // Workers without a subscription, or with another backend, are not included.
    request(&mut groups, "c", 0, 0, HERE);
    groups.subscribe("d");
    let other = v1::BroadcastCapability { backend: "nccl".into(), round: 0 };
    groups.record_request("d", Some(&other), Some(held(0)), Some(HERE), NOW);
    let (job, members, is_new) = start(&mut groups, 1).unwrap();
    assert_eq!((job.round, job.workers, job.bytes, is_new), (1, 2, 12, true));
    assert_eq!(members, ["a", "b"]);
    assert!(start(&mut groups, 2).is_none(), "one broadcast at a time");
    assert!(matches!(groups.offer("a", Some(held(0))), BroadcastOffer::Pending));
    groups.rendezvous_ready("127.0.0.1:5".parse().unwrap());
    let BroadcastOffer::Head(head) = groups.offer("b", Some(held(0))) else { panic!("b takes part") };
    let broadcast = head.broadcast.unwrap();
    assert_eq!((broadcast.rank, broadcast.world, broadcast.address.as_str(), head.version), (2, 3, "127.0.0.1:5", 1));
    for (worker, base) in [("c", Some(held(0))), ("a", None), ("a", Some(held(1)))] {
        assert!(matches!(groups.offer(worker, base), BroadcastOffer::None), "{worker}, {base:?}");
    }
    groups.finished(&job, &Ok(()));
    assert_eq!(groups.drain_reports().iter().map(|s| (s.version, s.workers)).collect::<Vec<_>>(), [(1, 2)]);
    let request_again =
        |groups: &mut BroadcastGroups, round| ["a", "b"].iter().for_each(|w| request(groups, w, 1, round, HERE));
    request_again(&mut groups, 1);
    let (job, _, is_new) = start(&mut groups, 2).unwrap();
    assert_eq!((job.round, is_new), (1, false));
    groups.finished(&job, &Ok(()));
    // One worker has left the collective group.
    request_again(&mut groups, 1);
    request(&mut groups, "a", 2, 0, HERE);
    let (job, _, is_new) = start(&mut groups, 3).unwrap();
    assert_eq!((job.round, is_new), (2, true));
}

#[test]
fn lost_workers_are_not_included() {
    let mut groups = subscribed(&["a", "b", "c", "d"]);
    let old = groups.subscribe("d");
    groups.subscribe("d");
    groups.stream_closed("d", old);
    groups.worker_lost("a");
    let stream = groups.streams["b"];
    groups.stream_closed("b", stream);
    groups.subscribers.get_mut("c").unwrap().alive_until = NOW - Duration::from_millis(1);
    assert_eq!(start(&mut groups, 1).unwrap().1, ["d"], "a newer stream of d is open");
    let mut groups = subscribed(&["a"]);
    groups.worker_lost("a");
    assert!(start(&mut groups, 1).is_none());
}

#[test]
fn failing_workers_are_excluded_for_longer_each_time() {
    let mut groups = subscribed(&["a", "b"]);
    let mut memberships: Vec<(u64, Vec<String>)> = Vec::new();
    for version in 1..=12 {
        ["a", "b"].iter().for_each(|w| request(&mut groups, w, version - 1, 0, HERE));
        let (job, members, _) = start(&mut groups, version).unwrap();
        let with_b = members.contains(&"b".to_owned());
        groups.finished(&job, &if with_b && version < 12 { missing(&[2]) } else { Ok(()) });
        assert_eq!(
            groups.subscribers.contains_key("a"),
            !with_b || version == 12,
            "members of a failed broadcast must request again"
        );
        memberships.push((version, members));
    }
    let with_b: Vec<u64> = memberships.iter().filter(|(_, m)| m.len() == 2).map(|(v, _)| *v).collect();
    assert_eq!(with_b, [1, 3, 6, 10]);
    assert_eq!(groups.penalties["b"].failures, 4);
}

#[test]
fn penalties_hit_failed_or_all_workers_until_a_success() {
    let penalties = |groups: &BroadcastGroups| groups.penalties.keys().cloned().collect::<Vec<_>>();
    for (left, ranks, penalized) in [(None, &[0][..], &["a", "b"][..]), (Some("b"), &[], &["b"]), (None, &[1], &["a"])]
    {
        let mut groups = subscribed(&["a", "b"]);
        let (job, ..) = start(&mut groups, 1).unwrap();
        left.into_iter().for_each(|worker| groups.worker_lost(worker));
        groups.finished(&job, &missing(ranks));
        assert_eq!(penalties(&groups), penalized);
        ["a", "b"].iter().for_each(|w| {
            groups.subscribe(w);
            request(&mut groups, w, 2, 0, HERE);
        });
        let (job, members, _) = start(&mut groups, 3).unwrap();
        assert_eq!(members, ["a", "b"]);
        groups.finished(&job, &Ok(()));
        assert!(penalties(&groups).is_empty());
    }
}

#[test]
fn rendezvous_uses_an_address_that_other_hosts_reach() {
    let mut groups = subscribed(&["a", "z"]);
    let lan: IpAddr = "10.0.0.7".parse().unwrap();
    groups.subscribe("m");
    request(&mut groups, "m", 0, 0, lan);
    assert_eq!(start(&mut groups, 1).unwrap().0.rendezvous_ip, Some(lan));
}
