//! Bytes of an annotation file to text: byte order marks, and the encoding that an XML declaration names. Pure.

use encoding_rs::{Encoding, UTF_8, UTF_16BE, UTF_16LE};

/// The text of a file that says nothing of its encoding: by its byte order mark, else UTF-8.
///
/// # Errors
/// What is wrong and what to do.
pub(super) fn text(bytes: Vec<u8>) -> Result<String, String> {
    if let Some((encoding, mark)) = Encoding::for_bom(&bytes) {
        return decode(encoding, &bytes[mark..], "its byte order mark says so");
    }
    String::from_utf8(bytes).map_err(|_| {
        "the file is not UTF-8: convert it, for example with `iconv -f GBK -t UTF-8` or `iconv -f LATIN1 -t UTF-8`"
            .to_owned()
    })
}

/// The text of an XML file: by its byte order mark, by the encoding that it declares, else UTF-8.
///
/// # Errors
/// What is wrong and what to do.
pub(super) fn xml(bytes: Vec<u8>) -> Result<String, String> {
    if Encoding::for_bom(&bytes).is_some() {
        return text(bytes);
    }
    // Without a mark, UTF-16 shows by the bytes of `<?` (XML 1.0, appendix F).
    match bytes.get(..4) {
        Some(b"<\0?\0") => return decode(UTF_16LE, &bytes, "its first bytes say so"),
        Some(b"\0<\0?") => return decode(UTF_16BE, &bytes, "its first bytes say so"),
        _ => {}
    }
    let Some(label) = declared(&bytes) else { return text(bytes) };
    let encoding = Encoding::for_label(label.as_bytes()).ok_or_else(|| {
        format!("the XML declares the encoding \"{label}\", which is not known: convert the file to UTF-8")
    })?;
    // A declaration that was read byte by byte is not in UTF-16, whatever it says.
    let encoding = if [UTF_16LE, UTF_16BE].contains(&encoding) { UTF_8 } else { encoding };
    decode(encoding, &bytes, "its XML declaration says so")
}

/// The encoding that the XML declaration names, where there is one.
fn declared(bytes: &[u8]) -> Option<String> {
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
    fn marks_and_declarations_decide() {
        let word = "息肉 é";
        assert_eq!(text(word.as_bytes().to_vec()).as_deref(), Ok(word));
        for swap in [false, true] {
            assert_eq!(text(utf16(&format!("\u{feff}{word}"), swap)).as_deref(), Ok(word));
            let file = format!("<?xml version=\"1.0\" encoding=\"utf-16\"?><a>{word}</a>");
            assert_eq!(xml(utf16(&file, swap)), Ok(file.clone()), "without a mark");
            assert_eq!(xml(utf16(&format!("\u{feff}{file}"), swap)), Ok(file), "with one");
        }
        assert_eq!(text([b"\xef\xbb\xbf", word.as_bytes()].concat()).as_deref(), Ok(word));
        for (label, bytes, want) in [
            ("GB2312", &b"\xcf\xa2\xc8\xe2"[..], "息肉"),
            ("gbk", b"\xcf\xa2\xc8\xe2", "息肉"),
            ("ISO-8859-1", b"l\xe9sion", "lésion"),
            ("UTF-8", "息肉".as_bytes(), "息肉"),
            // Written by a tool that declares what its strings are in memory.
            ("utf-16", "息肉".as_bytes(), "息肉"),
        ] {
            for quote in ["\"", "'"] {
                let head = format!("<?xml version=\"1.0\" encoding = {quote}{label}{quote}?>");
                assert_eq!(xml([head.as_bytes(), bytes].concat()), Ok(format!("{head}{want}")));
            }
        }
        assert_eq!(xml("<a>息肉</a>".into()).as_deref(), Ok("<a>息肉</a>"));
        // What is no declaration does not decide.
        assert_eq!(xml("<a>encoding=\"latin1\" 息肉</a>".into()).as_deref(), Ok("<a>encoding=\"latin1\" 息肉</a>"));
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let gbk = b"\xcf\xa2\xc8\xe2".to_vec();
        assert!(text(gbk.clone()).unwrap_err().contains("iconv -f GBK"));
        assert!(xml([b"<a>", &gbk[..]].concat()).unwrap_err().contains("not UTF-8"));
        let declared = |label: &str, bytes: &[u8]| {
            xml([format!("<?xml encoding=\"{label}\"?>").as_bytes(), bytes].concat()).unwrap_err()
        };
        assert!(declared("UTF-8", &gbk).contains("is not UTF-8, though its XML declaration says so"));
        assert!(declared("GBK", b"\xff\xff").contains("is not GBK"));
        assert!(declared("klingon", b"").contains("\"klingon\", which is not known"));
        assert!(text(b"\xff\xfe\x00\xd8".to_vec()).unwrap_err().contains("UTF-16LE, though its byte order mark"));
        for odd in ["", "<?xml", "<?xml encoding", "<?xml encoding=", "<?xml encoding=é?>", "<?xml encoding=\"?>"] {
            assert_eq!(xml(odd.as_bytes().to_vec()).as_deref(), Ok(odd));
        }
    }
}
