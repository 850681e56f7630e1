//! The rendezvous: rank 0 hosts a store, every rank publishes its fingerprint there, and every rank checks all others.

use std::net::{IpAddr, SocketAddr, TcpListener, ToSocketAddrs, UdpSocket};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use unveil_torch_ext::{ExtError, GlooGroup, Store};

use crate::failure_detector::{FAULT_KEY, FailureDetector, NO_FAULT};
use crate::heartbeat::{self, Heartbeat};
use crate::{Backend, CollectiveError, Result, Setup, World, proof, transport};

/// Interval at which the store is checked for ranks that are still missing.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Interval at which the name of rank 0 is resolved again.
const RESOLVE_INTERVAL: Duration = Duration::from_millis(200);

/// Time for which rank 0 keeps the store alive, so that the other ranks can read why the rendezvous failed.
const REFUSAL_GRACE: Duration = Duration::from_secs(10);

/// Store key of the first error that made the rendezvous fail.
const REFUSAL_KEY: &str = "refused";

/// Waits for all ranks to join, and connects them.
///
/// # Errors
/// Returns [`CollectiveError::Missing`] if ranks are missing at the deadline, [`CollectiveError::Fingerprint`] on all ranks if one has
/// another fingerprint, [`CollectiveError::TokenMismatch`] if tokens differ, [`CollectiveError::DuplicateRank`] if two processes have
/// the same rank, [`CollectiveError::Backend`] if the backend is not available, and [`CollectiveError::Setup`] for an invalid setup.
pub fn open(setup: &Setup) -> Result<World> {
    open_reporting_address(setup, |_| ())
}

/// Opens a world like [`open`]; with several ranks, rank 0 passes the address at which it listens to `report` before it waits for the
/// others.
///
/// # Errors
/// See [`open`].
pub fn open_reporting_address(setup: &Setup, report: impl FnOnce(SocketAddr)) -> Result<World> {
    setup.check()?;
    let available = match setup.backend {
        Backend::Solo => Ok(()),
        Backend::Gloo => GlooGroup::available().map_err(|e| e.to_string()),
        Backend::Nccl { device } => transport::load_library(device).map(drop),
    };
    available.map_err(|message| CollectiveError::Backend { backend: setup.backend.name(), message })?;
    let deadline = Instant::now() + setup.timeouts.rendezvous;
    if setup.world == 1 {
        return World::connect(setup.clone(), String::new(), None, deadline);
    }
    let rendezvous = Rendezvous::start(setup, deadline)?;
    if setup.rank == 0 {
        report(rendezvous.store.address());
    }
    if let Err(e) = rendezvous.join() {
        rendezvous.publish_refusal(&e);
        return Err(e);
    }
    let Rendezvous { store, local_address, .. } = rendezvous;
    let detector = FailureDetector::start(setup.rank, setup.world, store, setup.timeouts)
        .map_err(|e| CollectiveError::Setup(format!("cannot start the heartbeat thread: {e}")))?;
    World::connect(setup.clone(), local_address, Some(detector), deadline)
}

/// Why the rendezvous failed, as published to the other ranks.
#[derive(Serialize, Deserialize)]
enum Refusal {
    Missing { ranks: Vec<usize>, seconds: f64, found_by: usize },
    Fingerprint { rank: usize, theirs: String, expected: String },
    Token { ranks: [usize; 2] },
}

struct Rendezvous<'a> {
    setup: &'a Setup,
    store: Store,
    local_address: String,
    /// Unique to this rank and this rendezvous, so that a proof cannot be replayed.
    nonce: String,
    begin: Instant,
    deadline: Instant,
}

impl<'a> Rendezvous<'a> {
    /// Hosts the store (rank 0) or connects to it.
    fn start(setup: &'a Setup, deadline: Instant) -> Result<Self> {
        let begin = Instant::now();
        let (store, local_ip) =
            if setup.rank == 0 { host_store(setup, deadline)? } else { join_store(setup, begin, deadline)? };
        if setup.token.is_none() && !local_ip.is_loopback() {
            return Err(CollectiveError::Setup(format!(
                "a rendezvous at {}, beyond this machine, needs a token by which ranks authenticate each other: set \
                 auth.token_env or auth.token_file. Traffic between ranks is not encrypted",
                setup.address
            )));
        }
        let local_address = match &setup.local_address {
            Some(address) => address.clone(),
            None if local_ip.is_unspecified() => {
                let address = &setup.address;
                return Err(CollectiveError::Setup(format!(
                    "rank 0 listens on all addresses ({address}): set `local_address` to the one at which other ranks reach it"
                )));
            }
            None => local_ip.to_string(),
        };
        Ok(Self { setup, store, local_address, nonce: proof::nonce(), begin, deadline })
    }

    /// Publishes this rank's fingerprint and proof, and waits for those of all other ranks.
    fn join(&self) -> Result<()> {
        let rank = self.setup.rank;
        let world = self.setup.world;
        // Store calls may still succeed at the rendezvous deadline, so that the missing ranks can be published.
        let limit = self.deadline + REFUSAL_GRACE;
        let host_failed = |e| self.host_failed(&e);
        if self.store.add(&format!("here/{rank}"), 1, limit).map_err(host_failed)? > 1 {
            return Err(CollectiveError::DuplicateRank { rank, address: self.setup.address.clone() });
        }
        if rank == 0 {
            self.store.set(FAULT_KEY, NO_FAULT, limit).map_err(host_failed)?;
        }
        let first_heartbeat =
            serde_json::to_vec(&Heartbeat::default()).map_err(|e| CollectiveError::Setup(e.to_string()))?;
        let fingerprint = self.setup.full_fingerprint();
        self.store.set(&heartbeat::key(rank), &first_heartbeat, limit).map_err(host_failed)?;
        self.store.set(&nonce_key(rank), self.nonce.as_bytes(), limit).map_err(host_failed)?;
        self.store.set(&fingerprint_key(rank), fingerprint.as_bytes(), limit).map_err(host_failed)?;

        self.wait_for_all(&fingerprint_key, limit, &|fingerprints| self.compare_fingerprints(fingerprints))?;
        let Some(token) = &self.setup.token else { return Ok(()) };
        let keys: Vec<String> = (0..world).map(nonce_key).collect();
        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
        let nonces = self.store.get_all(&keys, limit).map_err(host_failed)?;
        let expected: Vec<String> = (0..world).map(|r| proof::prove(token, &nonces, r, &fingerprint)).collect();
        self.store.set(&proof_key(rank), expected[rank].as_bytes(), limit).map_err(host_failed)?;
        self.wait_for_all(&proof_key, limit, &|proofs| {
            let mut pairs = proofs.iter().zip(&expected);
            match pairs.position(|(proof, expected)| proof.as_ref().is_some_and(|p| !proof::verify(p, expected))) {
                Some(other) => {
                    Err(CollectiveError::TokenMismatch { ranks: [rank, other], address: self.setup.address.clone() })
                }
                None => Ok(()),
            }
        })
    }

    /// Waits until every rank has set its key, and passes the values read so far to `check` after each poll.
    fn wait_for_all(
        &self,
        key: &dyn Fn(usize) -> String,
        limit: Instant,
        check: &dyn Fn(&[Option<String>]) -> Result<()>,
    ) -> Result<()> {
        let Setup { rank, world, .. } = *self.setup;
        let host_failed = |e| self.host_failed(&e);
        let mut values: Vec<Option<String>> = vec![None; world];
        loop {
            self.check_refusal(limit)?;
            let missing: Vec<usize> = (0..world).filter(|r| values[*r].is_none()).collect();
            for r in &missing {
                if self.store.check(&[&key(*r)], limit).map_err(host_failed)? {
                    let mut value = self.store.get_all(&[&key(*r)], limit).map_err(host_failed)?;
                    values[*r] = Some(String::from_utf8_lossy(&value.pop().unwrap_or_default()).into_owned());
                }
            }
            check(&values)?;
            let missing: Vec<usize> = missing.into_iter().filter(|r| values[*r].is_none()).collect();
            if missing.is_empty() {
                return Ok(());
            }
            if Instant::now() >= self.deadline {
                return Err(self.missing_error(missing, self.begin.elapsed().as_secs_f64(), rank));
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// Checks that every rank that has joined has the fingerprint of rank 0.
    fn compare_fingerprints(&self, fingerprints: &[Option<String>]) -> Result<()> {
        let Some(Some(expected)) = fingerprints.first() else { return Ok(()) };
        let different =
            fingerprints.iter().enumerate().find_map(|(rank, f)| Some((rank, f.as_ref().filter(|f| *f != expected)?)));
        different.map_or(Ok(()), |(rank, theirs)| {
            Err(CollectiveError::Fingerprint { rank, theirs: theirs.clone(), expected: expected.clone() })
        })
    }

    /// Returns the error that another rank has published, if any.
    fn check_refusal(&self, limit: Instant) -> Result<()> {
        let host_failed = |e| self.host_failed(&e);
        if !self.store.check(&[REFUSAL_KEY], limit).map_err(host_failed)? {
            return Ok(());
        }
        let value = self.store.get_all(&[REFUSAL_KEY], limit).map_err(host_failed)?.pop().unwrap_or_default();
        match serde_json::from_slice(&value) {
            Ok(Refusal::Missing { ranks, seconds, found_by }) => Err(self.missing_error(ranks, seconds, found_by)),
            Ok(Refusal::Fingerprint { rank, theirs, expected }) => {
                Err(CollectiveError::Fingerprint { rank, theirs, expected })
            }
            Ok(Refusal::Token { ranks }) => {
                Err(CollectiveError::TokenMismatch { ranks, address: self.setup.address.clone() })
            }
            Err(e) => Err(CollectiveError::Setup(format!(
                "the store at {} has an unknown format: {e}; check the address",
                self.setup.address
            ))),
        }
    }

    fn missing_error(&self, ranks: Vec<usize>, seconds: f64, found_by: usize) -> CollectiveError {
        CollectiveError::Missing {
            ranks,
            world: self.setup.world,
            address: self.setup.address.clone(),
            seconds,
            found_by,
        }
    }

    /// Converts a failed store call: the store fails when its host, rank 0, does.
    fn host_failed(&self, error: &ExtError) -> CollectiveError {
        unreachable_host(self.setup, self.begin, error)
    }

    /// Publishes the error for the other ranks; rank 0 keeps the store alive until they have read it.
    fn publish_refusal(&self, error: &CollectiveError) {
        let limit = Instant::now() + REFUSAL_GRACE;
        let refusal = match error.clone() {
            CollectiveError::Missing { ranks, seconds, found_by, .. } => Refusal::Missing { ranks, seconds, found_by },
            CollectiveError::Fingerprint { rank, theirs, expected } => Refusal::Fingerprint { rank, theirs, expected },
            CollectiveError::TokenMismatch { ranks, .. } => Refusal::Token { ranks },
            _ => return,
        };
        let Ok(text) = serde_json::to_vec(&refusal) else { return };
        let rank = self.setup.rank;
        // If the store has failed, the other ranks notice by themselves.
        let published = self.store.compare_set(REFUSAL_KEY, b"", &text, limit);
        if published.and_then(|_| self.store.set(&leave_key(rank), b"", limit)).is_err() || rank != 0 {
            return;
        }
        // Ranks that were missing at the deadline are not waited for again.
        let missing = match refusal {
            Refusal::Missing { ranks, .. } => ranks,
            Refusal::Fingerprint { .. } | Refusal::Token { .. } => Vec::new(),
        };
        let still_reading =
            |r: usize| !missing.contains(&r) && !self.store.check(&[&leave_key(r)], limit).unwrap_or(true);
        while Instant::now() < limit && (1..self.setup.world).any(still_reading) {
            std::thread::sleep(POLL_INTERVAL);
        }
    }
}

fn nonce_key(rank: usize) -> String {
    format!("nonce/{rank}")
}

fn proof_key(rank: usize) -> String {
    format!("proof/{rank}")
}

fn fingerprint_key(rank: usize) -> String {
    format!("hello/{rank}")
}

fn leave_key(rank: usize) -> String {
    format!("bye/{rank}")
}

fn unreachable_host(setup: &Setup, begin: Instant, error: &ExtError) -> CollectiveError {
    if let ExtError::Unavailable { .. } = error {
        return CollectiveError::Backend { backend: setup.backend.name(), message: error.to_string() };
    }
    CollectiveError::Missing {
        ranks: vec![0],
        world: setup.world,
        address: setup.address.clone(),
        seconds: begin.elapsed().as_secs_f64(),
        found_by: setup.rank,
    }
}

/// Hosts the store, and returns it with the address it listens on.
fn host_store(setup: &Setup, deadline: Instant) -> Result<(Store, IpAddr)> {
    let cannot_listen = |e: &dyn std::fmt::Display| {
        CollectiveError::Setup(format!(
            "rank 0 cannot listen at {}: {e}; use an address of this machine",
            setup.address
        ))
    };
    let listener = resolve(&setup.address).and_then(TcpListener::bind).map_err(|e| cannot_listen(&e))?;
    let local_ip = listener.local_addr().map_err(|e| cannot_listen(&e))?.ip();
    let store = Store::host(listener, deadline).map_err(|e| match e {
        ExtError::Unavailable { .. } => unreachable_host(setup, Instant::now(), &e),
        e => cannot_listen(&e),
    })?;
    Ok((store, local_ip))
}

/// Connects to the store of rank 0, and returns it with the local address of the route to it.
fn join_store(setup: &Setup, begin: Instant, deadline: Instant) -> Result<(Store, IpAddr)> {
    // The host name may become resolvable only when rank 0 starts.
    let address = loop {
        match resolve(&setup.address) {
            Ok(address) => break address,
            Err(e) if Instant::now() >= deadline || e.kind() == std::io::ErrorKind::InvalidInput => {
                return Err(CollectiveError::Setup(format!("`{}` is not an address, host:port: {e}", setup.address)));
            }
            Err(_) => std::thread::sleep(RESOLVE_INTERVAL),
        }
    };
    let store = Store::join(address, deadline).map_err(|e| unreachable_host(setup, begin, &e))?;
    // Other ranks reach this machine at the local address of the route to rank 0.
    let unspecified: IpAddr =
        if address.is_ipv4() { std::net::Ipv4Addr::UNSPECIFIED.into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
    let route = UdpSocket::bind((unspecified, 0)).and_then(|s| s.connect(address).and_then(|()| s.local_addr()));
    let local_ip = route.map_err(|e| CollectiveError::Setup(format!("no route to {address}: {e}")))?.ip();
    Ok((store, local_ip))
}

/// Resolves a name to its first IPv4 address, or to its first address if it has no IPv4 address.
fn resolve(address: &str) -> std::io::Result<SocketAddr> {
    let addresses: Vec<SocketAddr> = address.to_socket_addrs()?.collect();
    let preferred = addresses.iter().find(|a| a.is_ipv4()).or(addresses.first()).copied();
    preferred.ok_or_else(|| std::io::Error::new(std::io::ErrorKind::NotFound, "the name has no address"))
}
