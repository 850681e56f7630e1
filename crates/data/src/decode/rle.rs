//! Decoding of run-length encoded DICOM frames (PS3.5 annex G).

use super::{DecodeError, fail};

/// Decodes `planes` byte planes of `n` bytes each: samples in order, the high byte of each first.
pub(super) fn planes(frame: &[u8], planes: usize, n: usize) -> Result<Vec<Vec<u8>>, DecodeError> {
    let invalid = || fail("its RLE segments are invalid");
    let word = |i: usize| {
        let bytes = frame.get(i * 4..i * 4 + 4).ok_or_else(invalid)?;
        Ok::<usize, DecodeError>(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize)
    };
    // Two bytes decode to at most 128, so never allocate more than the frame can fill.
    if word(0)? != planes || frame.len().saturating_mul(64) < planes * n {
        return Err(invalid());
    }
    let plane = |i: usize| {
        let end = if i + 1 < planes { word(i + 2)? } else { frame.len() };
        let mut rest = frame.get(word(i + 1)?..end).ok_or_else(invalid)?;
        let mut out = Vec::with_capacity(n);
        while out.len() < n {
            let (count, tail) = rest.split_first().ok_or_else(invalid)?;
            rest = match *count as i8 {
                -128 => tail,
                run @ ..0 => {
                    let (value, tail) = tail.split_first().ok_or_else(invalid)?;
                    out.resize(out.len() + 1 + usize::from(run.unsigned_abs()), *value);
                    tail
                }
                literal => {
                    let (values, tail) = tail.split_at_checked(literal as usize + 1).ok_or_else(invalid)?;
                    out.extend_from_slice(values);
                    tail
                }
            };
        }
        out.truncate(n);
        Ok(out)
    };
    (0..planes).map(plane).collect()
}
