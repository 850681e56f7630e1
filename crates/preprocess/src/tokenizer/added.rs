//! Tokens defined only in `tokenizer_config.json`: transformers adds them to those of `tokenizer.json`, so some directories omit them
//! there.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};
use tokenizers::{AddedToken, Tokenizer as Inner};

use crate::preprocess_error::PreprocessError;
use crate::preprocess_error::read_json;

#[derive(Deserialize)]
struct StoredToken {
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

impl StoredToken {
    fn token(self) -> AddedToken {
        AddedToken::from(self.content, self.special)
            .single_word(self.single_word)
            .lstrip(self.lstrip)
            .rstrip(self.rstrip)
            .normalized(self.normalized.unwrap_or(!self.special))
    }
}

/// Adds the tokens of `added_tokens_decoder` in order of their ids, then any named and additional special tokens still missing.
///
/// # Errors
/// Returns [`PreprocessError::Config`] if a token list cannot be parsed or a token gets an id other than the one in the file; a file that
/// cannot be read or parsed is an error as well.
pub(super) fn add_configured_tokens(dir: &Path, inner: &mut Inner) -> Result<(), PreprocessError> {
    let path = dir.join("tokenizer_config.json");
    if !path.is_file() {
        return Ok(());
    }
    let config: Map<String, Value> = read_json(&path)?;
    let invalid = |key: &'static str, what: String| PreprocessError::Config { path: path.clone(), key, what };
    let known = inner.get_added_tokens_decoder();
    let mut missing: Vec<AddedToken> = Vec::new();
    let mut ids: Vec<u32> = Vec::new();
    if let Some(listed) = config.get("added_tokens_decoder").filter(|v| !v.is_null()) {
        let listed: BTreeMap<u32, StoredToken> =
            serde_json::from_value::<BTreeMap<String, StoredToken>>(listed.clone())
                .map_err(|e| e.to_string())
                .and_then(|map| {
                    let number = |(id, t): (String, StoredToken)| {
                        Ok((id.parse().map_err(|_| format!("{id:?} is not a token id"))?, t))
                    };
                    map.into_iter().map(number).collect::<Result<_, String>>()
                })
                .map_err(|e| invalid("added_tokens_decoder", format!("cannot be read: {e}")))?;
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
    let additional = lists.iter().filter_map(|key| config.get(*key)?.as_array()).flatten();
    for value in named.iter().filter_map(|key| config.get(*key)).chain(additional) {
        let Some(content) = value.as_str().or_else(|| value.get("content")?.as_str()) else { continue };
        if !content.is_empty() && !known.values().chain(&missing).any(|t| t.content == content) {
            missing.push(AddedToken::from(content.to_owned(), true));
        }
    }
    inner
        .add_tokens(missing.iter().cloned())
        .map_err(|e| invalid("added_tokens_decoder", format!("cannot be appended to tokenizer.json: {e}")))?;
    for (id, token) in ids.into_iter().zip(&missing) {
        if let Some(actual) = inner.token_to_id(&token.content).filter(|actual| *actual != id) {
            let what = format!("gives {} the id {id}, but appended to tokenizer.json it gets {actual}", token.content);
            return Err(invalid("added_tokens_decoder", what));
        }
    }
    Ok(())
}
