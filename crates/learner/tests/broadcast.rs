//! Weights by broadcast over Gloo, from a host to receivers: the same bits as by stream, workers that come, leave, and are killed in
//! the middle.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};
use tokio::runtime::{Builder, Runtime};
use unveil_collective::{Backend, Collective, Setup, Timing, open};
use unveil_core::{GroupId, Sampling};
use unveil_experience::{Experience, Settings};
use unveil_learner::{
    Broadcasting, Host, HostOptions, LearnerError, LeaseSource, Leased, NewWeights, Sent, TrainGroup,
};
use unveil_proto::v1;
use unveil_proto::v1::experience_client::ExperienceClient;
use unveil_proto::weights::{BUCKET, Sum};
use unveil_rollout::sync::{Member, WeightReceiver};

/// Of a broadcast.
const LIMIT: Duration = Duration::from_secs(4);
const SOON: Duration = Duration::from_secs(60);
/// Elements in bf16: more than two buckets, the last one not of whole words.
const TOP: i64 = BUCKET as i64 + 1;
const ADDRESS: &str = "UNVEIL_TEST_HOST";

struct Nothing;

impl LeaseSource for Nothing {
    fn lease(&self, _: usize, _: &GroupId) -> Result<Leased, LearnerError> {
        Err(LearnerError::Setting("nothing is leased here".into()))
    }
}

/// Weights of a version: one tensor that never changes, and two that do, not in the order of names.
fn named(version: u64) -> Vec<(String, Tensor)> {
    let wave = |count: i64| (Tensor::arange(count, (Kind::Float, Device::Cpu)) * (version as f64 + 0.37)).sin();
    vec![
        ("top".into(), wave(TOP)),
        ("base".into(), Tensor::arange(1001, (Kind::Float, Device::Cpu))),
        ("middle".into(), wave(3 * 5).view([5, 3]).transpose(0, 1)),
    ]
}

fn bits(t: &Tensor) -> Vec<u8> {
    let t = t.to_kind(Kind::BFloat16).contiguous();
    let mut out = vec![0; t.numel() * 2];
    t.copy_data_u8(&mut out, t.numel());
    out
}

/// Name and bits of the tensors that change, by name.
fn changing(version: u64) -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<_> =
        named(version).iter().filter(|(n, _)| n != "base").map(|(n, t)| (n.clone(), bits(t))).collect();
    all.sort();
    all
}

fn checksum(version: u64) -> u32 {
    let mut all: Vec<_> = named(version).iter().map(|(n, t)| (n.clone(), bits(t))).collect();
    all.sort();
    Sum::of(&all.into_iter().flat_map(|(_, b)| b).collect::<Vec<u8>>()).crc32c
}

struct Served {
    runtime: Runtime,
    host: Host,
}

impl Served {
    fn new() -> Self {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let settings =
            Settings { groups_per_step: 1, max_staleness: 0, lease_s: 9.0, seed: 0, term: 1, total_groups: None };
        let machine: Experience<TrainGroup> = Experience::new(settings, vec!["a".into()]).unwrap();
        let options = HostOptions {
            listen: "127.0.0.1:0".into(),
            sampling: Sampling { n: 2, ..Default::default() },
            stop: vec![],
            vocab: 50,
            fixed: None,
            broadcast: Some(Broadcasting { device: Device::Cpu, limit: LIMIT }),
        };
        let host = Host::start(runtime.handle(), options, machine, Arc::new(Nothing)).unwrap();
        Self { runtime, host }
    }

    fn publish(&self, version: u64) {
        let (named, kind) = (named(version), Kind::BFloat16);
        let changes = |name: &str| name != "base";
        self.host.publish(&NewWeights { version, named: &named, kind, adapters: None, changes: &changes }).unwrap();
    }

    /// The next broadcast that ended well, as (version, round, workers, bytes).
    fn sent(&self) -> (u64, u64, usize, u64) {
        let end = Instant::now() + SOON;
        while Instant::now() < end {
            if let Some(Sent { version, round, workers, bytes, .. }) = self.host.drain_broadcasts().pop() {
                return (version, round, workers, bytes);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("no broadcast within {SOON:?}");
    }

    fn follow(&self, name: &str) -> Follower {
        Follower::start(self.host.address().to_string(), name.to_owned())
    }
}

/// What a worker got.
#[derive(Clone, PartialEq)]
struct Got {
    version: u64,
    whole: bool,
    checksum: u32,
    tensors: Vec<(String, Vec<u8>)>,
}

/// A worker's receiver on a thread of its own, which takes each version as it comes.
struct Follower {
    got: Arc<Mutex<Vec<Got>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Follower {
    fn start(address: String, name: String) -> Self {
        let (got, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (out, end) = (got.clone(), stop.clone());
        let work = async move {
            let member = Member::start(Device::Cpu, LIMIT).unwrap();
            let receiver = WeightReceiver::connect(&address, &name, SOON).await.unwrap();
            let mut receiver = receiver.with_broadcast(member);
            while !end.load(Ordering::Relaxed) {
                let Some(update) = receiver.fetch(Duration::from_millis(200)).await.unwrap() else { continue };
                let mut tensors: Vec<_> = update.tensors.iter().map(|(n, t)| (n.clone(), bits(t))).collect();
                tensors.sort();
                let (version, whole, checksum) = (update.version, update.whole, update.checksum);
                receiver.taken(update);
                out.lock().unwrap().push(Got { version, whole, checksum, tensors });
            }
        };
        let thread = std::thread::spawn(|| Builder::new_current_thread().enable_all().build().unwrap().block_on(work));
        Self { got, stop, thread: Some(thread) }
    }

    /// Waits until a version has come, and a moment more, in which the host hears of it; gives what came.
    #[track_caller]
    fn has(&self, version: u64) -> Got {
        let end = Instant::now() + SOON;
        loop {
            let last = self.got.lock().unwrap().last().cloned();
            if let Some(last) = last.filter(|g| g.version == version) {
                std::thread::sleep(Duration::from_millis(300));
                return last;
            }
            assert!(Instant::now() < end, "version {version} did not come");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Version `version` came as a difference, with the right bits.
    #[track_caller]
    fn has_right(&self, version: u64) {
        let got = self.has(version);
        assert_eq!((got.whole, got.checksum), (false, checksum(version)));
        assert!(got.tensors == changing(version), "bits of version {version}");
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(std::thread::panicking() || matches!(ended, Some(Ok(()))));
    }
}

/// Bytes of the tensors that change.
const DIFFERENCE: u64 = (TOP as u64 + 15) * 2;

#[test]
fn versions_come_by_broadcast_with_the_bits_of_the_stream_and_each_membership_has_its_round() {
    let s = Served::new();
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
        let mut plain = WeightReceiver::connect(&s.host.address().to_string(), "plain", SOON).await.unwrap();
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
    [&one, &two, &three].iter().for_each(|w| w.has_right(3));
    // Who leaves is missed by nobody.
    drop(one);
    std::thread::sleep(Duration::from_millis(300));
    s.publish(4);
    assert_eq!(s.sent(), (4, 3, 2, DIFFERENCE));
    [&two, &three].iter().for_each(|w| w.has_right(4));
}

#[test]
#[ignore = "a worker that stops in the middle of a broadcast, which another test starts and kills"]
fn victim() {
    let Ok(address) = std::env::var(ADDRESS) else { return };
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let ticket = runtime.block_on(async {
        let channel = unveil_service::connect(&address, SOON).await.unwrap();
        let mut client = ExperienceClient::new(channel);
        let holds = Some(v1::HeldWeights { version: 0, checksum: checksum(0) });
        let joins = Some(v1::Joins { backend: "gloo".into(), round: 0 });
        println!("READY");
        let ask = v1::WeightsRequest { worker: "victim".into(), holds, wait_ms: 20_000, joins };
        let first = client.weights(ask).await.unwrap().into_inner().message().await.unwrap().unwrap();
        let head: v1::WeightsHead = prost::Message::decode(first.data).unwrap();
        head.broadcast.expect("a broadcast")
    });
    let setup = Setup {
        rank: ticket.rank as usize,
        world: ticket.world as usize,
        address: ticket.address,
        local: None,
        backend: Backend::Gloo,
        fingerprint: ticket.fingerprint,
        timing: Timing::within(LIMIT),
    };
    let world = open(&setup).unwrap();
    let _first = world.group().broadcast(Tensor::zeros([BUCKET as i64 / 8], (Kind::Int64, Device::Cpu)), 0).unwrap();
    println!("MIDDLE");
    std::thread::sleep(SOON);
}

struct Victim(Child);

impl Drop for Victim {
    fn drop(&mut self) {
        let (_killed, _ended) = (self.0.kill(), self.0.wait());
    }
}

#[test]
fn a_worker_killed_in_the_middle_holds_nobody_up_for_long() {
    let s = Served::new();
    s.publish(0);
    let survivor = s.follow("survivor");
    survivor.has(0);
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["victim", "--exact", "--ignored", "--nocapture"]).env(ADDRESS, s.host.address().to_string());
    let mut victim = Victim(command.stdout(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(victim.0.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|l| l.contains("READY")));
    std::thread::sleep(Duration::from_millis(300));
    let begin = Instant::now();
    s.publish(1);
    assert!(begin.elapsed() < LIMIT / 2, "the learner does not wait for a broadcast");
    assert!(lines.any(|l| l.contains("MIDDLE")), "the victim takes part");
    drop(victim);
    survivor.has_right(1);
    assert!(begin.elapsed() < LIMIT * 3, "{:?}", begin.elapsed());
    assert!(s.host.drain_broadcasts().is_empty());
    // The next version has a new world, without the dead.
    s.publish(2);
    assert_eq!(s.sent(), (2, 2, 1, DIFFERENCE));
    survivor.has_right(2);
}

#[test]
fn a_worker_that_does_not_come_is_done_without() {
    let s = Served::new();
    s.publish(0);
    let present = s.follow("present");
    present.has(0);
    // It tells that it takes part, and lets the offer lie.
    let holds = Some(v1::HeldWeights { version: 0, checksum: checksum(0) });
    let joins = Some(v1::Joins { backend: "gloo".into(), round: 0 });
    let ask = v1::WeightsRequest { worker: "absent".into(), holds, wait_ms: 0, joins: joins.clone() };
    let channel = s.runtime.block_on(unveil_service::connect(&s.host.address().to_string(), SOON)).unwrap();
    let mut client = ExperienceClient::new(channel);
    s.runtime.block_on(client.weights(ask.clone())).unwrap();
    // Another backend is no part of it.
    let other = v1::Joins { backend: "nccl".into(), round: 0 };
    let ask = v1::WeightsRequest { worker: "other".into(), joins: Some(other), ..ask };
    s.runtime.block_on(client.weights(ask)).unwrap();
    let begin = Instant::now();
    s.publish(1);
    present.has_right(1);
    assert!(begin.elapsed() < LIMIT * 3, "{:?}", begin.elapsed());
    assert!(s.host.drain_broadcasts().is_empty());
    s.publish(2);
    assert_eq!(s.sent(), (2, 2, 1, DIFFERENCE));
    present.has_right(2);
}
