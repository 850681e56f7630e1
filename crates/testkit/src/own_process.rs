//! Tests of the calling binary that run in their own process.

use std::process::{Child, Command};

/// Prepares a process that runs one ignored test of the calling binary, named with its modules, with one tensor thread.
pub fn ignored_test(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("the running test has a path"));
    command.args([name, "--exact", "--ignored", "--nocapture"]).env("OMP_NUM_THREADS", "1");
    command
}

/// A process that is killed on drop.
#[derive(Debug)]
pub struct KilledOnDrop(pub Child);

impl Drop for KilledOnDrop {
    fn drop(&mut self) {
        let _already_exited = self.0.kill();
        let _ended = self.0.wait();
    }
}
