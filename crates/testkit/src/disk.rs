//! A small file system that tests fill up.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::Sandbox;

/// A directory on a memory file system of limited size, visible only to programs of [`SmallDisk::command`].
///
/// It is mounted in a separate mount namespace, so user namespaces are the only privilege that is required.
#[derive(Debug)]
pub struct SmallDisk {
    holder: Child,
    dir: PathBuf,
}

impl SmallDisk {
    /// Mounts a file system of `mib` MiB on `dir`, which must exist.
    ///
    /// # Panics
    /// Panics if the machine does not allow user namespaces.
    #[track_caller]
    pub fn mount(sandbox: &Sandbox, dir: &Path, mib: u32) -> Self {
        let script = format!("mount -t tmpfs -o size={mib}m tmpfs \"$0\" && touch \"$0/.mounted\" && exec sleep 600");
        let holder = sandbox
            .command(Path::new("unshare"), &["--user", "--map-root-user", "--mount", "sh", "-c", &script])
            .arg(dir)
            .stdin(Stdio::null())
            .spawn()
            .expect("unshare (util-linux) starts");
        let mut disk = Self { holder, dir: dir.to_owned() };
        for _ in 0..500 {
            if disk.path_outside(".mounted").exists() {
                return disk;
            }
            if let Ok(Some(status)) = disk.holder.try_wait() {
                panic!(
                    "a small disk cannot be mounted ({status}): user namespaces are required (sysctl kernel.unprivileged_userns_clone)"
                );
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("a small disk was not mounted within 5 s");
    }

    /// Prepares a command that sees the mounted disk.
    pub fn command(&self, sandbox: &Sandbox, program: &Path, args: &[&str]) -> Command {
        let target = self.holder.id().to_string();
        let mut command = sandbox
            .command(Path::new("nsenter"), &["--preserve-credentials", "--user", "--mount", "--target", &target]);
        command.arg(program).args(args);
        command
    }

    /// Returns the path of a file on the disk for this process, outside of the mount namespace.
    pub fn path_outside(&self, relative: &str) -> PathBuf {
        let inner = self.dir.strip_prefix("/").unwrap_or(&self.dir);
        PathBuf::from(format!("/proc/{}/root", self.holder.id())).join(inner).join(relative)
    }

    /// Fills the disk to the last byte.
    #[track_caller]
    pub fn fill(&self) {
        use std::io::Write;
        let path = self.path_outside("filler");
        let mut file = std::fs::File::create(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let block = vec![0u8; 1 << 20];
        for size in [1 << 20, 1 << 12, 1] {
            while file.write_all(&block[..size]).is_ok() {}
        }
    }

    /// Frees the filled space.
    pub fn free_space(&self) {
        let _missing = std::fs::remove_file(self.path_outside("filler"));
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _already_exited = self.holder.kill();
        let _reaped = self.holder.wait();
    }
}
