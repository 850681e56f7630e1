//! A host that publishes weights made by a formula, and workers that follow it by broadcast.
#![allow(dead_code)]

use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};
use tokio::runtime::{Builder, Runtime};
use unveil_core::{GroupId, Sampling};
use unveil_experience::{Experience, Settings};
use unveil_learner::{
    Broadcasting, Host, HostOptions, LearnerError, LeaseSource, Leased, NewWeights, Sent, TrainGroup,
};
use unveil_proto::weights::{BUCKET, Sum};
use unveil_rollout::sync::{Member, WeightReceiver};

/// Of a broadcast.
pub const LIMIT: Duration = Duration::from_secs(4);
pub const SOON: Duration = Duration::from_secs(60);
/// Elements in bf16: more than two buckets, the last one not of whole words.
const TOP: i64 = BUCKET as i64 + 1;
/// Bytes of the tensors that change.
pub const DIFFERENCE: u64 = (TOP as u64 + 15) * 2;

pub struct Nothing;

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

pub fn bits(t: &Tensor) -> Vec<u8> {
    let t = t.detach().to_device(Device::Cpu).contiguous();
    let mut out = vec![0; t.numel() * t.kind().elt_size_in_bytes()];
    t.copy_data_u8(&mut out, t.numel());
    out
}

/// Name and bits of a version's tensors, by name.
pub fn all(version: u64) -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<_> = named(version).into_iter().map(|(n, t)| (n, bits(&t.to_kind(Kind::BFloat16)))).collect();
    all.sort();
    all
}

pub fn checksum(version: u64) -> u32 {
    Sum::of(&all(version).into_iter().flat_map(|(_, b)| b).collect::<Vec<u8>>()).crc32c
}

pub struct Served {
    pub runtime: Runtime,
    pub host: Host,
    device: Device,
}

impl Served {
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
        let options = HostOptions {
            listen: "127.0.0.1:0".into(),
            sampling: Sampling { n: 2, ..Default::default() },
            stop: vec![],
            vocab: 50,
            fixed: None,
            broadcast: Some(Broadcasting { device, limit: LIMIT }),
        };
        let host = Host::start(runtime.handle(), options, machine, Arc::new(Nothing)).unwrap();
        Self { runtime, host, device }
    }

    /// Publishes the version of the formula.
    pub fn publish(&self, version: u64) {
        let named: Vec<_> = named(version).into_iter().map(|(n, t)| (n, t.to_device(self.device))).collect();
        self.publish_these(version, &named, Kind::BFloat16, &|name| name != "base");
    }

    pub fn publish_these(&self, version: u64, named: &[(String, Tensor)], kind: Kind, changes: &dyn Fn(&str) -> bool) {
        self.host.publish(&NewWeights { version, named, kind, adapters: None, changes }).unwrap();
    }

    /// The next broadcast that ended well, as (version, round, workers, bytes).
    pub fn sent(&self) -> (u64, u64, usize, u64) {
        let end = Instant::now() + SOON;
        while Instant::now() < end {
            if let Some(Sent { version, round, workers, bytes, .. }) = self.host.drain_broadcasts().pop() {
                return (version, round, workers, bytes);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("no broadcast within {SOON:?}");
    }

    pub fn address(&self) -> String {
        self.host.address().to_string()
    }

    pub fn follow(&self, name: &str) -> Follower {
        Follower::start(self.address(), name.to_owned(), self.device)
    }
}

/// What a worker got.
#[derive(Clone, PartialEq)]
pub struct Got {
    pub version: u64,
    pub whole: bool,
    pub checksum: u32,
    pub tensors: Vec<(String, Vec<u8>)>,
    pub devices: Vec<Device>,
}

/// A worker's receiver on a thread of its own, which takes each version as it comes.
pub struct Follower {
    got: Arc<Mutex<Vec<Got>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Follower {
    pub fn start(address: String, name: String, device: Device) -> Self {
        let (got, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (out, end) = (got.clone(), stop.clone());
        let work = async move {
            let member = Member::start(device, LIMIT, None).unwrap();
            let receiver = WeightReceiver::connect(&address, &name, SOON).await.unwrap();
            let mut receiver = receiver.with_broadcast(Some(member));
            while !end.load(Ordering::Relaxed) {
                let Some(update) = receiver.fetch(Duration::from_millis(200)).await.unwrap() else { continue };
                let mut tensors: Vec<_> = update.tensors.iter().map(|(n, t)| (n.clone(), bits(t))).collect();
                tensors.sort();
                let devices = update.tensors.iter().map(|(_, t)| t.device()).collect();
                let (version, whole, checksum) = (update.version, update.whole, update.checksum);
                receiver.taken(update);
                out.lock().unwrap().push(Got { version, whole, checksum, tensors, devices });
            }
        };
        let thread = std::thread::spawn(|| Builder::new_current_thread().enable_all().build().unwrap().block_on(work));
        Self { got, stop, thread: Some(thread) }
    }

    /// Waits until a version has come, and a moment more, in which the host hears of it; gives what came.
    #[track_caller]
    pub fn has(&self, version: u64) -> Got {
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

    /// Version `version` of the formula came as a difference, with the right bits; gives where they are.
    #[track_caller]
    pub fn has_right(&self, version: u64) -> Vec<Device> {
        let got = self.has(version);
        assert_eq!((got.whole, got.checksum), (false, checksum(version)));
        let changing: Vec<_> = all(version).into_iter().filter(|(n, _)| n != "base").collect();
        assert!(got.tensors == changing, "bits of version {version}");
        got.devices
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(std::thread::panicking() || matches!(ended, Some(Ok(()))));
    }
}

/// An ignored test of this file in a process of its own, which is killed when it is not needed any more.
pub struct Process(pub Child);

impl Process {
    /// `told` are variables of its environment.
    pub fn start(test: &str, told: &[(&str, String)]) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([test, "--exact", "--ignored", "--nocapture"]).envs(told.iter().map(|(k, v)| (k, v)));
        command.env("OMP_NUM_THREADS", "1");
        Self(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let (_killed, _ended) = (self.0.kill(), self.0.wait());
    }
}
