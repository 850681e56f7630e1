//! Stage 1 as one process per rank, which end together.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::LaunchError;
use crate::gpus::Gpu;
use crate::role_process::{RoleCommand, RoleProcess};

/// Timeout for rank 0 to load the model's configuration and listen for the other ranks.
const READY_TIMEOUT: Duration = Duration::from_secs(300);

/// The processes of stage 1.
pub(crate) struct Stage1<'a> {
    pub unveil: &'a Path,
    pub config: &'a Path,
    pub logs: &'a Path,
    /// The GPU of each rank; `None` on CPUs.
    pub ranks: Vec<Option<Gpu>>,
}

impl Stage1<'_> {
    /// Runs until rank 0 has ended; all processes have ended when this returns.
    ///
    /// # Errors
    /// Returns [`LaunchError::Interrupted`] once `stop` returns true, and [`LaunchError::Role`] for a rank that failed.
    pub(crate) fn run(&self, stop: &dyn Fn() -> bool) -> Result<(), LaunchError> {
        let mut first = self.start(0, None)?;
        let mut others = Vec::new();
        let outcome = self.run_ranks(&mut first, &mut others, stop);
        let deadline = Instant::now() + Duration::from_secs(4);
        for role in std::iter::once(&mut first).chain(&mut others) {
            if role.exit_status().is_none() {
                role.terminate();
            }
        }
        for role in std::iter::once(&mut first).chain(&mut others) {
            role.reap(deadline);
        }
        outcome
    }

    fn run_ranks(
        &self,
        first: &mut RoleProcess,
        others: &mut Vec<RoleProcess>,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), LaunchError> {
        let check_stop = || if stop() { Err(LaunchError::Interrupted) } else { Ok(()) };
        if self.ranks.len() > 1 {
            let rendezvous = first.wait_for_address(READY_TIMEOUT, &mut || check_stop())?;
            for rank in 1..self.ranks.len() {
                others.push(self.start(rank, Some(&rendezvous))?);
            }
        }
        loop {
            check_stop()?;
            if let Some(status) = first.exit_status() {
                if status.success() {
                    return Ok(());
                }
                // Rank 0 fails because of another rank as well, whose log says why.
                let failed = others.iter_mut().find_map(|r| Some((r.exit_status().filter(|s| !s.success())?, r)));
                return Err(failed.map_or_else(|| first.failure(status), |(status, rank)| rank.failure(status)));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Starts a rank; stderr of rank 0 goes to the terminal.
    fn start(&self, rank: usize, rendezvous: Option<&str>) -> Result<RoleProcess, LaunchError> {
        let name = if rank == 0 { "sft".to_owned() } else { format!("sft-{rank}") };
        let mut args: Vec<String> =
            ["sft", "--config", &self.config.display().to_string(), "--supervised"].map(str::to_owned).to_vec();
        if let Some(rendezvous) = rendezvous {
            let sets = [format!("sft.parallel.rank={rank}"), format!("sft.parallel.rendezvous={rendezvous}")];
            args.extend(sets.into_iter().flat_map(|set| ["--set".to_owned(), set]));
        }
        let log = self.logs.join(format!("{name}.log"));
        let gpu = self.ranks[rank].as_ref();
        RoleProcess::start(RoleCommand { name: &name, program: self.unveil, args, log: &log, shown: rank == 0, gpu })
    }
}
