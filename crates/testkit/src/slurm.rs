//! A real Slurm of several nodes on this machine: munge, the controller and one slurmd per node, all below a sandbox's directory, on ports
//! of their own. Every node is 127.0.0.1. All of it ends when it is dropped. Needs root, as slurmd does.

use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use crate::process::{Finished, Found, Process, in_directory};
use crate::{Sandbox, events_of};

const SOON: Duration = Duration::from_secs(30);

/// A cluster of nodes `n1`, `n2`… with two CPUs each.
pub struct MiniSlurm<'a> {
    sandbox: &'a Sandbox,
    dir: PathBuf,
    /// Node by node; none where one was killed.
    nodes: Vec<Option<Process>>,
    _controller: Process,
    _munge: Process,
}

impl<'a> MiniSlurm<'a> {
    /// Starts it and waits until every node is idle.
    ///
    /// # Panics
    /// Slurm is not installed, or this is not root; the message says what to do.
    #[track_caller]
    pub fn start(sandbox: &'a Sandbox, nodes: usize) -> Self {
        let root = std::fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0);
        assert!(root, "a Slurm of its own needs root: run the test as root");
        let dir = sandbox.path("slurm");
        for made in [dir.clone(), dir.join("state")].into_iter().chain((1..=nodes).map(|n| dir.join(format!("n{n}")))) {
            std::fs::create_dir(&made).unwrap_or_else(|e| panic!("{}: {e}", made.display()));
        }
        let key: Vec<u8> = (0..64).map(|i: u32| (i.wrapping_mul(37) ^ std::process::id()) as u8).collect();
        sandbox.write("slurm/munge.key", key);
        let private = std::fs::Permissions::from_mode(0o400);
        std::fs::set_permissions(dir.join("munge.key"), private).expect("the key is private");
        sandbox.write("slurm/slurm.conf", conf(&dir, nodes));
        let at = |name: &str| format!("{}/{name}", dir.display());
        let munge = [
            "--foreground".into(),
            "--force".into(),
            format!("--key-file={}", at("munge.key")),
            format!("--socket={}", at("munge.sock")),
            format!("--pid-file={}", at("munged.pid")),
            format!("--log-file={}", at("munged.log")),
            format!("--seed-file={}", at("munge.seed")),
        ];
        let daemon = |program: &str, args: &[String]| {
            let path = Path::new("/usr/sbin").join(program);
            let hint = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge";
            assert!(path.exists(), "{} is missing: {hint}", path.display());
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            sandbox.start(sandbox.command(&path, &args).env("SLURM_CONF", at("slurm.conf")))
        };
        let mut munge = daemon("munged", &munge);
        munge.until("munge's socket", SOON, || dir.join("munge.sock").exists().then_some(()));
        let controller = daemon("slurmctld", &["-D".into(), "-c".into()]);
        let start = |n: usize| Some(daemon("slurmd", &["-D".into(), "-N".into(), format!("n{n}")]));
        let running = (1..=nodes).map(start).collect();
        let slurm = Self { sandbox, dir, nodes: running, _controller: controller, _munge: munge };
        slurm.until("all nodes idle", SOON, || {
            let states = slurm.run("sinfo", &["-h", "-N", "-o", "%t"]).stdout;
            (states.lines().filter(|s| *s == "idle").count() == nodes).then_some(())
        });
        slurm
    }

    /// Prepares a program that finds this Slurm.
    pub fn command(&self, program: &Path, args: &[&str]) -> Command {
        let mut command = self.sandbox.command(program, args);
        command.env("SLURM_CONF", self.dir.join("slurm.conf"));
        command
    }

    /// Runs one of Slurm's commands to its end.
    #[track_caller]
    pub fn run(&self, program: &str, args: &[&str]) -> Finished {
        self.sandbox.start(&mut self.command(Path::new(program), args)).wait(SOON)
    }

    /// One field of `scontrol show job`, such as `JobState`.
    #[track_caller]
    pub fn job(&self, job: &str, field: &str) -> String {
        let shown = self.run("scontrol", &["show", "job", "-o", job]).ok().stdout;
        let value = shown.split_whitespace().find_map(|w| w.strip_prefix(field)?.strip_prefix('='));
        value.unwrap_or_else(|| panic!("no {field} in {shown}")).to_owned()
    }

    /// Waits until `ready` gives something.
    ///
    /// # Panics
    /// The time passed; the message has what the controller and the jobs said.
    #[track_caller]
    pub fn until<T>(&self, what: &str, within: Duration, mut ready: impl FnMut() -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(found) = ready() {
                return found;
            }
            assert!(start.elapsed() < within, "no {what} within {within:?}\n{}", self.told());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits until a run has done `step` updates.
    #[track_caller]
    pub fn until_step(&self, run: &Path, step: u64, within: Duration) {
        let last = || events_of(run, "train").last().and_then(|e| e["step"].as_u64());
        self.until(&format!("update {step}"), within, || last().filter(|s| *s >= step));
    }

    /// Kills the slurmd of node `n` (from 1) alone: what runs there lives on, out of Slurm's reach.
    #[track_caller]
    pub fn cut_off(&mut self, n: usize) {
        self.nodes[n - 1].take().unwrap_or_else(|| panic!("n{n} runs")).kill();
    }

    /// Kills node `n` and all that runs on it.
    #[track_caller]
    pub fn kill_node(&mut self, n: usize) {
        self.cut_off(n);
        in_directory(&self.dir.join(format!("n{n}"))).iter().for_each(Found::kill);
        self.on_node(n).iter().for_each(Found::kill);
    }

    /// Processes of jobs on node `n`.
    pub fn on_node(&self, n: usize) -> Vec<Found> {
        self.sandbox.processes_with("SLURMD_NODENAME", &format!("n{n}"))
    }

    fn told(&self) -> String {
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
        // No daemon may start something while it is being taken down.
        self.nodes.clear();
        in_directory(&self.dir).iter().for_each(Found::kill);
    }
}

fn conf(dir: &Path, nodes: usize) -> String {
    let (dir, first) = (dir.display(), free_ports(nodes as u16 + 1));
    let (from, to) = (first + 1, first + nodes as u16);
    // cred_expire: a job that is requeued waits that long. NoInAddrAny: all is on loopback.
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

/// The first of `n` ports in a row that nobody has, above those that the system hands out by itself.
fn free_ports(n: u16) -> u16 {
    static TAKEN: AtomicU16 = AtomicU16::new(0);
    let own = (std::process::id() % 250) as u16 + TAKEN.fetch_add(1, Ordering::Relaxed) % 8;
    let start = 61_000 + own % 250 * 16;
    let all = (start..65_000).chain(61_000..start).step_by(16);
    let free = |first: &u16| (*first..*first + n).all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok());
    all.into_iter().find(free).expect("some free ports")
}
