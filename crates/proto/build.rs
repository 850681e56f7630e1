//! Compiles proto/ into OUT_DIR with protox, so that `protoc` need not be installed.

#![allow(clippy::disallowed_methods, reason = "cargo passes its settings in environment variables")]

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto");
    let files = ["unveil/v1/common.proto", "unveil/v1/reward.proto", "unveil/v1/experience.proto"];
    println!("cargo:rerun-if-changed={}", root.display());
    let set = protox::compile(files, [&root])?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptor.bin"), protox::prost::Message::encode_to_vec(&set))?;
    tonic_prost_build::configure().bytes(".").compile_fds(set)?;
    Ok(())
}
