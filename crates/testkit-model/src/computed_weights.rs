//! Weights that are computed from their version, and how long tests wait for them.

use std::time::Duration;

use tch::{Device, Kind, Tensor};
use unveil_experience_rpc::checksum::{BUCKET_BYTES, Checksum};

use crate::bits;

/// Timeout of a broadcast.
pub const BROADCAST_TIMEOUT: Duration = Duration::from_secs(4);
/// Time within which everything else happens.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Number of bf16 elements: more than two buckets, the last one not a multiple of a word.
const TOP: i64 = BUCKET_BYTES as i64 + 1;
/// Bytes of the tensors that change between versions.
pub const DIFFERENCE: u64 = (TOP as u64 + 15) * 2;

/// Computes the weights of a version: one constant tensor and two that change, not sorted by name.
pub(crate) fn computed(version: u64) -> Vec<(String, Tensor)> {
    let wave = |count: i64| (Tensor::arange(count, (Kind::Float, Device::Cpu)) * (version as f64 + 0.37)).sin();
    vec![
        ("top".into(), wave(TOP)),
        ("base".into(), Tensor::arange(1001, (Kind::Float, Device::Cpu))),
        ("middle".into(), wave(3 * 5).view([5, 3]).transpose(0, 1)),
    ]
}

/// Returns name and bytes of the computed tensors of a version, by name.
pub fn version_weights(version: u64) -> Vec<(String, Vec<u8>)> {
    let as_bits = |(name, tensor): (String, Tensor)| (name, bits(&tensor.to_kind(Kind::BFloat16)));
    let mut all: Vec<_> = computed(version).into_iter().map(as_bits).collect();
    all.sort();
    all
}

/// Returns the checksum of the computed weights of a version.
pub fn version_checksum(version: u64) -> u32 {
    Checksum::of(&version_weights(version).into_iter().flat_map(|(_, b)| b).collect::<Vec<u8>>()).crc32c
}
