//! Receives weights that the learner broadcasts to all workers: a thread makes this worker's collective calls in the broadcast group of a
//! round.

use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use tch::{Device, Kind, Tensor};
use tokio::sync::oneshot;
use unveil_collective::{Backend, Collective, CollectiveError, Setup, Timeouts, World, open};
use unveil_core::Secret;
use unveil_proto::v1::{Broadcast, BroadcastCapability};

use super::checksummer::Checksummer;
use super::error::{ClientError, Result};
use super::weight_stream::{WeightAssembler, WeightUpdate};
use crate::checksum::BUCKET_BYTES;

/// Time to wait for the thread at shutdown.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(2);

/// A broadcast to receive into an assembler, and where to send the result.
struct ReceiveRequest {
    offer: Broadcast,
    assembler: WeightAssembler,
    reply: oneshot::Sender<Result<WeightUpdate, String>>,
}

/// This worker's membership in broadcast groups. Dropping it ends the thread after the current call.
#[derive(Debug)]
pub struct BroadcastMember {
    device: Device,
    requests: mpsc::Sender<ReceiveRequest>,
    thread: JoinHandle<()>,
}

impl BroadcastMember {
    /// Starts the thread. Tensors are received on `device`; `limit` bounds the wait for the learner and other workers. If there is a
    /// `token`, all members prove that they have it.
    ///
    /// # Errors
    /// Returns [`ClientError::Thread`] if the thread cannot be spawned.
    pub fn start(device: Device, limit: Duration, token: Option<Secret>) -> Result<Arc<Self>> {
        let (requests, inbox) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("unveil-broadcast".to_owned())
            .spawn(move || {
                let checksummer = Checksummer::new(device);
                BroadcastThread { device, limit, token, world: None, checksummer }.serve(&inbox);
            })
            .map_err(ClientError::Thread)?;
        Ok(Arc::new(Self { device, requests, thread }))
    }

    /// Returns the device that receives the tensors.
    pub(super) fn device(&self) -> Device {
        self.device
    }

    /// Returns the capability reported to the learner by a member of the broadcast group of `round`.
    pub(super) fn broadcast_capability(&self, round: u64) -> BroadcastCapability {
        BroadcastCapability { backend: Backend::for_device(self.device).name().to_owned(), round }
    }

    /// Receives the tensors of `assembler` by the offered broadcast; the error is the reason of a failure.
    pub(super) async fn receive(&self, offer: Broadcast, assembler: WeightAssembler) -> Result<WeightUpdate, String> {
        let (reply, answer) = oneshot::channel();
        let died = || "the broadcast thread has ended".to_owned();
        self.requests.send(ReceiveRequest { offer, assembler, reply }).map_err(|_| died())?;
        answer.await.map_err(|_| died())?
    }

    /// Leaves the broadcast group and waits for it, up to two seconds.
    pub async fn close(self) {
        drop(self.requests);
        let joined = tokio::task::spawn_blocking(move || self.thread.join());
        if tokio::time::timeout(SHUTDOWN_GRACE, joined).await.is_err() {
            tracing::debug!("leaving the broadcast group before other members");
        }
    }
}

/// State of the broadcast thread.
struct BroadcastThread {
    device: Device,
    limit: Duration,
    token: Option<Secret>,
    /// The broadcast group that the worker has joined, with its fingerprint: rounds of two learners may have the same number.
    world: Option<(String, World)>,
    checksummer: Checksummer,
}

impl BroadcastThread {
    fn serve(mut self, inbox: &mpsc::Receiver<ReceiveRequest>) {
        while let Ok(ReceiveRequest { offer, assembler, reply }) = inbox.recv() {
            let received = self.receive(&offer, assembler);
            if let Some((_, world)) = self.world.take_if(|_| received.is_err()) {
                world.leave();
            }
            drop(reply.send(received));
        }
    }

    fn receive(&mut self, offer: &Broadcast, mut assembler: WeightAssembler) -> Result<WeightUpdate, String> {
        let round = offer.round;
        let collected = self.join(offer).and_then(|()| self.collect(&mut assembler));
        collected
            .map_err(|e| format!("the broadcast of version {} in round {round} failed: {e}", assembler.version()))?;
        assembler.finish()
    }

    /// Joins the broadcast group of a round, unless the worker is already a member.
    fn join(&mut self, offer: &Broadcast) -> Result<(), CollectiveError> {
        if let Some((_, old)) = self.world.take_if(|(fingerprint, _)| *fingerprint != offer.fingerprint) {
            old.leave();
        }
        if self.world.is_none() {
            let setup = Setup {
                rank: offer.rank as usize,
                world: offer.world as usize,
                address: offer.address.clone(),
                local_address: None,
                backend: Backend::for_device(self.device),
                fingerprint: offer.fingerprint.clone(),
                token: self.token.clone(),
                timeouts: Timeouts::within(self.limit),
            };
            self.world = Some((offer.fingerprint.clone(), open(&setup)?));
        }
        Ok(())
    }

    /// Receives the bytes of all tensors from rank 0. They stay on the receiving device.
    fn collect(&mut self, assembler: &mut WeightAssembler) -> Result<(), CollectiveError> {
        let tensor_error = |message: String| CollectiveError::Tensor { call: "broadcast", message };
        let torch_error = |e: tch::TchError| tensor_error(e.to_string());
        let world =
            self.world.as_ref().ok_or_else(|| CollectiveError::Setup("no broadcast group was joined".into()))?;
        let group = world.1.group();
        let mut left = assembler.size();
        while left > 0 {
            let count = left.min(BUCKET_BYTES);
            let empty = Tensor::f_zeros([count.div_ceil(8) as i64], (Kind::Int64, self.device)).map_err(torch_error)?;
            let bytes = group.broadcast(empty, 0)?.f_view_dtype(Kind::Uint8).map_err(torch_error)?;
            let bytes = bytes.f_narrow(0, 0, count as i64).map_err(torch_error)?;
            assembler.fill(&bytes, &mut self.checksummer).map_err(tensor_error)?;
            left -= count;
        }
        group.barrier()
    }
}
