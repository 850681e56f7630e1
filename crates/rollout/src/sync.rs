//! The receiving end of weight sync: asks for what is newer than the weights it holds, checks it, asks again when it was damaged.
//! Must not know: the engine.

use std::time::Duration;

use tonic::{Status, Streaming};
use unveil_proto::v1::{HeldWeights, WeightsChunk};
use unveil_service::ClientOptions;

use crate::experience::Experience;
use crate::weights::{Assembly, Known, Pool};
use crate::{Result, RolloutError};

pub use crate::weights::Update;

/// How often weights that arrived damaged are asked for again.
const TRIES: usize = 3;

/// Receives weights over a connection of its own, so that no lease waits behind them.
pub struct WeightReceiver {
    experience: Experience,
    known: Option<Known>,
    pool: Pool,
    patience: Duration,
}

impl WeightReceiver {
    /// [`WeightReceiver::connect_with`] to a service without TLS and token.
    ///
    /// # Errors
    /// As there.
    pub async fn connect(address: &str, worker: &str, patience: Duration) -> Result<Self> {
        Self::connect_with(address, worker, &ClientOptions::default(), patience).await
    }

    /// Connects to the experience service, trying until `patience` is over. No message of a stream may take longer either.
    ///
    /// # Errors
    /// Nobody answers at the address, or a certificate cannot be used.
    pub async fn connect_with(
        address: &str,
        worker: &str,
        options: &ClientOptions,
        patience: Duration,
    ) -> Result<Self> {
        let experience = Experience::connect(address, worker, options, patience).await?;
        Ok(Self { experience, known: None, pool: Pool::new(), patience })
    }

    /// What is held.
    pub fn held(&self) -> Option<HeldWeights> {
        self.known.as_ref().map(Known::held)
    }

    /// Forgets what is held: all tensors are fetched next.
    pub fn forget(&mut self) {
        self.known = None;
    }

    /// Waits up to `wait` for weights newer than those held, and receives them. None when there are none.
    ///
    /// # Errors
    /// The service stayed unreachable, or weights arrived damaged several times; the message names version and checksums.
    pub async fn fetch(&mut self, wait: Duration) -> Result<Option<Update>> {
        let mut left = TRIES;
        loop {
            let stream = self.experience.weights(self.held(), wait).await?;
            let what = match self.receive(stream).await {
                Ok(found) => return Ok(found),
                Err(what) => what,
            };
            left -= 1;
            if left == 0 {
                return Err(RolloutError::Weights { address: self.experience.address.clone(), what });
            }
            tracing::warn!("weights from {} are refused and asked for again: {what}", self.experience.address);
        }
    }

    async fn receive(&mut self, mut stream: Streaming<WeightsChunk>) -> Result<Option<Update>, String> {
        let Some(first) = next(&mut stream, self.patience).await? else { return Ok(None) };
        let mut assembly = Assembly::begin(&first, self.known.as_ref(), &mut self.pool)?;
        while let Some(chunk) = next(&mut stream, self.patience).await? {
            assembly.push(&chunk)?;
        }
        assembly.finish().map(Some)
    }

    /// The update is what is held from here on; its memory is used for the next one.
    pub fn taken(&mut self, update: Update) {
        self.known = Some(Known { version: update.version, sums: update.sums });
        self.pool.extend(update.tensors);
    }
}

async fn next(stream: &mut Streaming<WeightsChunk>, patience: Duration) -> Result<Option<WeightsChunk>, String> {
    let broken = |e: Status| format!("the stream broke off: {:?}: {}", e.code(), e.message());
    match tokio::time::timeout(patience, stream.message()).await {
        Ok(message) => message.map_err(broken),
        Err(_) => Err(format!("the stream stood still for {:.0} s", patience.as_secs_f64())),
    }
}
