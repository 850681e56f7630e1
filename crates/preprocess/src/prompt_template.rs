//! The text of prompts: a minijinja template over the fields of a record, and a suffix.
//!
//! The image is not part of the template: it always stands before the text in the user message, so no template can drop it. What the model
//! is asked for (`answer`, `boxes`, `labels`) is not available either.

use std::collections::BTreeSet;

use minijinja::{AutoEscape, Environment, ErrorKind, UndefinedBehavior, Value as Rendered};
use minijinja_contrib::pycompat;
use regex::Regex;
use serde_json::{Map, Value};
use unveil_core::{PromptSettings, Record};

use crate::preprocess_error::PreprocessError;

/// Name of the template in messages: its configuration key.
const TEMPLATE_NAME: &str = "prompt.template";
/// Maximum number of instructions of a rendering.
const FUEL: u64 = 1_000_000;

/// Fields that a template may not name, and the reason.
const UNAVAILABLE: [(&str, &str); 5] = [
    ("image", "the image always stands before the text"),
    ("image_size", "the image always stands before the text"),
    ("answer", "it would show the model what it is asked for"),
    ("boxes", "it would show the model what it is asked for"),
    ("labels", "it would show the model what it is asked for"),
];

/// Placeholders with which other trainers mark the position of the image.
const IMAGE_PLACEHOLDERS: [&str; 4] = ["<image>", "<img>", "<|image_pad|>", "<|vision_start|>"];

/// Text of the prompts of a run.
#[derive(Debug, Clone)]
pub struct PromptTemplate {
    settings: PromptSettings,
    /// Holds the template; `None`: the text is the question.
    env: Option<Environment<'static>>,
    /// Fields that the template looks up.
    named: BTreeSet<String>,
    /// Fields among `named` for whose absence it does not provide.
    required: BTreeSet<String>,
}

impl PromptTemplate {
    /// Parses the template of these settings.
    ///
    /// # Errors
    /// Returns [`PreprocessError::Prompt`] if the template is malformed or names a field that is not available, or if a text contains an
    /// image placeholder.
    pub fn new(settings: &PromptSettings) -> Result<Self, PreprocessError> {
        let refuse = |what: String| Err(PreprocessError::Prompt { what });
        let texts = [
            ("prompt.system", &settings.system),
            (TEMPLATE_NAME, &settings.template),
            ("prompt.suffix", &settings.suffix),
        ];
        for (key, text) in texts {
            if let Some(placeholder) = IMAGE_PLACEHOLDERS.iter().find(|p| text.contains(**p)) {
                return refuse(format!(
                    "{key} contains `{placeholder}`: the image always stands before the text; remove the placeholder"
                ));
            }
        }
        let settings = settings.clone();
        if settings.template.is_empty() {
            return Ok(Self { settings, env: None, named: BTreeSet::new(), required: BTreeSet::new() });
        }
        let mut env = Environment::new();
        env.set_undefined_behavior(UndefinedBehavior::SemiStrict);
        env.set_auto_escape_callback(|_| AutoEscape::None);
        env.set_unknown_method_callback(pycompat::unknown_method_callback);
        env.set_fuel(Some(FUEL));
        let malformed = |e: minijinja::Error| PreprocessError::Prompt { what: describe(&e) };
        env.add_template_owned(TEMPLATE_NAME, settings.template.clone()).map_err(malformed)?;
        let globals: BTreeSet<String> = env.globals().map(|(name, _)| name.to_owned()).collect();
        let looked_up = env.get_template(TEMPLATE_NAME).map_err(malformed)?.undeclared_variables(false);
        let named: BTreeSet<String> = looked_up.into_iter().filter(|name| !globals.contains(name)).collect();
        if let Some((field, why)) = UNAVAILABLE.iter().find(|(field, _)| named.contains(*field)) {
            return refuse(format!("{TEMPLATE_NAME} names `{field}`, which is not available: {why}"));
        }
        let required = named.iter().filter(|name| !provides_for_absence(&settings.template, name)).cloned().collect();
        Ok(Self { settings, env: Some(env), named, required })
    }

    /// Returns the system message; empty: none.
    pub fn system(&self) -> &str {
        &self.settings.system
    }

    /// Returns the text of the user message for a record.
    ///
    /// # Errors
    /// Returns [`PreprocessError::Record`] if the template names a field that the record lacks, or cannot be rendered for it.
    pub fn text(&self, record: &Record) -> Result<String, PreprocessError> {
        let question = record.question_or(&self.settings.question);
        let mut text = match &self.env {
            None => question.to_owned(),
            Some(env) => {
                let fields = fields(record, question);
                let refuse = |what: String| PreprocessError::Record { id: record.id.clone(), what };
                if let Some(what) = missing_fields(&self.required, &fields) {
                    return Err(refuse(what));
                }
                let failed = |e: minijinja::Error| {
                    let undefined = e.kind() == ErrorKind::UndefinedError;
                    let missing = if undefined { missing_fields(&self.named, &fields) } else { None };
                    refuse(missing.unwrap_or_else(|| describe(&e)))
                };
                let template = env.get_template(TEMPLATE_NAME).map_err(failed)?;
                template.render(Rendered::from_serialize(&fields)).map_err(failed)?
            }
        };
        text.push_str(&self.settings.suffix);
        Ok(text)
    }
}

/// Returns whether a template tests a field, or gives it a default, somewhere.
fn provides_for_absence(template: &str, field: &str) -> bool {
    let name = regex::escape(field);
    let pattern = format!(r"\b{name}\s*\|\s*(default|d)\b|\b{name}\s+is\s|\b(if|elif|and|or|not)\s+{name}\b");
    Regex::new(&pattern).is_ok_and(|tests| tests.is_match(template))
}

/// Describes those of `names` that are not among the fields of a record.
fn missing_fields(names: &BTreeSet<String>, fields: &Map<String, Value>) -> Option<String> {
    let missing = names.iter().filter(|name| !fields.contains_key(*name));
    let missing: Vec<String> = missing.map(|name| format!("`{name}`")).collect();
    let pronoun = if missing.len() == 1 { "it" } else { "them" };
    (!missing.is_empty()).then(|| {
        format!(
            "it has no {}, and {TEMPLATE_NAME} names {pronoun}: give the record a value, or provide for its absence with {{% if … %}} or \
             the filter `default`",
            missing.join(" and no ")
        )
    })
}

/// Returns the fields of a record that a template may name: those that have a value, the question and the task.
fn fields(record: &Record, question: &str) -> Map<String, Value> {
    let mut fields = match serde_json::to_value(record) {
        Ok(Value::Object(fields)) => fields,
        _ => Map::new(),
    };
    let is_absent = |v: &Value| v.is_null() || v.as_str().is_some_and(|text| text.trim().is_empty());
    fields.retain(|name, value| !is_absent(value) && !UNAVAILABLE.iter().any(|(field, _)| field == name));
    fields.insert("question".to_owned(), question.into());
    fields.insert("task".to_owned(), record.task.name().into());
    fields
}

fn describe(e: &minijinja::Error) -> String {
    let location = e.line().map_or(String::new(), |line| format!(" (line {line})"));
    format!("{TEMPLATE_NAME}{location}: {}", e.detail().map_or_else(|| e.to_string(), str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(template: &str) -> PromptSettings {
        PromptSettings { template: template.into(), question: "Where?".into(), ..PromptSettings::default() }
    }

    fn record(more: &str) -> Record {
        Record::parse(&format!(
            r#"{{"id":"r7","image":"secret.png","boxes":[[1,2,3,4]],"category":"cyst","answer":"secret"{more}}}"#
        ))
        .unwrap()
    }

    fn text(template: &str, more: &str) -> Result<String, String> {
        PromptTemplate::new(&settings(template)).and_then(|t| t.text(&record(more))).map_err(|e| e.to_string())
    }

    #[test]
    fn question_is_the_default_text() {
        assert_eq!(text("", "").unwrap(), "Where?");
        assert_eq!(text("", r#","question":" ""#).unwrap(), "Where?");
        assert_eq!(text("", r#","question":"What?""#).unwrap(), "What?");
        let suffix = PromptSettings { suffix: "\nIn JSON.".into(), ..settings("") };
        assert_eq!(PromptTemplate::new(&suffix).unwrap().text(&record("")).unwrap(), "Where?\nIn JSON.");
    }

    #[test]
    fn template_has_the_fields_of_the_record() {
        let more =
            r#","question":"Which <b>?","options":["a","b"],"modality":"CT","turns":[{"question":"Q1"}],"patient":7"#;
        for (template, expected) in [
            ("{{ question }}", "Which <b>?"),
            ("{{ question }} {{ options | join(', ') }}", "Which <b>? a, b"),
            ("{% for o in options %}{{ loop.index }}. {{ o }} {% endfor %}", "1. a 2. b "),
            ("{{ modality.lower() }} of {{ patient }}", "ct of 7"),
            ("{{ turns[0].question }}", "Q1"),
            ("{{ task }}", "grounding"),
            ("Find the {{ category }}.", "Find the cyst."),
            ("{% if source %}{{ source }}{% else %}none{% endif %}", "none"),
            ("{{ source | default('unknown') }}", "unknown"),
            ("{{ source is defined }}", "False"),
            ("{% set x = 3 %}{{ x }}{% for i in range(2) %}{{ i }}{% endfor %}", "301"),
        ] {
            assert_eq!(text(template, more).unwrap(), expected, "{template}");
        }
    }

    #[test]
    fn absent_fields_are_named_with_their_record() {
        for (template, field) in [
            ("{{ modality }}", "`modality`"),
            ("{{ question }} {{ organ }}", "`organ`"),
            ("{{ options | join(', ') }}", "`options`"),
            ("{% for o in options %}{{ o }}{% endfor %}", "`options`"),
            ("{{ organ.name }}", "`organ`"),
            ("{{ range(3) }}{{ organ }}", "`organ`"),
            ("{% if organ %}{{ organ }}{% endif %}{{ organ }}", "`organ`"),
            ("{{ modality.lower() }}", "`modality`"),
        ] {
            let e = text(template, "").unwrap_err();
            assert!(e.contains("record r7") && e.contains(field) && e.contains("prompt.template"), "{template}: {e}");
            assert!(!e.contains("`range`") && !e.contains("`question`"), "{e}");
        }
        let e = text("{{ options[5] }}", r#","options":["a"]"#).unwrap_err();
        assert!(e.contains("record r7") && e.contains("undefined"), "{e}");
    }

    #[test]
    fn unusable_templates_are_refused() {
        for (template, needle) in [
            ("{{ question", "prompt.template (line 1)"),
            ("{% for %}", "prompt.template"),
            ("{{ image }}", "`image`"),
            ("{{ answer }}", "`answer`"),
            ("{% if boxes %}x{% endif %}", "`boxes`"),
            ("{{ labels[0] }}", "`labels`"),
            ("<image>\n{{ question }}", "`<image>`"),
            ("{{ question }}<|image_pad|>", "`<|image_pad|>`"),
        ] {
            let e = text(template, "").unwrap_err();
            assert!(e.contains(needle) && !e.contains("secret"), "{template}: {e}");
        }
        for (key, settings) in [
            ("prompt.system", PromptSettings { system: "<image>".into(), ..settings("") }),
            ("prompt.suffix", PromptSettings { suffix: " <image>".into(), ..settings("") }),
        ] {
            let e = PromptTemplate::new(&settings).unwrap_err().to_string();
            assert!(e.contains(key) && e.contains("stands before the text"), "{e}");
        }
        let endless = "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}";
        assert!(text(endless, "").unwrap_err().contains("record r7"));
        assert!(text("{{ question | no_such_filter }}", "").is_err());
    }
}
