//! The life of a lease over real gRPC: prepared before it is taken, repeated when its answer was lost, renewed while its worker goes
//! on, however slow, and never larger than a message, however large its images.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::record;
use tch::{Device, Kind, Tensor};
use tokio::runtime::Runtime;
use tonic::transport::Channel;
use unveil_core::{Grid, GroupId, Sampling};
use unveil_experience::{Experience, Settings};
use unveil_learner::{GroupInput, Host, HostOptions, LearnerError, LeaseSource, Leased, NewWeights, TrainGroup};
use unveil_proto::v1;
use unveil_proto::v1::experience_client::ExperienceClient;
use unveil_service::limited;

const SOON: Duration = Duration::from_secs(20);

/// Images of given sizes, each made in `takes`, of records with a note of so many bytes.
struct Source {
    takes: Duration,
    note: usize,
    bytes: Vec<usize>,
    made: Arc<AtomicUsize>,
    now: AtomicUsize,
    most: Arc<AtomicUsize>,
}

/// An image of so many bytes takes long.
const LATE: usize = 77_777;

fn image(bytes: usize, index: usize) -> Bytes {
    (0..bytes).map(|at| (at * (index + 3) % 251) as u8).collect::<Vec<u8>>().into()
}

impl LeaseSource for Source {
    fn lease(&self, index: usize, group: &GroupId) -> Result<Leased, LearnerError> {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        let late = self.bytes[index % self.bytes.len()] == LATE;
        std::thread::sleep(if late { Duration::from_secs(8) } else { self.takes });
        self.now.fetch_sub(1, Ordering::SeqCst);
        self.made.fetch_add(1, Ordering::SeqCst);
        let mut record = record(&group.record);
        if self.note > 0 {
            record.extra.insert("note".into(), "x".repeat(self.note).into());
        }
        let input = GroupInput {
            record,
            image_size: (64, 64),
            prompt: unveil_model::Prompt { tokens: vec![1, index as u32], grids: vec![] },
            patches: vec![],
            merged: Grid { rows: 2, cols: 2 },
            encoded: Default::default(),
        };
        let image = image(self.bytes[index % self.bytes.len()], index);
        Ok(Leased { input: Arc::new(input), image, image_hash: "h".into() })
    }
}

struct Served {
    runtime: Runtime,
    host: Host,
    client: ExperienceClient<Channel>,
    made: Arc<AtomicUsize>,
    most: Arc<AtomicUsize>,
}

impl Served {
    /// A host with one batch of `records` groups, whose images have the sizes of `bytes` in turns.
    fn new(records: usize, takes: Duration, bytes: &[usize], change: impl FnOnce(&mut Settings)) -> Self {
        Self::with_notes(records, 0, takes, bytes, change)
    }

    /// The same, of records with a note of `note` bytes.
    fn with_notes(
        records: usize,
        note: usize,
        takes: Duration,
        bytes: &[usize],
        change: impl FnOnce(&mut Settings),
    ) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let mut settings = Settings {
            groups_per_step: records,
            max_staleness: 0,
            lease_s: 600.0,
            stall_s: 600.0,
            silence_s: 600.0,
            seed: 0,
            term: 1,
            total_groups: None,
        };
        change(&mut settings);
        let ids = (0..records).map(|i| format!("r{i}")).collect();
        let machine: Experience<TrainGroup> = Experience::new(settings, ids).unwrap();
        let (made, most) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let (bytes, now) = (bytes.to_vec(), AtomicUsize::new(0));
        let source = Source { takes, note, bytes, made: made.clone(), now, most: most.clone() };
        let sampling = Sampling { n: 2, temperature: 1.0, max_new_tokens: 4, seed: 7, ..Default::default() };
        let options = HostOptions {
            listen: "127.0.0.1:0".into(),
            sampling,
            stop: vec![],
            vocab: 50,
            fixed: None,
            broadcast: None,
        };
        let host = Host::start(runtime.handle(), options, machine, Arc::new(source)).unwrap();
        let named = vec![("w".to_owned(), Tensor::ones([5], (Kind::Float, Device::Cpu)))];
        let weights = NewWeights { version: 0, named: &named, kind: Kind::Float, adapters: None, changes: &|_| true };
        host.publish(&weights).unwrap();
        let address = host.address().to_string();
        let channel = runtime.block_on(unveil_service::connect(&address, Duration::from_secs(5))).unwrap();
        Self { client: limited!(ExperienceClient::new(channel)), host, runtime, made, most }
    }

    fn lease(&mut self, worker: &str, session: u64, call: u64, wait_ms: u32) -> Vec<v1::LeasedGroup> {
        let ask = ask(worker, session, call, wait_ms);
        self.runtime.block_on(self.client.lease(ask)).unwrap().into_inner().groups
    }

    /// Makes a call and gives it up.
    fn lease_and_leave(&mut self, worker: &str, call: u64, after: Duration) {
        let (mut client, ask) = (self.client.clone(), ask(worker, 1, call, 20_000));
        let left = self.runtime.block_on(async move { tokio::time::timeout(after, client.lease(ask)).await });
        assert!(left.is_err(), "the call was to be given up: {left:?}");
    }

    fn beat(&mut self, worker: &str, session: u64, done: u64, in_hand: &[(&str, u64)]) -> Vec<String> {
        let one = |(lease, progress): &(&str, u64)| v1::InHand { lease: (*lease).to_owned(), progress: *progress };
        let in_hand = in_hand.iter().map(one).collect();
        let beat = v1::HeartbeatRequest { worker: worker.into(), session, done, in_hand };
        self.runtime.block_on(self.client.heartbeat(beat)).unwrap().into_inner().lost
    }
}

fn ask(worker: &str, session: u64, call: u64, wait_ms: u32) -> v1::LeaseRequest {
    v1::LeaseRequest { worker: worker.into(), max_groups: 64, wait_ms, session, call, weights: None }
}

fn ids(groups: &[v1::LeasedGroup]) -> Vec<(String, Option<v1::GroupKey>)> {
    groups.iter().map(|g| (g.lease.clone(), g.group.clone())).collect()
}

/// Preparation takes longer than any call lasts: no call takes anything with it, and what was prepared stays.
#[test]
fn a_lease_that_takes_long_to_prepare_arrives() {
    let cores = std::thread::available_parallelism().unwrap().get();
    let mut s = Served::new(4 * cores, Duration::from_millis(400), &[3], |_| ());
    for call in 1..=4 {
        s.lease_and_leave("w", call, Duration::from_millis(300));
        assert_eq!(s.host.stats().leased, 0, "a call that was given up holds nothing");
    }
    let groups = s.lease("w", 1, 5, 10_000);
    assert_eq!((groups.len(), s.made.load(Ordering::SeqCst)), (4 * cores, 4 * cores), "each is prepared once");
    assert_eq!(s.most.load(Ordering::SeqCst), cores, "side by side");
}

/// One image takes longer than the call waits: the others go out meanwhile, and it follows.
#[test]
fn what_is_ready_does_not_wait_for_ever() {
    let mut s = Served::new(1, Duration::from_secs(7), &[3], |_| ());
    let begun = Instant::now();
    assert!(s.lease("w", 1, 1, 0).is_empty());
    assert!(begun.elapsed() < Duration::from_secs(7), "{:?}", begun.elapsed());
    assert_eq!(s.lease("w", 1, 2, 10_000).len(), 1);
    assert_eq!(s.made.load(Ordering::SeqCst), 1);
}

#[test]
fn a_repeated_call_gets_the_same_leases_and_a_lost_answer_is_free_at_once() {
    let mut s = Served::new(3, Duration::ZERO, &[3], |_| ());
    let first = ids(&s.lease("w", 1, 1, 1000));
    assert_eq!(first.len(), 3);
    assert_eq!(ids(&s.lease("w", 1, 1, 1000)), first, "the answer was lost, the call is repeated");
    assert!(s.lease("w", 1, 2, 50).is_empty(), "another call gets what is left");
    // The worker has heard of one of them only: another one waits for the rest.
    let (mut client, waits) = (s.client.clone(), ask("v", 1, 1, 20_000));
    let waiting = s.runtime.spawn(async move { client.lease(waits).await.unwrap().into_inner().groups });
    assert_eq!(s.beat("w", 1, 0, &[(first[0].0.as_str(), 1)]), Vec::<String>::new());
    assert_eq!(s.host.stats().leased, 3, "the call may be repeated yet");
    let begun = Instant::now();
    assert_eq!(s.beat("w", 1, 2, &[(first[0].0.as_str(), 1)]), Vec::<String>::new());
    let got = s.runtime.block_on(waiting).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    let keys = |leases: &[(String, Option<v1::GroupKey>)]| leases.iter().map(|l| l.1.clone()).collect::<Vec<_>>();
    assert_eq!(keys(&ids(&got)), keys(&first[1..]));
    assert_eq!(s.beat("w", 1, 2, &[(first[0].0.as_str(), 1), (first[1].0.as_str(), 2)]), [first[1].0.clone()]);
    // A process that was started again under the same name has nothing in hand.
    let again = ids(&s.lease("w", 2, 1, 1000));
    assert_eq!((again.len(), &again[0].1), (1, &first[0].1));
    assert_eq!(s.beat("w", 2, 1, &[(again[0].0.as_str(), 1)]), Vec::<String>::new());
}

/// A heartbeat without progress keeps nothing; one with progress keeps a lease many times longer than it lasts.
#[test]
fn heartbeats_renew_what_moves_and_nothing_else() {
    let times = |s: &mut Settings| (s.lease_s, s.stall_s) = (0.4, 1.0);
    let mut s = Served::new(2, Duration::ZERO, &[3], times);
    let got = ids(&s.lease("w", 1, 1, 1000));
    let (moving, stuck) = (got[0].0.as_str(), got[1].0.as_str());
    let (begun, mut beats) = (Instant::now(), 1);
    let other = loop {
        assert_eq!(s.beat("w", 1, 1, &[(moving, beats), (stuck, 1)]), Vec::<String>::new());
        let other = ids(&s.lease("v", 1, beats, 0));
        if !other.is_empty() {
            break other;
        }
        assert!(begun.elapsed() < SOON, "the group that stands still was not given to another worker");
        std::thread::sleep(Duration::from_millis(50));
        beats += 1;
    };
    assert!(begun.elapsed() > Duration::from_millis(900), "{:?}", begun.elapsed());
    assert_eq!((other.len(), &other[0].1), (1, &got[1].1));
    assert_eq!(s.beat("w", 1, 1, &[(moving, 1 << 40), (stuck, 1 << 40)]), [stuck], "it hears what is lost");
    // Four times the time of a lease later the other group is its yet.
    while begun.elapsed() < Duration::from_millis(2500) {
        beats += 1;
        assert_eq!(s.beat("w", 1, 1, &[(moving, (1 << 40) + beats)]), Vec::<String>::new());
        assert!(ids(&s.lease("u", 1, beats, 0)).iter().all(|l| l.1 == got[1].1));
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// One image that takes long holds nothing else up: what is ready when the call is over is leased, the rest with a later one.
#[test]
fn a_slow_image_holds_up_nothing_else() {
    if std::thread::available_parallelism().unwrap().get() == 1 {
        return; // There one is prepared after another.
    }
    let mut s = Served::new(3, Duration::ZERO, &[3, LATE, 3], |_| ());
    let begun = Instant::now();
    assert_eq!(s.lease("w", 1, 1, 0).len(), 2);
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    assert_eq!(s.lease("w", 1, 2, 20_000).len(), 1);
}

/// Records of six MiB each: a lease has those that fit into a quarter of a message, and the others are free for the next call.
#[test]
fn records_beyond_a_message_stay_in_the_queue() {
    let mut s = Served::with_notes(8, 6 << 20, Duration::ZERO, &[3], |_| ());
    let mut all = Vec::new();
    for call in 1..=4 {
        let groups = s.lease("w", 1, call, 20_000);
        let texts: usize = groups.iter().map(|g| g.record_json.len()).sum();
        assert!(groups.len() == 2 && texts <= 16 << 20, "{} groups, {texts} bytes", groups.len());
        all.extend(groups.into_iter().map(|g| g.group.unwrap().record));
        assert_eq!(s.host.stats().leased, all.len(), "what did not fit is not in its hands");
    }
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 8, "each of them once: {all:?}");
}

#[test]
fn images_beyond_a_message_are_fetched_one_by_one() {
    // A full-resolution film each, more than a message in all; and one that is more than a message by itself.
    let mut sizes = vec![6_800_000; 22];
    sizes.push((64 << 20) + 5);
    let mut s = Served::new(sizes.len(), Duration::ZERO, &sizes, |_| ());
    let groups = s.lease("w", 1, 1, 20_000);
    assert_eq!(groups.len(), sizes.len(), "in one call");
    let sent: usize = groups.iter().map(|g| g.image.len()).sum();
    assert!((20 << 20..=32 << 20).contains(&sent), "{sent} bytes of images in one message");
    let mut client = s.client.clone();
    let mut fetch = |worker: &str, lease: &str| {
        let ask = v1::ImageRequest { worker: worker.into(), lease: lease.into() };
        s.runtime.block_on(async {
            let mut stream = client.image(ask).await?.into_inner();
            let mut all = Vec::new();
            while let Some(part) = stream.message().await? {
                assert!(part.data.len() <= 1 << 20);
                all.extend_from_slice(&part.data);
            }
            Ok::<_, tonic::Status>(all)
        })
    };
    let mut fetched = 0;
    for g in &groups {
        let index: usize = g.group.as_ref().unwrap().record[1..].parse().unwrap();
        let expected = image(sizes[index], index);
        if g.image_bytes == 0 {
            assert!(g.image == expected);
            continue;
        }
        assert!(g.image.is_empty() && g.image_bytes == sizes[index] as u64);
        assert!(fetch("w", &g.lease).unwrap() == expected);
        fetched += 1;
    }
    assert_eq!(fetched, 19);
    let e = fetch("thief", &groups[0].lease).unwrap_err();
    assert!(e.code() == tonic::Code::NotFound && e.message().contains("thief"), "{e}");
}
