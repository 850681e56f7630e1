//! The two prompts: minijinja templates, built in or from the user's files. The system message is above a line `===`.

use std::path::Path;

use minijinja::{Environment, UndefinedBehavior};
use serde::Serialize;

use crate::CollectError;

/// Maximum number of instructions that a template may execute.
const MAX_INSTRUCTIONS: u64 = 100_000;

/// Variables of a template.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct PromptVariables {
    /// Name of the abnormal class.
    pub(crate) category: String,
    /// Modality (CT, X-ray, …); may be empty.
    pub(crate) modality: String,
    /// Question of the record.
    pub(crate) question: String,
    /// Source of the record.
    pub(crate) source: String,
    /// Width of the image that is sent, in pixels.
    pub(crate) width: u32,
    /// Height of the image that is sent, in pixels.
    pub(crate) height: u32,
    /// The marked regions.
    pub(crate) regions: Vec<Region>,
    /// Colour of the marks.
    pub(crate) colour: &'static str,
    /// Answer to the first prompt; empty in the first prompt.
    pub(crate) diagnosis: String,
}

/// One marked region, in pixels of the image that is sent.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Region {
    pub(crate) label: String,
    pub(crate) x1: i64,
    pub(crate) y1: i64,
    pub(crate) x2: i64,
    pub(crate) y2: i64,
}

/// A rendered prompt.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct FilledPrompt {
    pub(crate) system: Option<String>,
    pub(crate) user: String,
}

/// The templates of both prompts.
#[derive(Debug)]
pub struct Prompts {
    env: Environment<'static>,
    names: [String; 2],
}

impl Prompts {
    /// Built-in templates for diagnosis and reflection, which a user's files replace.
    pub const BUILT_IN: [&'static str; 2] =
        [include_str!("prompts/diagnosis.txt"), include_str!("prompts/reflection.txt")];

    /// Loads templates from these files (diagnosis, reflection); an empty path selects the built-in template.
    ///
    /// # Errors
    /// Returns [`CollectError::Io`] if a file cannot be read, [`CollectError::Prompt`] if it is not a template or uses an unknown variable.
    pub fn load(files: [&str; 2]) -> Result<Self, CollectError> {
        let mut env = Environment::new();
        env.set_undefined_behavior(UndefinedBehavior::Strict);
        env.set_fuel(Some(MAX_INSTRUCTIONS));
        let mut names = ["built-in diagnosis".to_owned(), "built-in reflection".to_owned()];
        for ((file, name), built_in) in files.into_iter().zip(&mut names).zip(Self::BUILT_IN) {
            let text = if file.is_empty() {
                built_in.to_owned()
            } else {
                *name = file.to_owned();
                std::fs::read_to_string(file).map_err(CollectError::io(Path::new(file)))?
            };
            env.add_template_owned(name.clone(), text).map_err(|e| prompt_error(name, &e))?;
        }
        let prompts = Self { env, names };
        let region = Region { label: "x".to_owned(), x1: 0, y1: 0, x2: 1, y2: 1 };
        let variables = PromptVariables {
            category: "x".to_owned(),
            modality: String::new(),
            question: String::new(),
            source: String::new(),
            width: 1,
            height: 1,
            regions: vec![region],
            colour: "red",
            diagnosis: "x".to_owned(),
        };
        for stage in 0..2 {
            prompts.render(stage, &variables)?;
        }
        Ok(prompts)
    }

    /// Renders the prompt of stage 0 (diagnosis) or 1 (reflection).
    ///
    /// # Errors
    /// Returns [`CollectError::Prompt`] if the template fails or the prompt is empty.
    pub(crate) fn render(&self, stage: usize, variables: &PromptVariables) -> Result<FilledPrompt, CollectError> {
        let name = &self.names[stage];
        let text = self.env.get_template(name).and_then(|t| t.render(variables)).map_err(|e| prompt_error(name, &e))?;
        let (system, user) = match text.split_once("\n===\n") {
            Some((system, user)) => (Some(system.trim().to_owned()), user),
            None => (None, text.as_str()),
        };
        let user = user.trim().to_owned();
        if user.is_empty() {
            return Err(CollectError::Prompt { name: name.clone(), what: "it is empty".to_owned() });
        }
        Ok(FilledPrompt { system, user })
    }
}

fn prompt_error(name: &str, e: &minijinja::Error) -> CollectError {
    let line = e.line().map_or_else(String::new, |l| format!("line {l}: "));
    CollectError::Prompt { name: name.to_owned(), what: format!("{line}{e}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn variables() -> PromptVariables {
        PromptVariables {
            category: "liver lesion".into(),
            modality: "CT".into(),
            question: "What is abnormal, and where?".into(),
            source: "deeplesion".into(),
            width: 512,
            height: 400,
            regions: vec![Region { label: "liver lesion".into(), x1: 10, y1: 20, x2: 30, y2: 44 }],
            colour: "cyan",
            diagnosis: "A dark mass.".into(),
        }
    }

    #[test]
    fn built_in_prompts_contain_class_region_and_diagnosis() {
        let p = Prompts::load(["", ""]).unwrap();
        let first = p.render(0, &variables()).unwrap();
        assert!(first.system.unwrap().starts_with("You are an experienced"));
        for part in [
            "(CT)",
            "512 pixels wide",
            "cyan box",
            "liver lesion: from (10, 20) to (30, 44)",
            "known to be: liver lesion",
        ] {
            assert!(first.user.contains(part), "{part}: {}", first.user);
        }
        let second = p.render(1, &variables()).unwrap().user;
        let positions = ["What is abnormal, and where?", "A dark mass.", "Detect", "Localise", "Recognise"]
            .map(|part| second.find(part));
        assert!(positions.is_sorted() && positions.iter().all(Option::is_some), "{second}");
    }

    #[test]
    fn files_replace_templates_and_errors_name_them() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        let custom = file("own.txt", "What of {{ category }}?");
        let filled = Prompts::load([&custom, ""]).unwrap().render(0, &variables()).unwrap();
        assert_eq!(filled, FilledPrompt { system: None, user: "What of liver lesion?".into() });
        for (text, what) in [
            ("{{ nothing }}", "undefined"),
            ("{% if %}", "line 1"),
            ("system\n===\n  ", "empty"),
            ("{% for i in range(10000) %}{% for j in range(10000) %}x{% endfor %}{% endfor %}", "fuel"),
        ] {
            let e = Prompts::load(["", &file("bad.txt", text)]).unwrap_err().to_string();
            assert!(e.contains("bad.txt") && e.contains(what), "{e}");
        }
        assert!(Prompts::load(["/nowhere/p.txt", ""]).unwrap_err().to_string().contains("/nowhere/p.txt"));
    }
}
