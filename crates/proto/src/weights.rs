//! Checksums of weights as both ends compute them: CRC-32C (Castagnoli, RFC 3720 appendix B.4) of chunks, of tensors, and of the
//! whole. Must not know: what a tensor is beyond its bytes.

use std::collections::BTreeMap;

use crate::v1;

/// Bytes that are broadcast at once, a multiple of eight. Both ends cut the tensors of a version by it.
pub const BUCKET: usize = 8 << 20;

/// CRC-32C of some bytes, and how many they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sum {
    /// The checksum.
    pub crc32c: u32,
    /// Number of bytes.
    pub bytes: u64,
}

impl Sum {
    /// Of `data`.
    pub fn of(data: &[u8]) -> Self {
        Self { crc32c: crc32c::crc32c(data), bytes: data.len() as u64 }
    }

    /// Of these bytes followed by those of `next`, without looking at either again.
    #[must_use]
    pub fn then(self, next: Self) -> Self {
        if self.bytes == 0 {
            return next;
        }
        let crc32c = crc32c::crc32c_combine(self.crc32c, next.crc32c, next.bytes as usize);
        Self { crc32c, bytes: self.bytes + next.bytes }
    }
}

/// Sums of all tensors of one version, by name.
pub type Sums = BTreeMap<String, Sum>;

/// Checksum of the whole: CRC-32C of the bytes of all tensors, ascending by name.
pub fn checksum(sums: &Sums) -> u32 {
    sums.values().fold(Sum::default(), |all, one| all.then(*one)).crc32c
}

/// A chunk with its checksum.
pub fn chunk(data: bytes::Bytes) -> v1::WeightsChunk {
    v1::WeightsChunk { crc32c: crc32c::crc32c(&data), data }
}

/// Sum of a chunk's data, if it is what was announced; the error has (found, announced).
pub fn verify(chunk: &v1::WeightsChunk) -> Result<Sum, (u32, u32)> {
    let found = Sum::of(&chunk.data);
    if found.crc32c == chunk.crc32c { Ok(found) } else { Err((found.crc32c, chunk.crc32c)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values_and_concatenation() {
        // Check value of CRC-32C, and 32 bytes of zeros from RFC 3720 appendix B.4.
        assert_eq!(Sum::of(b"123456789").crc32c, 0xe306_9283);
        assert_eq!(Sum::of(&[0; 32]).crc32c, 0x8a91_36aa);
        let bytes: Vec<u8> = (0..70_001u64).map(|i| (i * i % 251) as u8).collect();
        for cut in [0, 1, 4095, 65_536, bytes.len()] {
            let (a, b) = bytes.split_at(cut);
            assert_eq!(Sum::of(a).then(Sum::of(b)), Sum::of(&bytes), "{cut}");
        }
    }

    #[test]
    fn the_whole_is_in_the_order_of_names() {
        let sums: Sums = [("b", b"34"), ("a", b"12")].map(|(n, d)| (n.to_owned(), Sum::of(d))).into();
        assert_eq!(checksum(&sums), Sum::of(b"1234").crc32c);
        assert_eq!(checksum(&Sums::new()), 0);
    }

    #[test]
    fn a_flipped_bit_is_found() {
        let good = chunk(vec![7u8; 1000].into());
        assert_eq!(verify(&good), Ok(Sum::of(&[7; 1000])));
        let mut data = good.data.to_vec();
        data[500] ^= 1;
        let (found, announced) = verify(&v1::WeightsChunk { data: data.into(), ..good.clone() }).unwrap_err();
        assert!(found != announced && announced == good.crc32c);
    }
}
