//! Fixture of an experience server that publishes computed weights, and workers that receive them by broadcast.

use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};
use tokio::runtime::{Builder, Runtime};
use unveil_core::{GroupId, Sampling, TrainGroup};
use unveil_experience::{Experience, Settings};
use unveil_experience_rpc::checksum::{BUCKET_BYTES, Checksum};
use unveil_experience_rpc::{
    BroadcastMember, BroadcastOptions, BroadcastReport, ExperienceServer, ExperienceServerOptions, GroupSource,
    NewWeights, PreparedGroup, RecordFailure, WeightReceiver,
};

/// Timeout of a broadcast.
pub const LIMIT: Duration = Duration::from_secs(4);
/// Timeout of everything else.
pub const SOON: Duration = Duration::from_secs(60);
/// Number of bf16 elements: more than two buckets, the last one not a multiple of a word.
const TOP: i64 = BUCKET_BYTES as i64 + 1;
/// Bytes of the tensors that change between versions.
pub const DIFFERENCE: u64 = (TOP as u64 + 15) * 2;

/// A source without groups.
pub struct NoLeases;

impl GroupSource for NoLeases {
    fn prepare(&self, _: usize, _: &GroupId) -> Result<PreparedGroup, RecordFailure> {
        Err("nothing is leased here".into())
    }
}

/// Computes the weights of a version: one constant tensor and two that change, not sorted by name.
fn named(version: u64) -> Vec<(String, Tensor)> {
    let wave = |count: i64| (Tensor::arange(count, (Kind::Float, Device::Cpu)) * (version as f64 + 0.37)).sin();
    vec![
        ("top".into(), wave(TOP)),
        ("base".into(), Tensor::arange(1001, (Kind::Float, Device::Cpu))),
        ("middle".into(), wave(3 * 5).view([5, 3]).transpose(0, 1)),
    ]
}

/// Returns the bytes of a tensor.
pub fn bits(t: &Tensor) -> Vec<u8> {
    let t = t.detach().to_device(Device::Cpu).contiguous();
    let mut out = vec![0; t.numel() * t.kind().elt_size_in_bytes()];
    t.copy_data_u8(&mut out, t.numel());
    out
}

/// Returns name and bytes of the tensors of a version, by name.
pub fn all(version: u64) -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<_> = named(version).into_iter().map(|(n, t)| (n, bits(&t.to_kind(Kind::BFloat16)))).collect();
    all.sort();
    all
}

/// Returns the checksum of a version.
pub fn checksum(version: u64) -> u32 {
    Checksum::of(&all(version).into_iter().flat_map(|(_, b)| b).collect::<Vec<u8>>()).crc32c
}

/// An experience server that publishes computed weights.
pub struct WeightPublisher {
    pub runtime: Runtime,
    pub server: ExperienceServer,
    device: Device,
}

impl WeightPublisher {
    pub fn new(device: Device) -> Self {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let settings = Settings {
            groups_per_step: 1,
            max_staleness: 0,
            lease_s: 9.0,
            stall_s: 300.0,
            silence_s: 9.0,
            seed: 0,
            term: 1,
            total_groups: None,
        };
        let machine: Experience<TrainGroup> = Experience::new(settings, vec!["a".into()]).unwrap();
        let options = ExperienceServerOptions {
            listen: "127.0.0.1:0".into(),
            sampling: Sampling { n: 2, ..Default::default() },
            stop: vec![],
            vocab: 50,
            fixed_lease_size: None,
            broadcast: Some(BroadcastOptions { device, timeout: LIMIT }),
        };
        let server = ExperienceServer::start(runtime.handle(), options, machine, Arc::new(NoLeases)).unwrap();
        Self { runtime, server, device }
    }

    /// Publishes the computed weights of a version.
    pub fn publish(&self, version: u64) {
        let named: Vec<_> = named(version).into_iter().map(|(n, t)| (n, t.to_device(self.device))).collect();
        self.publish_these(version, &named, Kind::BFloat16, &|name| name != "base");
    }

    pub fn publish_these(
        &self,
        version: u64,
        named: &[(String, Tensor)],
        kind: Kind,
        may_change: &dyn Fn(&str) -> bool,
    ) {
        self.server.publish(&NewWeights { version, named, kind, adapters: None, may_change }).unwrap();
    }

    /// Waits for the next completed broadcast; returns (version, round, workers, bytes).
    pub fn sent(&self) -> (u64, u64, usize, u64) {
        let end = Instant::now() + SOON;
        while Instant::now() < end {
            if let Some(BroadcastReport { version, round, workers, bytes, .. }) = self.server.drain_broadcasts().pop() {
                return (version, round, workers, bytes);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("no broadcast within {SOON:?}");
    }

    pub fn address(&self) -> String {
        self.server.address().to_string()
    }

    pub fn subscribe(&self, name: &str) -> TestSubscriber {
        TestSubscriber::start(self.address(), name.to_owned(), self.device)
    }
}

/// Weights received by a worker.
#[derive(Clone, PartialEq)]
pub struct ReceivedWeights {
    pub version: u64,
    pub whole: bool,
    pub checksum: u32,
    pub tensors: Vec<(String, Vec<u8>)>,
    pub devices: Vec<Device>,
}

/// A weight receiver on its own thread that loads each version as it arrives.
pub struct TestSubscriber {
    received: Arc<Mutex<Vec<ReceivedWeights>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl TestSubscriber {
    pub fn start(address: String, name: String, device: Device) -> Self {
        let received = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let out = received.clone();
        let end = stop.clone();
        let work = async move {
            let member = BroadcastMember::start(device, LIMIT, None).unwrap();
            let receiver = WeightReceiver::connect(&address, &name, SOON).await.unwrap();
            let mut receiver = receiver.with_broadcast(Some(member));
            while !end.load(Ordering::Relaxed) {
                let Some(update) = receiver.fetch(Duration::from_millis(200)).await.unwrap() else { continue };
                let mut tensors: Vec<_> = update.tensors.iter().map(|(n, t)| (n.clone(), bits(t))).collect();
                tensors.sort();
                let devices = update.tensors.iter().map(|(_, t)| t.device()).collect();
                let version = update.version;
                let whole = update.whole;
                let checksum = update.checksum;
                receiver.adopt(update);
                out.lock().unwrap().push(ReceivedWeights { version, whole, checksum, tensors, devices });
            }
        };
        let thread = std::thread::spawn(|| Builder::new_current_thread().enable_all().build().unwrap().block_on(work));
        Self { received, stop, thread: Some(thread) }
    }

    /// Waits for a version, and a moment longer until the server knows that the worker holds it; returns what was
    /// received.
    #[track_caller]
    pub fn wait_for(&self, version: u64) -> ReceivedWeights {
        let end = Instant::now() + SOON;
        loop {
            let last = self.received.lock().unwrap().last().cloned();
            if let Some(last) = last.filter(|g| g.version == version) {
                std::thread::sleep(Duration::from_millis(300));
                return last;
            }
            assert!(Instant::now() < end, "version {version} did not arrive");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for a computed version and checks that it arrived as a difference with the right bytes; returns the
    /// devices of its tensors.
    #[track_caller]
    pub fn wait_for_difference(&self, version: u64) -> Vec<Device> {
        let received = self.wait_for(version);
        assert_eq!((received.whole, received.checksum), (false, checksum(version)));
        let changing: Vec<_> = all(version).into_iter().filter(|(n, _)| n != "base").collect();
        assert!(received.tensors == changing, "bits of version {version}");
        received.devices
    }
}

impl Drop for TestSubscriber {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(std::thread::panicking() || matches!(ended, Some(Ok(()))));
    }
}

/// An ignored test in its own process, which is killed on drop.
pub struct TestProcess(pub Child);

impl TestProcess {
    /// Starts the test of this name, including its module, with environment variables.
    pub fn start(test: &str, environment: &[(&str, String)]) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([test, "--exact", "--ignored", "--nocapture"]).envs(environment.iter().map(|(k, v)| (k, v)));
        command.env("OMP_NUM_THREADS", "1");
        Self(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap())
    }
}

impl Drop for TestProcess {
    fn drop(&mut self) {
        let _killed = self.0.kill();
        let _ended = self.0.wait();
    }
}
