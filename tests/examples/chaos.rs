//! Runs the soak (`make chaos SEED=… FAULTS=…`): prints every fault as it happens and the verdict as JSON at the end. Exits with code 1 if
//! anything is wrong.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "an example prints its results")]

use std::process::ExitCode;
use std::time::Duration;

use unveil_tests::chaos::{Plan, soak};

fn main() -> ExitCode {
    let numbers: Vec<u64> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let [seed, faults] = numbers[..] else {
        eprintln!("usage: chaos SEED FAULTS");
        return ExitCode::from(2);
    };
    let plan = Plan { seed, faults: faults as usize, max_duration: Duration::from_secs(12) };
    let verdict = soak(plan, &mut |line| println!("{line}"));
    match serde_json::to_string_pretty(&verdict) {
        Ok(text) => println!("{text}"),
        Err(e) => eprintln!("error: the verdict cannot be written: {e}"),
    }
    if verdict.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
