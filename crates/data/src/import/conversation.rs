//! Text of conversations: placeholders that stand for the image. Pure.

use std::sync::LazyLock;

use regex::Regex;

static IMAGE: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"(?s)(?:Picture \d+:\s*)?<img>.*?</img>|<image>|<image_\d+>").ok());

/// The text without the image's placeholder, trimmed.
pub(super) fn without_image(text: &str) -> String {
    IMAGE.as_ref().map_or_else(|| text.to_owned(), |r| r.replace_all(text, "").into_owned()).trim().to_owned()
}
