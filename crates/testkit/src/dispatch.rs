//! Tests that compare floating point, run again in processes whose libraries take the code of another instruction set.

use std::process::Command;

/// Runs the tests of the calling test's own binary once more for each instruction set of this machine that libtorch has code for, with
/// MKL's and OpenBLAS's code for older processors beside the oldest: those that are named, or all whose name does not hold
/// `every_dispatch`. Each process has the variables from its start, since libraries choose once.
///
/// # Panics
/// A test fails, or there is none of that name.
pub fn under_every_dispatch(only: &[&str]) {
    let program = std::env::current_exe().expect("a test has a program");
    for set in dispatches() {
        let shown: Vec<String> = set.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let shown = shown.join(" ");
        let mut run = Command::new(&program);
        match only {
            [] => run.args(["--skip", "every_dispatch"]),
            only => run.arg("--exact").args(only),
        };
        // On a busy machine threads that wait must not spin.
        let done = run.arg("--test-threads=2").env("OMP_WAIT_POLICY", "PASSIVE").envs(set).output();
        let done = done.unwrap_or_else(|e| panic!("{}: {e}", program.display()));
        let said = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        assert!(done.status.success(), "{shown}: {said}");
        let passed = said.lines().find_map(|l| l.strip_prefix("test result: ok. ")?.split(' ').next()?.parse().ok());
        let ran = passed.unwrap_or(0usize);
        assert!(ran > 0 && (only.is_empty() || ran == only.len()), "{shown}: {ran} of {only:?} ran: {said}");
    }
}

/// Variables of each process.
fn dispatches() -> Vec<Vec<(&'static str, &'static str)>> {
    const ATEN: &str = "ATEN_CPU_CAPABILITY";
    let mut all = vec![
        vec![(ATEN, "default")],
        vec![(ATEN, "default"), ("MKL_ENABLE_INSTRUCTIONS", "SSE4_2"), ("OPENBLAS_CORETYPE", "Nehalem")],
    ];
    // libtorch does not ask whether the machine has what it is told to use.
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
            all.push(vec![(ATEN, "avx2"), ("OPENBLAS_CORETYPE", "Haswell")]);
        }
        let avx512 = std::arch::is_x86_feature_detected!("avx512f")
            && std::arch::is_x86_feature_detected!("avx512bw")
            && std::arch::is_x86_feature_detected!("avx512dq")
            && std::arch::is_x86_feature_detected!("avx512vl");
        if avx512 {
            all.push(vec![(ATEN, "avx512"), ("OPENBLAS_CORETYPE", "SkylakeX")]);
        }
    }
    all
}
