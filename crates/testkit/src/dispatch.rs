//! Reruns of numerical tests with other instruction sets of the tensor libraries.

use std::process::Command;

/// Environment variable that extends [`under_every_dispatch`] if it is `all`.
const EXTENT_VARIABLE: &str = "UNVEIL_DISPATCH";

/// Reruns `tests` (full names) of the calling binary once per instruction set of libtorch below the best one of this machine, which
/// ordinary runs use. Each run is a separate process, because libraries choose their code once.
///
/// With `UNVEIL_DISPATCH=all`, it reruns all tests of the binary whose names do not contain `every_dispatch`, with the best set, too.
///
/// # Panics
/// Panics if a test fails or does not exist, or `tests` is empty: without names a program would run itself without end.
pub fn under_every_dispatch(tests: &[&str]) {
    assert!(!tests.is_empty(), "name the tests to rerun");
    let everything = std::env::var(EXTENT_VARIABLE).is_ok_and(|extent| extent == "all");
    let program = std::env::current_exe().expect("a test has a program");
    for set in dispatches(everything) {
        let shown: Vec<String> = set.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let shown = shown.join(" ");
        let mut command = Command::new(&program);
        if everything {
            command.args(["--skip", "every_dispatch"]);
        } else {
            command.arg("--exact").args(tests);
        }
        // Waiting threads must not spin on a busy machine.
        let output = command.arg("--test-threads=2").env("OMP_WAIT_POLICY", "PASSIVE").envs(set).output();
        let output = output.unwrap_or_else(|e| panic!("{}: {e}", program.display()));
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{shown}: {text}");
        let passed = text.lines().find_map(|l| l.strip_prefix("test result: ok. ")?.split(' ').next()?.parse().ok());
        let ran = passed.unwrap_or(0usize);
        assert!(ran > 0 && (everything || ran == tests.len()), "{shown}: {ran} of {tests:?} ran: {text}");
    }
}

/// Returns the environment variables of each run, from the oldest instruction set to the best one of this machine. The best one is
/// included only with `own`, unless there is no other.
fn dispatches(own: bool) -> Vec<Vec<(&'static str, &'static str)>> {
    // libtorch does not check whether the machine supports the requested instruction set.
    #[cfg(target_arch = "x86_64")]
    let supported = [
        ("avx2", std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma")),
        (
            "avx512",
            std::arch::is_x86_feature_detected!("avx512f")
                && std::arch::is_x86_feature_detected!("avx512bw")
                && std::arch::is_x86_feature_detected!("avx512dq")
                && std::arch::is_x86_feature_detected!("avx512vl"),
        ),
    ];
    #[cfg(not(target_arch = "x86_64"))]
    let supported: [(&str, bool); 0] = [];
    let better = supported.into_iter().filter(|(_, detected)| *detected).map(|(name, _)| name);
    let mut sets: Vec<&'static str> = std::iter::once("default").chain(better).collect();
    if !own && sets.len() > 1 {
        sets.pop();
    }
    sets.into_iter().map(variables).collect()
}

/// Returns the variables that select an instruction set of libtorch, and that of the same processors in MKL, oneDNN and OpenBLAS.
fn variables(set: &'static str) -> Vec<(&'static str, &'static str)> {
    let (mkl, onednn, openblas) = match set {
        "avx512" => ("AVX512", "AVX512_CORE", "SkylakeX"),
        "avx2" => ("AVX2", "AVX2", "Haswell"),
        _ => ("SSE4_2", "SSE41", "Nehalem"),
    };
    vec![
        ("ATEN_CPU_CAPABILITY", set),
        ("MKL_ENABLE_INSTRUCTIONS", mkl),
        ("ONEDNN_MAX_CPU_ISA", onednn),
        ("OPENBLAS_CORETYPE", openblas),
    ]
}
