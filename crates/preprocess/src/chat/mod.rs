//! Prompts: renders the model's chat template for one user message of images and a question and expands the image tokens.
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

/// A prompt with expanded image tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// Token ids, including the generation prompt.
    pub ids: Vec<u32>,
    /// Positions of the image tokens in `ids`, ascending: images in order, each row-major over its merged grid.
    pub image_token_positions: Vec<usize>,
    /// Merged grid of each image.
    pub grids: Vec<Grid>,
}

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

    /// Renders one user message of `images` images followed by `question`, with the generation prompt, without tools and with no system
    /// message except the template's own.
    pub fn render(&self, images: usize, question: &str) -> Result<String, PreprocessError> {
        let mut content = vec![json!({"type": "image"}); images];
        content.push(json!({"type": "text", "text": question}));
        self.render_content(&content.into()).map_err(|e| match images > 0 && self.is_text_only(question) {
            true => PreprocessError::TextTemplate { path: self.path.clone() },
            false => PreprocessError::Format { path: self.path.clone(), cause: describe(&e) },
        })
    }

    /// Renders the template with one user message of this content.
    fn render_content(&self, content: &Value) -> Result<String, Error> {
        let mut context = self.tokens.clone();
        context.insert("messages".to_owned(), json!([{"role": "user", "content": content}]));
        context.insert("add_generation_prompt".to_owned(), Value::Bool(true));
        self.env.get_template(TEMPLATE_NAME)?.render(Template::from_serialize(&context))
    }

    /// Returns whether the template accepts messages with plain text as content; used for a template that ignores images.
    fn is_text_only(&self, question: &str) -> bool {
        self.render_content(&question.into()).is_ok_and(|text| text.contains(question))
    }

    /// Builds the prompt of a question about images with these merged grids.
    ///
    /// # Errors
    /// Returns [`PreprocessError::SpecialInText`] if the question contains a special token, [`PreprocessError::TextTemplate`] if the template
    /// ignores images, and [`PreprocessError::ImageTokens`] if it does not write one placeholder per image.
    pub fn prompt(&self, tokenizer: &Tokenizer, grids: &[Grid], question: &str) -> Result<Prompt, PreprocessError> {
        tokenizer.encode_plain(question)?;
        let unexpanded = tokenizer.encode(&self.render(grids.len(), question)?)?;
        let pad = tokenizer.special().image_pad;
        let found = unexpanded.iter().filter(|id| **id == pad).count();
        if found == 0 && !grids.is_empty() && self.is_text_only(question) {
            return Err(PreprocessError::TextTemplate { path: self.path.clone() });
        }
        if found != grids.len() {
            return Err(PreprocessError::ImageTokens { found, expected: grids.len() });
        }
        let total: usize = grids.iter().map(Grid::tokens).sum();
        let mut ids = Vec::with_capacity(unexpanded.len() + total);
        let mut image_token_positions = Vec::with_capacity(total);
        let mut remaining_grids = grids.iter();
        for id in unexpanded {
            let copies = if id == pad { remaining_grids.next().map_or(0, Grid::tokens) } else { 1 };
            if id == pad {
                image_token_positions.extend(ids.len()..ids.len() + copies);
            }
            ids.extend(std::iter::repeat_n(id, copies));
        }
        Ok(Prompt { ids, image_token_positions, grids: grids.to_vec() })
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
            chat.render(1, "Q?").unwrap(),
            "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Q?<|im_end|>\n<|im_start|>assistant\n"
        );
        let grids = [Grid { rows: 2, cols: 3 }, Grid { rows: 1, cols: 2 }];
        let p = chat.prompt(&tokenizer, &grids, "What?").unwrap();
        let pad = tokenizer.special().image_pad;
        let positions: Vec<usize> = (0..p.ids.len()).filter(|i| p.ids[*i] == pad).collect();
        assert_eq!((positions.len(), &positions), (8, &p.image_token_positions));
        assert!(matches!(
            chat.prompt(&tokenizer, &grids, "a <|image_pad|>"),
            Err(PreprocessError::SpecialInText { .. })
        ));
    }

    #[test]
    fn bad_templates_name_their_file() {
        let (_dir, t) = with_template("{% for");
        assert!(t.unwrap_err().to_string().contains("chat_template.jinja"));
        let (_dir, t) = with_template("{{ raise_exception('only text') }}");
        let e = t.unwrap().render(1, "x").unwrap_err().to_string();
        assert!(e.contains("chat_template.jinja") && e.contains("only text"), "{e}");
        let (_dir, t) = with_template("{% for i in range(100000000) %}{{ i }}{% endfor %}");
        assert!(t.unwrap().render(1, "x").is_err());
        let (dir, t) = with_template("no image");
        let tokenizer = Tokenizer::load(dir.path()).unwrap();
        let e = t.unwrap().prompt(&tokenizer, &[Grid { rows: 1, cols: 1 }], "x").unwrap_err();
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
            let e = t.unwrap().prompt(&tokenizer, &[Grid { rows: 1, cols: 1 }], "Where?").unwrap_err();
            assert!(matches!(e, PreprocessError::TextTemplate { .. }), "{e}");
            assert!(e.to_string().contains("chat_template.jinja") && e.to_string().contains("text only"), "{e}");
        }
    }

    #[test]
    fn python_methods_loop_controls_and_generation_marks_work() {
        let (_dir, t) = with_template(
            "{% for m in messages %}{% if m.role.startswith('u') %}{% generation %}{{ m['content'][-1].text.strip() }}{{ eos_token }}{% endgeneration %}{% break %}{% endif %}{% endfor %}",
        );
        assert_eq!(t.unwrap().render(0, " hi ").unwrap(), "hi<|im_end|>");
    }
}
