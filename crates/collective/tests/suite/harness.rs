//! Starts ranks, waits for them with a limit, and ends them; and what a started rank does first.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use unveil_collective::{Backend, CollectiveError, Fault, Setup, Timing, World, open_with};

use super::{Kind, Spec, Task, conform, fail};

const SPEC: &str = "UNVEIL_COLLECTIVE_SPEC";

/// Every rank must have ended so long after another failed.
pub const LIMIT: Duration = Duration::from_secs(30);

/// How a rank ended.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Outcome {
    pub error: Option<String>,
    pub fault: Option<Fault>,
    /// The error of one more call after the failure.
    pub again: Option<String>,
    /// From the begin of the call that failed to its error.
    pub seconds: f64,
}

/// One process.
pub struct Rank {
    child: Child,
    pub rank: usize,
    lines: mpsc::Receiver<String>,
}

impl Spec {
    pub fn new(rank: usize, world: usize, backend: Kind, task: &Task) -> Self {
        let (address, fingerprint) = ("127.0.0.1:0".into(), "v1".into());
        Self { rank, world, address, backend, fingerprint, token: None, join_ms: 60_000, task: task.clone() }
    }

    pub fn start(&self) -> Rank {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["rank", "--exact", "--ignored", "--nocapture"]);
        command.env(SPEC, serde_json::to_string(self).unwrap()).env("OMP_NUM_THREADS", "1");
        if self.backend == Kind::Nccl {
            // Two ranks may share one GPU when NCCL takes them for two machines.
            command.env("NCCL_HOSTID", format!("rank{}", self.rank)).env("NCCL_P2P_DISABLE", "1");
            command.env("NCCL_SHM_DISABLE", "1").env("NCCL_NET", "Socket").env("NCCL_SOCKET_IFNAME", "lo");
        }
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (send, lines) = mpsc::channel();
        forward(child.stdout.take().unwrap(), send);
        Rank { child, rank: self.rank, lines }
    }
}

fn forward(out: ChildStdout, send: mpsc::Sender<String>) {
    std::thread::spawn(move || {
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            let _gone = send.send(line);
        }
    });
}

impl Rank {
    /// The next line that begins with `word`, without it; none when the process ends or `end` comes first.
    fn line(&self, word: &str, end: Instant) -> Option<String> {
        loop {
            let line = self.lines.recv_timeout(end.saturating_duration_since(Instant::now())).ok()?;
            // The test harness may have begun the line.
            if let Some((_, rest)) = line.split_once(word) {
                return Some(rest.to_owned());
            }
        }
    }

    /// Waits for the rank's outcome.
    #[track_caller]
    pub fn outcome(&mut self, limit: Duration) -> Outcome {
        match self.line("OUTCOME ", Instant::now() + limit) {
            Some(text) => serde_json::from_str(&text).unwrap(),
            None => {
                let _ended = self.child.kill();
                let mut stderr = String::new();
                let _lost = self.child.stderr.take().unwrap().read_to_string(&mut stderr);
                panic!("rank {} gave no outcome within {limit:?}; its stderr:\n{stderr}", self.rank);
            }
        }
    }

    /// Lets a stopped process go on.
    pub fn wake(&self) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT).unwrap();
    }

    /// Waits for the process itself to end.
    #[track_caller]
    pub fn ended(&mut self, limit: Duration) {
        let end = Instant::now() + limit;
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < end, "rank {} has its outcome but does not end", self.rank);
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Starts rank 0, and the others at the address that it picked.
#[track_caller]
pub fn start_all(world: usize, backend: Kind, task: &Task) -> Vec<Rank> {
    let first = Spec::new(0, world, backend, task).start();
    if world == 1 {
        return vec![first];
    }
    let address = address_of(&first);
    let rest =
        (1..world).map(|rank| Spec { address: address.clone(), ..Spec::new(rank, world, backend, task) }.start());
    std::iter::once(first).chain(rest).collect()
}

#[track_caller]
pub fn address_of(first: &Rank) -> String {
    first.line("ADDRESS ", Instant::now() + Duration::from_secs(60)).expect("rank 0 tells its address")
}

/// The body of the test `rank`, which is not one by itself.
pub fn rank() {
    let spec = std::env::var(SPEC).expect("this is started by the other tests of the file, not by hand");
    let spec: Spec = serde_json::from_str(&spec).unwrap();
    tch::set_num_threads(1);
    let outcome = match open(&spec) {
        Err(e) => Outcome { error: Some(e.to_string()), ..Outcome::default() },
        Ok(world) => match &spec.task {
            Task::Conform { seed } => {
                conform::all(&world, spec.backend, *seed);
                Outcome::default()
            }
            Task::Meet => of(unveil_collective::Collective::barrier(world.group()).err()),
            Task::Fail { collective, victim, how } => {
                fail::until(&world, device(spec.backend), collective, *victim, *how)
            }
            Task::FailInShards { victim } => fail::in_shards(&world, device(spec.backend), *victim),
            Task::Differ => fail::differ(&world, device(spec.backend)),
        },
    };
    println!("OUTCOME {}", serde_json::to_string(&outcome).unwrap());
}

pub fn of(error: Option<CollectiveError>) -> Outcome {
    let fault = match &error {
        Some(CollectiveError::Fault(fault)) => Some((**fault).clone()),
        _ => None,
    };
    Outcome { error: error.map(|e| e.to_string()), fault, ..Outcome::default() }
}

pub fn device(backend: Kind) -> tch::Device {
    if backend == Kind::Nccl { tch::Device::Cuda(0) } else { tch::Device::Cpu }
}

fn open(spec: &Spec) -> Result<World, CollectiveError> {
    let backend = if spec.backend == Kind::Nccl { Backend::Nccl { device: 0 } } else { Backend::Gloo };
    let timing = Timing {
        join: Duration::from_millis(spec.join_ms),
        call: Duration::from_secs(60),
        beat: Duration::from_millis(100),
        lost: Duration::from_secs(3),
    };
    let setup = Setup {
        rank: spec.rank,
        world: spec.world,
        address: spec.address.clone(),
        local: None,
        backend,
        fingerprint: spec.fingerprint.clone(),
        token: spec.token.as_deref().map(unveil_core::Secret::new),
        timing,
    };
    open_with(&setup, |address| println!("\nADDRESS {address}"))
}

/// All calls among `world` ranks, each in a process of its own.
pub fn check_calls(world: usize, backend: Kind) {
    let seed = u64::from(std::process::id());
    for mut rank in start_all(world, backend, &Task::Conform { seed }) {
        let outcome = rank.outcome(Duration::from_secs(300));
        assert!(outcome.error.is_none(), "seed {seed}: {outcome:?}");
        rank.ended(LIMIT);
    }
}
