//! Builds the CUDA part into a shared library that the crate carries in itself; an empty file where the CUDA headers that come
//! with torch's GPU packages are not there.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=cpp/cuda.cc");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("libunveil_cuda.so");
    let built = std::env::var_os("LIBTORCH").map(PathBuf::from).is_some_and(|torch| build(&torch, &out));
    if !built {
        std::fs::write(&out, b"").expect("OUT_DIR can be written");
    }
}

fn build(torch: &Path, out: &Path) -> bool {
    // The headers of the CUDA runtime lie beside the torch package.
    let Some(site) = torch.parent() else { return false };
    let headers = ["nvidia/cu13/include", "nvidia/cuda_runtime/include"].map(|p| site.join(p));
    let Some(cuda) =
        headers.iter().find(|p| p.join("crt/host_config.h").exists() && p.join("cuda_runtime_api.h").exists())
    else {
        println!("cargo:warning=no CUDA headers beside {}: decoding on a GPU will not use graphs", torch.display());
        return false;
    };
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let status = Command::new(&compiler)
        .args(["-std=c++20", "-O2", "-fPIC", "-shared", "-D_GLIBCXX_USE_CXX11_ABI=1", "cpp/cuda.cc"])
        .arg("-isystem")
        .arg(torch.join("include"))
        .arg("-isystem")
        .arg(torch.join("include/torch/csrc/api/include"))
        .arg("-isystem")
        .arg(cuda)
        .arg("-L")
        .arg(torch.join("lib"))
        .args(["-Wl,--no-as-needed", "-ltorch_cuda", "-lc10_cuda", "-ltorch_cpu", "-lc10", "-o"])
        .arg(out)
        .status();
    match status {
        Ok(status) if status.success() => true,
        Ok(status) => panic!("{compiler} could not build cpp/cuda.cc ({status})"),
        Err(e) => panic!("{compiler} is needed to build cpp/cuda.cc: {e}"),
    }
}
