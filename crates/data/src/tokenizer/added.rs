//! Tokens that stand in `tokenizer_config.json` alone: transformers adds them to what `tokenizer.json` holds, so some directories leave
//! them out there.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};
use tokenizers::{AddedToken, Tokenizer as Inner};

use crate::prepare::PrepareError;
use crate::prepare::error::read_json;

#[derive(Deserialize)]
struct Stored {
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    normalized: Option<bool>,
    #[serde(default)]
    special: bool,
}

impl Stored {
    fn token(self) -> AddedToken {
        AddedToken::from(self.content, self.special)
            .single_word(self.single_word)
            .lstrip(self.lstrip)
            .rstrip(self.rstrip)
            .normalized(self.normalized.unwrap_or(!self.special))
    }
}

/// Adds the tokens of `added_tokens_decoder` in the order of their ids, then the named and additional special tokens that are still
/// missing.
///
/// # Errors
/// The file does not hold what it should, or a token gets another id than the file says.
pub(super) fn take(dir: &Path, inner: &mut Inner) -> Result<(), PrepareError> {
    let path = dir.join("tokenizer_config.json");
    if !path.is_file() {
        return Ok(());
    }
    let config: Map<String, Value> = read_json(&path)?;
    let bad = |key: &'static str, what: String| PrepareError::Config { path: path.clone(), key, what };
    let known = inner.get_added_tokens_decoder();
    let (mut missing, mut ids): (Vec<AddedToken>, Vec<u32>) = (Vec::new(), Vec::new());
    if let Some(listed) = config.get("added_tokens_decoder").filter(|v| !v.is_null()) {
        let listed: BTreeMap<u32, Stored> = serde_json::from_value::<BTreeMap<String, Stored>>(listed.clone())
            .map_err(|e| e.to_string())
            .and_then(|map| {
                let number = |(id, t): (String, Stored)| Ok((id.parse().map_err(|_| format!("{id:?} is no id"))?, t));
                map.into_iter().map(number).collect::<Result<_, String>>()
            })
            .map_err(|e| bad("added_tokens_decoder", format!("cannot be read: {e}")))?;
        for (id, stored) in listed {
            let token = stored.token();
            if known.get(&id) != Some(&token) {
                missing.push(token);
                ids.push(id);
            }
        }
    }
    let named = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
    let lists = ["additional_special_tokens", "extra_special_tokens"];
    let several = lists.iter().filter_map(|key| config.get(*key)?.as_array()).flatten();
    for value in named.iter().filter_map(|key| config.get(*key)).chain(several) {
        let Some(content) = value.as_str().or_else(|| value.get("content")?.as_str()) else { continue };
        if !content.is_empty() && !known.values().chain(&missing).any(|t| t.content == content) {
            missing.push(AddedToken::from(content.to_owned(), true));
        }
    }
    inner.add_tokens(&missing);
    for (id, token) in ids.into_iter().zip(&missing) {
        if let Some(got) = inner.token_to_id(&token.content).filter(|got| *got != id) {
            let what = format!("gives {} the id {id}, but behind tokenizer.json it has {got}", token.content);
            return Err(bad("added_tokens_decoder", what));
        }
    }
    Ok(())
}
