//! The part of a DICOM file before its data set: the preamble and the file meta group, either of which may be missing.
//!
//! Files from scanners and exports may lack the preamble, lack the length of the group or have a wrong one, or name a transfer syntax other
//! than the one in which they are written. All of them are read as pydicom reads them: the group ends where its elements end, and the first
//! element shows how the data set is encoded. A deflated data set is inflated here.

use std::borrow::Cow;

use dicom_dictionary_std::uids;

use super::inflate::inflate;
use super::{DecodeError, fail};
use crate::image_store::MAX_FILE_BYTES;

/// Length in bytes of the preamble and the magic word after it.
const PREAMBLE_BYTES: usize = 132;
/// Value representations with a four-byte length after two unused bytes.
const LONG_REPRESENTATIONS: [&[u8; 2]; 12] =
    [b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UT", b"UV"];
/// Transfer syntax of big-endian files, whose constant in the dictionary is deprecated because the standard retired it.
const BIG_ENDIAN: &str = "1.2.840.10008.1.2.2";

/// The information needed to read the data set.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Header<'a> {
    /// Unique identifier of the transfer syntax; guessed if the file does not name one.
    pub syntax: &'a str,
    /// Whether the elements of the data set name their value representation.
    pub explicit: bool,
    /// Bytes of the data set, inflated if the transfer syntax deflates them.
    pub rest: Cow<'a, [u8]>,
}

/// Returns whether a file is DICOM: it has the magic word, or starts like a data set without a preamble.
pub(super) fn is_dicom(bytes: &[u8]) -> bool {
    has_preamble(bytes) || starts_without_preamble(bytes)
}

fn has_preamble(bytes: &[u8]) -> bool {
    bytes.get(PREAMBLE_BYTES - 4..PREAMBLE_BYTES).is_some_and(|magic| magic == b"DICM")
}

/// Returns whether the first element is in group 2 or among the first ones of group 8 and has a valid value representation or length.
fn starts_without_preamble(bytes: &[u8]) -> bool {
    let Some(&[group, 0, low, high, a, b, c, d]) = bytes.first_chunk::<8>() else { return false };
    let length = u32::from_le_bytes([a, b, c, d]) as usize;
    let plausible = names_representation([a, b]) || length <= bytes.len() - 8;
    plausible && high == 0 && (group == 2 || group == 8 && low <= 0x18)
}

fn names_representation([a, b]: [u8; 2]) -> bool {
    a.is_ascii_uppercase() && b.is_ascii_uppercase()
}

/// Reads a file up to its data set.
pub(super) fn read(bytes: &[u8]) -> Result<Header<'_>, DecodeError> {
    let mut rest = if has_preamble(bytes) { &bytes[PREAMBLE_BYTES..] } else { bytes };
    let mut named_syntax = None;
    while let Some(&[2, 0, low, high, a, b, c, d]) = rest.first_chunk::<8>() {
        let long = LONG_REPRESENTATIONS.contains(&&[a, b]);
        let (head, length) = match (names_representation([a, b]), long) {
            (true, false) => (8, u32::from(u16::from_le_bytes([c, d]))),
            (true, true) => match rest.get(8..12) {
                Some(&[a, b, c, d]) => (12, u32::from_le_bytes([a, b, c, d])),
                _ => return Err(fail("it ends within its file meta group")),
            },
            (false, _) => (8, u32::from_le_bytes([a, b, c, d])),
        };
        let end = head + length as usize;
        let value = rest.get(head..end).ok_or_else(|| fail("it ends within its file meta group"))?;
        if (low, high) == (0x10, 0) {
            named_syntax =
                std::str::from_utf8(value).ok().map(|v| v.trim_matches(|c: char| c.is_whitespace() || c == '\0'));
        }
        rest = &rest[end..];
    }
    let rest = match named_syntax {
        Some(uids::DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN) => Cow::Owned(inflated(rest)?),
        _ => Cow::Borrowed(rest),
    };
    let explicit = rest.get(4..6).is_some_and(|vr| names_representation([vr[0], vr[1]]));
    // Low groups come first: one that looks high is in the opposite byte order.
    let swapped = rest.first_chunk::<2>().is_some_and(|g| u16::from_le_bytes(*g) >= 1024);
    let syntax = match named_syntax.filter(|uid| !uid.is_empty()) {
        Some(uid) => uid,
        None if !explicit => uids::IMPLICIT_VR_LITTLE_ENDIAN,
        None if swapped => BIG_ENDIAN,
        None => uids::EXPLICIT_VR_LITTLE_ENDIAN,
    };
    Ok(Header { syntax, explicit, rest })
}

/// Inflates a data set, which may become as large as an image file that is not deflated.
fn inflated(bytes: &[u8]) -> Result<Vec<u8>, DecodeError> {
    let out = inflate(bytes, MAX_FILE_BYTES + 1)?;
    if out.len() as u64 > MAX_FILE_BYTES {
        return Err(DecodeError::TooLarge {
            what: "the size of its inflated data set".to_owned(),
            limit: MAX_FILE_BYTES,
        });
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An element of a file meta group.
    fn meta(element: u16, vr: &[u8; 2], value: &[u8]) -> Vec<u8> {
        let mut out = [&[2, 0][..], &element.to_le_bytes(), vr].concat();
        match LONG_REPRESENTATIONS.contains(&vr) {
            true => out.extend([&[0, 0][..], &(value.len() as u32).to_le_bytes()].concat()),
            false => out.extend((value.len() as u16).to_le_bytes()),
        }
        out.extend(value);
        out
    }

    #[test]
    fn preamble_and_group_length_may_be_missing() {
        let data = b"\x08\x00\x16\x00UI\x02\x001.";
        let syntax = meta(0x10, b"UI", b"1.2.840.10008.1.2.1\0");
        let version = meta(1, b"OB", &[0, 1]);
        let preamble = [&[0; 128][..], b"DICM"].concat();
        for (name, lead) in [
            ("whole", [&preamble[..], &meta(0, b"UL", &42_u32.to_le_bytes()), &version, &syntax].concat()),
            ("no length of the group", [&preamble[..], &version, &syntax].concat()),
            ("a wrong length", [&preamble[..], &meta(0, b"UL", &[255; 4]), &syntax].concat()),
            ("no preamble", [&version[..], &syntax].concat()),
            ("the data set alone", Vec::new()),
        ] {
            let file = [&lead[..], data].concat();
            assert!(is_dicom(&file), "{name}");
            let header = read(&file).unwrap();
            assert_eq!((header.syntax, header.explicit), (uids::EXPLICIT_VR_LITTLE_ENDIAN, true), "{name}");
            assert_eq!(&*header.rest, data, "{name}");
        }
        let cut = [&preamble[..], &syntax[..12]].concat();
        assert!(matches!(read(&cut), Err(DecodeError::Decode(e)) if e.contains("within its file meta group")));
        assert_eq!(read(b"\x08\x00\x16\x00\x02\0\0\x001.").unwrap().syntax, uids::IMPLICIT_VR_LITTLE_ENDIAN);
        assert_eq!(read(b"\x00\x08\x00\x16UI\x00\x021.").unwrap().syntax, BIG_ENDIAN);
    }

    #[test]
    fn other_formats_are_not_dicom() {
        for (name, bytes) in [
            ("nothing", &b""[..]),
            ("PNG", b"\x89PNG\r\n\x1a\n"),
            ("JPEG", b"\xff\xd8\xff\xe0\0\x10JFIF"),
            ("BMP", b"BM\0\0\0\0\0\0"),
            ("JSON", b"{\"id\":1}"),
            ("a long run", &[8; 40]),
            ("a short run", &[2; 7]),
        ] {
            assert!(!is_dicom(bytes), "{name}");
        }
    }
}
