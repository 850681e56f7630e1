//! BLAKE3 of an object by parts: parts are hashed while they are uploaded, and a range is verified without reading the rest.
//!
//! The root is the plain BLAKE3 of the object, since parts are subtrees of its hash tree (BLAKE3 paper, section 2.1).

use blake3::hazmat::{ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};
use bytes::Bytes;

/// Size in bytes of a part, also of uploads; the last part of an object may be shorter. A power of two, as subtrees require.
pub(crate) const PART_BYTES: usize = 16 << 20;

/// Size in bytes from which hashing moves to a blocking thread.
const BLOCKING_THRESHOLD_BYTES: usize = 1 << 20;

/// Returns the number of parts of an object of `size` bytes, at least one.
pub(crate) fn part_count(size: u64) -> usize {
    size.div_ceil(PART_BYTES as u64).max(1) as usize
}

/// Returns the byte range of part `index` of an object of `size` bytes.
pub(crate) fn part_range(size: u64, index: usize) -> std::ops::Range<u64> {
    let begin = index as u64 * PART_BYTES as u64;
    begin..size.min(begin + PART_BYTES as u64)
}

/// Returns the chaining value of part `index`, or the hash itself if it is the only part.
pub(crate) fn hash_part(bytes: &[u8], index: usize, size: u64) -> ChainingValue {
    if part_count(size) == 1 {
        return *blake3::hash(bytes).as_bytes();
    }
    blake3::Hasher::new().set_input_offset(part_range(size, index).start).update(bytes).finalize_non_root()
}

/// Returns the hash of an object, hex, from the chaining values of its parts in order.
pub(crate) fn root_hash(parts: &[ChainingValue]) -> String {
    let hash = match parts {
        [] => blake3::hash(&[]),
        [single] => blake3::Hash::from_bytes(*single),
        several => {
            let (left, right) = several.split_at(left_count(several.len()));
            merge_subtrees_root(&merge(left), &merge(right), Mode::Hash)
        }
    };
    hash.to_hex().to_string()
}

fn merge(parts: &[ChainingValue]) -> ChainingValue {
    match parts {
        [single] => *single,
        several => {
            let (left, right) = several.split_at(left_count(several.len()));
            merge_subtrees_non_root(&merge(left), &merge(right), Mode::Hash)
        }
    }
}

/// Returns the largest power of two below `count`: the number of parts in the left subtree, which is full.
fn left_count(count: usize) -> usize {
    count.next_power_of_two() / 2
}

/// Formats a chaining value in hex.
pub(crate) fn hex(value: &ChainingValue) -> String {
    blake3::Hash::from_bytes(*value).to_hex().to_string()
}

/// Returns the hash of an object from its parts' chaining values in hex; `None` if they are malformed.
pub(crate) fn root_hash_of_hex(parts: &[String]) -> Option<String> {
    let values = parts.iter().map(|p| blake3::Hash::from_hex(p).ok().map(|h| *h.as_bytes()));
    values.collect::<Option<Vec<_>>>().map(|v| root_hash(&v))
}

/// Hashes all parts of an object, on a blocking thread if it is large.
pub(crate) async fn hash_parts(bytes: &Bytes) -> Vec<ChainingValue> {
    let size = bytes.len() as u64;
    let hash = move |bytes: &Bytes| -> Vec<ChainingValue> {
        (0..part_count(size)).map(|i| hash_part(&bytes[as_usize(part_range(size, i))], i, size)).collect()
    };
    if bytes.len() < BLOCKING_THRESHOLD_BYTES {
        return hash(bytes);
    }
    let copy = bytes.clone();
    match tokio::task::spawn_blocking(move || hash(&copy)).await {
        Ok(values) => values,
        Err(_) => hash(bytes),
    }
}

/// Hashes one part, on a blocking thread if it is large.
pub(crate) async fn hash_part_async(bytes: &Bytes, index: usize, size: u64) -> ChainingValue {
    if bytes.len() < BLOCKING_THRESHOLD_BYTES {
        return hash_part(bytes, index, size);
    }
    let copy = bytes.clone();
    match tokio::task::spawn_blocking(move || hash_part(&copy, index, size)).await {
        Ok(value) => value,
        Err(_) => hash_part(bytes, index, size),
    }
}

/// Converts a byte range to an index range in memory.
pub(crate) fn as_usize(range: std::ops::Range<u64>) -> std::ops::Range<usize> {
    range.start as usize..range.end as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn part_hashes_merge_to_the_plain_hash() {
        for size in [
            0,
            1,
            1024,
            PART_BYTES - 1,
            PART_BYTES,
            PART_BYTES + 1,
            2 * PART_BYTES,
            2 * PART_BYTES + 1025,
            3 * PART_BYTES,
            5 * PART_BYTES + 7,
        ] {
            let bytes: Vec<u8> = (0..size).map(|i| (i ^ (i >> 9) ^ (i >> 20)) as u8).collect();
            let len = size as u64;
            let values: Vec<_> =
                (0..part_count(len)).map(|i| hash_part(&bytes[as_usize(part_range(len, i))], i, len)).collect();
            assert_eq!(root_hash(&values), blake3::hash(&bytes).to_hex().to_string(), "{size}");
            assert_eq!(values.len(), size.div_ceil(PART_BYTES).max(1));
            let hex_values: Vec<String> = values.iter().map(hex).collect();
            assert_eq!(root_hash_of_hex(&hex_values), Some(root_hash(&values)));
        }
    }
}
