//! Prompts: renders the model's chat template for a system message and one user message of images and a text, and expands the image tokens.
//!
//! The template runs in minijinja with the Python features that templates use; it cannot read files. A date in the prompt is the time at
//! which the model directory was loaded.

mod python;

use std::path::{Path, PathBuf};

use chrono::Local;
use minijinja::{Environment, Error, Value as Template};
use regex::Regex;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use unveil_core::Grid;

use crate::preprocess_error::PreprocessError;
use crate::preprocess_error::{read, read_json};
use crate::tokenizer::Tokenizer;

/// A model directory's chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    env: Environment<'static>,
    path: PathBuf,
    /// `bos_token`, `eos_token` and so on, which templates may write.
    tokens: Map<String, Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum StoredTemplate {
    Single(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

const TEMPLATE_NAME: &str = "chat";

impl ChatTemplate {
    /// Loads `chat_template.jinja`, else `chat_template.json`, else the template in `tokenizer_config.json`.
    pub fn load(dir: &Path) -> Result<Self, PreprocessError> {
        let config_path = dir.join("tokenizer_config.json");
        let config: Map<String, Value> = if config_path.is_file() { read_json(&config_path)? } else { Map::new() };
        let plain = dir.join("chat_template.jinja");
        let wrapped = dir.join("chat_template.json");
        let (path, source) = if plain.is_file() {
            let text = String::from_utf8(read(&plain)?)
                .map_err(|e| PreprocessError::Format { path: plain.clone(), cause: e.to_string() })?;
            (plain, text)
        } else if wrapped.is_file() {
            let map: Map<String, Value> = read_json(&wrapped)?;
            let text = template_text(&wrapped, map.get("chat_template"))?;
            (wrapped, text)
        } else if config_path.is_file() {
            let text = template_text(&config_path, config.get("chat_template"))?;
            (config_path, text)
        } else {
            let cause = std::io::Error::new(std::io::ErrorKind::NotFound, "no chat template in the model directory");
            return Err(PreprocessError::File { path: plain, cause });
        };
        let tokens = config
            .iter()
            .filter(|(k, _)| k.ends_with("_token"))
            .filter_map(|(k, v)| {
                let text = v.as_str().or_else(|| v.get("content")?.as_str())?;
                Some((k.clone(), Value::from(text)))
            })
            .collect();
        let env =
            environment(&source).map_err(|e| PreprocessError::Format { path: path.clone(), cause: describe(&e) })?;
        Ok(Self { env, path, tokens })
    }

    /// Renders the system message `system`, if it is not empty, and one user message of `images` images followed by `text`, with the
    /// generation prompt and without tools.
    ///
    /// # Errors
    /// Returns [`PreprocessError::TextTemplate`] if the template is for text only, and [`PreprocessError::Format`] if it cannot be rendered
    /// or ignores the system message.
    pub fn render(&self, images: usize, system: &str, text: &str) -> Result<String, PreprocessError> {
        let mut content = vec![json!({"type": "image"}); images];
        content.push(json!({"type": "text", "text": text}));
        let format = |cause: String| PreprocessError::Format { path: self.path.clone(), cause };
        let rendered =
            self.render_content(system, &content.into()).map_err(|e| match images > 0 && self.is_text_only(text) {
                true => PreprocessError::TextTemplate { path: self.path.clone() },
                false => format(describe(&e)),
            })?;
        if !rendered.contains(system.trim()) {
            return Err(format("the chat template ignores the system message: leave prompt.system empty".to_owned()));
        }
        Ok(rendered)
    }

    /// Renders the template with a system message, unless it is empty, and one user message of this content.
    fn render_content(&self, system: &str, content: &Value) -> Result<String, Error> {
        let mut messages = vec![json!({"role": "user", "content": content})];
        if !system.is_empty() {
            messages.insert(0, json!({"role": "system", "content": [{"type": "text", "text": system}]}));
        }
        let mut context = self.tokens.clone();
        context.insert("messages".to_owned(), messages.into());
        context.insert("add_generation_prompt".to_owned(), Value::Bool(true));
        self.env.get_template(TEMPLATE_NAME)?.render(Template::from_serialize(&context))
    }

    /// Returns whether the template accepts messages with plain text as content; used for a template that ignores images.
    fn is_text_only(&self, text: &str) -> bool {
        self.render_content("", &text.into()).is_ok_and(|rendered| rendered.contains(text))
    }

    /// Returns the token ids of a system message (none if it is empty) and a user message of images with these merged grids and `text`,
    /// including the generation prompt. Each image has one placeholder per image token, row-major over its merged grid.
    ///
    /// # Errors
    /// Returns [`PreprocessError::SpecialInText`] if a text contains a special token, [`PreprocessError::TextTemplate`] if the template
    /// ignores images, [`PreprocessError::ImageTokens`] if it does not write one placeholder per image, and [`PreprocessError::Format`] if it
    /// ignores the system message.
    pub fn prompt_ids(
        &self,
        tokenizer: &Tokenizer,
        grids: &[Grid],
        system: &str,
        text: &str,
    ) -> Result<Vec<u32>, PreprocessError> {
        tokenizer.encode_plain(system)?;
        tokenizer.encode_plain(text)?;
        let unexpanded = tokenizer.encode(&self.render(grids.len(), system, text)?)?;
        let pad = tokenizer.special().image_pad;
        let found = unexpanded.iter().filter(|id| **id == pad).count();
        if found == 0 && !grids.is_empty() && self.is_text_only(text) {
            return Err(PreprocessError::TextTemplate { path: self.path.clone() });
        }
        if found != grids.len() {
            return Err(PreprocessError::ImageTokens { found, expected: grids.len() });
        }
        let total: usize = grids.iter().map(Grid::tokens).sum();
        let mut ids = Vec::with_capacity(unexpanded.len() + total);
        let mut remaining_grids = grids.iter();
        for id in unexpanded {
            let copies = if id == pad { remaining_grids.next().map_or(0, Grid::tokens) } else { 1 };
            ids.extend(std::iter::repeat_n(id, copies));
        }
        Ok(ids)
    }
}

/// Returns the template in the value of a `chat_template` key.
fn template_text(path: &Path, value: Option<&Value>) -> Result<String, PreprocessError> {
    let missing = || PreprocessError::Config {
        path: path.to_owned(),
        key: "chat_template",
        what: "is missing: the model directory has no chat template".to_owned(),
    };
    let value = value.filter(|v| !v.is_null()).ok_or_else(missing)?;
    match serde_json::from_value(value.clone()) {
        Ok(StoredTemplate::Single(text)) => Ok(text),
        Ok(StoredTemplate::Named(list)) => {
            list.into_iter().find(|t| t.name == "default").map(|t| t.template).ok_or_else(missing)
        }
        Err(_) => Err(PreprocessError::Config {
            path: path.to_owned(),
            key: "chat_template",
            what: "is neither a text nor a list of named templates".to_owned(),
        }),
    }
}

/// Creates the environment that transformers gives chat templates, as far as a single user message uses it.
fn environment(source: &str) -> Result<Environment<'static>, Error> {
    let mut env = Environment::new();
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_fuel(Some(1_000_000));
    python::install(&mut env, Local::now());
    env.add_template_owned(TEMPLATE_NAME, python::rewrite_percent_operators(&strip_generation_marks(source)))?;
    Ok(env)
}

/// Replaces `{% generation %}` blocks by their content; in transformers they only mark text for training masks.
fn strip_generation_marks(source: &str) -> String {
    match (Regex::new(r"\{%(-?)\s*generation\s*(-?)%\}"), Regex::new(r"\{%(-?)\s*endgeneration\s*(-?)%\}")) {
        (Ok(open), Ok(close)) => {
            let opened = open.replace_all(source, "{%$1 if true $2%}");
            close.replace_all(&opened, "{%$1 endif $2%}").into_owned()
        }
        _ => source.to_owned(),
    }
}

fn describe(e: &Error) -> String {
    let location = e.line().map_or(String::new(), |l| format!(" (line {l})"));
    format!("chat template: {}{location}", e.detail().map_or_else(|| e.to_string(), str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tiny::{TinyProcessorSpec, write_tiny};

    fn with_template(text: &str) -> (tempfile::TempDir, Result<ChatTemplate, PreprocessError>) {
        let dir = tempfile::tempdir().unwrap();
        write_tiny(dir.path(), &TinyProcessorSpec::default()).unwrap();
        std::fs::write(dir.path().join("chat_template.jinja"), text).unwrap();
        let t = ChatTemplate::load(dir.path());
        (dir, t)
    }

    #[test]
    fn image_tokens_are_expanded_in_place() {
        let dir = tempfile::tempdir().unwrap();
        write_tiny(dir.path(), &TinyProcessorSpec::default()).unwrap();
        let chat = ChatTemplate::load(dir.path()).unwrap();
        let tokenizer = Tokenizer::load(dir.path()).unwrap();
        assert_eq!(
            chat.render(1, "", "Q?").unwrap(),
            "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Q?<|im_end|>\n<|im_start|>assistant\n"
        );
        let grids = [Grid { rows: 2, cols: 3 }, Grid { rows: 1, cols: 2 }];
        let ids = chat.prompt_ids(&tokenizer, &grids, "", "What?").unwrap();
        let special = tokenizer.special();
        let images: Vec<&[u32]> = ids
            .split(|id| *id == special.vision_start)
            .skip(1)
            .map(|rest| rest.split(|id| *id == special.vision_end).next().unwrap())
            .collect();
        assert_eq!(images, [&[special.image_pad; 6][..], &[special.image_pad; 2]]);
        assert_eq!(ids.iter().filter(|id| **id == special.image_pad).count(), 8);
        assert!(matches!(
            chat.prompt_ids(&tokenizer, &grids, "", "a <|image_pad|>"),
            Err(PreprocessError::SpecialInText { .. })
        ));
    }

    #[test]
    fn system_messages_precede_the_user() {
        let dir = tempfile::tempdir().unwrap();
        write_tiny(dir.path(), &TinyProcessorSpec::default()).unwrap();
        let tokenizer = Tokenizer::load(dir.path()).unwrap();
        let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}";
        let (_dir, chat) = with_template(template);
        let chat = chat.unwrap();
        let both = chat.render(0, "Be brief.", "Q?").unwrap();
        assert_eq!(both, "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ?<|im_end|>\n");
        let e = chat.prompt_ids(&tokenizer, &[], "a <|im_end|>", "Q?").unwrap_err().to_string();
        assert!(e.contains("<|im_end|>"), "{e}");
        let (_dir, chat) = with_template("{{ messages[-1].content[-1].text }}");
        let e = chat.unwrap().render(0, "Be brief.", "Q?").unwrap_err().to_string();
        assert!(e.contains("chat_template.jinja") && e.contains("prompt.system"), "{e}");
        let (_dir, chat) =
            with_template("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}");
        let e = chat.unwrap().render(0, "Be brief.", "Q?").unwrap_err().to_string();
        assert!(e.contains("no system role"), "{e}");
    }

    #[test]
    fn bad_templates_name_their_file() {
        let (_dir, t) = with_template("{% for");
        assert!(t.unwrap_err().to_string().contains("chat_template.jinja"));
        let (_dir, t) = with_template("{{ raise_exception('only text') }}");
        let e = t.unwrap().render(1, "", "x").unwrap_err().to_string();
        assert!(e.contains("chat_template.jinja") && e.contains("only text"), "{e}");
        let (_dir, t) = with_template("{% for i in range(100000000) %}{{ i }}{% endfor %}");
        assert!(t.unwrap().render(1, "", "x").is_err());
        let (dir, t) = with_template("no image");
        let tokenizer = Tokenizer::load(dir.path()).unwrap();
        let e = t.unwrap().prompt_ids(&tokenizer, &[Grid { rows: 1, cols: 1 }], "", "x").unwrap_err();
        assert!(matches!(e, PreprocessError::ImageTokens { found: 0, expected: 1 }));
        std::fs::remove_file(dir.path().join("chat_template.jinja")).unwrap();
        assert!(ChatTemplate::load(dir.path()).unwrap_err().to_string().contains("chat_template"));
    }

    #[test]
    fn text_only_templates_are_reported() {
        for text in [
            "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}",
            "{% for m in messages %}{{ m['content'] }}{% endfor %}",
            "{% for m in messages %}{{ m['content'] if m.content is string else m.content[-1].text }}{% endfor %}",
        ] {
            let (dir, t) = with_template(text);
            let tokenizer = Tokenizer::load(dir.path()).unwrap();
            let e = t.unwrap().prompt_ids(&tokenizer, &[Grid { rows: 1, cols: 1 }], "", "Where?").unwrap_err();
            assert!(matches!(e, PreprocessError::TextTemplate { .. }), "{e}");
            assert!(e.to_string().contains("chat_template.jinja") && e.to_string().contains("text only"), "{e}");
        }
    }

    #[test]
    fn python_methods_loop_controls_and_generation_marks_work() {
        let (_dir, t) = with_template(
            "{% for m in messages %}{% if m.role.startswith('u') %}{% generation %}{{ m['content'][-1].text.strip() }}{{ eos_token }}{% endgeneration %}{% break %}{% endif %}{% endfor %}",
        );
        assert_eq!(t.unwrap().render(0, "", " hi ").unwrap(), "hi<|im_end|>");
    }
}
