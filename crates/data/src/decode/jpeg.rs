//! JPEG streams, as files and within DICOM: whether one is whole, and what its markers say about colour.
//!
//! Decoders fill what is missing of a stream with grey and say nothing. A stream that ends before its end marker was cut short and is
//! refused, as Pillow refuses it; a tail of zeros in place of the rest is no end either.

use jpeg_decoder::{ColorTransform, PixelFormat};

use super::{Fault, fail};

/// What the segments before the first scan say.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Markers {
    /// There is a JFIF segment: colours are YCbCr.
    jfif: bool,
    /// There is an Adobe segment, and whether it says that colours were transformed.
    adobe: Option<bool>,
    /// Components are called R, G, B.
    rgb_ids: bool,
}

/// Walks over all markers.
///
/// # Errors
/// The stream does not begin as a JPEG, or ends before its end marker.
pub(super) fn walk(stream: &[u8]) -> Result<Markers, Fault> {
    let cut = || fail("the JPEG ends before its end marker: it was cut short");
    if !stream.starts_with(&[0xff, 0xd8]) {
        return Err(fail("it does not begin as a JPEG does"));
    }
    let mut out = Markers::default();
    let mut at = 2;
    loop {
        // Between segments, and within a scan, everything up to the next 0xff is passed over; so are fill bytes.
        at += stream[at..].iter().position(|b| *b == 0xff).ok_or_else(cut)?;
        at += stream[at..].iter().position(|b| *b != 0xff).ok_or_else(cut)?;
        let marker = stream[at];
        at += 1;
        match marker {
            // A stuffed byte, a private marker without a length, restarts, another beginning.
            0x00 | 0x01 | 0xd0..=0xd8 => {}
            0xd9 => return Ok(out),
            _ => {
                let length = match stream.get(at..at + 2) {
                    Some(&[high, low]) => usize::from(u16::from_be_bytes([high, low])),
                    _ => return Err(cut()),
                };
                let body = stream.get(at + 2..at + length.max(2)).ok_or_else(cut)?;
                out.note(marker, body);
                at += length.max(2);
            }
        }
    }
}

impl Markers {
    fn note(&mut self, marker: u8, body: &[u8]) {
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

    /// How colours are to be read where the data set calls them `photometric`: the stream knows better, as pydicom holds it too.
    fn colours(&self, photometric: &str) -> ColorTransform {
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

/// A stream within DICOM, whose header claims this size and so many samples a pixel; colour comes out as RGB.
pub(super) fn decode(stream: &[u8], size: (u32, u32), samples: usize, photometric: &str) -> Result<Vec<u16>, Fault> {
    let markers = walk(stream)?;
    let mut decoder = jpeg_decoder::Decoder::new(stream);
    decoder.read_info().map_err(fail)?;
    let info = decoder.info().ok_or_else(|| fail("its JPEG stream has no header"))?;
    let found = (u32::from(info.width), u32::from(info.height));
    if found != size {
        let ((fw, fh), (w, h)) = (found, size);
        return Err(Fault::Decode(format!("its JPEG stream is of {fw} x {fh} pixels, its header says {w} x {h}")));
    }
    match (info.pixel_format, samples) {
        (PixelFormat::L8 | PixelFormat::L16, 1) => {}
        (PixelFormat::RGB24, 3) => decoder.set_color_transform(markers.colours(photometric)),
        (other, n) => {
            return Err(Fault::Decode(format!("its JPEG stream is {other:?}, its header says {n} samples a pixel")));
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
    fn a_stream_is_whole_where_its_end_marker_stands() {
        // An end marker within a segment, as of a thumbnail, is none; nor are stuffed bytes and restarts.
        let head: &[(u8, &[u8])] = &[(0xe1, b"Exif\xff\xd9"), (0xda, b"\x01\x01\x00\x00\x3f\x00")];
        assert!(walk(&stream(head, b"\x12\xff\x00\x34\xff\xd0\x56\xff\xff\xd9junk")).is_ok());
        for rest in [
            &b""[..],
            b"\x12\xff",
            b"\x12\xff\x00",
            b"\x12\xff\xff",
            b"\x12\xff\xc4\x00",
            b"\x12\xff\xc4\x00\x09ab",
            &[0; 99],
        ] {
            assert!(matches!(walk(&stream(head, rest)), Err(Fault::Decode(e)) if e.contains("cut short")), "{rest:?}");
        }
        assert!(walk(b"\xff").is_err() && walk(b"\xff\xd8").is_err());
    }

    #[test]
    fn colours_are_those_of_the_stream() {
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
            let found = walk(&stream(&list, b"\xff\xd9")).unwrap().colours(photometric);
            assert_eq!(matches!(found, ColorTransform::YCbCr), transformed, "{segments:?} {photometric}");
        }
    }
}
