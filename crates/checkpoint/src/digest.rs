//! BLAKE3 of an object by parts, so that parts are hashed at the same time as they travel, and a range can be checked without the
//! rest. The whole is the plain BLAKE3 of the object: parts are subtrees of its tree (BLAKE3 paper, section 2.1).

use blake3::hazmat::{ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};
use bytes::Bytes;

/// Bytes of a part, of uploads too; the last one of an object may be shorter. A power of two, as subtrees are.
pub(crate) const PART: usize = 16 << 20;

/// How many parts an object of `size` bytes has; at least one.
pub(crate) fn parts(size: u64) -> usize {
    size.div_ceil(PART as u64).max(1) as usize
}

/// The bytes of part `index` within an object of `size` bytes.
pub(crate) fn range(size: u64, index: usize) -> std::ops::Range<u64> {
    let begin = index as u64 * PART as u64;
    begin..size.min(begin + PART as u64)
}

/// The chaining value of part `index`, or the hash itself where there is one part.
pub(crate) fn part(bytes: &[u8], index: usize, size: u64) -> ChainingValue {
    if parts(size) == 1 {
        return *blake3::hash(bytes).as_bytes();
    }
    blake3::Hasher::new().set_input_offset(range(size, index).start).update(bytes).finalize_non_root()
}

/// The hash of an object, hex, from those of its parts in order.
pub(crate) fn root(parts: &[ChainingValue]) -> String {
    let hash = match parts {
        [] => blake3::hash(&[]),
        [one] => blake3::Hash::from_bytes(*one),
        more => {
            let (left, right) = more.split_at(half(more.len()));
            merge_subtrees_root(&merge(left), &merge(right), Mode::Hash)
        }
    };
    hash.to_hex().to_string()
}

fn merge(parts: &[ChainingValue]) -> ChainingValue {
    match parts {
        [one] => *one,
        more => {
            let (left, right) = more.split_at(half(more.len()));
            merge_subtrees_non_root(&merge(left), &merge(right), Mode::Hash)
        }
    }
}

/// The largest power of two below `count`: the left subtree is full.
fn half(count: usize) -> usize {
    count.next_power_of_two() / 2
}

/// Hex of a chaining value.
pub(crate) fn hex(value: &ChainingValue) -> String {
    blake3::Hash::from_bytes(*value).to_hex().to_string()
}

/// The hash of an object from the hex of its parts' values; none where they are no such.
pub(crate) fn joined(parts: &[String]) -> Option<String> {
    let values = parts.iter().map(|p| blake3::Hash::from_hex(p).ok().map(|h| *h.as_bytes()));
    values.collect::<Option<Vec<_>>>().map(|v| root(&v))
}

/// All parts' values, off the async threads when it takes long.
pub(crate) async fn all(bytes: &Bytes) -> Vec<ChainingValue> {
    let size = bytes.len() as u64;
    let of = move |bytes: &Bytes| -> Vec<ChainingValue> {
        (0..parts(size)).map(|i| part(&bytes[as_usize(range(size, i))], i, size)).collect()
    };
    if bytes.len() < 1 << 20 {
        return of(bytes);
    }
    let copy = bytes.clone();
    match tokio::task::spawn_blocking(move || of(&copy)).await {
        Ok(values) => values,
        Err(_) => of(bytes),
    }
}

/// The value of one part, off the async threads when it takes long.
pub(crate) async fn one(bytes: &Bytes, index: usize, size: u64) -> ChainingValue {
    if bytes.len() < 1 << 20 {
        return part(bytes, index, size);
    }
    let copy = bytes.clone();
    match tokio::task::spawn_blocking(move || part(&copy, index, size)).await {
        Ok(value) => value,
        Err(_) => part(bytes, index, size),
    }
}

/// A range of bytes in memory.
pub(crate) fn as_usize(range: std::ops::Range<u64>) -> std::ops::Range<usize> {
    range.start as usize..range.end as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_make_the_plain_hash() {
        for size in [0, 1, 1024, PART - 1, PART, PART + 1, 2 * PART, 2 * PART + 1025, 3 * PART, 5 * PART + 7] {
            let bytes: Vec<u8> = (0..size).map(|i| (i ^ (i >> 9) ^ (i >> 20)) as u8).collect();
            let whole = size as u64;
            let values: Vec<_> = (0..parts(whole)).map(|i| part(&bytes[as_usize(range(whole, i))], i, whole)).collect();
            assert_eq!(root(&values), blake3::hash(&bytes).to_hex().to_string(), "{size}");
            assert_eq!(values.len(), size.div_ceil(PART).max(1));
            let told: Vec<String> = values.iter().map(hex).collect();
            assert_eq!(joined(&told), Some(root(&values)));
        }
    }
}
