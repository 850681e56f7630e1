//! Reruns of numerical tests with other instruction sets of the tensor libraries.

use std::process::Command;

/// Reruns tests of the calling binary once per instruction set that both this machine and libtorch support, and once with the code of MKL
/// and OpenBLAS for old processors. `only` lists full test names, or modules (`name::`); empty runs all tests of the binary. Tests with
/// `every_dispatch` in their name are left out of modules. Each run is a separate process, because libraries choose their code once.
///
/// # Panics
/// Panics if a test fails or does not exist.
pub fn under_every_dispatch(only: &[&str]) {
    let program = std::env::current_exe().expect("a test has a program");
    for set in dispatches() {
        let shown: Vec<String> = set.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let shown = shown.join(" ");
        let mut command = Command::new(&program);
        let whole_modules = only.iter().all(|name| name.ends_with("::"));
        match only {
            modules if whole_modules => command.args(modules).args(["--skip", "every_dispatch"]),
            only => command.arg("--exact").args(only),
        };
        // Waiting threads must not spin on a busy machine.
        let output = command.arg("--test-threads=2").env("OMP_WAIT_POLICY", "PASSIVE").envs(set).output();
        let output = output.unwrap_or_else(|e| panic!("{}: {e}", program.display()));
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{shown}: {text}");
        let passed = text.lines().find_map(|l| l.strip_prefix("test result: ok. ")?.split(' ').next()?.parse().ok());
        let ran = passed.unwrap_or(0usize);
        assert!(ran > 0 && (whole_modules || ran == only.len()), "{shown}: {ran} of {only:?} ran: {text}");
    }
}

/// Returns the environment variables of each run.
fn dispatches() -> Vec<Vec<(&'static str, &'static str)>> {
    const ATEN: &str = "ATEN_CPU_CAPABILITY";
    let mut all = vec![
        vec![(ATEN, "default")],
        vec![(ATEN, "default"), ("MKL_ENABLE_INSTRUCTIONS", "SSE4_2"), ("OPENBLAS_CORETYPE", "Nehalem")],
    ];
    // libtorch does not check whether the machine supports the requested instruction set.
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
