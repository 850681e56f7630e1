//! Builds the C++ files into shared libraries that the crate embeds; a library that this machine cannot build becomes an empty file.

#![allow(clippy::disallowed_methods, reason = "cargo passes its settings in environment variables")]

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-changed=cpp");
    // Portable code with OpenMP, whose runtime libtorch has loaded; one build per instruction set that is worth it. Products and sums
    // are fused where the code says so, never by the compiler: results would depend on how it unrolls a loop.
    let common = ["-O3", "-fopenmp", "-Wno-psabi"];
    // `v3_wide`: AVX-512 vectors in AVX2 instructions, for tests on hosts without AVX-512.
    let levels: &[(&str, &[&str])] = match std::env::var("CARGO_CFG_TARGET_ARCH").as_deref() {
        Ok("x86_64") => &[
            ("x86_64", &["-ffp-contract=off", "-march=x86-64"]),
            ("x86_64_v3", &["-ffp-contract=off", "-march=x86-64-v3"]),
            ("x86_64_v3_wide", &["-ffp-contract=off", "-march=x86-64-v3", "-DUNVEIL_LANES=16"]),
            ("x86_64_v4", &["-ffp-contract=off", "-march=x86-64-v4"]),
        ],
        _ => &[("native", &["-ffp-contract=fast", "-march=native"])],
    };
    for (level, flags) in levels {
        compile(&format!("cpu_{level}"), "cpu/step.cc", &[&common, *flags].concat(), &[], None);
    }
    let torch = std::env::var_os("LIBTORCH").map(PathBuf::from);
    match torch.as_deref().and_then(|torch| Some((torch, cuda_headers(torch)?))) {
        Some((torch, cuda)) => {
            let headers = [torch.join("include"), torch.join("include/torch/csrc/api/include"), cuda];
            let libraries = ["-ltorch_cuda", "-lc10_cuda", "-ltorch_cpu", "-lc10"];
            compile("cuda", "cuda.cc", &["-O2"], &headers, Some((torch, &libraries)));
        }
        None => {
            println!("cargo:warning=no CUDA headers next to libtorch: decoding on a GPU will not use graphs");
            leave_out("cuda");
        }
    }
    for name in ["store", "memory", "context", "autograd", "operations", "packed_attention", "precision"] {
        match torch.as_deref() {
            Some(torch) => {
                let headers = [torch.join("include"), torch.join("include/torch/csrc/api/include")];
                compile(name, &format!("{name}.cc"), &["-O2"], &headers, Some((torch, &["-ltorch_cpu", "-lc10"])));
            }
            None => leave_out(name),
        }
    }
    match torch.as_deref().zip(gloo_headers()) {
        Some((torch, gloo)) => {
            let headers = [torch.join("include"), torch.join("include/torch/csrc/api/include"), gloo];
            compile("gloo", "gloo.cc", &["-O2"], &headers, Some((torch, &["-ltorch_cpu", "-lc10"])));
        }
        None => {
            println!(
                "cargo:warning=no Gloo headers (Debian: libgloo-dev): ranks on CPUs will not be able to communicate"
            );
            // Look again after a package was installed.
            if Path::new(PACKAGES).exists() {
                println!("cargo:rerun-if-changed={PACKAGES}");
            }
            leave_out("gloo");
        }
    }
}

/// A file that Debian changes whenever a package is installed or removed.
const PACKAGES: &str = "/var/lib/dpkg/status";

/// Finds Gloo's headers; libtorch contains the code but does not ship them.
fn gloo_headers() -> Option<PathBuf> {
    ["/usr/local/include", "/usr/include"].map(PathBuf::from).into_iter().find(|p| p.join("gloo/context.h").exists())
}

/// Finds the headers of the CUDA runtime next to the torch package.
fn cuda_headers(torch: &Path) -> Option<PathBuf> {
    let site = torch.parent()?;
    let candidates = ["nvidia/cu13/include", "nvidia/cuda_runtime/include"].map(|p| site.join(p));
    candidates.into_iter().find(|p| p.join("crt/host_config.h").exists() && p.join("cuda_runtime_api.h").exists())
}

fn out(name: &str) -> PathBuf {
    PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join(format!("libunveil_{name}.so"))
}

fn leave_out(name: &str) {
    std::fs::write(out(name), b"").expect("OUT_DIR can be written");
}

/// Builds one file under cpp/, linked with the given libraries of libtorch, if any.
fn compile(name: &str, source: &str, flags: &[&str], headers: &[PathBuf], torch: Option<(&Path, &[&str])>) {
    let source = format!("cpp/{source}");
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let mut command = Command::new(&compiler);
    command.args(["-std=c++20", "-Wall", "-fPIC", "-shared", "-D_GLIBCXX_USE_CXX11_ABI=1"]).args(flags).arg(&source);
    for folder in headers.iter().filter(|p| *p != Path::new("/usr/include")) {
        command.arg("-isystem").arg(folder);
    }
    if let Some((torch, libraries)) = torch {
        command.arg("-L").arg(torch.join("lib")).arg("-Wl,--no-as-needed").args(libraries);
    }
    match command.arg("-o").arg(out(name)).status() {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{compiler} could not build {source} ({status})"),
        Err(e) => panic!("{compiler} is needed to build {source}: {e}"),
    }
}
