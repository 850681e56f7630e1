//! Control of the ranks of a learner: rank 0 broadcasts a command, and all ranks execute it together.

use std::net::SocketAddr;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};
use unveil_collective::{Backend, Collective, Setup, Timeouts, World, open_reporting_address};
use unveil_config::Config;
use unveil_config::schema::Parallel;
use unveil_service::ServiceError;
use unveil_trainer::{Ranks, ZeroStage, device_of_rank};

use crate::error::{LearnerError, Result};

/// The commands of rank 0, as errors name them.
const COMMANDS: &str = "the commands of rank 0";

/// A command without a batch.
pub(crate) type Signal = Command<()>;

/// An operation that all ranks execute; B is the stage's own command on a batch.
#[derive(Serialize, Deserialize)]
pub(crate) enum Command<B> {
    /// Nothing to do yet.
    Idle,
    /// Executes the stage's own command on a batch.
    Batch(B),
    /// Gathers all sharded parameters on rank 0.
    GatherParameters,
    /// Gathers sharded parameters part by part, for rank 0 to read.
    VisitParameters,
    /// Writes a checkpoint: each rank writes its shard under this term.
    Save {
        /// Number of updates so far.
        step: u64,
        /// The term of rank 0.
        term: u64,
    },
    /// Gathers the reports of the ranks on what they have written, if all have finished.
    CollectReports,
    /// Ends the stage.
    Shutdown,
}

/// The ranks of a learner and the commands between them.
pub(crate) struct RankControl {
    pub ranks: Rc<Ranks>,
    device: Device,
    /// Longest time between two commands of rank 0.
    keepalive_interval: Duration,
    last_command: Instant,
}

impl RankControl {
    /// Connects the ranks `p`. Rank 0 passes the rendezvous address to `on_listening` before it waits for the others.
    ///
    /// # Errors
    /// Returns [`LearnerError::Trainer`] if a rank does not join in time or has another configuration.
    pub(crate) fn open(
        config: &Config,
        model: &Path,
        records: &[String],
        p: &Parallel,
        on_listening: impl FnOnce(SocketAddr),
    ) -> Result<Self> {
        let seconds = Duration::from_secs_f64;
        let device = device_of_rank(config, p)?;
        let ranks = if p.ranks == 1 {
            Ranks::solo()
        } else {
            let timeouts = Timeouts {
                rendezvous: seconds(p.join_s),
                call: seconds(p.call_s),
                heartbeat: seconds(p.lost_s),
                ..Timeouts::default()
            };
            let setup = Setup {
                rank: p.rank,
                world: p.ranks,
                address: p.rendezvous.clone(),
                local_address: None,
                backend: Backend::for_device(device),
                fingerprint: fingerprint(config, model, records)?,
                token: config.token().map_err(ServiceError::from)?,
                timeouts,
            };
            let warn_and_forward = |address: SocketAddr| {
                if !address.ip().is_loopback() {
                    tracing::warn!(%address, "traffic between ranks is not encrypted: use a trusted network");
                }
                on_listening(address);
            };
            let world: World = open_reporting_address(&setup, warn_and_forward)?;
            Ranks::new(world, ZeroStage::from_number(p.zero), p.shards)?
        };
        let keepalive_interval = (seconds(p.call_s) / 4).min(Duration::from_secs(1));
        Ok(Self { ranks, device, keepalive_interval, last_command: Instant::now() })
    }

    /// Sends a command, on rank 0; it is built only if there are other ranks. Returns whether another rank was asked to
    /// stop.
    ///
    /// # Errors
    /// Returns [`LearnerError::Trainer`] if another rank has failed or timed out.
    pub(crate) fn command<B: Serialize>(&mut self, command: impl FnOnce() -> Command<B>) -> Result<bool> {
        if self.ranks.size() == 1 {
            return Ok(false);
        }
        let bytes = rmp_serde::to_vec_named(&command()).map_err(LearnerError::rank_message(COMMANDS))?;
        self.broadcast_bytes(Some(&bytes))?;
        self.last_command = Instant::now();
        self.any_stop_requested(false)
    }

    /// Sends [`Command::Idle`] if the last command was long ago. Returns whether another rank was asked to stop.
    ///
    /// # Errors
    /// Returns [`LearnerError::Trainer`] if another rank has failed or timed out.
    pub(crate) fn keepalive(&mut self) -> Result<bool> {
        if self.last_command.elapsed() < self.keepalive_interval { Ok(false) } else { self.command(|| Signal::Idle) }
    }

    /// Waits for the next command of rank 0, on another rank; `stop` reports that this rank was asked to stop.
    ///
    /// # Errors
    /// Returns [`LearnerError::Trainer`] if another rank has failed or timed out.
    pub(crate) fn next_command<B: DeserializeOwned>(&self, stop: bool) -> Result<Command<B>> {
        let bytes = self.broadcast_bytes(None)?;
        let command = rmp_serde::from_slice(&bytes).map_err(LearnerError::rank_message(COMMANDS))?;
        self.any_stop_requested(stop)?;
        Ok(command)
    }

    /// Returns whether any rank was asked to stop; all ranks call it.
    fn any_stop_requested(&self, this_rank: bool) -> Result<bool> {
        Ok(self.ranks.all_reduce_sum(vec![f64::from(u8::from(this_rank))], self.device)?.iter().any(|n| *n > 0.0))
    }

    /// Broadcasts `bytes` from rank 0 and returns them; other ranks pass `None`.
    pub(crate) fn broadcast_bytes(&self, bytes: Option<&[u8]>) -> Result<Vec<u8>> {
        let Some(world) = self.ranks.world() else { return Ok(bytes.unwrap_or_default().to_vec()) };
        let length = Tensor::from_slice(&[bytes.map_or(0, <[u8]>::len) as i64]).f_to_device(self.device)?;
        let length = usize::try_from(world.broadcast(length, 0)?.f_int64_value(&[0])?).unwrap_or(0);
        let mut words = words(bytes.unwrap_or_default());
        words.resize(length.div_ceil(8).max(1), 0);
        let sent = world.broadcast(Tensor::f_from_slice(&words)?.f_to_device(self.device)?, 0)?;
        let words = Vec::<i64>::try_from(sent.f_to_device(Device::Cpu)?)?;
        Ok(words.into_iter().flat_map(i64::to_le_bytes).take(length).collect())
    }

    /// Gathers bytes of every rank on all ranks, by rank; returns `None` while any rank passes `None`. All ranks call
    /// it.
    ///
    /// # Errors
    /// Returns [`LearnerError::Trainer`] if another rank has failed or timed out.
    pub(crate) fn gather_bytes(&self, bytes: Option<&[u8]>) -> Result<Option<Vec<Vec<u8>>>> {
        let Some(world) = self.ranks.world() else { return Ok(bytes.map(|b| vec![b.to_vec()])) };
        let mut lengths = vec![0.0; self.ranks.size()];
        lengths[self.ranks.rank()] = bytes.map_or(0.0, |b| b.len() as f64 + 1.0);
        let lengths = self.ranks.all_reduce_sum(lengths, self.device)?;
        if lengths.contains(&0.0) {
            return Ok(None);
        }
        let longest = lengths.iter().fold(0.0, |a: f64, b| a.max(*b)) as usize;
        let mut padded = bytes.unwrap_or_default().to_vec();
        padded.resize(longest.next_multiple_of(8), 0);
        let words: Vec<i64> = words(&padded);
        let count = words.len();
        let gathered = world.all_gather(Tensor::f_from_slice(&words)?.f_to_device(self.device)?)?;
        let gathered = Vec::<i64>::try_from(gathered.f_to_device(Device::Cpu)?)?;
        let bytes_of_rank = |(rank, length): (usize, &f64)| -> Vec<u8> {
            let words = gathered[rank * count..(rank + 1) * count].iter();
            words.flat_map(|w| w.to_le_bytes()).take(*length as usize - 1).collect()
        };
        Ok(Some(lengths.iter().enumerate().map(bytes_of_rank).collect()))
    }
}

/// Packs bytes into little-endian words; the last one is padded with zeros.
fn words(bytes: &[u8]) -> Vec<i64> {
    let to_word = |chunk: &[u8]| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        i64::from_le_bytes(word)
    };
    bytes.chunks(8).map(to_word).collect()
}

/// Describes what must be equal on all ranks, one line per item.
fn fingerprint(config: &Config, model: &Path, records: &[String]) -> Result<String> {
    let mut same = config.clone();
    for parallel in [&mut same.sft.parallel, &mut same.learner.parallel] {
        parallel.rank = 0;
        parallel.rendezvous.clear();
    }
    same.learner.listen.clear();
    same.learner.address.clear();
    same.learner.metrics_listen.clear();
    same.health.listen.clear();
    same.telemetry = Default::default();
    same.reward.address.clear();
    // Paths of certificates and tokens may differ between machines.
    same.tls.dir.clear();
    same.auth = Default::default();
    let mut lines = vec![format!("unveil {}", env!("CARGO_PKG_VERSION"))];
    lines.extend(unveil_config::entries(&same).into_iter().map(|(key, value)| format!("{key} = {value}")));
    let path = model.join("config.json");
    let shape = std::fs::read(&path).map_err(LearnerError::io("read", &path))?;
    lines.push(format!("config.json of the model = {}", blake3::hash(&shape)));
    lines.push(format!("records = {} with {}", records.len(), blake3::hash(records.join("\n").as_bytes())));
    Ok(lines.join("\n"))
}
