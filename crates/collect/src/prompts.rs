//! The two prompts: templates in minijinja, built in or from files of the user. Above a line `===` stands the system message.

use std::path::Path;

use minijinja::{Environment, UndefinedBehavior};
use serde::Serialize;

use crate::CollectError;

/// Steps that one template may take.
const FUEL: u64 = 100_000;

/// What a template can use.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Facts {
    /// The abnormal class, in words.
    pub(crate) category: String,
    /// CT, X-ray…; may be empty.
    pub(crate) modality: String,
    /// The record's question.
    pub(crate) question: String,
    /// The record's source.
    pub(crate) source: String,
    /// Width of the image that is sent, in pixels.
    pub(crate) width: u32,
    /// Height of the image that is sent.
    pub(crate) height: u32,
    /// The marked regions.
    pub(crate) regions: Vec<Region>,
    /// Colour of the marks.
    pub(crate) colour: &'static str,
    /// The answer to the first prompt; empty in the first.
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

/// A filled prompt.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Filled {
    pub(crate) system: Option<String>,
    pub(crate) user: String,
}

/// Both templates.
#[derive(Debug)]
pub struct Prompts {
    env: Environment<'static>,
    names: [String; 2],
}

impl Prompts {
    /// The built-in texts, diagnosis and reflection: what a user's file would replace.
    pub const BUILT_IN: [&'static str; 2] =
        [include_str!("prompts/diagnosis.txt"), include_str!("prompts/reflection.txt")];

    /// Templates from these files (diagnosis, reflection); an empty path takes the built-in one.
    ///
    /// # Errors
    /// A file that cannot be read or is no template, or uses a name that there is not.
    pub fn load(files: [&str; 2]) -> Result<Self, CollectError> {
        let mut env = Environment::new();
        env.set_undefined_behavior(UndefinedBehavior::Strict);
        env.set_fuel(Some(FUEL));
        let mut names = ["built-in diagnosis".to_owned(), "built-in reflection".to_owned()];
        for ((file, name), built_in) in files.into_iter().zip(&mut names).zip(Self::BUILT_IN) {
            let text = if file.is_empty() {
                built_in.to_owned()
            } else {
                *name = file.to_owned();
                std::fs::read_to_string(file).map_err(CollectError::io(Path::new(file)))?
            };
            env.add_template_owned(name.clone(), text).map_err(|e| fault(name, &e))?;
        }
        let prompts = Self { env, names };
        let region = Region { label: "x".to_owned(), x1: 0, y1: 0, x2: 1, y2: 1 };
        let facts = Facts {
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
            prompts.fill(stage, &facts)?;
        }
        Ok(prompts)
    }

    /// The prompt of stage 0 (diagnosis) or 1 (reflection).
    pub(crate) fn fill(&self, stage: usize, facts: &Facts) -> Result<Filled, CollectError> {
        let name = &self.names[stage];
        let text = self.env.get_template(name).and_then(|t| t.render(facts)).map_err(|e| fault(name, &e))?;
        let (system, user) = match text.split_once("\n===\n") {
            Some((system, user)) => (Some(system.trim().to_owned()), user),
            None => (None, text.as_str()),
        };
        let user = user.trim().to_owned();
        if user.is_empty() {
            return Err(CollectError::Prompt { name: name.clone(), what: "it is empty".to_owned() });
        }
        Ok(Filled { system, user })
    }
}

fn fault(name: &str, e: &minijinja::Error) -> CollectError {
    let line = e.line().map_or_else(String::new, |l| format!("line {l}: "));
    CollectError::Prompt { name: name.to_owned(), what: format!("{line}{e}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn facts() -> Facts {
        Facts {
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
    fn built_in_prompts_hold_class_region_and_diagnosis() {
        let p = Prompts::load(["", ""]).unwrap();
        let first = p.fill(0, &facts()).unwrap();
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
        let second = p.fill(1, &facts()).unwrap().user;
        let at = ["What is abnormal, and where?", "A dark mass.", "Detect", "Localise", "Recognise"]
            .map(|part| second.find(part));
        assert!(at.is_sorted() && at.iter().all(Option::is_some), "{second}");
    }

    #[test]
    fn files_replace_them_and_faults_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        let own = file("own.txt", "What of {{ category }}?");
        let filled = Prompts::load([&own, ""]).unwrap().fill(0, &facts()).unwrap();
        assert_eq!(filled, Filled { system: None, user: "What of liver lesion?".into() });
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
