//! The thread that broadcasts weights to the workers of a broadcast group. A failed broadcast costs only time: its
//! workers fetch the version as a stream.

use std::net::SocketAddr;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use tch::Device;
use unveil_collective::{Backend, Collective, Group, Setup, Timeouts, World, open_reporting_address};
use unveil_core::Secret;

use super::Shared;
use super::broadcast_groups::BroadcastJob;
use super::buckets::BucketSource;
use super::error::{Result, ServerError};
use super::weights::NewWeights;

/// Options for broadcasting weights.
#[derive(Debug, Clone, Copy)]
pub struct BroadcastOptions {
    /// Device of the learner: NCCL between GPUs, Gloo on CPUs.
    pub device: Device,
    /// Timeout of the rendezvous and of each collective call; at least one second.
    pub timeout: Duration,
}

/// Handle of the sending thread, which leaves its group and ends when the handle is closed.
#[derive(Debug)]
pub(super) struct Broadcaster {
    device: Device,
    jobs: mpsc::Sender<BroadcastJob>,
    ended: mpsc::Receiver<()>,
    thread: JoinHandle<()>,
}

impl Broadcaster {
    /// Starts the thread; workers must prove knowledge of `token` to join, if there is one.
    ///
    /// # Errors
    /// Returns [`ServerError::Thread`] if the thread cannot be spawned.
    pub(super) fn start(shared: Arc<Shared>, options: BroadcastOptions, token: Option<Secret>) -> Result<Self> {
        let (jobs, inbox) = mpsc::channel();
        let (running, ended) = mpsc::channel();
        let work = move || {
            Sender { shared, options, token, world: None }.serve(&inbox);
            drop(running);
        };
        let thread = std::thread::Builder::new().name("unveil-broadcast".into()).spawn(work);
        let thread = thread.map_err(ServerError::Thread)?;
        Ok(Self { device: options.device, jobs, ended, thread })
    }

    /// Sends a job to the thread; returns it if the thread has died. Tensors of `new`, if they can be read, on a GPU are copied there
    /// first, so that they need not be loaded from host memory; they may change once this returns.
    pub(super) fn send(&self, mut job: BroadcastJob, new: Option<&NewWeights<'_>>) -> Result<(), Box<BroadcastJob>> {
        if let Some(new) = new.filter(|_| self.device.is_cuda()) {
            match job.source.copy_to_device(new, self.device) {
                Ok(source) => job.source = source,
                Err(e) => tracing::warn!(version = job.version, "broadcasting weights from host memory: {e}"),
            }
        }
        self.jobs.send(job).map_err(|mpsc::SendError(job)| Box::new(job))
    }

    /// Ends the thread and waits up to `timeout` for it.
    pub(super) fn close(self, timeout: Duration) {
        drop(self.jobs);
        match self.ended.recv_timeout(timeout) {
            Err(mpsc::RecvTimeoutError::Timeout) => tracing::warn!("a broadcast of weights is still in progress"),
            _ => drop(self.thread.join()),
        }
    }
}

/// State of the sending thread.
struct Sender {
    shared: Arc<Shared>,
    options: BroadcastOptions,
    token: Option<Secret>,
    world: Option<World>,
}

impl Sender {
    fn serve(mut self, inbox: &mpsc::Receiver<BroadcastJob>) {
        while let Ok(job) = inbox.recv() {
            let result = self.send(&job);
            if let Some(world) = self.world.take_if(|_| result.is_err()) {
                world.leave();
            }
            if let Some(groups) = &mut self.shared.lock().broadcast_groups {
                groups.finished(&job, &result);
            }
            self.shared.work.notify_waiters();
        }
    }

    /// Broadcasts a version, in a new group if the job requires one.
    fn send(&mut self, job: &BroadcastJob) -> Result<()> {
        if let Some(ip) = job.rendezvous_ip {
            if let Some(old) = self.world.take() {
                old.leave();
            }
            let setup = Setup {
                rank: 0,
                world: job.workers + 1,
                address: SocketAddr::new(ip, 0).to_string(),
                local_address: None,
                backend: Backend::for_device(self.options.device),
                fingerprint: job.fingerprint.clone(),
                token: self.token.clone(),
                timeouts: Timeouts::within(self.options.timeout),
            };
            let world = open_reporting_address(&setup, |address| {
                if let Some(groups) = &mut self.shared.lock().broadcast_groups {
                    groups.rendezvous_ready(address);
                }
                self.shared.work.notify_waiters();
            })?;
            self.world = Some(world);
        }
        let world = self.world.as_ref().ok_or(ServerError::ThreadEnded("the broadcast group"))?;
        broadcast(world.group(), self.options.device, &job.source)
    }
}

/// Broadcasts the bytes of tensors from rank 0 and waits until all ranks have them.
fn broadcast(group: &Group, device: Device, source: &BucketSource) -> Result<()> {
    source.for_each_bucket(device, |bucket| {
        let _same_tensor = group.broadcast(bucket, 0)?;
        Ok(())
    })?;
    Ok(group.barrier()?)
}
