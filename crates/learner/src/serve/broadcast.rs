//! The thread that broadcasts weights to all workers of a round, through the collective room. A round that fails costs nothing but
//! time: its workers fetch the version as a stream. Must not know: which workers, losses.

use std::net::SocketAddr;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use tch::Device;
use unveil_collective::{Backend, Collective, Group, Setup, Timing, World, open_with};
use unveil_core::Secret;

use super::Shared;
use super::buckets::Source;
use super::rounds::Job;
use super::weights::NewWeights;
use crate::error::{LearnerError, Result};

/// How the host broadcasts weights.
#[derive(Debug, Clone, Copy)]
pub struct Broadcasting {
    /// The learner's device: NCCL carries the calls where it is a GPU, and tensors go from device to device; Gloo on the CPU.
    pub device: Device,
    /// The longest that workers may take to come, and that each call may take; at least one second.
    pub limit: Duration,
}

/// The thread that sends. It ends, and leaves its world, when this is closed.
pub(super) struct Broadcaster {
    device: Device,
    jobs: mpsc::Sender<Job>,
    ended: mpsc::Receiver<()>,
    thread: JoinHandle<()>,
}

impl Broadcaster {
    /// Starts the thread; workers prove that they know `token` before they join, where there is one.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn start(shared: Arc<Shared>, how: Broadcasting, token: Option<Secret>) -> Result<Self> {
        let (jobs, inbox) = mpsc::channel();
        let (running, ended) = mpsc::channel();
        let work = move || {
            Sender { shared, how, token, world: None }.serve(&inbox);
            drop(running);
        };
        let thread = std::thread::Builder::new().name("unveil-broadcast".into()).spawn(work);
        let thread = thread.map_err(LearnerError::io("a thread for broadcasts"))?;
        Ok(Self { device: how.device, jobs, ended, thread })
    }

    /// Hands a job over, or back where the thread has died. Tensors of `new` that are on a GPU are copied there first, so that
    /// they need not come from host memory; they may change once this returns.
    pub fn send(&self, mut job: Job, new: &NewWeights<'_>) -> Result<(), Box<Job>> {
        if self.device.is_cuda() {
            match job.source.copied(new, self.device) {
                Ok(source) => job.source = source,
                Err(e) => tracing::warn!("version {} is broadcast from host memory: {e}", job.version),
            }
        }
        self.jobs.send(job).map_err(|mpsc::SendError(job)| Box::new(job))
    }

    /// Ends the thread, and waits for it up to `most`.
    pub fn close(self, most: Duration) {
        drop(self.jobs);
        match self.ended.recv_timeout(most) {
            Err(mpsc::RecvTimeoutError::Timeout) => tracing::warn!("a broadcast of weights is still under way"),
            _ => drop(self.thread.join()),
        }
    }
}

struct Sender {
    shared: Arc<Shared>,
    how: Broadcasting,
    token: Option<Secret>,
    world: Option<World>,
}

impl Sender {
    fn serve(mut self, inbox: &mpsc::Receiver<Job>) {
        while let Ok(job) = inbox.recv() {
            let done = self.work(&job);
            if let Some(world) = self.world.take_if(|_| done.is_err()) {
                world.part();
            }
            if let Some(rounds) = &mut self.shared.lock().rounds {
                rounds.ended(&job, &done);
            }
            self.shared.work.notify_waiters();
        }
    }

    fn work(&mut self, job: &Job) -> Result<()> {
        if let Some(ip) = job.meet {
            if let Some(old) = self.world.take() {
                old.part();
            }
            let setup = Setup {
                rank: 0,
                world: job.workers + 1,
                address: SocketAddr::new(ip, 0).to_string(),
                local: None,
                backend: Backend::of(self.how.device),
                fingerprint: job.fingerprint.clone(),
                token: self.token.clone(),
                timing: Timing::within(self.how.limit),
            };
            let world = open_with(&setup, |address| {
                if let Some(rounds) = &mut self.shared.lock().rounds {
                    rounds.met(address);
                }
                self.shared.work.notify_waiters();
            })?;
            self.world = Some(world);
        }
        let world = self.world.as_ref().ok_or(LearnerError::Lost("the world of a broadcast"))?;
        broadcast(world.group(), self.how.device, &job.source)
    }
}

/// Sends the bytes of tensors from rank 0, and waits until all ranks have them.
fn broadcast(group: &Group, device: Device, source: &Source) -> Result<()> {
    source.each(device, |bucket| {
        let _same = group.broadcast(bucket, 0)?;
        Ok(())
    })?;
    Ok(group.barrier()?)
}
