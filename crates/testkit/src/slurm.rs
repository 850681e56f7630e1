//! A real Slurm cluster on this machine: munge, the controller and one slurmd per node, all in a sandbox and on separate ports. Every node
//! is 127.0.0.1. The cluster stops on drop. Requires root, like slurmd.

use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use crate::process::{Finished, FoundProcess, Process, in_directory};
use crate::{Sandbox, events_of};

const TIMEOUT: Duration = Duration::from_secs(30);

/// A cluster of nodes `n1`, `n2`… with two CPUs each.
#[derive(Debug)]
pub struct MiniSlurm<'a> {
    sandbox: &'a Sandbox,
    dir: PathBuf,
    /// Slurmd by node; `None` if it was killed.
    nodes: Vec<Option<Process>>,
    _controller: Process,
    _munge: Process,
}

impl<'a> MiniSlurm<'a> {
    /// Starts the cluster and waits until every node is idle.
    ///
    /// # Panics
    /// Panics if Slurm is not installed or the user is not root; the message says what to do.
    #[track_caller]
    pub fn start(sandbox: &'a Sandbox, nodes: usize) -> Self {
        let root = std::fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0);
        assert!(root, "a test cluster of Slurm needs root: run the test as root");
        let dir = sandbox.path("slurm");
        for subdir in [dir.clone(), dir.join("state")].into_iter().chain((1..=nodes).map(|n| dir.join(format!("n{n}"))))
        {
            std::fs::create_dir(&subdir).unwrap_or_else(|e| panic!("{}: {e}", subdir.display()));
        }
        let key: Vec<u8> = (0..64).map(|i: u32| (i.wrapping_mul(37) ^ std::process::id()) as u8).collect();
        sandbox.write("slurm/munge.key", key);
        let private = std::fs::Permissions::from_mode(0o400);
        std::fs::set_permissions(dir.join("munge.key"), private).expect("the key is private");
        sandbox.write("slurm/slurm.conf", slurm_conf(&dir, nodes));
        let in_dir = |name: &str| format!("{}/{name}", dir.display());
        let munge = [
            "--foreground".into(),
            "--force".into(),
            format!("--key-file={}", in_dir("munge.key")),
            format!("--socket={}", in_dir("munge.sock")),
            format!("--pid-file={}", in_dir("munged.pid")),
            format!("--log-file={}", in_dir("munged.log")),
            format!("--seed-file={}", in_dir("munge.seed")),
        ];
        let daemon = |program: &str, args: &[String]| {
            let path = Path::new("/usr/sbin").join(program);
            let hint = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge";
            assert!(path.exists(), "{} is missing: {hint}", path.display());
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            sandbox.start(sandbox.command(&path, &args).env("SLURM_CONF", in_dir("slurm.conf")))
        };
        let mut munge = daemon("munged", &munge);
        munge.until("munge's socket", TIMEOUT, || dir.join("munge.sock").exists().then_some(()));
        let controller = daemon("slurmctld", &["-D".into(), "-c".into()]);
        let start = |n: usize| Some(daemon("slurmd", &["-D".into(), "-N".into(), format!("n{n}")]));
        let running = (1..=nodes).map(start).collect();
        let slurm = Self { sandbox, dir, nodes: running, _controller: controller, _munge: munge };
        slurm.until("all nodes idle", TIMEOUT, || {
            let states = slurm.run("sinfo", &["-h", "-N", "-o", "%t"]).stdout;
            (states.lines().filter(|s| *s == "idle").count() == nodes).then_some(())
        });
        slurm
    }

    /// Prepares a command that uses this cluster.
    pub fn command(&self, program: &Path, args: &[&str]) -> Command {
        let mut command = self.sandbox.command(program, args);
        command.env("SLURM_CONF", self.dir.join("slurm.conf"));
        command
    }

    /// Runs a command of Slurm until it exits.
    #[track_caller]
    pub fn run(&self, program: &str, args: &[&str]) -> Finished {
        self.sandbox.start(&mut self.command(Path::new(program), args)).wait(TIMEOUT)
    }

    /// Returns a field of `scontrol show job`, such as `JobState`.
    #[track_caller]
    pub fn job(&self, job: &str, field: &str) -> String {
        let shown = self.run("scontrol", &["show", "job", "-o", job]).ok().stdout;
        let value = shown.split_whitespace().find_map(|w| w.strip_prefix(field)?.strip_prefix('='));
        value.unwrap_or_else(|| panic!("no {field} in {shown}")).to_owned()
    }

    /// Waits until `ready` returns a value; `what` names it in messages.
    ///
    /// # Panics
    /// Panics with the logs of the controller and the jobs if the time is up.
    #[track_caller]
    pub fn until<T>(&self, what: &str, within: Duration, mut ready: impl FnMut() -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(value) = ready() {
                return value;
            }
            assert!(start.elapsed() < within, "no {what} within {within:?}\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits until a run has made `step` updates.
    #[track_caller]
    pub fn until_step(&self, run: &Path, step: u64, within: Duration) {
        let last = || events_of(run, "train").last().and_then(|e| e["step"].as_u64());
        self.until(&format!("update {step}"), within, || last().filter(|s| *s >= step));
    }

    /// Kills only the slurmd of node `n` (from 1): its job processes keep running, out of Slurm's reach.
    #[track_caller]
    pub fn kill_slurmd(&mut self, n: usize) {
        self.nodes[n - 1].take().unwrap_or_else(|| panic!("n{n} runs")).kill();
    }

    /// Kills node `n` and all processes on it.
    #[track_caller]
    pub fn kill_node(&mut self, n: usize) {
        self.kill_slurmd(n);
        in_directory(&self.dir.join(format!("n{n}"))).iter().for_each(FoundProcess::kill);
        self.on_node(n).iter().for_each(FoundProcess::kill);
    }

    /// Returns the job processes on node `n`.
    pub fn on_node(&self, n: usize) -> Vec<FoundProcess> {
        self.sandbox.processes_with("SLURMD_NODENAME", &format!("n{n}"))
    }

    /// Returns the last lines of the logs of the controller and the jobs.
    fn logs(&self) -> String {
        let mut files = vec![self.dir.join("slurmctld.log")];
        let logs = std::fs::read_dir(self.sandbox.path("run/logs")).into_iter().flatten().flatten();
        files.extend(logs.map(|e| e.path()));
        let mut out = String::new();
        for file in files {
            let text = std::fs::read_to_string(&file).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let end = lines[lines.len().saturating_sub(25)..].join("\n");
            out.push_str(&format!("--- {}\n{end}\n", file.display()));
        }
        out
    }
}

impl Drop for MiniSlurm<'_> {
    fn drop(&mut self) {
        // Stop the slurmds first, so that no daemon starts anything during the shutdown.
        self.nodes.clear();
        in_directory(&self.dir).iter().for_each(FoundProcess::kill);
    }
}

fn slurm_conf(dir: &Path, nodes: usize) -> String {
    let dir = dir.display();
    let first = free_ports(nodes as u16 + 1);
    let from = first + 1;
    let to = first + nodes as u16;
    // cred_expire: a requeued job waits that long. MessageTimeout: calls to a dead node are repeated that long before it counts as down.
    // NoInAddrAny: everything is on loopback.
    format!(
        "ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={first}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={dir}/munge.sock,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
MessageTimeout=5
MailProg=/bin/true
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/%n/slurmd.pid
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/%n
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/%n/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdTimeout=5
KillWait=5
MinJobAge=600
JobRequeue=1
NodeName=n[1-{nodes}] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{from}-{to}] CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"
    )
}

/// Returns the first of `n` consecutive free ports, above the ephemeral range of the system.
fn free_ports(n: u16) -> u16 {
    static COUNTER: AtomicU16 = AtomicU16::new(0);
    let block = (std::process::id() % 250) as u16 + COUNTER.fetch_add(1, Ordering::Relaxed) % 8;
    let start = 61_000 + block % 250 * 16;
    let candidates = (start..65_000).chain(61_000..start).step_by(16);
    let free = |first: &u16| (*first..*first + n).all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok());
    candidates.into_iter().find(free).expect("some free ports")
}
