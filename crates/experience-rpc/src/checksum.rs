//! Checksums of weights, computed by both ends: CRC-32C (Castagnoli, RFC 3720 appendix B.4) of chunks, tensors and
//! whole versions.

use std::collections::BTreeMap;

use unveil_proto::v1;

/// Bytes per bucket of a broadcast, a multiple of eight. Both ends split the tensors of a version into buckets of this
/// size.
pub const BUCKET_BYTES: usize = 8 << 20;

/// CRC-32C of a byte string and its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Checksum {
    /// CRC-32C of the bytes.
    pub crc32c: u32,
    /// Number of bytes.
    pub bytes: u64,
}

impl Checksum {
    /// Computes the checksum of `data`.
    pub fn of(data: &[u8]) -> Self {
        Self { crc32c: crc32c::crc32c(data), bytes: data.len() as u64 }
    }

    /// Returns the checksum of the concatenation with `next`, computed from the two checksums.
    #[must_use]
    pub fn concat(self, next: Self) -> Self {
        if self.bytes == 0 {
            return next;
        }
        let crc32c = crc32c::crc32c_combine(self.crc32c, next.crc32c, next.bytes as usize);
        Self { crc32c, bytes: self.bytes + next.bytes }
    }
}

/// Checksums of all tensors of a version, by name.
pub type TensorChecksums = BTreeMap<String, Checksum>;

/// Computes the checksum of a version: CRC-32C of the bytes of all tensors, ascending by name.
pub fn version_checksum(sums: &TensorChecksums) -> u32 {
    sums.values().fold(Checksum::default(), |total, tensor| total.concat(*tensor)).crc32c
}

/// Creates a chunk with its checksum.
pub fn chunk(data: bytes::Bytes) -> v1::WeightsChunk {
    v1::WeightsChunk { crc32c: crc32c::crc32c(&data), data }
}

/// Verifies a chunk and returns the checksum of its data.
///
/// # Errors
/// Returns the pair (computed CRC-32C, announced CRC-32C) if they differ.
pub fn verify(chunk: &v1::WeightsChunk) -> Result<Checksum, (u32, u32)> {
    let found = Checksum::of(&chunk.data);
    if found.crc32c == chunk.crc32c { Ok(found) } else { Err((found.crc32c, chunk.crc32c)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_match_known_values_and_concatenate() {
        // Check value of CRC-32C, and 32 bytes of zeros from RFC 3720 appendix B.4.
        assert_eq!(Checksum::of(b"123456789").crc32c, 0xe306_9283);
        assert_eq!(Checksum::of(&[0; 32]).crc32c, 0x8a91_36aa);
        let bytes: Vec<u8> = (0..70_001u64).map(|i| (i * i % 251) as u8).collect();
        for cut in [0, 1, 4095, 65_536, bytes.len()] {
            let (a, b) = bytes.split_at(cut);
            assert_eq!(Checksum::of(a).concat(Checksum::of(b)), Checksum::of(&bytes), "{cut}");
        }
    }

    #[test]
    fn version_checksum_is_ordered_by_name() {
        let sums: TensorChecksums = [("b", b"34"), ("a", b"12")].map(|(n, d)| (n.to_owned(), Checksum::of(d))).into();
        assert_eq!(version_checksum(&sums), Checksum::of(b"1234").crc32c);
        assert_eq!(version_checksum(&TensorChecksums::new()), 0);
    }

    #[test]
    fn flipped_bits_are_detected() {
        let good = chunk(vec![7u8; 1000].into());
        assert_eq!(verify(&good), Ok(Checksum::of(&[7; 1000])));
        let mut data = good.data.to_vec();
        data[500] ^= 1;
        let (found, announced) = verify(&v1::WeightsChunk { data: data.into(), ..good.clone() }).unwrap_err();
        assert!(found != announced && announced == good.crc32c);
    }
}
