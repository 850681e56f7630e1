//! Whether records fit a model, judged before anything is trained or decoded: from the headers of their images, the tokenizer, the
//! chat template and the box form. In parallel, for a run looks at all of its records when it starts.
//!
//! Must not know: weights, devices, what reads the answers.

use std::io::Read;
use std::path::Path;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};

use unveil_core::Record;

use crate::check::{Finding, Severity};
use crate::decode;
use crate::files::open_regular;
use crate::prepare::{PrepareError, Preparer};
use crate::records::RecordFile;
use crate::root::Root;
use crate::store::{ImageError, image_size};

/// Bytes of a file that mostly hold the header with the image's size.
const HEADER: usize = 64 << 10;
/// Records that an error names.
const NAMED: usize = 5;

/// What records must fit into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Tokens that the model takes in all.
    pub context: usize,
    /// Tokens that may be generated behind a prompt.
    pub new_tokens: usize,
    /// Asked where a record has no question.
    pub question: String,
}

/// What is asked of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Its prompt is answered.
    Asked,
    /// Its training answer is learnt too.
    Trained,
    /// It is not looked at.
    Unused,
}

/// Why a record does not fit.
#[derive(Debug, thiserror::Error)]
pub enum Misfit {
    /// Its image cannot be had.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Prompt or answer cannot be made.
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    /// Prompt and answer are longer than the model's context.
    #[error(
        "its {prompt} prompt tokens ({images} of them image tokens) and {what} are more than the model's context of {context}: \
         shorten its question or answer, or lower the image size (`max_pixels`) or max_new_tokens"
    )]
    Context {
        /// Prompt tokens.
        prompt: usize,
        /// Image tokens among them.
        images: usize,
        /// What comes behind, with its tokens.
        what: String,
        /// The model's limit.
        context: usize,
    },
}

/// Records that do not fit a model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{}", .first.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "), match .more { 0 => String::new(), n => format!("; and {n} more: see `unveil data check --model`") })]
pub struct FitError {
    /// The first ones.
    pub first: Vec<Finding>,
    /// How many more there are.
    pub more: usize,
}

/// Judges one record by the header of its image. Returns prompt tokens and answer tokens; these are 0 unless it is trained on.
///
/// # Errors
/// Why it does not fit.
pub fn fits(
    preparer: &Preparer,
    limits: &Limits,
    root: &Root,
    record: &Record,
    used: Use,
) -> Result<(usize, usize), Misfit> {
    if used == Use::Unused {
        return Ok((0, 0));
    }
    let size = header_size(&root.file(record)?)?;
    let question = if record.question.trim().is_empty() { &limits.question } else { &record.question };
    let grid = preparer.processor().merged_grid(size)?;
    let prompt = preparer.prompt(grid, question)?.ids.len();
    let answer = match used {
        Use::Trained => preparer.target_ids(record, &preparer.sizes(size)?)?.len(),
        Use::Asked | Use::Unused => 0,
    };
    limits.check(prompt, grid.tokens(), answer)?;
    Ok((prompt, answer))
}

impl Limits {
    /// Whether a prompt fits with an answer of `answer` tokens (0 = none is given) and with what may be generated.
    ///
    /// # Errors
    /// [`Misfit::Context`].
    pub fn check(&self, prompt: usize, images: usize, answer: usize) -> Result<(), Misfit> {
        let behind = answer.max(self.new_tokens);
        if prompt + behind <= self.context {
            return Ok(());
        }
        let what = if answer > self.new_tokens {
            format!("{answer} tokens of the answer")
        } else {
            format!("up to {behind} new ones")
        };
        Err(Misfit::Context { prompt, images, what, context: self.context })
    }
}

/// Every record that does not fit, in the order of the file. `used` says what is asked of each; `stopped` is looked at between records,
/// and ends this early.
pub fn misfits(
    file: &RecordFile,
    preparer: &Preparer,
    limits: &Limits,
    used: impl Fn(&Record) -> Use + Sync,
    stopped: &(dyn Fn() -> bool + Sync),
) -> Vec<Finding> {
    let (root, next, found) = (file.root(), AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || {
        while !stopped() {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(record) = file.records.get(index) else { return };
            if let Err(why) = fits(preparer, limits, &root, record, used(record)) {
                found.lock().unwrap_or_else(PoisonError::into_inner).push((index, said(&why, record)));
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
    let mut found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    found.sort_by_key(|(index, _)| *index);
    let finding = |(index, what): (usize, String)| Finding {
        id: file.records[index].id.clone(),
        file: file.place(index),
        what,
        severity: Severity::Error,
    };
    found.into_iter().map(finding).collect()
}

/// The error that names the first of `findings`; none where there are none.
///
/// # Errors
/// There is one.
pub fn require(mut findings: Vec<Finding>) -> Result<(), FitError> {
    let more = findings.len().saturating_sub(NAMED);
    findings.truncate(NAMED);
    if findings.is_empty() { Ok(()) } else { Err(FitError { first: findings, more }) }
}

/// A misfit in words; who prints it names the record.
fn said(why: &Misfit, record: &Record) -> String {
    match why {
        Misfit::Prepare(PrepareError::Record { id, what }) if *id == record.id => what.clone(),
        other => other.to_string(),
    }
}

/// Width and height of an image file, of which most of the time only the beginning is read.
fn header_size(path: &Path) -> Result<(u32, u32), ImageError> {
    let name = path.display().to_string();
    let mut head = Vec::with_capacity(HEADER);
    let file = open_regular(path).map_err(|cause| ImageError::Io { name: name.clone(), cause })?;
    let read = file.take(HEADER as u64).read_to_end(&mut head);
    read.map_err(|cause| ImageError::Io { name: name.clone(), cause })?;
    match decode::size(&head, &name) {
        Ok(size) => Ok(size),
        Err(_) if head.len() == HEADER => image_size(path),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::root::Reach;
    use crate::store::Image;
    use crate::tokenizer::tiny::{TinyProcessorSpec, write_tiny};

    struct Place {
        dir: tempfile::TempDir,
        preparer: Preparer,
    }

    impl Place {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            write_tiny(dir.path(), &TinyProcessorSpec::default()).unwrap();
            for (name, w, h) in [("a.png", 96, 96), ("wide.png", 1200, 4)] {
                std::fs::write(dir.path().join(name), Image::new(w, h).to_png().unwrap()).unwrap();
            }
            let preparer = Preparer::load(dir.path()).unwrap();
            Self { dir, preparer }
        }

        fn file(&self, lines: &[String]) -> RecordFile {
            let path = self.dir.path().join("r.jsonl");
            std::fs::write(&path, lines.join("\n")).unwrap();
            RecordFile::load_with(&path, Reach::Folder).unwrap()
        }

        fn found(&self, lines: &[String], limits: &Limits, used: Use) -> Vec<(String, String)> {
            let found = misfits(&self.file(lines), &self.preparer, limits, |_| used, &|| false);
            found.into_iter().map(|f| (f.id, f.what)).collect()
        }
    }

    fn limits(context: usize, new_tokens: usize) -> Limits {
        Limits { context, new_tokens, question: "Where?".into() }
    }

    fn line(id: &str, more: &str) -> String {
        format!(r#"{{"id":"{id}","split":"train",{more}}}"#)
    }

    #[test]
    fn every_odd_record_is_named_with_its_reason() {
        let place = Place::new();
        let boxed = r#""image":"a.png","question":"q","boxes":[[1,5,20,25]]"#;
        let odd = [
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
        let mut lines: Vec<String> = odd.iter().map(|(id, more, _)| line(id, more)).collect();
        lines.insert(3, line("good", &format!(r#"{boxed},"category":"x""#)));
        let found = place.found(&lines, &limits(300, 20), Use::Trained);
        assert_eq!(found.len(), odd.len(), "{found:#?}");
        for ((id, what), (wanted, _, reason)) in found.iter().zip(&odd) {
            assert!(id == wanted && what.contains(reason), "{id}: {what}");
        }
        // Where nothing is learnt, answers do not matter.
        let asked = place.found(&lines, &limits(300, 20), Use::Asked);
        let ids: Vec<&str> = asked.iter().map(|(id, _)| id.as_str()).collect();
        assert_eq!(ids, ["wide", "special-question", "bare", "remote", "gone", "long"]);
        assert_eq!(place.found(&lines, &limits(300, 20), Use::Unused), []);
        let e = require(misfits(&place.file(&lines), &place.preparer, &limits(300, 20), |_| Use::Trained, &|| false));
        let e = e.unwrap_err().to_string();
        assert!(e.contains("r.jsonl:1: record \"wide\"") && e.contains("and 5 more"), "{e}");
    }

    #[test]
    fn the_longer_of_answer_and_new_tokens_must_fit() {
        let place = Place::new();
        let text = "word ".repeat(40);
        let lines = [line("a", &format!(r#""image":"a.png","question":"q","task":"vqa","answer":"{text}""#))];
        let root = place.file(&lines).root();
        let record = &place.file(&lines).records[0];
        let wide = limits(10_000, 1);
        let (prompt, answer) = fits(&place.preparer, &wide, &root, record, Use::Trained).unwrap();
        // The prompt is the one that training makes of the decoded image.
        let whole = place.preparer.prepare(&Image::new(96, 96), "q").unwrap();
        assert_eq!(prompt, whole.prompt.ids.len());
        assert!(answer > 40);
        let fit = |context, new| place.found(&lines, &limits(context, new), Use::Trained).pop().map(|(_, what)| what);
        assert_eq!(fit(prompt + answer, 1), None);
        let e = fit(prompt + answer - 1, 1).unwrap();
        assert!(e.contains(&format!("{answer} tokens of the answer")) && e.contains("36 of them image tokens"), "{e}");
        assert_eq!(fit(prompt + answer + 9, answer + 9), None);
        assert!(fit(prompt + answer + 8, answer + 9).unwrap().contains(&format!("up to {} new ones", answer + 9)));
        assert_eq!(fits(&place.preparer, &limits(prompt + 1, 1), &root, record, Use::Asked).unwrap(), (prompt, 0));
    }

    #[test]
    fn a_stop_is_obeyed_between_records() {
        let place = Place::new();
        let lines: Vec<String> =
            (0..50).map(|i| line(&format!("{i}"), r#""image":"gone.png","question":"q""#)).collect();
        let seen = AtomicUsize::new(0);
        let stop = || seen.fetch_add(1, Ordering::Relaxed) >= 5;
        let found = misfits(&place.file(&lines), &place.preparer, &limits(300, 20), |_| Use::Asked, &stop);
        assert_eq!(found.len(), 5);
    }

    #[test]
    fn sizes_come_from_the_beginning_of_a_file() {
        let place = Place::new();
        let path = place.dir.path().join("big.png");
        let mut noise = Image::new(400, 300);
        noise.rgb_mut().iter_mut().enumerate().for_each(|(i, v)| *v = (i * 7919 % 251) as u8);
        let png = noise.to_png().unwrap();
        assert!(png.len() > HEADER);
        // Only the header is whole, so nothing more was read.
        std::fs::write(&path, &png[..HEADER + 1]).unwrap();
        assert_eq!(header_size(&path).unwrap(), (400, 300));
    }
}
