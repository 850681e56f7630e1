//! Attention of packed sequences (a prompt and responses that do not see each other) in parts that are joined by their log-sum-exp: the
//! prompt causally, all responses over the prompt, and each response causally over itself. libtorch's fused kernels compute the parts,
//! forward and backward. There is no mask, and the keys and values of a prompt are not copied for its responses.

use std::ffi::{c_char, c_int, c_void};

use tch::{Device, Kind, Tensor};

use crate::library::{NativeLibrary, check_call, function_table, native_library};
use crate::{ExtError, Result};

// cpp/packed_attention.cc
function_table! {
    "packed attention", library();
    attention: unsafe extern "C" fn(
        *const c_void, *const c_void, *const c_void, *const i64, i64, *const *const c_void, *const i64, i64, c_int, *mut *mut c_void,
        *mut c_char, usize,
    ) -> c_int = b"unveil_packed_attention",
}

/// cpp/packed_attention.cc. libtorch itself is loaded already, since tch links it.
fn library() -> Result<&'static NativeLibrary, String> {
    native_library!("packed_attention", "LIBTORCH was not set (make setup sets it)")
}

/// Arrangement of packed sequences in a batch `[B, L]`: each is a prompt, then its responses one after another.
#[derive(Debug)]
pub struct PackedLayout {
    /// Row, start, end of the prompt and end of the last response, for each sequence.
    cuts: Vec<i64>,
    /// Width of each bucket.
    widths: Vec<i64>,
    /// For each bucket: the position in `B * L` of each row of its padded responses, the rows that are tokens, and their positions.
    indices: Vec<Tensor>,
    size: [i64; 2],
}

impl PackedLayout {
    /// Creates the layout of sequences with a row each, of `length` tokens, where padding follows the last response. `groups` has the
    /// length of each prompt and of its responses, which may be 0.
    ///
    /// # Errors
    /// Returns [`ExtError::Index`] if a sequence is longer than `length`.
    pub fn padded(groups: &[(usize, Vec<usize>)], length: usize, device: Device) -> Result<Self> {
        if let Some(longest) = groups.iter().map(length_of).max().filter(|n| *n > length) {
            return Err(ExtError::Index { what: "a packed sequence", value: longest as i64, limit: length as i64 });
        }
        Ok(Self::new(groups, [groups.len(), length], |index, _| (index, 0), device))
    }

    /// Creates the layout of sequences that follow one another in a single row without padding.
    pub fn single_row(groups: &[(usize, Vec<usize>)], device: Device) -> Self {
        let total = groups.iter().map(length_of).sum();
        Self::new(groups, [1, total], |_, before| (0, before), device)
    }

    /// `place` returns the row and the start of a sequence for its index and the total length of those before it. Responses are padded
    /// in buckets, each to its longest, which has at most twice the tokens of its shortest.
    fn new(
        groups: &[(usize, Vec<usize>)],
        [rows, length]: [usize; 2],
        place: impl Fn(usize, usize) -> (usize, usize),
        device: Device,
    ) -> Self {
        let mut cuts = Vec::with_capacity(4 * groups.len());
        let mut responses = Vec::new();
        let mut before = 0;
        for (index, group) in groups.iter().enumerate() {
            let (row, start) = place(index, before);
            let end = start + length_of(group);
            before += end - start;
            let (prompt, lengths) = group;
            let mut prompt_end = start + prompt;
            if lengths.iter().filter(|n| **n > 0).count() == 1 {
                // The only response of a prompt continues it: one causal part.
                prompt_end = end;
            } else {
                let mut at = row * length + prompt_end;
                for count in lengths.iter().copied().filter(|n| *n > 0) {
                    responses.push((count, at));
                    at += count;
                }
            }
            cuts.extend([row, start, prompt_end, end].map(|n| n as i64));
        }
        responses.sort_by_key(|(count, start)| (std::cmp::Reverse(*count), *start));
        let size = [rows as i64, length as i64];
        let mut layout = Self { cuts, widths: Vec::new(), indices: Vec::new(), size };
        let mut rest = responses.as_slice();
        while let Some(&(width, _)) = rest.first() {
            let (bucket, others) = rest.split_at(rest.partition_point(|(count, _)| 2 * count >= width));
            layout.push_bucket(width, bucket, device);
            rest = others;
        }
        layout
    }

    /// Adds responses `(count, start)` as rows of `width` tokens; padding repeats the last token.
    fn push_bucket(&mut self, width: usize, bucket: &[(usize, usize)], device: Device) {
        let mut gather = Vec::with_capacity(width * bucket.len());
        let mut real = Vec::with_capacity(width * bucket.len());
        let mut place = Vec::with_capacity(width * bucket.len());
        for (row, &(count, start)) in bucket.iter().enumerate() {
            gather.extend((0..width).map(|i| (start + i.min(count - 1)) as i64));
            real.extend((0..count).map(|i| (row * width + i) as i64));
            place.extend((start..start + count).map(|i| i as i64));
        }
        self.widths.push(width as i64);
        self.indices.extend([gather, real, place].map(|index| Tensor::from_slice(&index).to_device(device)));
    }

    /// Returns the shape `[B, L]` of the batch.
    pub fn size(&self) -> [i64; 2] {
        self.size
    }
}

/// Returns the tokens of a prompt and its responses.
fn length_of((prompt, responses): &(usize, Vec<usize>)) -> usize {
    prompt + responses.iter().sum::<usize>()
}

/// Computes attention of `q [B, H, L, d]` over `k, v [B, Hk, L, d]`, where Hk divides H: `[B, L, H, d]` in the dtype of `q`, 0 at
/// padding. Each prompt attends to itself causally, each response to its prompt and to itself causally. The kernels compute in dtype
/// `operands`, with sums in fp32 (fp64 in fp64). Gradients reach `q`, `k` and `v`; there are no second derivatives.
///
/// # Errors
/// Returns [`ExtError::Refused`] if shapes, dtypes or the layout do not match, and [`ExtError::Unavailable`] if the library cannot be
/// loaded.
pub fn packed_attention(q: &Tensor, k: &Tensor, v: &Tensor, layout: &PackedLayout, operands: Kind) -> Result<Tensor> {
    const WHAT: &str = "attention of packed sequences";
    let kind = match operands {
        Kind::Half => 5,
        Kind::Float => 6,
        Kind::Double => 7,
        Kind::BFloat16 => 15,
        other => return Err(ExtError::Refused { what: WHAT, message: format!("the kernels have no dtype {other:?}") }),
    };
    let size = q.size();
    if [size.first(), size.get(2)] != [Some(&layout.size[0]), Some(&layout.size[1])] {
        let message = format!("queries {size:?} for a batch of {:?}", layout.size);
        return Err(ExtError::Refused { what: WHAT, message });
    }
    let f = functions()?;
    let handle = |t: &Tensor| t.as_ptr().cast::<c_void>();
    let indices: Vec<*const c_void> = layout.indices.iter().map(handle).collect();
    let sequences = (layout.cuts.len() / 4) as i64;
    let buckets = layout.widths.len() as i64;
    let mut out = std::ptr::null_mut();
    // SAFETY: the handles are those of live tensors; the arrays hold four numbers per sequence, three handles and one width per bucket.
    check_call(WHAT, |m, n| unsafe {
        (f.attention)(
            handle(q),
            handle(k),
            handle(v),
            layout.cuts.as_ptr(),
            sequences,
            indices.as_ptr(),
            layout.widths.as_ptr(),
            buckets,
            kind,
            &raw mut out,
            m,
            n,
        )
    })?;
    // SAFETY: the call has succeeded and returned a new tensor, which belongs to the caller.
    Ok(unsafe { Tensor::from_ptr(out.cast()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn responses_share_buckets_of_similar_length() {
        let values = |t: &Tensor| Vec::<i64>::try_from(t).unwrap();
        let groups = [(2, vec![3, 0, 8, 4]), (5, vec![9]), (4, vec![])];
        let layout = PackedLayout::padded(&groups, 20, Device::Cpu).unwrap();
        assert_eq!(layout.size(), [3, 20]);
        assert_eq!(
            layout.cuts,
            [[0, 0, 2, 17], [1, 0, 14, 14], [2, 0, 4, 4]].concat(),
            "a single response continues its prompt"
        );
        assert_eq!(layout.widths, [8, 3]);
        assert_eq!(values(&layout.indices[0]), [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 16, 16, 16, 16]);
        assert_eq!(values(&layout.indices[1]), (0..12).collect::<Vec<_>>());
        assert_eq!(values(&layout.indices[2]), (5..17).collect::<Vec<_>>());
        assert_eq!(values(&layout.indices[5]), [2, 3, 4]);
        let row = PackedLayout::single_row(&groups[1..], Device::Cpu);
        assert_eq!((row.size(), row.cuts), ([1, 18], [[0, 0, 14, 14], [0, 14, 18, 18]].concat()));
    }

    #[test]
    fn sequences_beyond_the_batch_are_refused() {
        let e = PackedLayout::padded(&[(3, vec![2, 2])], 6, Device::Cpu).unwrap_err().to_string();
        assert_eq!(e, "a packed sequence: 7 does not fit 6");
    }
}
