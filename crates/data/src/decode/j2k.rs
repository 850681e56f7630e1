//! JPEG 2000 within DICOM, decoded by openjp2 behind checks of the stream's own header.

use jpeg2k::DecodeParameters;

use super::{Fault, fail};

/// Start of a code stream: its first marker, and that of the segment with the sizes.
const START: [u8; 4] = [0xff, 0x4f, 0xff, 0x51];
/// Samples that a frame may have whatever its length; of more, so many for each byte.
const FREE: usize = 16 << 20;
const PER_BYTE: usize = 1024;
/// Bytes after which a code stream begins at the latest; some writers put it into the boxes of a JP2 file.
const BOXES: usize = 4096;

/// What the samples of a frame are.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Samples {
    /// Samples, pixel by pixel, in two's complement of 16 bits where they are signed.
    pub values: Vec<u16>,
    /// Bits of a sample.
    pub bits: u32,
}

/// The size segment of a code stream (ISO/IEC 15444-1, A.5.1).
#[derive(Debug, PartialEq, Eq)]
struct Size {
    width: u32,
    height: u32,
    /// Bits of each component, none where they are subsampled.
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

/// A frame whose header claims this size, so many samples a pixel, and so many bits for each at most.
pub(super) fn decode(frame: &[u8], (width, height): (u32, u32), samples: usize, most: u32) -> Result<Samples, Fault> {
    let start = frame.windows(4).take(BOXES).position(|w| w == START);
    let stream = &frame[start.ok_or_else(|| fail("its pixels are no JPEG 2000 stream"))?..];
    let size = Size::read(stream).ok_or_else(|| fail("its JPEG 2000 stream ends within its header"))?;
    if (size.width, size.height) != (width, height) {
        let (w, h) = (size.width, size.height);
        return Err(Fault::Decode(format!(
            "its JPEG 2000 stream is of {w} x {h} pixels, its header says {width} x {height}"
        )));
    }
    let bits = match size.components.as_slice() {
        [Some(first), rest @ ..] if rest.len() + 1 == samples && rest.iter().all(|b| *b == Some(*first)) => *first,
        other => {
            return Err(Fault::Decode(format!(
                "its JPEG 2000 stream has {} components, some smaller or deeper than others or not as many as the header's {samples} \
                 samples a pixel",
                other.len()
            )));
        }
    };
    if bits > most {
        return Err(Fault::Decode(format!("its JPEG 2000 stream has {bits} bits a sample, its header allots {most}")));
    }
    let n = width as usize * height as usize;
    if n * samples > FREE && stream.len() < n * samples / PER_BYTE {
        return Err(Fault::Decode(format!(
            "its JPEG 2000 stream claims {n} pixels in {} bytes, which they cannot be",
            stream.len()
        )));
    }
    let image = jpeg2k::Image::from_bytes_with(stream, DecodeParameters::new().strict(true))
        .map_err(|e| Fault::Decode(format!("its JPEG 2000 stream is damaged or cut short: {e}")))?;
    let planes = image.components();
    if planes.len() != samples || planes.iter().any(|p| (p.width(), p.height()) != (width, height)) {
        return Err(fail("its JPEG 2000 stream does not hold what its header says"));
    }
    let planes: Vec<&[i32]> = planes.iter().map(|p| p.data()).collect();
    let values = (0..n).flat_map(|i| planes.iter().map(move |p| p[i] as u16)).collect();
    Ok(Samples { values, bits })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(width: u32, height: u32, offset: u32, components: &[[u8; 3]]) -> Vec<u8> {
        let mut out = START.to_vec();
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
    fn the_size_segment_by_hand() {
        let read = |components: &[[u8; 3]]| Size::read(&stream(7, 5, 3, components)).unwrap();
        assert_eq!(read(&[[11, 1, 1]]), Size { width: 7, height: 5, components: vec![Some(12)] });
        assert_eq!(read(&[[0x8f, 1, 1], [7, 2, 1]]).components, [Some(16), None]);
        assert_eq!(Size::read(&START), None);
    }

    #[test]
    fn what_the_header_of_the_data_set_does_not_say_is_refused_before_decoding() {
        let refused = |bytes: &[u8]| match decode(bytes, (7, 5), 1, 16) {
            Err(Fault::Decode(what)) => what,
            other => panic!("{other:?}"),
        };
        for (bytes, needle) in [
            (b"nothing".to_vec(), "no JPEG 2000 stream"),
            (START.to_vec(), "within its header"),
            (stream(9, 5, 0, &[[11, 1, 1]]), "9 x 5"),
            (stream(7, 5, 0, &[[11, 1, 1], [11, 1, 1]]), "2 components"),
            (stream(7, 5, 0, &[[11, 2, 2]]), "1 components"),
            (stream(7, 5, 0, &[[30, 1, 1]]), "31 bits"),
            (stream(7, 5, 0, &[[11, 1, 1]]), "damaged or cut short"),
        ] {
            let what = refused(&bytes);
            assert!(what.contains(needle), "{what}");
        }
    }
}
