//! The part of a DICOM file that images are made of: some elements of the main data set, and where the pixels lie.
//!
//! The parser of dicom-rs reads lazily here: a length is checked against the file before a value is read, and nesting is checked
//! before the parser goes on, because it trusts both.

use std::collections::BTreeMap;
use std::io::Cursor;

use dicom_core::{PrimitiveValue, Tag};
use dicom_dictionary_std::tags;
use dicom_encoding::{Endianness, TransferSyntax, TransferSyntaxIndex};
use dicom_parser::StatefulDecode;
use dicom_parser::dataset::LazyDataToken;
use dicom_parser::dataset::lazy_read::LazyDataSetReader;
use dicom_transfer_syntax_registry::{TransferSyntaxRegistry, entries::EXPLICIT_VR_LITTLE_ENDIAN};

use super::{Fault, fail};

/// Bytes of the preamble and the magic word behind it.
const PREAMBLE: usize = 132;
/// Longest value that is read, in bytes; those that images need are a few words.
const VALUE_LIMIT: u32 = 4096;

const WANTED: [Tag; 16] = [
    tags::TRANSFER_SYNTAX_UID,
    tags::ROWS,
    tags::COLUMNS,
    tags::NUMBER_OF_FRAMES,
    tags::SAMPLES_PER_PIXEL,
    tags::PHOTOMETRIC_INTERPRETATION,
    tags::PLANAR_CONFIGURATION,
    tags::BITS_ALLOCATED,
    tags::BITS_STORED,
    tags::HIGH_BIT,
    tags::PIXEL_REPRESENTATION,
    tags::RESCALE_SLOPE,
    tags::RESCALE_INTERCEPT,
    tags::WINDOW_CENTER,
    tags::WINDOW_WIDTH,
    tags::VOILUT_FUNCTION,
];

/// Whether a file says that it is DICOM.
pub(super) fn is_dicom(bytes: &[u8]) -> bool {
    bytes.get(PREAMBLE - 4..PREAMBLE).is_some_and(|magic| magic == b"DICM")
}

/// Where the pixels lie.
#[derive(Debug, Default)]
pub(super) enum Pixels<'a> {
    /// The data set has none.
    #[default]
    None,
    /// As they are.
    Native(&'a [u8]),
    /// Compressed: the fragments, the offset table (first) left out.
    Fragments(Vec<&'a [u8]>),
}

/// What was read of a file.
#[derive(Debug, Default)]
pub(super) struct DataSet<'a> {
    values: BTreeMap<Tag, PrimitiveValue>,
    /// Sequences of the main data set, by tag.
    sequences: Vec<Tag>,
    /// The pixels.
    pub pixels: Pixels<'a>,
    /// Values of pixels have their high byte first.
    pub big_endian: bool,
    /// Unique identifier of the transfer syntax.
    pub syntax: String,
}

impl<'a> DataSet<'a> {
    /// Reads a file up to its pixels.
    pub(super) fn read(bytes: &'a [u8]) -> Result<Self, Fault> {
        let rest = bytes.get(PREAMBLE..).unwrap_or_default();
        // File meta group, always in this syntax: its first element says how long it is.
        let length = match rest.get(..12) {
            Some([0x02, 0, 0, 0, b'U', b'L', 4, 0, a, b, c, d]) => u32::from_le_bytes([*a, *b, *c, *d]) as usize,
            _ => return Err(fail("its file meta group does not begin with its length")),
        };
        let meta = rest[12..].get(..length).ok_or_else(|| fail("it ends within its file meta group"))?;
        let meta = Self::read_set(meta, &EXPLICIT_VR_LITTLE_ENDIAN.erased())?;
        let uid = meta.text(tags::TRANSFER_SYNTAX_UID).ok_or_else(|| fail("it names no transfer syntax"))?;
        let syntax = TransferSyntaxRegistry
            .get(&uid)
            .filter(|s| !s.name().contains("Deflate"))
            .ok_or_else(|| Fault::Decode(format!("its transfer syntax {uid} is not supported")))?;
        let mut out = Self::read_set(&rest[12 + length..], syntax)?;
        out.big_endian = syntax.endianness() == Endianness::Big;
        out.syntax = uid;
        Ok(out)
    }

    fn read_set(bytes: &'a [u8], syntax: &TransferSyntax) -> Result<Self, Fault> {
        let mut out = Self::default();
        let mut reader = LazyDataSetReader::new_with_ts(Cursor::new(bytes), syntax).map_err(fail)?;
        // Open levels: true for an item, false for a sequence.
        let mut open: Vec<bool> = Vec::new();
        let mut fragments: Option<Vec<&[u8]>> = None;
        let inside = |start: u64, len: u32| {
            let start = usize::try_from(start).ok()?;
            bytes.get(start..start.checked_add(len as usize)?)
        };
        let cut = || fail("it ends within a value");
        let close = |open: &mut Vec<bool>, item| match open.pop() == Some(item) {
            true => Ok(()),
            false => Err(fail("something ends that was not begun")),
        };
        while let Some(token) = reader.advance() {
            match token.map_err(fail)? {
                LazyDataToken::SequenceStart { tag, .. } => {
                    if open.is_empty() {
                        out.sequences.push(tag);
                    }
                    open.push(false);
                }
                LazyDataToken::PixelSequenceStart => {
                    if open.is_empty() {
                        fragments = Some(Vec::new());
                    }
                    open.push(false);
                }
                LazyDataToken::ItemStart { .. } => {
                    if open.last() != Some(&false) {
                        return Err(fail("an item lies outside of a sequence"));
                    }
                    open.push(true);
                    if let Some(list) = fragments.as_mut().filter(|_| open.len() == 2) {
                        list.push(&[]);
                    }
                }
                LazyDataToken::ItemEnd => close(&mut open, true)?,
                LazyDataToken::SequenceEnd => {
                    close(&mut open, false)?;
                    if let Some(list) = fragments.take_if(|_| open.is_empty()) {
                        out.pixels = Pixels::Fragments(list.into_iter().skip(1).collect());
                        return Ok(out);
                    }
                }
                LazyDataToken::LazyItemValue { len, decoder } => {
                    let value = inside(decoder.position(), len).ok_or_else(cut)?;
                    if let Some(last) = fragments.as_mut().and_then(|f| f.last_mut()) {
                        *last = value;
                    }
                    decoder.skip_bytes(len).map_err(fail)?;
                }
                LazyDataToken::LazyValue { header, decoder } => {
                    let len = header.len.0;
                    let value = inside(decoder.position(), len).ok_or_else(cut)?;
                    if !open.is_empty() {
                        decoder.skip_bytes(len).map_err(fail)?;
                    } else if header.tag == tags::PIXEL_DATA {
                        out.pixels = Pixels::Native(value);
                        return Ok(out);
                    } else if WANTED.contains(&header.tag) && len <= VALUE_LIMIT {
                        out.values.insert(header.tag, decoder.read_value_preserved(&header).map_err(fail)?);
                    } else {
                        decoder.skip_bytes(len).map_err(fail)?;
                    }
                }
                // A header alone: its value is the next token.
                _ => {}
            }
        }
        if fragments.is_some() {
            return Err(fail("it ends within its pixels"));
        }
        Ok(out)
    }

    /// Whether the main data set has this sequence.
    pub(super) fn has_sequence(&self, tag: Tag) -> bool {
        self.sequences.contains(&tag)
    }

    /// A whole number; none when the element is absent or empty.
    ///
    /// # Errors
    /// It is there and no whole number.
    pub(super) fn number(&self, tag: Tag, name: &str) -> Result<Option<u32>, Fault> {
        self.convert(tag, name, |v| v.to_int::<u32>().map_err(fail))
    }

    /// The first of several real numbers; none when the element is absent or empty.
    ///
    /// # Errors
    /// It is there and no number.
    pub(super) fn real(&self, tag: Tag, name: &str) -> Result<Option<f64>, Fault> {
        let value = self.convert(tag, name, |v| v.to_multi_float64().map_err(fail))?;
        Ok(value.and_then(|v| v.first().copied()))
    }

    /// A text without its padding; none when the element is absent or empty.
    pub(super) fn text(&self, tag: Tag) -> Option<String> {
        let value = self.values.get(&tag)?.to_str();
        let text = value.trim_matches(|c: char| c.is_whitespace() || c == '\0');
        (!text.is_empty()).then(|| text.to_owned())
    }

    fn convert<T>(
        &self,
        tag: Tag,
        name: &str,
        read: impl FnOnce(&PrimitiveValue) -> Result<T, Fault>,
    ) -> Result<Option<T>, Fault> {
        if self.text(tag).is_none() {
            return Ok(None);
        }
        let value = self.values.get(&tag).map(read).transpose();
        value.map_err(|_| Fault::Decode(format!("its {name} is {:?}, no number", self.text(tag).unwrap_or_default())))
    }
}
