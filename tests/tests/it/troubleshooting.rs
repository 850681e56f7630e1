//! The troubleshooting page quotes messages as the sources have them.

use std::path::Path;

/// Messages of other programs: torch-sys's build script, and the operating system.
const FOREIGN: [&str; 2] = ["Cannot find a libtorch install, you can either", "No such file or directory"];
/// Characters of a piece of a message, below which finding it says nothing.
const MIN_PIECE_CHARS: usize = 13;

/// Appends all Rust sources below a directory.
fn add_sources(dir: &Path, sources: &mut String) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            add_sources(&path, sources);
        } else if path.extension().is_some_and(|e| e == "rs") {
            sources.push_str(&std::fs::read_to_string(&path).unwrap());
        }
    }
}

/// Joins string literals that continue on the next line, and removes quotes.
fn as_printed(text: &str) -> String {
    let joined: String = text.split("\\\n").enumerate().map(|(i, s)| if i == 0 { s } else { s.trim_start() }).collect();
    joined.replace(['`', '"', '\\'], "")
}

#[test]
fn headings_quote_messages_of_the_sources() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut sources = std::fs::read_to_string(root.join(".ci/setup")).unwrap();
    add_sources(&root.join("crates"), &mut sources);
    let sources = as_printed(&sources);
    let page = std::fs::read_to_string(root.join(".github/TROUBLESHOOTING.md")).unwrap();
    let headings: Vec<&str> = page.lines().filter_map(|l| l.strip_prefix("### ")).collect();
    assert!(headings.len() >= 20, "{} headings", headings.len());
    for heading in headings {
        let messages = heading.split('`').skip(1).step_by(2);
        let pieces = messages.flat_map(|m| m.trim_start_matches("setup: ").split('…'));
        let trimmed = pieces.map(|p| p.trim_matches(|c: char| !c.is_alphanumeric()));
        let pieces: Vec<&str> = trimmed.filter(|p| p.chars().count() >= MIN_PIECE_CHARS).collect();
        assert!(!pieces.is_empty(), "no message in `{heading}`");
        for piece in pieces {
            assert!(FOREIGN.contains(&piece) || sources.contains(piece), "no program says `{piece}` of `{heading}`");
        }
    }
}
