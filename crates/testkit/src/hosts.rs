//! Hosts with separate addresses on one network: network namespaces on a bridge, with a hosts file that tests rewrite.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::Sandbox;

/// Creates the bridge and the hosts, writes their process ids, and sleeps. Arguments: directory, number of hosts.
const SETUP_SCRIPT: &str = r#"
set -e
PATH=$PATH:/usr/sbin:/sbin
dir=$1; n=$2
ip link set lo up
ip link add br0 type bridge
ip link set br0 up
i=1
while [ "$i" -le "$n" ]; do
  unshare --net --mount sh -c 'mount --bind "$0" /etc/hosts && touch "$1" && exec sleep 900' "$dir/hosts" "$dir/up-$i" &
  pid=$!
  while [ ! -e "$dir/up-$i" ]; do kill -0 "$pid"; sleep 0.01; done
  ip link add "p$i" type veth peer name eth0 netns "$pid"
  ip link set "p$i" master br0 up
  nsenter --target "$pid" --net sh -c "ip link set lo up; ip addr add 10.77.0.$i/24 dev eth0; ip link set eth0 up"
  echo "$pid" > "$dir/pid-$i"
  i=$((i + 1))
done
touch "$dir/ready"
exec sleep 900
"#;

/// Hosts in a separate user namespace: user namespaces are the only privilege that is required, and the network of the machine is not
/// touched. They end with the sandbox.
#[derive(Debug)]
pub struct Hosts {
    holder: Child,
    dir: PathBuf,
    pids: Vec<String>,
}

impl Hosts {
    /// Starts `count` hosts, numbered from 1, without host names.
    ///
    /// # Panics
    /// Panics if the machine does not allow user namespaces or has no `ip`.
    #[track_caller]
    pub fn start(sandbox: &Sandbox, count: u8) -> Self {
        let dir = sandbox.path("hosts");
        std::fs::create_dir(&dir).expect("a directory for the hosts");
        std::fs::write(dir.join("hosts"), "127.0.0.1 localhost\n").expect("a hosts file");
        let shown = dir.to_string_lossy();
        let args = [
            "--user",
            "--map-root-user",
            "--net",
            "--mount",
            "sh",
            "-c",
            SETUP_SCRIPT,
            "sh",
            &shown,
            &count.to_string(),
        ];
        let mut holder = sandbox
            .command(Path::new("unshare"), &args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("unshare (util-linux) starts");
        let start = Instant::now();
        while !dir.join("ready").exists() {
            if let Ok(Some(status)) = holder.try_wait() {
                panic!(
                    "hosts cannot be created ({status}): user namespaces (sysctl kernel.unprivileged_userns_clone) and iproute2 are required"
                );
            }
            assert!(start.elapsed() < Duration::from_secs(20), "hosts were not created within 20 s");
            std::thread::sleep(Duration::from_millis(10));
        }
        let pid = |i: u8| std::fs::read_to_string(dir.join(format!("pid-{i}"))).expect("the host's process id");
        let pids = (1..=count).map(|i| pid(i).trim().to_owned()).collect();
        Self { holder, dir, pids }
    }

    /// Returns the address of a host.
    pub fn address(host: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, host)
    }

    /// Prepares a command on a host. Its working directory is `/`: use absolute paths.
    pub fn command(&self, sandbox: &Sandbox, host: u8, program: &Path, args: &[&str]) -> Command {
        let target = &self.pids[usize::from(host) - 1];
        let enter = ["--preserve-credentials", "--user", "--net", "--mount", "--target", target];
        let mut command = sandbox.command(Path::new("nsenter"), &enter);
        command.arg(program).args(args);
        command
    }

    /// Sets the host names, on all hosts and with immediate effect.
    #[track_caller]
    pub fn set_names(&self, names: &[(&str, u8)]) {
        let mut text = "127.0.0.1 localhost\n".to_owned();
        for (name, host) in names {
            text.push_str(&format!("{} {name}\n", Self::address(*host)));
        }
        // Written in place, because the file is bind-mounted.
        std::fs::write(self.dir.join("hosts"), text).expect("the hosts file");
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        let _already_exited = self.holder.kill();
        let _reaped = self.holder.wait();
    }
}
