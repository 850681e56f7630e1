//! A worker that receives weights, without an engine.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tch::Device;
use tokio::runtime::Builder;
use unveil_experience_rpc::{BroadcastMember, WeightReceiver};

use crate::{BROADCAST_TIMEOUT, PATIENCE, bits, version_checksum, version_weights};

/// Weights received by a worker.
#[derive(Debug, Clone, PartialEq)]
pub struct ReceivedWeights {
    /// Version.
    pub version: u64,
    /// Whether all tensors were received, not only those that had changed.
    pub whole: bool,
    /// Checksum of all tensors of the version.
    pub checksum: u32,
    /// Name and bytes of the received tensors, by name.
    pub tensors: Vec<(String, Vec<u8>)>,
    /// Devices of the received tensors.
    pub devices: Vec<Device>,
}

/// A weight receiver on its own thread that loads each version as it arrives.
#[derive(Debug)]
pub struct WeightSubscriber {
    received: Arc<Mutex<Vec<ReceivedWeights>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl WeightSubscriber {
    /// Starts a worker of this name whose tensors lie on `device`.
    pub fn start(address: String, name: String, device: Device) -> Self {
        let received = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let out = received.clone();
        let end = stop.clone();
        let work = async move {
            let member = BroadcastMember::start(device, BROADCAST_TIMEOUT, None).expect("a member of broadcasts");
            let receiver = WeightReceiver::connect(&address, &name, PATIENCE).await.expect("a connection");
            let mut receiver = receiver.with_broadcast(Some(member));
            while !end.load(Ordering::Relaxed) {
                let update = receiver.fetch(Duration::from_millis(200)).await.expect("weights, or none that are newer");
                let Some(update) = update else { continue };
                let mut tensors: Vec<_> = update.tensors.iter().map(|(n, t)| (n.clone(), bits(t))).collect();
                tensors.sort();
                let devices = update.tensors.iter().map(|(_, t)| t.device()).collect();
                let version = update.version;
                let whole = update.whole;
                let checksum = update.checksum;
                receiver.adopt(update);
                let weights = ReceivedWeights { version, whole, checksum, tensors, devices };
                out.lock().expect("no test thread panicked").push(weights);
            }
        };
        let runtime = || Builder::new_current_thread().enable_all().build().expect("a runtime");
        let thread = std::thread::spawn(move || runtime().block_on(work));
        Self { received, stop, thread: Some(thread) }
    }

    /// Waits for a version, and a moment longer until the server knows that the worker holds it; returns what was
    /// received.
    #[track_caller]
    pub fn wait_for(&self, version: u64) -> ReceivedWeights {
        let end = Instant::now() + PATIENCE;
        loop {
            let last = self.received.lock().expect("the worker did not panic").last().cloned();
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
        assert_eq!((received.whole, received.checksum), (false, version_checksum(version)));
        let changing: Vec<_> = version_weights(version).into_iter().filter(|(n, _)| n != "base").collect();
        assert!(received.tensors == changing, "bits of version {version}");
        received.devices
    }
}

impl Drop for WeightSubscriber {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(std::thread::panicking() || matches!(ended, Some(Ok(()))));
    }
}
