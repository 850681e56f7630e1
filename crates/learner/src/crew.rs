//! How rank 0 leads the other ranks of a learner: it tells each what comes next, and all do it together. Must not know: what an
//! order leads to, sockets.

use std::net::SocketAddr;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};
use unveil_collective::{Backend, Collective, Setup, Timing, World, open_with};
use unveil_config::Config;
use unveil_service::ServiceError;

use crate::batch::TrainGroup;
use crate::error::{LearnerError, Result};
use crate::plain::Group;
use crate::shard::{Ranks, Zero};

/// What comes next.
#[derive(Serialize, Deserialize)]
pub(crate) enum Order {
    /// Nothing yet.
    Wait,
    /// The update of a batch.
    Update(Vec<Group>),
    /// Values of a batch, for a dump.
    Values(Vec<Group>),
    /// All weights, whole on all ranks.
    Bring,
    /// A checkpoint: each rank writes what it has under this term.
    Save {
        /// After how many updates.
        step: u64,
        /// The term of rank 0.
        term: u64,
    },
    /// What each rank has written, if all have.
    Collect,
    /// The end.
    End,
}

/// The ranks of a learner and the orders among them.
pub(crate) struct Crew {
    pub ranks: Rc<Ranks>,
    device: Device,
    /// Rank 0 gives an order this often at least.
    every: Duration,
    last: Instant,
}

impl Crew {
    /// A crew of one.
    pub fn solo() -> Self {
        Self { ranks: Ranks::solo(), device: Device::Cpu, every: Duration::from_secs(1), last: Instant::now() }
    }

    /// Brings the ranks together; rank 0 hands the address where they meet to `tell` before it waits for the others.
    ///
    /// # Errors
    /// A rank does not come, or runs something else.
    pub fn open(config: &Config, model: &Path, records: &[String], tell: impl FnOnce(SocketAddr)) -> Result<Self> {
        let p = &config.learner.parallel;
        let seconds = Duration::from_secs_f64;
        let device = device(config)?;
        let ranks = if p.ranks == 1 {
            Ranks::solo()
        } else {
            let timing = Timing {
                join: seconds(p.join_s),
                call: seconds(p.call_s),
                lost: seconds(p.lost_s),
                ..Timing::default()
            };
            let setup = Setup {
                rank: p.rank,
                world: p.ranks,
                address: p.rendezvous.clone(),
                local: None,
                backend: Backend::of(device),
                fingerprint: fingerprint(config, model, records)?,
                token: config.token().map_err(ServiceError::from)?,
                timing,
            };
            let warned = |address: SocketAddr| {
                if !address.ip().is_loopback() {
                    tracing::warn!(%address, "what ranks send each other is not encrypted: keep it within a network that is trusted");
                }
                tell(address);
            };
            let world: World = open_with(&setup, warned)?;
            Ranks::new(world, Zero::stage(p.zero), p.shards)?
        };
        let every = (seconds(p.call_s) / 4).min(Duration::from_secs(1));
        Ok(Self { ranks, device, every, last: Instant::now() })
    }

    /// Gives an order, as rank 0; it is made only where there is somebody to hear it. Returns whether some other rank was told to stop.
    ///
    /// # Errors
    /// A rank is gone.
    pub fn give(&mut self, order: impl FnOnce() -> Order) -> Result<bool> {
        if self.ranks.size() == 1 {
            return Ok(false);
        }
        let fault = |e: rmp_serde::encode::Error| LearnerError::Setting(format!("an order for other ranks: {e}"));
        let bytes = rmp_serde::to_vec_named(&order()).map_err(fault)?;
        self.send(Some(&bytes))?;
        self.last = Instant::now();
        self.stops(false)
    }

    /// Tells the other ranks that nothing has happened, where they have not heard for long.
    ///
    /// # Errors
    /// A rank is gone.
    pub fn hold(&mut self) -> Result<bool> {
        if self.last.elapsed() < self.every { Ok(false) } else { self.give(|| Order::Wait) }
    }

    /// The next order, as another rank; `stop` says that this one was told to stop.
    ///
    /// # Errors
    /// Rank 0 is gone.
    pub fn hear(&self, stop: bool) -> Result<Order> {
        let bytes = self.send(None)?;
        let order = rmp_serde::from_slice(&bytes)
            .map_err(|e| LearnerError::Setting(format!("an order of rank 0 is not readable: {e}")))?;
        self.stops(stop)?;
        Ok(order)
    }

    /// Whether some rank was told to stop.
    fn stops(&self, own: bool) -> Result<bool> {
        Ok(self.ranks.sum(vec![f64::from(u8::from(own))], self.device)?.iter().any(|n| *n > 0.0))
    }

    /// Bytes of rank 0, on all ranks.
    pub fn send(&self, bytes: Option<&[u8]>) -> Result<Vec<u8>> {
        let Some(all) = self.ranks.all() else { return Ok(bytes.unwrap_or_default().to_vec()) };
        let length = Tensor::from_slice(&[bytes.map_or(0, <[u8]>::len) as i64]).f_to_device(self.device)?;
        let length = usize::try_from(all.broadcast(length, 0)?.f_int64_value(&[0])?).unwrap_or(0);
        let mut words = words(bytes.unwrap_or_default());
        words.resize(length.div_ceil(8).max(1), 0);
        let sent = all.broadcast(Tensor::f_from_slice(&words)?.f_to_device(self.device)?, 0)?;
        let words = Vec::<i64>::try_from(sent.f_to_device(Device::Cpu)?)?;
        Ok(words.into_iter().flat_map(i64::to_le_bytes).take(length).collect())
    }

    /// What every rank has to say, by rank, on all ranks; none as long as one of them has nothing. All ranks call it.
    ///
    /// # Errors
    /// A rank is gone.
    pub fn collect(&self, own: Option<&[u8]>) -> Result<Option<Vec<Vec<u8>>>> {
        let Some(all) = self.ranks.all() else { return Ok(own.map(|b| vec![b.to_vec()])) };
        let mut lengths = vec![0.0; self.ranks.size()];
        lengths[self.ranks.rank()] = own.map_or(0.0, |b| b.len() as f64 + 1.0);
        let lengths = self.ranks.sum(lengths, self.device)?;
        if lengths.contains(&0.0) {
            return Ok(None);
        }
        let most = lengths.iter().fold(0.0, |a: f64, b| a.max(*b)) as usize;
        let mut bytes = own.unwrap_or_default().to_vec();
        bytes.resize(most.next_multiple_of(8), 0);
        let words: Vec<i64> = words(&bytes);
        let count = words.len();
        let told = all.all_gather(Tensor::f_from_slice(&words)?.f_to_device(self.device)?)?;
        let told = Vec::<i64>::try_from(told.f_to_device(Device::Cpu)?)?;
        let of = |(rank, length): (usize, &f64)| -> Vec<u8> {
            let own = told[rank * count..(rank + 1) * count].iter();
            own.flat_map(|w| w.to_le_bytes()).take(*length as usize - 1).collect()
        };
        Ok(Some(lengths.iter().enumerate().map(of).collect()))
    }

    /// A batch as it is sent.
    pub fn plain(groups: &[TrainGroup]) -> Vec<Group> {
        groups.iter().map(|g| Group::new(g, None)).collect()
    }
}

/// Bytes as words, the last one filled up.
fn words(bytes: &[u8]) -> Vec<i64> {
    let word = |eight: &[u8]| {
        let mut own = [0; 8];
        own[..eight.len()].copy_from_slice(eight);
        i64::from_le_bytes(own)
    };
    bytes.chunks(8).map(word).collect()
}

/// The device of this rank: of several GPUs that a bare `cuda` or `auto` may mean, the one for its rank.
pub(crate) fn device(config: &Config) -> Result<Device> {
    let found = unveil_model::device(&config.run.device)?;
    let many = config.learner.parallel.ranks > 1 && matches!(config.run.device.as_str(), "auto" | "cuda");
    Ok(match found {
        Device::Cuda(_) if many => {
            let count = usize::try_from(tch::Cuda::device_count()).unwrap_or(1).max(1);
            Device::Cuda(config.learner.parallel.rank % count)
        }
        other => other,
    })
}

/// What must be the same on all ranks, line by line.
fn fingerprint(config: &Config, model: &Path, records: &[String]) -> Result<String> {
    let mut same = config.clone();
    same.learner.parallel.rank = 0;
    same.learner.parallel.rendezvous.clear();
    same.learner.listen.clear();
    same.learner.address.clear();
    same.learner.metrics_listen.clear();
    same.health.listen.clear();
    same.telemetry = Default::default();
    same.reward.address.clear();
    // Where a machine keeps its certificates and its token is its own affair.
    same.tls.dir.clear();
    same.auth = Default::default();
    let mut lines = vec![format!("unveil {}", env!("CARGO_PKG_VERSION"))];
    lines.extend(unveil_config::entries(&same).into_iter().map(|(key, value)| format!("{key} = {value}")));
    let path = model.join("config.json");
    let shape = std::fs::read(&path).map_err(LearnerError::io(&path))?;
    lines.push(format!("config.json of the model = {}", blake3::hash(&shape)));
    lines.push(format!("records = {} with {}", records.len(), blake3::hash(records.join("\n").as_bytes())));
    Ok(lines.join("\n"))
}
