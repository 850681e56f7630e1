//! Decoding of JPEG 2000 within DICOM by openjp2, after validation of the stream's own header.

use jpeg2k::DecodeParameters;

use super::{DecodeError, fail};

/// Start of a code stream: its first marker and the marker of the size segment.
const CODESTREAM_START: [u8; 4] = [0xff, 0x4f, 0xff, 0x51];
/// Number of samples that a frame may have regardless of its length in bytes.
const UNCHECKED_SAMPLES: usize = 16 << 20;
/// Maximum number of samples per byte of a larger frame.
const MAX_SAMPLES_PER_BYTE: usize = 1024;
/// Maximum offset in bytes at which a code stream begins; some writers wrap it in the boxes of a JP2 file.
const MAX_START_OFFSET: usize = 4096;

/// A decoded frame.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct DecodedFrame {
    /// Samples pixel by pixel; signed ones as 16-bit two's complement.
    pub values: Vec<u16>,
    /// Bits per sample.
    pub bits: u32,
}

/// The size segment of a code stream (ISO/IEC 15444-1, A.5.1).
#[derive(Debug, PartialEq, Eq)]
struct Size {
    width: u32,
    height: u32,
    /// Bits per sample of each component; `None` if it is subsampled.
    components: Vec<Option<u32>>,
}

impl Size {
    fn read(stream: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u32::from_be_bytes(stream.get(at..at + 4)?.try_into().ok()?));
        let count = usize::from(u16::from_be_bytes(stream.get(40..42)?.try_into().ok()?));
        let components = stream.get(42..42 + count * 3)?.chunks_exact(3);
        Some(Self {
            width: word(8)?.checked_sub(word(16)?)?,
            height: word(12)?.checked_sub(word(20)?)?,
            components: components.map(|c| (c[1..] == [1, 1]).then_some(u32::from(c[0] & 0x7f) + 1)).collect(),
        })
    }
}

/// Decodes a frame whose DICOM header claims this size, `samples` samples per pixel and at most `max_bits` bits per sample.
pub(super) fn decode(
    frame: &[u8],
    (width, height): (u32, u32),
    samples: usize,
    max_bits: u32,
) -> Result<DecodedFrame, DecodeError> {
    let start = frame.windows(4).take(MAX_START_OFFSET).position(|w| w == CODESTREAM_START);
    let stream = &frame[start.ok_or_else(|| fail("its pixels are not a JPEG 2000 stream"))?..];
    let size = Size::read(stream).ok_or_else(|| fail("its JPEG 2000 stream ends within its header"))?;
    if (size.width, size.height) != (width, height) {
        let w = size.width;
        let h = size.height;
        return Err(DecodeError::Decode(format!(
            "its JPEG 2000 stream has {w} x {h} pixels, but its header says {width} x {height}"
        )));
    }
    let bits = match size.components.as_slice() {
        [Some(first), rest @ ..] if rest.len() + 1 == samples && rest.iter().all(|b| *b == Some(*first)) => *first,
        other => {
            return Err(DecodeError::Decode(format!(
                "its JPEG 2000 stream has {} components, but the header says {samples} samples per pixel, all of the same size and depth",
                other.len()
            )));
        }
    };
    if bits > max_bits {
        return Err(DecodeError::Decode(format!(
            "its JPEG 2000 stream has {bits} bits per sample, but its header allows {max_bits}"
        )));
    }
    let n = width as usize * height as usize;
    if n * samples > UNCHECKED_SAMPLES && stream.len() < n * samples / MAX_SAMPLES_PER_BYTE {
        return Err(DecodeError::Decode(format!(
            "its JPEG 2000 stream claims {n} pixels in {} bytes, which is impossible",
            stream.len()
        )));
    }
    let image = jpeg2k::Image::from_bytes_with(stream, DecodeParameters::new().strict(true))
        .map_err(|e| DecodeError::Decode(format!("its JPEG 2000 stream is damaged or truncated: {e}")))?;
    let planes = image.components();
    if planes.len() != samples || planes.iter().any(|p| (p.width(), p.height()) != (width, height)) {
        return Err(fail("its JPEG 2000 stream does not match its header"));
    }
    let planes: Vec<&[i32]> = planes.iter().map(|p| p.data()).collect();
    let values = (0..n).flat_map(|i| planes.iter().map(move |p| p[i] as u16)).collect();
    Ok(DecodedFrame { values, bits })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(width: u32, height: u32, offset: u32, components: &[[u8; 3]]) -> Vec<u8> {
        let mut out = CODESTREAM_START.to_vec();
        out.extend((38 + 3 * components.len() as u16).to_be_bytes());
        out.extend([0, 0]);
        for word in [width + offset, height + offset, offset, offset, width, height, 0, 0] {
            out.extend(word.to_be_bytes());
        }
        out.extend((components.len() as u16).to_be_bytes());
        out.extend(components.as_flattened());
        out
    }

    #[test]
    fn size_segment_by_hand() {
        let read = |components: &[[u8; 3]]| Size::read(&stream(7, 5, 3, components)).unwrap();
        assert_eq!(read(&[[11, 1, 1]]), Size { width: 7, height: 5, components: vec![Some(12)] });
        assert_eq!(read(&[[0x8f, 1, 1], [7, 2, 1]]).components, [Some(16), None]);
        assert_eq!(Size::read(&CODESTREAM_START), None);
    }

    #[test]
    fn streams_that_contradict_the_header_are_refused() {
        let refused = |bytes: &[u8]| match decode(bytes, (7, 5), 1, 16) {
            Err(DecodeError::Decode(what)) => what,
            other => panic!("{other:?}"),
        };
        for (bytes, needle) in [
            (b"nothing".to_vec(), "not a JPEG 2000 stream"),
            (CODESTREAM_START.to_vec(), "within its header"),
            (stream(9, 5, 0, &[[11, 1, 1]]), "9 x 5"),
            (stream(7, 5, 0, &[[11, 1, 1], [11, 1, 1]]), "2 components"),
            (stream(7, 5, 0, &[[11, 2, 2]]), "1 components"),
            (stream(7, 5, 0, &[[30, 1, 1]]), "31 bits"),
            (stream(7, 5, 0, &[[11, 1, 1]]), "damaged or truncated"),
        ] {
            let what = refused(&bytes);
            assert!(what.contains(needle), "{what}");
        }
    }
}
