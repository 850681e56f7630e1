//! Weights that the learner broadcasts to all workers at once: the thread that makes this worker's calls in the world of a round.
//! Must not know: the service, the engine.

use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use tch::{Device, Kind, Tensor};
use tokio::sync::oneshot;
use unveil_collective::{Backend, Collective, CollectiveError, Group, Setup, Timing, World, open};
use unveil_proto::v1::{Broadcast, Joins};
use unveil_proto::weights::BUCKET;

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
    backend: Backend,
    orders: mpsc::Sender<Order>,
    thread: JoinHandle<()>,
}

impl Member {
    /// Starts the thread; tensors pass over `device`, and the learner and other workers are waited for up to `limit`.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn start(device: Device, limit: Duration) -> Result<Arc<Self>> {
        let (orders, inbox) = mpsc::channel();
        let backend = Backend::of(device);
        let thread = std::thread::Builder::new()
            .name("unveil-broadcast".to_owned())
            .spawn(move || Calls { device, limit, world: None }.serve(&inbox))
            .map_err(RolloutError::io("cannot start a thread for broadcasts"))?;
        Ok(Arc::new(Self { backend, orders, thread }))
    }

    /// What the learner is told of it, where it is in the world of `round`.
    pub(crate) fn joins(&self, round: u64) -> Joins {
        Joins { backend: self.backend.name().to_owned(), round }
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
    world: Option<(u64, World)>,
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
        let (device, round) = (self.device, ticket.round);
        let collected = self.join(ticket).and_then(|world| collect(world.group(), device, &mut assembly));
        collected
            .map_err(|e| format!("the broadcast of version {} in round {round} failed: {e}", assembly.version()))?;
        assembly.finish()
    }

    /// The world of a round: the one that the worker is in, or a new one.
    fn join(&mut self, ticket: &Broadcast) -> Result<&World, CollectiveError> {
        if let Some((_, old)) = self.world.take_if(|(round, _)| *round != ticket.round) {
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
                timing: Timing::within(self.limit),
            };
            self.world = Some((ticket.round, open(&setup)?));
        }
        let none = || CollectiveError::Setup("there is no world".into());
        self.world.as_ref().map(|(_, world)| world).ok_or_else(none)
    }
}

/// Takes the bytes of all tensors from rank 0.
fn collect(group: &Group, device: Device, assembly: &mut Assembly) -> Result<(), CollectiveError> {
    let wrong = |what: String| CollectiveError::Tensor { call: "broadcast", message: what };
    let torch = |e: tch::TchError| wrong(e.to_string());
    let (mut left, mut bucket) = (assembly.size(), Vec::new());
    while left > 0 {
        let count = left.min(BUCKET);
        let words = count.div_ceil(8);
        let empty = Tensor::f_zeros([words as i64], (Kind::Int64, device)).map_err(torch)?;
        let sent = group.broadcast(empty, 0)?.f_to_device(Device::Cpu).map_err(torch)?;
        bucket.resize(words * 8, 0);
        sent.f_copy_data_u8(&mut bucket, words).map_err(torch)?;
        assembly.fill(&bucket[..count]).map_err(wrong)?;
        left -= count;
    }
    group.barrier()
}
