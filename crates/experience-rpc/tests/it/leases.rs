//! Leases over real gRPC: prepared before they are taken, repeated when a call is retried, renewed while their worker
//! makes progress, and never larger than a message.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tch::{Device, Kind, Tensor};
use tokio::runtime::Runtime;
use tonic::transport::Channel;
use unveil_core::{GroupId, TrainGroup};
use unveil_experience::{Experience, Settings};
use unveil_experience_rpc::{ExperienceServer, GroupSource, NewWeights, PreparedGroup, RecordFailure};
use unveil_proto::v1;
use unveil_proto::v1::experience_client::ExperienceClient;
use unveil_service::limited;
use unveil_testkit_model::{experience_settings, server_options, text_input};

const SOON: Duration = Duration::from_secs(20);

/// Source of images with the sizes `bytes` in turn, each prepared in `takes`, whose records have a note of `note`
/// bytes.
struct Source {
    takes: Duration,
    note: usize,
    bytes: Vec<usize>,
    prepared: Arc<AtomicUsize>,
    running: AtomicUsize,
    max_running: Arc<AtomicUsize>,
}

/// Size of an image that takes long to prepare.
const SLOW_IMAGE_BYTES: usize = 77_777;

fn image(bytes: usize, index: usize) -> Bytes {
    (0..bytes).map(|at| (at * (index + 3) % 251) as u8).collect::<Vec<u8>>().into()
}

impl GroupSource for Source {
    fn prepare(&self, index: usize, group: &GroupId) -> Result<PreparedGroup, RecordFailure> {
        let now = self.running.fetch_add(1, Ordering::SeqCst) + 1;
        self.max_running.fetch_max(now, Ordering::SeqCst);
        let is_slow = self.bytes[index % self.bytes.len()] == SLOW_IMAGE_BYTES;
        std::thread::sleep(if is_slow { Duration::from_secs(8) } else { self.takes });
        self.running.fetch_sub(1, Ordering::SeqCst);
        self.prepared.fetch_add(1, Ordering::SeqCst);
        let mut input = text_input(&group.record, index);
        if self.note > 0 {
            input.record.extra.insert("note".into(), "x".repeat(self.note).into());
        }
        let image = image(self.bytes[index % self.bytes.len()], index);
        Ok(PreparedGroup { input: Arc::new(input), image, image_hash: "h".into() })
    }
}

struct TestServer {
    runtime: Runtime,
    server: ExperienceServer,
    client: ExperienceClient<Channel>,
    prepared: Arc<AtomicUsize>,
    max_running: Arc<AtomicUsize>,
}

impl TestServer {
    /// Starts a server with one batch of `records` groups, whose images have the sizes `bytes` in turn.
    fn new(records: usize, takes: Duration, bytes: &[usize], change: impl FnOnce(&mut Settings)) -> Self {
        Self::with_notes(records, 0, takes, bytes, change)
    }

    /// Starts a server whose records also have a note of `note` bytes.
    fn with_notes(
        records: usize,
        note: usize,
        takes: Duration,
        bytes: &[usize],
        change: impl FnOnce(&mut Settings),
    ) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let mut settings = Settings { stall_s: 600.0, ..experience_settings(records, 600.0) };
        change(&mut settings);
        let ids = (0..records).map(|i| format!("r{i}")).collect();
        let machine: Experience<TrainGroup> = Experience::new(settings, ids).unwrap();
        let prepared = Arc::<AtomicUsize>::default();
        let max_running = Arc::<AtomicUsize>::default();
        let bytes = bytes.to_vec();
        let running = AtomicUsize::new(0);
        let source =
            Source { takes, note, bytes, prepared: prepared.clone(), running, max_running: max_running.clone() };
        let server = ExperienceServer::start(runtime.handle(), server_options(), machine, Arc::new(source)).unwrap();
        let named = vec![("w".to_owned(), Tensor::ones([5], (Kind::Float, Device::Cpu)))];
        let weights =
            NewWeights { version: 0, named: &named, kind: Kind::Float, adapters: None, may_change: &|_| true };
        server.publish(&weights).unwrap();
        let address = server.address().to_string();
        let channel = runtime.block_on(unveil_service::connect(&address, Duration::from_secs(5))).unwrap();
        Self { client: limited!(ExperienceClient::new(channel)), server, runtime, prepared, max_running }
    }

    fn lease(&mut self, worker: &str, session: u64, call: u64, wait_ms: u32) -> Vec<v1::LeasedGroup> {
        let ask = ask(worker, session, call, wait_ms);
        self.runtime.block_on(self.client.lease(ask)).unwrap().into_inner().groups
    }

    /// Makes a call and abandons it.
    fn lease_and_leave(&mut self, worker: &str, call: u64, after: Duration) {
        let mut client = self.client.clone();
        let ask = ask(worker, 1, call, 20_000);
        let left = self.runtime.block_on(async move { tokio::time::timeout(after, client.lease(ask)).await });
        assert!(left.is_err(), "the call was to be given up: {left:?}");
    }

    fn heartbeat(&mut self, worker: &str, session: u64, done: u64, in_hand: &[(&str, u64)]) -> Vec<String> {
        let to_wire = |(lease, progress): &(&str, u64)| v1::InHand { lease: (*lease).to_owned(), progress: *progress };
        let in_hand = in_hand.iter().map(to_wire).collect();
        let heartbeat = v1::HeartbeatRequest { worker: worker.into(), session, done, in_hand };
        self.runtime.block_on(self.client.heartbeat(heartbeat)).unwrap().into_inner().lost
    }
}

fn ask(worker: &str, session: u64, call: u64, wait_ms: u32) -> v1::LeaseRequest {
    v1::LeaseRequest { worker: worker.into(), max_groups: 64, wait_ms, session, call, weights: None }
}

fn ids(groups: &[v1::LeasedGroup]) -> Vec<(String, Option<v1::GroupKey>)> {
    groups.iter().map(|g| (g.lease.clone(), g.group.clone())).collect()
}

/// Preparation takes longer than any call lasts: abandoned calls take no leases, and prepared groups are kept.
#[test]
fn slowly_prepared_groups_are_leased_eventually() {
    let cores = std::thread::available_parallelism().unwrap().get();
    let mut s = TestServer::new(4 * cores, Duration::from_millis(400), &[3], |_| ());
    for call in 1..=4 {
        s.lease_and_leave("w", call, Duration::from_millis(300));
        assert_eq!(s.server.stats().leased, 0, "an abandoned call has no leases");
    }
    let groups = s.lease("w", 1, 5, 10_000);
    assert_eq!((groups.len(), s.prepared.load(Ordering::SeqCst)), (4 * cores, 4 * cores), "each is prepared once");
    assert_eq!(s.max_running.load(Ordering::SeqCst), cores, "concurrently");
}

/// Preparation takes longer than the call waits: the call returns without the group, which is leased later.
#[test]
fn a_call_returns_before_a_slow_preparation_ends() {
    let mut s = TestServer::new(1, Duration::from_secs(7), &[3], |_| ());
    let start = Instant::now();
    assert!(s.lease("w", 1, 1, 0).is_empty());
    assert!(start.elapsed() < Duration::from_secs(7), "{:?}", start.elapsed());
    assert_eq!(s.lease("w", 1, 2, 10_000).len(), 1);
    assert_eq!(s.prepared.load(Ordering::SeqCst), 1);
}

#[test]
fn retried_calls_get_the_same_leases() {
    let mut s = TestServer::new(3, Duration::ZERO, &[3], |_| ());
    let first = ids(&s.lease("w", 1, 1, 1000));
    assert_eq!(first.len(), 3);
    assert_eq!(ids(&s.lease("w", 1, 1, 1000)), first, "the response was lost and the call is retried");
    assert!(s.lease("w", 1, 2, 50).is_empty(), "another call gets the remaining groups");
    // The worker knows of only one lease; another worker waits for the others.
    let mut client = s.client.clone();
    let waits = ask("v", 1, 1, 20_000);
    let waiting = s.runtime.spawn(async move { client.lease(waits).await.unwrap().into_inner().groups });
    assert_eq!(s.heartbeat("w", 1, 0, &[(first[0].0.as_str(), 1)]), Vec::<String>::new());
    assert_eq!(s.server.stats().leased, 3, "the call may still be retried");
    let start = Instant::now();
    assert_eq!(s.heartbeat("w", 1, 2, &[(first[0].0.as_str(), 1)]), Vec::<String>::new());
    let leased = s.runtime.block_on(waiting).unwrap();
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    let keys = |leases: &[(String, Option<v1::GroupKey>)]| leases.iter().map(|l| l.1.clone()).collect::<Vec<_>>();
    assert_eq!(keys(&ids(&leased)), keys(&first[1..]));
    assert_eq!(s.heartbeat("w", 1, 2, &[(first[0].0.as_str(), 1), (first[1].0.as_str(), 2)]), [first[1].0.clone()]);
    // A restarted process of the same name has no leases.
    let again = ids(&s.lease("w", 2, 1, 1000));
    assert_eq!((again.len(), &again[0].1), (1, &first[0].1));
    assert_eq!(s.heartbeat("w", 2, 1, &[(again[0].0.as_str(), 1)]), Vec::<String>::new());
}

/// Heartbeats without progress do not renew a lease; heartbeats with progress renew it indefinitely.
#[test]
fn heartbeats_renew_only_leases_with_progress() {
    let times = |s: &mut Settings| {
        s.lease_s = 0.4;
        s.stall_s = 1.0;
    };
    let mut s = TestServer::new(2, Duration::ZERO, &[3], times);
    let leased = ids(&s.lease("w", 1, 1, 1000));
    let moving = leased[0].0.as_str();
    let stuck = leased[1].0.as_str();
    let start = Instant::now();
    let mut beats = 1;
    let other = loop {
        assert_eq!(s.heartbeat("w", 1, 1, &[(moving, beats), (stuck, 1)]), Vec::<String>::new());
        let other = ids(&s.lease("v", 1, beats, 0));
        if !other.is_empty() {
            break other;
        }
        assert!(start.elapsed() < SOON, "the stalled group was not leased to another worker");
        std::thread::sleep(Duration::from_millis(50));
        beats += 1;
    };
    assert!(start.elapsed() > Duration::from_millis(900), "{:?}", start.elapsed());
    assert_eq!((other.len(), &other[0].1), (1, &leased[1].1));
    assert_eq!(
        s.heartbeat("w", 1, 1, &[(moving, 1 << 40), (stuck, 1 << 40)]),
        [stuck],
        "the worker is told which leases are lost"
    );
    // The worker keeps the other group for several times the duration of a lease.
    while start.elapsed() < Duration::from_millis(2500) {
        beats += 1;
        assert_eq!(s.heartbeat("w", 1, 1, &[(moving, (1 << 40) + beats)]), Vec::<String>::new());
        assert!(ids(&s.lease("u", 1, beats, 0)).iter().all(|l| l.1 == leased[1].1));
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Groups that are prepared when the call ends are leased, the others with a later call.
#[test]
fn a_slow_image_does_not_delay_other_groups() {
    if std::thread::available_parallelism().unwrap().get() == 1 {
        return; // Groups are prepared sequentially.
    }
    let mut s = TestServer::new(3, Duration::ZERO, &[3, SLOW_IMAGE_BYTES, 3], |_| ());
    let start = Instant::now();
    assert_eq!(s.lease("w", 1, 1, 0).len(), 2);
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    assert_eq!(s.lease("w", 1, 2, 20_000).len(), 1);
}

/// Records of six MiB each: a call leases those that fit into a quarter of a message and leaves the others to the next
/// call.
#[test]
fn records_over_the_message_limit_stay_queued() {
    let mut s = TestServer::with_notes(8, 6 << 20, Duration::ZERO, &[3], |_| ());
    let mut all = Vec::new();
    for call in 1..=4 {
        let groups = s.lease("w", 1, call, 20_000);
        let texts: usize = groups.iter().map(|g| g.record_json.len()).sum();
        assert!(groups.len() == 2 && texts <= 16 << 20, "{} groups, {texts} bytes", groups.len());
        all.extend(groups.into_iter().map(|g| g.group.unwrap().record));
        assert_eq!(s.server.stats().leased, all.len(), "groups that did not fit are not leased");
    }
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 8, "each of them once: {all:?}");
}

#[test]
fn images_over_the_message_limit_are_fetched_separately() {
    // Full-resolution radiographs that exceed the message limit in total, and one that exceeds it by itself.
    let mut sizes = vec![6_800_000; 22];
    sizes.push((64 << 20) + 5);
    let mut s = TestServer::new(sizes.len(), Duration::ZERO, &sizes, |_| ());
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
