//! Weights that the learner broadcasts to all workers at once: the thread that makes this worker's calls in the world of a round.
//! Must not know: the service, the engine.

use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use tch::{Device, Kind, Tensor};
use tokio::sync::oneshot;
use unveil_collective::{Backend, Collective, CollectiveError, Setup, Timing, World, open};
use unveil_core::Secret;
use unveil_proto::v1::{Broadcast, Joins};
use unveil_proto::weights::BUCKET;

use crate::crc::Checks;
use crate::weights::{Assembly, Update};
use crate::{Result, RolloutError};

/// How long the thread is waited for at the end.
const CLOSING: Duration = Duration::from_secs(2);

struct Order {
    ticket: Broadcast,
    assembly: Assembly,
    reply: oneshot::Sender<Result<Update, String>>,
}

/// This worker's place in broadcasts. Dropping it ends the thread after the present call.
pub struct Member {
    device: Device,
    orders: mpsc::Sender<Order>,
    thread: JoinHandle<()>,
}

impl Member {
    /// Starts the thread; tensors pass over `device`, and the learner and other workers are waited for up to `limit`. All prove that
    /// they know `token` where there is one.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn start(device: Device, limit: Duration, token: Option<Secret>) -> Result<Arc<Self>> {
        let (orders, inbox) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("unveil-broadcast".to_owned())
            .spawn(move || Calls { device, limit, token, world: None, checks: Checks::new(device) }.serve(&inbox))
            .map_err(RolloutError::io("cannot start a thread for broadcasts"))?;
        Ok(Arc::new(Self { device, orders, thread }))
    }

    /// Where tensors arrive.
    pub(crate) fn device(&self) -> Device {
        self.device
    }

    /// What the learner is told of it, where it is in the world of `round`.
    pub(crate) fn joins(&self, round: u64) -> Joins {
        Joins { backend: Backend::of(self.device).name().to_owned(), round }
    }

    /// Takes part in a broadcast of what `assembly` waits for; the error says why nothing came of it.
    pub(crate) async fn receive(&self, ticket: Broadcast, assembly: Assembly) -> Result<Update, String> {
        let (reply, answer) = oneshot::channel();
        let died = || "the thread of broadcasts has ended".to_owned();
        self.orders.send(Order { ticket, assembly, reply }).map_err(|_| died())?;
        answer.await.map_err(|_| died())?
    }

    /// Leaves the world, and waits a moment for that.
    pub(crate) async fn close(self) {
        drop(self.orders);
        let joined = tokio::task::spawn_blocking(move || self.thread.join());
        if tokio::time::timeout(CLOSING, joined).await.is_err() {
            tracing::debug!("the world of broadcasts is left while others are in it");
        }
    }
}

struct Calls {
    device: Device,
    limit: Duration,
    token: Option<Secret>,
    /// The world that the worker is in, and by what all in it knew each other: rounds of two learners may have the same number.
    world: Option<(String, World)>,
    checks: Checks,
}

impl Calls {
    fn serve(mut self, inbox: &mpsc::Receiver<Order>) {
        while let Ok(Order { ticket, assembly, reply }) = inbox.recv() {
            let done = self.receive(&ticket, assembly);
            if let Some((_, world)) = self.world.take_if(|_| done.is_err()) {
                world.part();
            }
            drop(reply.send(done));
        }
    }

    fn receive(&mut self, ticket: &Broadcast, mut assembly: Assembly) -> Result<Update, String> {
        let round = ticket.round;
        let collected = self.join(ticket).and_then(|()| self.collect(&mut assembly));
        collected
            .map_err(|e| format!("the broadcast of version {} in round {round} failed: {e}", assembly.version()))?;
        assembly.finish()
    }

    /// Has the world of a round: the one that the worker is in, or a new one.
    fn join(&mut self, ticket: &Broadcast) -> Result<(), CollectiveError> {
        if let Some((_, old)) = self.world.take_if(|(fingerprint, _)| *fingerprint != ticket.fingerprint) {
            old.part();
        }
        if self.world.is_none() {
            let setup = Setup {
                rank: ticket.rank as usize,
                world: ticket.world as usize,
                address: ticket.address.clone(),
                local: None,
                backend: Backend::of(self.device),
                fingerprint: ticket.fingerprint.clone(),
                token: self.token.clone(),
                timing: Timing::within(self.limit),
            };
            self.world = Some((ticket.fingerprint.clone(), open(&setup)?));
        }
        Ok(())
    }

    /// Takes the bytes of all tensors from rank 0. They stay on the device that they come to.
    fn collect(&mut self, assembly: &mut Assembly) -> Result<(), CollectiveError> {
        let wrong = |what: String| CollectiveError::Tensor { call: "broadcast", message: what };
        let torch = |e: tch::TchError| wrong(e.to_string());
        let world = self.world.as_ref().ok_or_else(|| CollectiveError::Setup("there is no world".into()))?;
        let (group, mut left) = (world.1.group(), assembly.size());
        while left > 0 {
            let count = left.min(BUCKET);
            let empty = Tensor::f_zeros([count.div_ceil(8) as i64], (Kind::Int64, self.device)).map_err(torch)?;
            let bytes = group.broadcast(empty, 0)?.f_view_dtype(Kind::Uint8).map_err(torch)?;
            let bytes = bytes.f_narrow(0, 0, count as i64).map_err(torch)?;
            assembly.fill(&bytes, &mut self.checks).map_err(wrong)?;
            left -= count;
        }
        group.barrier()
    }
}
