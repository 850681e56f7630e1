//! Weight broadcasts over Gloo: the same bytes as by stream, and workers that join, leave or are killed during a broadcast.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};
use tokio::runtime::Builder;
use unveil_collective::{Backend, Collective, Setup, Timeouts, open};
use unveil_experience_rpc::WeightReceiver;
use unveil_experience_rpc::checksum::BUCKET_BYTES;
use unveil_proto::v1;
use unveil_proto::v1::experience_client::ExperienceClient;
use unveil_testkit::{KilledOnDrop, ignored_test};
use unveil_testkit_model::{BROADCAST_TIMEOUT, DIFFERENCE, PATIENCE, WeightPublisher, bits, version_checksum};

const ADDRESS: &str = "UNVEIL_TEST_HOST";

#[test]
fn broadcast_and_stream_deliver_equal_bytes() {
    let s = WeightPublisher::new(Device::Cpu);
    s.publish(0);
    let one = s.subscribe("one");
    let two = s.subscribe("two");
    assert!(one.wait_for(0).whole && two.wait_for(0).whole, "the first version comes as a stream");
    for version in [1, 2] {
        s.publish(version);
        assert_eq!(s.sent(), (version, 1, 2, DIFFERENCE), "the group is reused while its members stay");
        one.wait_for_difference(version);
        two.wait_for_difference(version);
    }
    // A stream delivers the same.
    let stream = s.runtime.block_on(async {
        let mut plain = WeightReceiver::connect(&s.address(), "plain", PATIENCE).await.unwrap();
        plain.fetch(PATIENCE).await.unwrap().unwrap()
    });
    let mut all: Vec<_> = stream.tensors.iter().map(|(n, t)| (n.clone(), bits(t))).collect();
    all.sort();
    assert_eq!((stream.version, stream.checksum), (2, two.wait_for(2).checksum));
    all.retain(|(n, _)| n != "base");
    assert!(all == two.wait_for(2).tensors);
    // A worker that joins receives a stream first and is a member of the next group.
    let three = s.subscribe("three");
    let first = three.wait_for(2);
    assert!(first.whole && first.checksum == version_checksum(2) && s.server.drain_broadcasts().is_empty());
    s.publish(3);
    assert_eq!(s.sent(), (3, 2, 3, DIFFERENCE));
    for worker in [&one, &two, &three] {
        worker.wait_for_difference(3);
    }
    // The next broadcast does not wait for a worker that has left.
    drop(one);
    std::thread::sleep(Duration::from_millis(300));
    let start = Instant::now();
    s.publish(4);
    assert_eq!(s.sent(), (4, 3, 2, DIFFERENCE));
    assert!(start.elapsed() < BROADCAST_TIMEOUT, "{:?}", start.elapsed());
    for worker in [&two, &three] {
        worker.wait_for_difference(4);
    }
}

#[test]
#[ignore = "a worker that stops in the middle of a broadcast, which another test starts and kills"]
fn victim() {
    let Ok(address) = std::env::var(ADDRESS) else { return };
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let (_subscription, offer) = runtime.block_on(async {
        let channel = unveil_service::connect(&address, PATIENCE).await.unwrap();
        let mut client = ExperienceClient::new(channel);
        let holds = Some(v1::HeldWeights { version: 0, checksum: version_checksum(0) });
        let broadcast_capability = Some(v1::BroadcastCapability { backend: "gloo".into(), round: 0 });
        let subscribe = v1::SubscribeRequest { worker: "victim".into() };
        let subscription = client.subscribe(subscribe).await.unwrap().into_inner();
        println!("READY");
        let ask = v1::WeightsRequest { worker: "victim".into(), holds, wait_ms: 20_000, broadcast_capability };
        let first = client.weights(ask).await.unwrap().into_inner().message().await.unwrap().unwrap();
        let head: v1::WeightsHead = prost::Message::decode(first.data).unwrap();
        (subscription, head.broadcast.expect("a broadcast"))
    });
    let setup = Setup {
        rank: offer.rank as usize,
        world: offer.world as usize,
        address: offer.address,
        local_address: None,
        backend: Backend::Gloo,
        fingerprint: offer.fingerprint,
        token: None,
        timeouts: Timeouts::within(BROADCAST_TIMEOUT),
    };
    let world = open(&setup).unwrap();
    let _first =
        world.group().broadcast(Tensor::zeros([BUCKET_BYTES as i64 / 8], (Kind::Int64, Device::Cpu)), 0).unwrap();
    println!("MIDDLE");
    std::thread::sleep(PATIENCE);
}

#[test]
fn killed_worker_does_not_block_a_broadcast_for_long() {
    let s = WeightPublisher::new(Device::Cpu);
    s.publish(0);
    let survivor = s.subscribe("survivor");
    survivor.wait_for(0);
    let victim = ignored_test("broadcast::victim").env(ADDRESS, s.address()).stdout(Stdio::piped()).spawn();
    let mut victim = KilledOnDrop(victim.unwrap());
    let mut lines = BufReader::new(victim.0.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|l| l.contains("READY")));
    std::thread::sleep(Duration::from_millis(300));
    let start = Instant::now();
    s.publish(1);
    // The victim stalls until the timeout of the broadcast.
    assert!(start.elapsed() < BROADCAST_TIMEOUT, "the learner waited for the broadcast");
    assert!(lines.any(|l| l.contains("MIDDLE")), "the victim takes part");
    drop(victim);
    survivor.wait_for_difference(1);
    assert!(start.elapsed() < PATIENCE / 2, "{:?}", start.elapsed());
    assert!(s.server.drain_broadcasts().is_empty());
    // The next version is sent in a new group without the killed worker.
    s.publish(2);
    assert_eq!(s.sent(), (2, 2, 1, DIFFERENCE));
    survivor.wait_for_difference(2);
}

#[test]
fn absent_worker_is_excluded_from_the_next_broadcast() {
    let s = WeightPublisher::new(Device::Cpu);
    s.publish(0);
    let present = s.subscribe("present");
    present.wait_for(0);
    // The worker subscribes but ignores the offer.
    let holds = Some(v1::HeldWeights { version: 0, checksum: version_checksum(0) });
    let broadcast_capability = Some(v1::BroadcastCapability { backend: "gloo".into(), round: 0 });
    let ask = v1::WeightsRequest { worker: "absent".into(), holds, wait_ms: 0, broadcast_capability };
    let channel = s.runtime.block_on(unveil_service::connect(&s.address(), PATIENCE)).unwrap();
    let mut client = ExperienceClient::new(channel);
    let subscribe = |worker: &str| v1::SubscribeRequest { worker: worker.into() };
    let _absent = s.runtime.block_on(client.subscribe(subscribe("absent"))).unwrap();
    s.runtime.block_on(client.weights(ask.clone())).unwrap();
    // A worker with another backend does not take part.
    let other = v1::BroadcastCapability { backend: "nccl".into(), round: 0 };
    let ask = v1::WeightsRequest { worker: "other".into(), broadcast_capability: Some(other), ..ask };
    let _other = s.runtime.block_on(client.subscribe(subscribe("other"))).unwrap();
    s.runtime.block_on(client.weights(ask)).unwrap();
    let start = Instant::now();
    s.publish(1);
    present.wait_for_difference(1);
    assert!(start.elapsed() < PATIENCE / 2, "{:?}", start.elapsed());
    assert!(s.server.drain_broadcasts().is_empty());
    s.publish(2);
    assert_eq!(s.sent(), (2, 2, 1, DIFFERENCE));
    present.wait_for_difference(2);
}
