//! Weights by broadcast over Gloo, from a host to receivers: the same bits as by stream, workers that come, leave, and are killed in
//! the middle, and a learner whose parameters are divided over ranks.

mod common;
#[path = "common/synced.rs"]
mod synced;

use std::io::{BufRead, BufReader};
use std::time::{Duration, Instant};

use common::{configured, low_tokens, model, rollout};
use synced::{DIFFERENCE, LIMIT, Process, SOON, Served, bits, checksum};
use tch::{Device, Kind, Tensor};
use tokio::runtime::Builder;
use unveil_collective::{Backend, Collective, Setup, Timing, open};
use unveil_learner::{Learner, Models, Ranks, Zero};
use unveil_proto::v1;
use unveil_proto::v1::experience_client::ExperienceClient;
use unveil_proto::weights::BUCKET;
use unveil_rollout::sync::WeightReceiver;

const ADDRESS: &str = "UNVEIL_TEST_HOST";
const RANK: &str = "UNVEIL_TEST_RANK";
const PORT: &str = "UNVEIL_TEST_PORT";

#[test]
fn versions_come_by_broadcast_with_the_bits_of_the_stream_and_each_membership_has_its_round() {
    let s = Served::new(Device::Cpu);
    s.publish(0);
    let (one, two) = (s.follow("one"), s.follow("two"));
    assert!(one.has(0).whole && two.has(0).whole, "the first version comes as a stream");
    for version in [1, 2] {
        s.publish(version);
        assert_eq!(s.sent(), (version, 1, 2, DIFFERENCE), "one world serves as long as the workers stay");
        one.has_right(version);
        two.has_right(version);
    }
    // By stream alone, the same.
    let stream = s.runtime.block_on(async {
        let mut plain = WeightReceiver::connect(&s.address(), "plain", SOON).await.unwrap();
        plain.fetch(SOON).await.unwrap().unwrap()
    });
    let mut all: Vec<_> = stream.tensors.iter().map(|(n, t)| (n.clone(), bits(t))).collect();
    all.sort();
    assert_eq!((stream.version, stream.checksum), (2, two.has(2).checksum));
    all.retain(|(n, _)| n != "base");
    assert!(all == two.has(2).tensors);
    // Who joins takes the stream, and is part of the next world.
    let three = s.follow("three");
    let first = three.has(2);
    assert!(first.whole && first.checksum == checksum(2) && s.host.drain_broadcasts().is_empty());
    s.publish(3);
    assert_eq!(s.sent(), (3, 2, 3, DIFFERENCE));
    for worker in [&one, &two, &three] {
        worker.has_right(3);
    }
    // Who leaves is missed by nobody: the next round does not wait for it.
    drop(one);
    std::thread::sleep(Duration::from_millis(300));
    let begin = Instant::now();
    s.publish(4);
    assert_eq!(s.sent(), (4, 3, 2, DIFFERENCE));
    assert!(begin.elapsed() < LIMIT, "{:?}", begin.elapsed());
    for worker in [&two, &three] {
        worker.has_right(4);
    }
}

#[test]
#[ignore = "a worker that stops in the middle of a broadcast, which another test starts and kills"]
fn victim() {
    let Ok(address) = std::env::var(ADDRESS) else { return };
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let (_following, ticket) = runtime.block_on(async {
        let channel = unveil_service::connect(&address, SOON).await.unwrap();
        let mut client = ExperienceClient::new(channel);
        let holds = Some(v1::HeldWeights { version: 0, checksum: checksum(0) });
        let joins = Some(v1::Joins { backend: "gloo".into(), round: 0 });
        let follow = v1::FollowRequest { worker: "victim".into() };
        let following = client.follow(follow).await.unwrap().into_inner();
        println!("READY");
        let ask = v1::WeightsRequest { worker: "victim".into(), holds, wait_ms: 20_000, joins };
        let first = client.weights(ask).await.unwrap().into_inner().message().await.unwrap().unwrap();
        let head: v1::WeightsHead = prost::Message::decode(first.data).unwrap();
        (following, head.broadcast.expect("a broadcast"))
    });
    let setup = Setup {
        rank: ticket.rank as usize,
        world: ticket.world as usize,
        address: ticket.address,
        local: None,
        backend: Backend::Gloo,
        fingerprint: ticket.fingerprint,
        token: None,
        timing: Timing::within(LIMIT),
    };
    let world = open(&setup).unwrap();
    let _first = world.group().broadcast(Tensor::zeros([BUCKET as i64 / 8], (Kind::Int64, Device::Cpu)), 0).unwrap();
    println!("MIDDLE");
    std::thread::sleep(SOON);
}

#[test]
fn a_worker_killed_in_the_middle_holds_nobody_up_for_long() {
    let s = Served::new(Device::Cpu);
    s.publish(0);
    let survivor = s.follow("survivor");
    survivor.has(0);
    let mut victim = Process::start("victim", &[(ADDRESS, s.address())]);
    let mut lines = BufReader::new(victim.0.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|l| l.contains("READY")));
    std::thread::sleep(Duration::from_millis(300));
    let begin = Instant::now();
    s.publish(1);
    // The victim stands still until the limit of the broadcast.
    assert!(begin.elapsed() < LIMIT, "the learner waited for the broadcast");
    assert!(lines.any(|l| l.contains("MIDDLE")), "the victim takes part");
    drop(victim);
    survivor.has_right(1);
    assert!(begin.elapsed() < SOON / 2, "{:?}", begin.elapsed());
    assert!(s.host.drain_broadcasts().is_empty());
    // The next version has a new world, without the dead.
    s.publish(2);
    assert_eq!(s.sent(), (2, 2, 1, DIFFERENCE));
    survivor.has_right(2);
}

#[test]
fn a_worker_that_does_not_come_is_done_without() {
    let s = Served::new(Device::Cpu);
    s.publish(0);
    let present = s.follow("present");
    present.has(0);
    // It tells that it takes part, and lets the offer lie.
    let holds = Some(v1::HeldWeights { version: 0, checksum: checksum(0) });
    let joins = Some(v1::Joins { backend: "gloo".into(), round: 0 });
    let ask = v1::WeightsRequest { worker: "absent".into(), holds, wait_ms: 0, joins: joins.clone() };
    let channel = s.runtime.block_on(unveil_service::connect(&s.address(), SOON)).unwrap();
    let mut client = ExperienceClient::new(channel);
    let follow = |worker: &str| v1::FollowRequest { worker: worker.into() };
    let _absent = s.runtime.block_on(client.follow(follow("absent"))).unwrap();
    s.runtime.block_on(client.weights(ask.clone())).unwrap();
    // Another backend is no part of it.
    let other = v1::Joins { backend: "nccl".into(), round: 0 };
    let ask = v1::WeightsRequest { worker: "other".into(), joins: Some(other), ..ask };
    let _other = s.runtime.block_on(client.follow(follow("other"))).unwrap();
    s.runtime.block_on(client.weights(ask)).unwrap();
    let begin = Instant::now();
    s.publish(1);
    present.has_right(1);
    assert!(begin.elapsed() < SOON / 2, "{:?}", begin.elapsed());
    assert!(s.host.drain_broadcasts().is_empty());
    s.publish(2);
    assert_eq!(s.sent(), (2, 2, 1, DIFFERENCE));
    present.has_right(2);
}

/// Bits of the parameters by name.
fn whole(learner: &Learner) -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<_> = learner.vlm().named_parameters().iter().map(|(n, t)| (n.clone(), bits(t))).collect();
    all.sort();
    all
}

#[test]
#[ignore = "a rank of a learner, which another test starts"]
fn rank() {
    let Ok(rank) = std::env::var(RANK) else { return };
    let rank: usize = rank.parse().unwrap();
    let vlm = model(5);
    let batch = rollout(&vlm, 2, 3, 0, &low_tokens);
    let address = format!("127.0.0.1:{}", std::env::var(PORT).unwrap());
    let (backend, fingerprint, timing) = (Backend::Gloo, "test".into(), Timing::within(SOON));
    let setup = Setup { rank, world: 2, address, local: None, backend, fingerprint, token: None, timing };
    let ranks = Ranks::new(open(&setup).unwrap(), Zero::Parameters, 0).unwrap();
    let settings = configured(&vlm, 20, |_| ());
    let mut learner = Learner::on(ranks, Models { vlm, reference: None, critic: None }, settings).unwrap();
    let served = (rank == 0).then(|| Served::new(Device::Cpu));
    let publish = |version: u64, learner: &Learner| {
        if let Some(s) = &served {
            s.publish_these(version, learner.vlm().named_parameters(), Kind::Float, &|_| true);
        }
    };
    learner.bring().unwrap();
    publish(0, &learner);
    let worker = served.as_ref().map(|s| s.follow("worker"));
    let first = worker.as_ref().map(|w| w.has(0).tensors);
    learner.update(&batch).unwrap();
    learner.bring().unwrap();
    publish(1, &learner);
    // What the optimiser has, gathered by another way.
    let state = learner.state().unwrap().0;
    if let (Some(s), Some(worker)) = (&served, worker) {
        let wanted = whole(&learner);
        let bytes = wanted.iter().map(|(_, b)| b.len() as u64).sum();
        assert_eq!(s.sent(), (1, 1, 1, bytes));
        let got = worker.has(1);
        assert!(!got.whole && got.tensors == wanted && Some(&got.tensors) != first.as_ref());
        for (name, tensor) in &state {
            let own = got.tensors.iter().find(|(n, _)| n == name);
            assert!(own.is_some_and(|(_, own)| *own == bits(tensor)), "{name}");
        }
        println!("RIGHT {}", state.len());
    }
}

#[test]
fn divided_parameters_are_broadcast_whole() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let start = |rank: usize| Process::start("rank", &[(RANK, rank.to_string()), (PORT, port.clone())]);
    let (mut zero, mut one) = (start(0), start(1));
    let lines = BufReader::new(zero.0.stdout.take().unwrap()).lines().map_while(Result::ok);
    let right: Vec<String> = lines.filter(|l| l.contains("RIGHT ")).collect();
    assert!(right.len() == 1 && !right[0].contains("RIGHT 0"), "{right:?}");
    assert!(zero.0.wait().unwrap().success() && one.0.wait().unwrap().success());
}
