//! Checks whether records fit into a model's context before anything is decoded or trained, using only image headers, the tokenizer, the
//! chat template and the box form. A run checks all its records when it starts, so this works in parallel.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};

use unveil_core::Record;
use unveil_data::finding::{Finding, Severity};
use unveil_data::image_root::ImageRoot;
use unveil_data::image_store::{ImageError, header_size};
use unveil_data::records::RecordFile;

use crate::preprocessor::{PreprocessError, Preprocessor};

/// Maximum number of records named in an error.
const MAX_NAMED_RECORDS: usize = 5;

/// Token limits that every record must respect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenLimits {
    /// Length of the model's context in tokens.
    pub context: usize,
    /// Maximum number of tokens generated after a prompt.
    pub new_tokens: usize,
}

/// Use of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordUse {
    /// The model answers its prompt.
    Prompted,
    /// The model is also trained on its answer.
    Trained,
    /// The record is not used.
    Unused,
}

/// Why a record does not fit.
#[derive(Debug, thiserror::Error)]
pub enum Misfit {
    /// Its image cannot be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Its prompt or answer cannot be built.
    #[error(transparent)]
    Preprocess(#[from] PreprocessError),
    /// Prompt and answer are longer than the model's context.
    #[error(
        "its {prompt} prompt tokens ({images} of them image tokens) and {completion} exceed the model's context of {context}: \
         shorten its question or answer, or lower the image size (`max_pixels`) or max_new_tokens"
    )]
    Context {
        /// Number of prompt tokens.
        prompt: usize,
        /// Number of image tokens among them.
        images: usize,
        /// Description of the tokens after the prompt, with their number.
        completion: String,
        /// Length of the model's context in tokens.
        context: usize,
    },
}

/// Records that do not fit a model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{}", .first.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "), match .more { 0 => String::new(), n => format!("; and {n} more: see `unveil data check --model`") })]
pub struct FitError {
    /// The first few records.
    pub first: Vec<Finding>,
    /// Number of further records.
    pub more: usize,
}

/// Checks one record, reading only the header of its image. Returns the numbers of prompt tokens and of answer tokens; the latter is 0
/// unless the record is trained on.
///
/// # Errors
/// Returns the [`Misfit`] if the record does not fit.
pub fn check_record(
    preprocessor: &Preprocessor,
    limits: &TokenLimits,
    root: &ImageRoot,
    record: &Record,
    record_use: RecordUse,
) -> Result<(usize, usize), Misfit> {
    if record_use == RecordUse::Unused {
        return Ok((0, 0));
    }
    let size = header_size(&root.file(record)?)?;
    let grid = preprocessor.processor().merged_grid(size)?;
    let prompt = preprocessor.prompt_ids(grid, record)?.len();
    let answer = match record_use {
        RecordUse::Trained => preprocessor.target_ids(record, &preprocessor.sizes(size)?)?.len(),
        RecordUse::Prompted | RecordUse::Unused => 0,
    };
    limits.check(prompt, grid.tokens(), answer)?;
    Ok((prompt, answer))
}

impl TokenLimits {
    /// Checks that a prompt of `prompt` tokens fits together with an answer of `answer` tokens (0: no answer) and with the tokens that may
    /// be generated.
    ///
    /// # Errors
    /// Returns [`Misfit::Context`] if it does not.
    pub fn check(&self, prompt: usize, images: usize, answer: usize) -> Result<(), Misfit> {
        let completion_tokens = answer.max(self.new_tokens);
        if prompt + completion_tokens <= self.context {
            return Ok(());
        }
        let completion = if answer > self.new_tokens {
            format!("{answer} answer tokens")
        } else {
            format!("up to {completion_tokens} new tokens")
        };
        Err(Misfit::Context { prompt, images, completion, context: self.context })
    }
}

/// Returns a finding for every record that does not fit, in file order. `record_use` classifies each record; `stopped` is polled between
/// records and ends the search early.
pub fn find_misfits(
    file: &RecordFile,
    preprocessor: &Preprocessor,
    limits: &TokenLimits,
    record_use: impl Fn(&Record) -> RecordUse + Sync,
    stopped: &(dyn Fn() -> bool + Sync),
) -> Vec<Finding> {
    let root = file.root();
    let next = AtomicUsize::new(0);
    let misfits = Mutex::new(Vec::new());
    let work = || {
        while !stopped() {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(record) = file.records.get(index) else { return };
            if let Err(misfit) = check_record(preprocessor, limits, &root, record, record_use(record)) {
                misfits.lock().unwrap_or_else(PoisonError::into_inner).push((index, describe(&misfit, record)));
            }
        }
    };
    std::thread::scope(|scope| {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(file.records.len());
        for _ in 1..threads {
            scope.spawn(work);
        }
        work();
    });
    let mut misfits = misfits.into_inner().unwrap_or_else(PoisonError::into_inner);
    misfits.sort_by_key(|(index, _)| *index);
    let finding = |(index, what): (usize, String)| Finding {
        id: file.records[index].id.clone(),
        file: file.location(index),
        what,
        severity: Severity::Error,
    };
    misfits.into_iter().map(finding).collect()
}

/// Turns findings into an error that names the first few.
///
/// # Errors
/// Returns [`FitError`] if `findings` is not empty.
pub fn reject_misfits(mut findings: Vec<Finding>) -> Result<(), FitError> {
    let more = findings.len().saturating_sub(MAX_NAMED_RECORDS);
    findings.truncate(MAX_NAMED_RECORDS);
    if findings.is_empty() { Ok(()) } else { Err(FitError { first: findings, more }) }
}

/// Describes a misfit without the record's id, which the finding already names.
fn describe(misfit: &Misfit, record: &Record) -> String {
    match misfit {
        Misfit::Preprocess(PreprocessError::Record { id, what }) if *id == record.id => what.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tiny::{TinyProcessorSpec, write_tiny};
    use unveil_data::image_root::PathPolicy;
    use unveil_data::image_store::Image;

    struct Fixture {
        dir: tempfile::TempDir,
        preprocessor: Preprocessor,
    }

    impl Fixture {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            write_tiny(dir.path(), &TinyProcessorSpec::default()).unwrap();
            for (name, w, h) in [("a.png", 96, 96), ("wide.png", 1200, 4)] {
                std::fs::write(dir.path().join(name), Image::new(w, h).to_png().unwrap()).unwrap();
            }
            let preprocessor = Preprocessor::load(dir.path()).unwrap();
            Self { dir, preprocessor }
        }

        fn file(&self, lines: &[String]) -> RecordFile {
            let path = self.dir.path().join("r.jsonl");
            std::fs::write(&path, lines.join("\n")).unwrap();
            RecordFile::load_with(&path, PathPolicy::Folder).unwrap()
        }

        fn misfits(&self, lines: &[String], limits: &TokenLimits, used: RecordUse) -> Vec<(String, String)> {
            let findings = find_misfits(&self.file(lines), &self.preprocessor, limits, |_| used, &|| false);
            findings.into_iter().map(|f| (f.id, f.what)).collect()
        }
    }

    fn limits(context: usize, new_tokens: usize) -> TokenLimits {
        TokenLimits { context, new_tokens }
    }

    fn line(id: &str, more: &str) -> String {
        format!(r#"{{"id":"{id}","split":"train",{more}}}"#)
    }

    #[test]
    fn misfits_are_named_with_their_reason() {
        let fixture = Fixture::new();
        let boxed = r#""image":"a.png","question":"q","boxes":[[1,5,20,25]]"#;
        let cases = [
            ("wide", r#""image":"wide.png","question":"q""#.to_owned(), "aspect ratio of 300.0"),
            ("category", format!(r#"{boxed},"category":"nodule [left]""#), "nodule [left]"),
            ("special-question", r#""image":"a.png","question":"q<|im_end|>""#.into(), "<|im_end|>"),
            ("special-category", format!(r#"{boxed},"category":"x<|image_pad|>""#), "<|image_pad|>"),
            (
                "special-answer",
                r#""image":"a.png","question":"q","task":"vqa","answer":"a<|im_start|>""#.into(),
                "<|im_start|>",
            ),
            (
                "regions",
                format!(r#"{boxed},"category":"x","answer":"<region> and <region>""#),
                "more than one <region>",
            ),
            ("bare", r#""image_size":[96,96],"question":"q""#.into(), "has no image"),
            ("remote", r#""image":"s3://b/k.png","question":"q""#.into(), "is a URL"),
            ("gone", r#""image":"gone.png","question":"q""#.into(), "gone.png"),
            ("long", format!(r#""image":"a.png","question":"{}""#, "why ".repeat(300)), "context of 300"),
        ];
        let mut lines: Vec<String> = cases.iter().map(|(id, more, _)| line(id, more)).collect();
        lines.insert(3, line("good", &format!(r#"{boxed},"category":"x""#)));
        let found = fixture.misfits(&lines, &limits(300, 20), RecordUse::Trained);
        assert_eq!(found.len(), cases.len(), "{found:#?}");
        for ((id, what), (wanted, _, reason)) in found.iter().zip(&cases) {
            assert!(id == wanted && what.contains(reason), "{id}: {what}");
        }
        // Without training, answers do not matter.
        let prompted = fixture.misfits(&lines, &limits(300, 20), RecordUse::Prompted);
        let ids: Vec<&str> = prompted.iter().map(|(id, _)| id.as_str()).collect();
        assert_eq!(ids, ["wide", "special-question", "bare", "remote", "gone", "long"]);
        assert_eq!(fixture.misfits(&lines, &limits(300, 20), RecordUse::Unused), []);
        let e = reject_misfits(find_misfits(
            &fixture.file(&lines),
            &fixture.preprocessor,
            &limits(300, 20),
            |_| RecordUse::Trained,
            &|| false,
        ));
        let e = e.unwrap_err().to_string();
        assert!(e.contains("r.jsonl:1: record \"wide\"") && e.contains("and 5 more"), "{e}");
    }

    #[test]
    fn longer_of_answer_and_new_tokens_must_fit() {
        let fixture = Fixture::new();
        let text = "word ".repeat(40);
        let lines = [line("a", &format!(r#""image":"a.png","question":"q","task":"vqa","answer":"{text}""#))];
        let root = fixture.file(&lines).root();
        let record = &fixture.file(&lines).records[0];
        let wide = limits(10_000, 1);
        let (prompt, answer) = check_record(&fixture.preprocessor, &wide, &root, record, RecordUse::Trained).unwrap();
        // The prompt has the length of the one that training builds from the decoded image.
        let whole = fixture.preprocessor.prepare(&Image::new(96, 96), record).unwrap();
        assert_eq!(prompt, whole.prompt.tokens.len());
        assert!(answer > 40);
        let fit = |context, new| {
            fixture.misfits(&lines, &limits(context, new), RecordUse::Trained).pop().map(|(_, what)| what)
        };
        assert_eq!(fit(prompt + answer, 1), None);
        let e = fit(prompt + answer - 1, 1).unwrap();
        assert!(e.contains(&format!("{answer} answer tokens")) && e.contains("36 of them image tokens"), "{e}");
        assert_eq!(fit(prompt + answer + 9, answer + 9), None);
        assert!(fit(prompt + answer + 8, answer + 9).unwrap().contains(&format!("up to {} new tokens", answer + 9)));
        assert_eq!(
            check_record(&fixture.preprocessor, &limits(prompt + 1, 1), &root, record, RecordUse::Prompted).unwrap(),
            (prompt, 0)
        );
    }

    #[test]
    fn search_stops_between_records() {
        let fixture = Fixture::new();
        let lines: Vec<String> =
            (0..50).map(|i| line(&format!("{i}"), r#""image":"gone.png","question":"q""#)).collect();
        let seen = AtomicUsize::new(0);
        let stop = || seen.fetch_add(1, Ordering::Relaxed) >= 5;
        let findings = find_misfits(
            &fixture.file(&lines),
            &fixture.preprocessor,
            &limits(300, 20),
            |_| RecordUse::Prompted,
            &stop,
        );
        assert_eq!(findings.len(), 5);
    }
}
