//! Removes characters that hide or reorder text from answers before others see them.

/// Returns the first `limit` characters of `text`, trimmed, without control characters (line feeds and tabs become spaces),
/// bidirectional controls, zero-width and tag characters.
///
/// Source: Unicode Technical Report 36, section 3 (text whose display differs from its stored order).
pub fn visible(text: &str, limit: usize) -> String {
    let shown = text.chars().filter_map(|c| match c {
        '\n' | '\r' | '\t' => Some(' '),
        c if c.is_control() || is_hidden(c) => None,
        c => Some(c),
    });
    let cut: String = shown.skip_while(|c| c.is_whitespace()).take(limit).collect();
    cut.trim_end().to_owned()
}

fn is_hidden(c: char) -> bool {
    matches!(c,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
        | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e0fff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_characters_are_removed() {
        assert_eq!(visible(" a\u{202e}b\u{200b}c\u{0}\nd\u{e0041} ", 100), "abc d");
        assert_eq!(visible("höhle", 3), "höh");
        assert_eq!(visible("\u{feff}", 3), "");
    }
}
