//! Decoding of annotation files to text, by byte order mark or by the encoding that an XML declaration names.

use encoding_rs::{Encoding, UTF_8, UTF_16BE, UTF_16LE};

/// Decodes a file of unknown encoding: by its byte order mark, else as UTF-8.
///
/// # Errors
/// Returns a message that says what is wrong and what to do.
pub(super) fn decode_text(bytes: Vec<u8>) -> Result<String, String> {
    if let Some((encoding, mark)) = Encoding::for_bom(&bytes) {
        return decode(encoding, &bytes[mark..], "its byte order mark says so");
    }
    String::from_utf8(bytes).map_err(|_| {
        "the file is not UTF-8: convert it, for example with `iconv -f GBK -t UTF-8` or `iconv -f LATIN1 -t UTF-8`"
            .to_owned()
    })
}

/// Decodes an XML file: by its byte order mark, by the encoding that it declares, else as UTF-8.
///
/// # Errors
/// Returns a message that says what is wrong and what to do.
pub(super) fn decode_xml(bytes: Vec<u8>) -> Result<String, String> {
    if Encoding::for_bom(&bytes).is_some() {
        return decode_text(bytes);
    }
    // Without a byte order mark, UTF-16 is recognised by the bytes of `<?` (XML 1.0, appendix F).
    match bytes.get(..4) {
        Some(b"<\0?\0") => return decode(UTF_16LE, &bytes, "its first bytes say so"),
        Some(b"\0<\0?") => return decode(UTF_16BE, &bytes, "its first bytes say so"),
        _ => {}
    }
    let Some(label) = declared_encoding(&bytes) else { return decode_text(bytes) };
    let encoding = Encoding::for_label(label.as_bytes()).ok_or_else(|| {
        format!("the XML declares the encoding \"{label}\", which is not supported: convert the file to UTF-8")
    })?;
    // A declaration that can be read as ASCII is not in UTF-16, even if it says so.
    let encoding = if [UTF_16LE, UTF_16BE].contains(&encoding) { UTF_8 } else { encoding };
    decode(encoding, &bytes, "its XML declaration says so")
}

/// Returns the encoding named by the XML declaration, if any.
fn declared_encoding(bytes: &[u8]) -> Option<String> {
    let start = bytes.trim_ascii_start().strip_prefix(b"<?xml")?;
    let head = &start[..start.windows(2).take(300).position(|w| w == b"?>")?];
    let head = String::from_utf8_lossy(head);
    let value = head.split_once("encoding")?.1.trim_start().strip_prefix('=')?.trim_start();
    let quote = value.chars().next().filter(|c| ['"', '\''].contains(c))?;
    Some(value[1..].split_once(quote)?.0.trim().to_owned())
}

fn decode(encoding: &'static Encoding, bytes: &[u8], why: &str) -> Result<String, String> {
    let text = encoding.decode_without_bom_handling_and_without_replacement(bytes);
    text.map(Into::into).ok_or_else(|| format!("the file is not {}, though {why}", encoding.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn utf16(text: &str, swap: bool) -> Vec<u8> {
        text.encode_utf16().flat_map(|u| if swap { u.to_be_bytes() } else { u.to_le_bytes() }).collect()
    }

    #[test]
    fn encoding_is_detected_by_mark_and_declaration() {
        let word = "息肉 é";
        assert_eq!(decode_text(word.as_bytes().to_vec()).as_deref(), Ok(word));
        for swap in [false, true] {
            assert_eq!(decode_text(utf16(&format!("\u{feff}{word}"), swap)).as_deref(), Ok(word));
            let file = format!("<?xml version=\"1.0\" encoding=\"utf-16\"?><a>{word}</a>");
            assert_eq!(decode_xml(utf16(&file, swap)), Ok(file.clone()), "without a mark");
            assert_eq!(decode_xml(utf16(&format!("\u{feff}{file}"), swap)), Ok(file), "with one");
        }
        assert_eq!(decode_text([b"\xef\xbb\xbf", word.as_bytes()].concat()).as_deref(), Ok(word));
        for (label, bytes, want) in [
            ("GB2312", &b"\xcf\xa2\xc8\xe2"[..], "息肉"),
            ("gbk", b"\xcf\xa2\xc8\xe2", "息肉"),
            ("ISO-8859-1", b"l\xe9sion", "lésion"),
            ("UTF-8", "息肉".as_bytes(), "息肉"),
            // Some tools declare the encoding that their strings have in memory.
            ("utf-16", "息肉".as_bytes(), "息肉"),
        ] {
            for quote in ["\"", "'"] {
                let head = format!("<?xml version=\"1.0\" encoding = {quote}{label}{quote}?>");
                assert_eq!(decode_xml([head.as_bytes(), bytes].concat()), Ok(format!("{head}{want}")));
            }
        }
        assert_eq!(decode_xml("<a>息肉</a>".into()).as_deref(), Ok("<a>息肉</a>"));
        // Only a declaration counts.
        assert_eq!(
            decode_xml("<a>encoding=\"latin1\" 息肉</a>".into()).as_deref(),
            Ok("<a>encoding=\"latin1\" 息肉</a>")
        );
    }

    #[test]
    fn undecodable_bytes_are_errors() {
        let gbk = b"\xcf\xa2\xc8\xe2".to_vec();
        assert!(decode_text(gbk.clone()).unwrap_err().contains("iconv -f GBK"));
        assert!(decode_xml([b"<a>", &gbk[..]].concat()).unwrap_err().contains("not UTF-8"));
        let declared = |label: &str, bytes: &[u8]| {
            decode_xml([format!("<?xml encoding=\"{label}\"?>").as_bytes(), bytes].concat()).unwrap_err()
        };
        assert!(declared("UTF-8", &gbk).contains("is not UTF-8, though its XML declaration says so"));
        assert!(declared("GBK", b"\xff\xff").contains("is not GBK"));
        assert!(declared("klingon", b"").contains("\"klingon\", which is not supported"));
        assert!(
            decode_text(b"\xff\xfe\x00\xd8".to_vec()).unwrap_err().contains("UTF-16LE, though its byte order mark")
        );
        for input in ["", "<?xml", "<?xml encoding", "<?xml encoding=", "<?xml encoding=é?>", "<?xml encoding=\"?>"] {
            assert_eq!(decode_xml(input.as_bytes().to_vec()).as_deref(), Ok(input));
        }
    }
}
