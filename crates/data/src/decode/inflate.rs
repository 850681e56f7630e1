//! Inflating of deflated DICOM data sets and frames, up to a limit.

use std::io::Read;

use flate2::read::DeflateDecoder;

use super::DecodeError;

/// Inflates a raw stream (RFC 1951) until it ends or `limit` bytes are complete.
///
/// # Errors
/// Returns [`DecodeError::Decode`] if the stream is damaged or truncated before the limit.
pub(super) fn inflate(stream: &[u8], limit: u64) -> Result<Vec<u8>, DecodeError> {
    let mut out = Vec::new();
    let read = DeflateDecoder::new(stream).take(limit).read_to_end(&mut out);
    read.map_err(|e| DecodeError::Decode(format!("its deflated data is damaged or truncated: {e}")))?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::DeflateEncoder;

    use super::*;

    #[test]
    fn streams_end_at_the_limit_or_are_refused() {
        let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(&[7; 5000]).unwrap();
        let stream = encoder.finish().unwrap();
        assert_eq!(inflate(&stream, 9000).unwrap(), [7; 5000]);
        assert_eq!(inflate(&[&stream[..], &[0]].concat(), 9000).unwrap(), [7; 5000], "a padded stream");
        assert_eq!(inflate(&stream, 20).unwrap(), [7; 20]);
        for bad in [&stream[..stream.len() - 2], b"", b"\xff\xff\xff"] {
            assert!(matches!(inflate(bad, 9000), Err(DecodeError::Decode(e)) if e.contains("damaged or truncated")));
        }
    }
}
