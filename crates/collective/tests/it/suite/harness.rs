//! Starts rank processes, waits for them with a time limit and kills them; contains the entry point of a rank process too.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use unveil_collective::{Backend, CollectiveError, Fault, Setup, Timeouts, World, open_reporting_address};

use super::{RankSpec, RankTask, TestBackend, conform, fail};

/// Environment variable with the JSON of a rank's [`RankSpec`].
const SPEC_VARIABLE: &str = "UNVEIL_COLLECTIVE_SPEC";

/// Time within which every rank must end after another one has failed.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// The result of a rank process, which it prints as JSON.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub error: Option<String>,
    pub fault: Option<Fault>,
    /// The error of one more call after the failure.
    pub next_error: Option<String>,
    /// Seconds from the start of the failed call to its error.
    pub seconds: f64,
}

/// A rank process.
pub(crate) struct RankProcess {
    child: Child,
    pub rank: usize,
    lines: mpsc::Receiver<String>,
}

impl RankSpec {
    pub(crate) fn new(rank: usize, world: usize, backend: TestBackend, task: &RankTask) -> Self {
        Self {
            rank,
            world,
            address: "127.0.0.1:0".into(),
            backend,
            fingerprint: "v1".into(),
            token: None,
            rendezvous_ms: 60_000,
            task: task.clone(),
        }
    }

    pub(crate) fn start(&self) -> RankProcess {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["rank", "--exact", "--ignored", "--nocapture"]);
        command.env(SPEC_VARIABLE, serde_json::to_string(self).unwrap()).env("OMP_NUM_THREADS", "1");
        if self.backend == TestBackend::Nccl {
            // NCCL lets two ranks share one GPU if it takes them for two machines.
            command.env("NCCL_HOSTID", format!("rank{}", self.rank)).env("NCCL_P2P_DISABLE", "1");
            command.env("NCCL_SHM_DISABLE", "1").env("NCCL_NET", "Socket").env("NCCL_SOCKET_IFNAME", "lo");
        }
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (send, lines) = mpsc::channel();
        forward_lines(child.stdout.take().unwrap(), send);
        RankProcess { child, rank: self.rank, lines }
    }
}

fn forward_lines(stdout: ChildStdout, send: mpsc::Sender<String>) {
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            let _receiver_dropped = send.send(line);
        }
    });
}

impl RankProcess {
    /// Returns the rest of the next line with `word`; `None` when the process ends or the deadline passes first.
    fn line(&self, word: &str, deadline: Instant) -> Option<String> {
        loop {
            let line = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok()?;
            // The test harness may have written the start of the line.
            if let Some((_, rest)) = line.split_once(word) {
                return Some(rest.to_owned());
            }
        }
    }

    /// Waits for the rank's outcome.
    #[track_caller]
    pub(crate) fn outcome(&mut self, limit: Duration) -> Outcome {
        match self.line("OUTCOME ", Instant::now() + limit) {
            Some(text) => serde_json::from_str(&text).unwrap(),
            None => {
                let _already_exited = self.child.kill();
                let mut stderr = String::new();
                let _unreadable = self.child.stderr.take().unwrap().read_to_string(&mut stderr);
                panic!("rank {} printed no outcome within {limit:?}; its stderr:\n{stderr}", self.rank);
            }
        }
    }

    /// Resumes a stopped process.
    pub(crate) fn resume(&self) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT).unwrap();
    }

    /// Waits for the process to exit.
    #[track_caller]
    pub(crate) fn wait_for_exit(&mut self, limit: Duration) {
        let deadline = Instant::now() + limit;
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "rank {} printed its outcome but does not exit", self.rank);
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for RankProcess {
    fn drop(&mut self) {
        let _already_exited = self.child.kill();
        let _status = self.child.wait();
    }
}

/// Starts rank 0, and the others with the address that it picked.
#[track_caller]
pub(crate) fn start_all(world: usize, backend: TestBackend, task: &RankTask) -> Vec<RankProcess> {
    let first = RankSpec::new(0, world, backend, task).start();
    if world == 1 {
        return vec![first];
    }
    let address = address_of(&first);
    let rest = (1..world)
        .map(|rank| RankSpec { address: address.clone(), ..RankSpec::new(rank, world, backend, task) }.start());
    std::iter::once(first).chain(rest).collect()
}

#[track_caller]
pub(crate) fn address_of(first: &RankProcess) -> String {
    first.line("ADDRESS ", Instant::now() + Duration::from_secs(60)).expect("rank 0 prints its address")
}

/// Runs a rank process: the body of the ignored test `rank`.
pub(crate) fn rank() {
    let spec = std::env::var(SPEC_VARIABLE).expect("the other tests start this one");
    let spec: RankSpec = serde_json::from_str(&spec).unwrap();
    tch::set_num_threads(1);
    let outcome = match open(&spec) {
        Err(e) => Outcome { error: Some(e.to_string()), ..Outcome::default() },
        Ok(world) => match &spec.task {
            RankTask::Conform { seed } => {
                conform::check_all_calls(&world, spec.backend, *seed);
                Outcome::default()
            }
            RankTask::Join => outcome_of(unveil_collective::Collective::barrier(world.group()).err()),
            RankTask::Fail { collective, victim, mode } => {
                fail::call_until_failure(&world, device(spec.backend), collective, *victim, *mode)
            }
            RankTask::FailInShards { victim } => {
                fail::call_in_shards_until_failure(&world, device(spec.backend), *victim)
            }
            RankTask::DifferentCalls => fail::make_different_calls(&world, device(spec.backend)),
        },
    };
    println!("OUTCOME {}", serde_json::to_string(&outcome).unwrap());
}

pub(crate) fn outcome_of(error: Option<CollectiveError>) -> Outcome {
    let fault = match &error {
        Some(CollectiveError::Fault(fault)) => Some((**fault).clone()),
        _ => None,
    };
    Outcome { error: error.map(|e| e.to_string()), fault, ..Outcome::default() }
}

pub(crate) fn device(backend: TestBackend) -> tch::Device {
    if backend == TestBackend::Nccl { tch::Device::Cuda(0) } else { tch::Device::Cpu }
}

fn open(spec: &RankSpec) -> Result<World, CollectiveError> {
    let backend = if spec.backend == TestBackend::Nccl { Backend::Nccl { device: 0 } } else { Backend::Gloo };
    let timeouts = Timeouts {
        rendezvous: Duration::from_millis(spec.rendezvous_ms),
        call: Duration::from_secs(60),
        heartbeat_interval: Duration::from_millis(100),
        heartbeat: Duration::from_secs(3),
    };
    let setup = Setup {
        rank: spec.rank,
        world: spec.world,
        address: spec.address.clone(),
        local_address: None,
        backend,
        fingerprint: spec.fingerprint.clone(),
        token: spec.token.as_deref().map(unveil_core::Secret::new),
        timeouts,
    };
    open_reporting_address(&setup, |address| println!("\nADDRESS {address}"))
}

/// Checks all calls among `world` ranks, each in its own process.
pub(crate) fn check_calls(world: usize, backend: TestBackend) {
    let seed = u64::from(std::process::id());
    for mut rank in start_all(world, backend, &RankTask::Conform { seed }) {
        let outcome = rank.outcome(Duration::from_secs(300));
        assert!(outcome.error.is_none(), "seed {seed}: {outcome:?}");
        rank.wait_for_exit(LIMIT);
    }
}
