//! JPEG streams in files and within DICOM: detection of truncated streams, and the colour information in markers.
//!
//! Decoders silently fill the missing part of a stream with grey. A stream that ends before its end marker is truncated and refused, as by
//! Pillow; a tail of zeros instead of the rest is no end marker either.

use jpeg_decoder::{ColorTransform, PixelFormat};

use super::{DecodeError, fail};

/// Colour information from the segments before the first scan.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Markers {
    /// Whether there is a JFIF segment, which implies YCbCr colours.
    jfif: bool,
    /// Whether the Adobe segment declares transformed colours; `None` without such a segment.
    adobe: Option<bool>,
    /// Whether the components are named R, G, B.
    rgb_ids: bool,
}

/// Scans all markers of a stream.
///
/// # Errors
/// Returns [`DecodeError::Decode`] if the stream does not start as a JPEG or ends before its end marker.
pub(super) fn scan_markers(stream: &[u8]) -> Result<Markers, DecodeError> {
    let truncated = || fail("the JPEG ends before its end marker: it is truncated");
    if !stream.starts_with(&[0xff, 0xd8]) {
        return Err(fail("it does not start as a JPEG"));
    }
    let mut out = Markers::default();
    let mut position = 2;
    loop {
        // Between segments and within a scan, everything up to the next 0xff is skipped, as are fill bytes.
        position += stream[position..].iter().position(|b| *b == 0xff).ok_or_else(truncated)?;
        position += stream[position..].iter().position(|b| *b != 0xff).ok_or_else(truncated)?;
        let marker = stream[position];
        position += 1;
        match marker {
            // A stuffed byte, a private marker without a length, restarts, another start.
            0x00 | 0x01 | 0xd0..=0xd8 => {}
            0xd9 => return Ok(out),
            _ => {
                let length = match stream.get(position..position + 2) {
                    Some(&[high, low]) => usize::from(u16::from_be_bytes([high, low])),
                    _ => return Err(truncated()),
                };
                let body = stream.get(position + 2..position + length.max(2)).ok_or_else(truncated)?;
                out.record(marker, body);
                position += length.max(2);
            }
        }
    }
}

impl Markers {
    fn record(&mut self, marker: u8, body: &[u8]) {
        match marker {
            0xe0..=0xef if body.starts_with(b"JFIF") => self.jfif = true,
            0xee if body.starts_with(b"Adobe") => self.adobe = body.get(11).map(|t| *t != 0),
            // Frame headers: precision, height, width, count, then three bytes for each component.
            0xc0..=0xcf if !matches!(marker, 0xc4 | 0xc8 | 0xcc) && body.get(5) == Some(&3) => {
                let ids: Vec<u8> = body[6..].chunks(3).filter_map(|c| c.first().copied()).collect();
                self.rgb_ids = ids == *b"RGB" || ids == *b"rgb";
            }
            _ => {}
        }
    }

    /// Returns the colour transform for a data set that declares `photometric`; as in pydicom, the stream takes precedence.
    fn colour_transform(&self, photometric: &str) -> ColorTransform {
        let transformed = if self.rgb_ids && (photometric != "RGB" || !self.jfif) {
            false
        } else if photometric != "RGB" || self.jfif {
            true
        } else {
            self.adobe.unwrap_or(false)
        };
        if transformed { ColorTransform::YCbCr } else { ColorTransform::RGB }
    }
}

/// Decodes a stream within DICOM whose header claims this size and `samples` samples per pixel. Colours are returned as RGB.
pub(super) fn decode(
    stream: &[u8],
    size: (u32, u32),
    samples: usize,
    photometric: &str,
) -> Result<Vec<u16>, DecodeError> {
    let markers = scan_markers(stream)?;
    let mut decoder = jpeg_decoder::Decoder::new(stream);
    decoder.read_info().map_err(fail)?;
    let info = decoder.info().ok_or_else(|| fail("its JPEG stream has no header"))?;
    let stream_size = (u32::from(info.width), u32::from(info.height));
    if stream_size != size {
        let (stream_width, stream_height) = stream_size;
        let (width, height) = size;
        return Err(DecodeError::Decode(format!(
            "its JPEG stream has {stream_width} x {stream_height} pixels, but its header says {width} x {height}"
        )));
    }
    match (info.pixel_format, samples) {
        (PixelFormat::L8 | PixelFormat::L16, 1) => {}
        (PixelFormat::RGB24, 3) => decoder.set_color_transform(markers.colour_transform(photometric)),
        (other, n) => {
            return Err(DecodeError::Decode(format!(
                "its JPEG stream is {other:?}, but its header says {n} samples per pixel"
            )));
        }
    }
    let bytes = decoder.decode().map_err(fail)?;
    Ok(match info.pixel_format {
        PixelFormat::L16 => bytes.chunks_exact(2).map(|b| u16::from_ne_bytes([b[0], b[1]])).collect(),
        _ => bytes.into_iter().map(u16::from).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(segments: &[(u8, &[u8])], rest: &[u8]) -> Vec<u8> {
        let mut out = vec![0xff, 0xd8];
        for (marker, body) in segments {
            out.extend([0xff, *marker]);
            out.extend((body.len() as u16 + 2).to_be_bytes());
            out.extend(*body);
        }
        out.extend(rest);
        out
    }

    #[test]
    fn streams_without_an_end_marker_are_truncated() {
        // An end marker within a segment, e.g. of a thumbnail, does not count; nor do stuffed bytes and restarts.
        let head: &[(u8, &[u8])] = &[(0xe1, b"Exif\xff\xd9"), (0xda, b"\x01\x01\x00\x00\x3f\x00")];
        assert!(scan_markers(&stream(head, b"\x12\xff\x00\x34\xff\xd0\x56\xff\xff\xd9junk")).is_ok());
        for rest in [
            &b""[..],
            b"\x12\xff",
            b"\x12\xff\x00",
            b"\x12\xff\xff",
            b"\x12\xff\xc4\x00",
            b"\x12\xff\xc4\x00\x09ab",
            &[0; 99],
        ] {
            assert!(
                matches!(scan_markers(&stream(head, rest)), Err(DecodeError::Decode(e)) if e.contains("truncated")),
                "{rest:?}"
            );
        }
        assert!(scan_markers(b"\xff").is_err() && scan_markers(b"\xff\xd8").is_err());
    }

    #[test]
    fn stream_determines_the_colour_transform() {
        let frame =
            |ids: &[u8; 3]| [&[8, 0, 1, 0, 1, 3][..], &[ids[0], 17, 0], &[ids[1], 17, 0], &[ids[2], 17, 0]].concat();
        let adobe = |transform: u8| [&b"Adobe\0\x64\0\0\0\0"[..], &[transform]].concat();
        let jfif = b"JFIF\0\x01\x01".to_vec();
        for (segments, photometric, transformed) in [
            (vec![], "RGB", false),
            (vec![], "YBR_FULL_422", true),
            (vec![(0xe0, jfif.clone())], "RGB", true),
            (vec![(0xee, adobe(1))], "RGB", true),
            (vec![(0xee, adobe(0))], "RGB", false),
            (vec![(0xee, adobe(0))], "YBR_FULL", true),
            (vec![(0xc0, frame(b"RGB"))], "YBR_FULL", false),
            (vec![(0xc0, frame(b"\x01\x02\x03"))], "RGB", false),
        ] {
            let list: Vec<(u8, &[u8])> = segments.iter().map(|(m, b)| (*m, b.as_slice())).collect();
            let transform = scan_markers(&stream(&list, b"\xff\xd9")).unwrap().colour_transform(photometric);
            assert_eq!(matches!(transform, ColorTransform::YCbCr), transformed, "{segments:?} {photometric}");
        }
    }
}
