//! How ranks come together: rank 0 hosts a store, every rank says who it is and what it runs, and all check all.

use std::net::{IpAddr, SocketAddr, TcpListener, ToSocketAddrs, UdpSocket};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use unveil_torch_ext::{ExtError, GlooGroup, Store};

use crate::beat::{self, Beat};
use crate::watch::{FAULT, NO_FAULT, Watch};
use crate::{Backend, CollectiveError, Result, Setup, World, proof, transport};

/// Between two looks for ranks that have not come.
const LOOK: Duration = Duration::from_millis(20);

/// How long rank 0 waits for the others to read why they were sent away. A rank that comes later still finds nobody.
const FAREWELL: Duration = Duration::from_secs(10);

/// The first reason why ranks did not come together.
const REFUSED: &str = "refused";

/// Brings all ranks together.
///
/// # Errors
/// Ranks are missing at the deadline ([`CollectiveError::Missing`]), one runs something else ([`CollectiveError::Fingerprint`]; all
/// ranks get this error) or is there twice, or the backend cannot be used here.
pub fn open(setup: &Setup) -> Result<World> {
    open_with(setup, |_| ())
}

/// As [`open`]; rank 0 of several ranks hands the address at which it listens to `tell` before it waits for the others.
///
/// # Errors
/// As [`open`].
pub fn open_with(setup: &Setup, tell: impl FnOnce(SocketAddr)) -> Result<World> {
    setup.check()?;
    let usable = match setup.backend {
        Backend::Solo => Ok(()),
        Backend::Gloo => GlooGroup::available().map_err(|e| e.to_string()),
        Backend::Nccl { device } => transport::library(device).map(drop),
    };
    usable.map_err(|message| CollectiveError::Backend { backend: setup.backend.name(), message })?;
    let deadline = Instant::now() + setup.timing.join;
    if setup.world == 1 {
        return World::connect(setup.clone(), String::new(), None, deadline);
    }
    let meeting = Meeting::reach(setup, deadline)?;
    if setup.rank == 0 {
        tell(meeting.store.address());
    }
    if let Err(e) = meeting.greet() {
        meeting.part(&e);
        return Err(e);
    }
    let Meeting { store, local, .. } = meeting;
    let failed =
        |e: std::io::Error| CollectiveError::Setup(format!("a thread for signs of life cannot be started: {e}"));
    let watch = Watch::start(setup.rank, setup.world, store, setup.timing).map_err(failed)?;
    World::connect(setup.clone(), local, Some(watch), deadline)
}

/// What a rank that gave up tells the others.
#[derive(Serialize, Deserialize)]
enum Refusal {
    Missing { ranks: Vec<usize>, seconds: f64, found_by: usize },
    Fingerprint { rank: usize, theirs: String, expected: String },
    Token { ranks: [usize; 2] },
}

struct Meeting<'a> {
    setup: &'a Setup,
    store: Store,
    local: String,
    /// Of this rank and this meeting alone: no proof of another time holds here.
    nonce: String,
    begin: Instant,
    deadline: Instant,
}

impl<'a> Meeting<'a> {
    fn reach(setup: &'a Setup, deadline: Instant) -> Result<Self> {
        let begin = Instant::now();
        let (store, own) = if setup.rank == 0 { host(setup, deadline)? } else { join(setup, begin, deadline)? };
        if setup.token.is_none() && !own.is_loopback() {
            return Err(CollectiveError::Setup(format!(
                "ranks that meet at {}, beyond this machine, need a token by which they know each other: set auth.token_env or \
                 auth.token_file. What they send each other is not encrypted",
                setup.address
            )));
        }
        let local = match &setup.local {
            Some(local) => local.clone(),
            None if own.is_unspecified() => {
                let address = &setup.address;
                return Err(CollectiveError::Setup(format!(
                    "rank 0 listens on all addresses ({address}): set `local` to the one by which other ranks reach it"
                )));
            }
            None => own.to_string(),
        };
        Ok(Self { setup, store, local, nonce: proof::nonce(), begin, deadline })
    }

    /// Says who this rank is, and waits for all others.
    fn greet(&self) -> Result<()> {
        let Setup { rank, world, .. } = *self.setup;
        // The store still takes calls at the deadline, so that the missing ones can be told.
        let limit = self.deadline + FAREWELL;
        let lost = |e| self.lost(&e);
        if self.store.add(&format!("here/{rank}"), 1, limit).map_err(lost)? > 1 {
            return Err(CollectiveError::Twice { rank, address: self.setup.address.clone() });
        }
        if rank == 0 {
            self.store.set(FAULT, NO_FAULT, limit).map_err(lost)?;
        }
        let beat = serde_json::to_vec(&Beat::default()).map_err(|e| CollectiveError::Setup(e.to_string()))?;
        self.store.set(&beat::key(rank), &beat, limit).map_err(lost)?;
        self.store.set(&nonce(rank), self.nonce.as_bytes(), limit).map_err(lost)?;
        self.store.set(&hello(rank), self.setup.print().as_bytes(), limit).map_err(lost)?;

        self.gather(&hello, limit, &|prints| self.compare(prints))?;
        let Some(token) = &self.setup.token else { return Ok(()) };
        let names: Vec<String> = (0..world).map(nonce).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let nonces = self.store.get_all(&names, limit).map_err(lost)?;
        let right: Vec<String> = (0..world).map(|r| proof::of(token, &nonces, r, &self.setup.print())).collect();
        self.store.set(&proof(rank), right[rank].as_bytes(), limit).map_err(lost)?;
        self.gather(&proof, limit, &|said| {
            let known =
                said.iter().zip(&right).map(|(said, right)| said.as_ref().is_none_or(|s| proof::same(s, right)));
            match known.enumerate().find(|(_, known)| !known) {
                Some((other, _)) => {
                    Err(CollectiveError::Token { ranks: [rank, other], address: self.setup.address.clone() })
                }
                None => Ok(()),
            }
        })
    }

    /// Waits until every rank has set its `key`, and looks at what is there after each look.
    fn gather(
        &self,
        key: &dyn Fn(usize) -> String,
        limit: Instant,
        look: &dyn Fn(&[Option<String>]) -> Result<()>,
    ) -> Result<()> {
        let Setup { rank, world, .. } = *self.setup;
        let lost = |e| self.lost(&e);
        let mut said: Vec<Option<String>> = vec![None; world];
        loop {
            self.refused(limit)?;
            let missing: Vec<usize> = (0..world).filter(|r| said[*r].is_none()).collect();
            for r in &missing {
                if self.store.check(&[&key(*r)], limit).map_err(lost)? {
                    let mut value = self.store.get_all(&[&key(*r)], limit).map_err(lost)?;
                    said[*r] = Some(String::from_utf8_lossy(&value.pop().unwrap_or_default()).into_owned());
                }
            }
            look(&said)?;
            let missing: Vec<usize> = missing.into_iter().filter(|r| said[*r].is_none()).collect();
            if missing.is_empty() {
                return Ok(());
            }
            if Instant::now() >= self.deadline {
                return Err(self.missing(missing, self.begin.elapsed().as_secs_f64(), rank));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Every rank that is here runs what rank 0 runs, as far as that is known.
    fn compare(&self, prints: &[Option<String>]) -> Result<()> {
        let Some(Some(expected)) = prints.first() else { return Ok(()) };
        let other =
            prints.iter().enumerate().find_map(|(rank, p)| Some((rank, p.as_ref().filter(|p| *p != expected)?)));
        other.map_or(Ok(()), |(rank, theirs)| {
            Err(CollectiveError::Fingerprint { rank, theirs: theirs.clone(), expected: expected.clone() })
        })
    }

    /// Whether another rank has given up.
    fn refused(&self, limit: Instant) -> Result<()> {
        let lost = |e| self.lost(&e);
        if !self.store.check(&[REFUSED], limit).map_err(lost)? {
            return Ok(());
        }
        let value = self.store.get_all(&[REFUSED], limit).map_err(lost)?.pop().unwrap_or_default();
        match serde_json::from_slice(&value) {
            Ok(Refusal::Missing { ranks, seconds, found_by }) => Err(self.missing(ranks, seconds, found_by)),
            Ok(Refusal::Fingerprint { rank, theirs, expected }) => {
                Err(CollectiveError::Fingerprint { rank, theirs, expected })
            }
            Ok(Refusal::Token { ranks }) => Err(CollectiveError::Token { ranks, address: self.setup.address.clone() }),
            Err(e) => {
                Err(CollectiveError::Setup(format!("the store at {} is not one of ours: {e}", self.setup.address)))
            }
        }
    }

    fn missing(&self, ranks: Vec<usize>, seconds: f64, found_by: usize) -> CollectiveError {
        let (world, address) = (self.setup.world, self.setup.address.clone());
        CollectiveError::Missing { ranks, world, address, seconds, found_by }
    }

    /// The store has gone: so has its host.
    fn lost(&self, error: &ExtError) -> CollectiveError {
        unreachable_host(self.setup, self.begin, error)
    }

    /// Tells the others why; rank 0 keeps the store until they have read it.
    fn part(&self, error: &CollectiveError) {
        let limit = Instant::now() + FAREWELL;
        let refusal = match error.clone() {
            CollectiveError::Missing { ranks, seconds, found_by, .. } => Refusal::Missing { ranks, seconds, found_by },
            CollectiveError::Fingerprint { rank, theirs, expected } => Refusal::Fingerprint { rank, theirs, expected },
            CollectiveError::Token { ranks, .. } => Refusal::Token { ranks },
            _ => return,
        };
        let Ok(text) = serde_json::to_vec(&refusal) else { return };
        let rank = self.setup.rank;
        // Where the store is gone, the others know without being told.
        let told = self.store.swap(REFUSED, b"", &text, limit);
        if told.and_then(|_| self.store.set(&bye(rank), b"", limit)).is_err() || rank != 0 {
            return;
        }
        // Ranks that were missing at the deadline are not waited for again.
        let missing = match refusal {
            Refusal::Missing { ranks, .. } => ranks,
            Refusal::Fingerprint { .. } | Refusal::Token { .. } => Vec::new(),
        };
        let reads = |r: usize| !missing.contains(&r) && !self.store.check(&[&bye(r)], limit).unwrap_or(true);
        while Instant::now() < limit && (1..self.setup.world).any(reads) {
            std::thread::sleep(LOOK);
        }
    }
}

fn nonce(rank: usize) -> String {
    format!("nonce/{rank}")
}

fn proof(rank: usize) -> String {
    format!("proof/{rank}")
}

fn hello(rank: usize) -> String {
    format!("hello/{rank}")
}

fn bye(rank: usize) -> String {
    format!("bye/{rank}")
}

fn unreachable_host(setup: &Setup, begin: Instant, error: &ExtError) -> CollectiveError {
    if let ExtError::Unavailable { .. } = error {
        return CollectiveError::Backend { backend: setup.backend.name(), message: error.to_string() };
    }
    let (world, address, found_by) = (setup.world, setup.address.clone(), setup.rank);
    CollectiveError::Missing { ranks: vec![0], world, address, seconds: begin.elapsed().as_secs_f64(), found_by }
}

fn host(setup: &Setup, deadline: Instant) -> Result<(Store, IpAddr)> {
    let refused = |e: &dyn std::fmt::Display| {
        CollectiveError::Setup(format!(
            "rank 0 cannot listen at {}: {e}; name an address of this machine",
            setup.address
        ))
    };
    let listener = resolve(&setup.address).and_then(TcpListener::bind).map_err(|e| refused(&e))?;
    let own = listener.local_addr().map_err(|e| refused(&e))?.ip();
    let store = Store::host(listener, deadline).map_err(|e| match e {
        ExtError::Unavailable { .. } => unreachable_host(setup, Instant::now(), &e),
        e => refused(&e),
    })?;
    Ok((store, own))
}

fn join(setup: &Setup, begin: Instant, deadline: Instant) -> Result<(Store, IpAddr)> {
    // A name may appear in the network together with its rank.
    let address = loop {
        match resolve(&setup.address) {
            Ok(address) => break address,
            Err(e) if Instant::now() >= deadline || e.kind() == std::io::ErrorKind::InvalidInput => {
                return Err(CollectiveError::Setup(format!("`{}` is not an address, host:port: {e}", setup.address)));
            }
            Err(_) => std::thread::sleep(LOOK * 10),
        }
    };
    let store = Store::join(address, deadline).map_err(|e| unreachable_host(setup, begin, &e))?;
    // The route to rank 0 shows by which address this machine is reached.
    let any: IpAddr =
        if address.is_ipv4() { std::net::Ipv4Addr::UNSPECIFIED.into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
    let route = UdpSocket::bind((any, 0)).and_then(|s| s.connect(address).and_then(|()| s.local_addr()));
    let own = route.map_err(|e| CollectiveError::Setup(format!("no route to {address}: {e}")))?.ip();
    Ok((store, own))
}

/// The first address of a name, of the older kind where there is one.
fn resolve(address: &str) -> std::io::Result<SocketAddr> {
    let all: Vec<SocketAddr> = address.to_socket_addrs()?.collect();
    let first = all.iter().find(|a| a.is_ipv4()).or(all.first()).copied();
    first.ok_or_else(|| std::io::Error::new(std::io::ErrorKind::NotFound, "the name has no address"))
}
