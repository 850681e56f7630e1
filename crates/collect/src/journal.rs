//! The journal: JSON lines of every request and answer, each synced to disk before the run continues. Answered requests are not repeated.

use std::collections::HashMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::CollectError;

/// An entry of the journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum JournalEntry {
    /// A request that is about to be sent. The image is identified by the hash of the PNG sent.
    Ask { key: String, id: String, stage: String, model: String, system: Option<String>, user: String, image: String },
    /// The answer to a request.
    Answer {
        key: String,
        #[serde(flatten)]
        answer: StoredAnswer,
    },
    /// The failure of a request after all attempts.
    Failed { key: String, error: String },
}

/// An answer with its cost.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct StoredAnswer {
    pub(crate) text: String,
    pub(crate) finish: String,
    /// Number of tokens of the prompt and of the answer.
    pub(crate) usage: [u64; 2],
    /// Whether `usage` is an estimate, because the endpoint did not report it.
    #[serde(default)]
    pub(crate) guessed: bool,
    /// Cost in the currency of the configured prices.
    pub(crate) cost: f64,
}

#[derive(Serialize, Deserialize)]
struct JournalLine {
    #[serde(flatten)]
    entry: JournalEntry,
    /// Seconds since 1970.
    time: f64,
}

/// The journal file, locked against other runs.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    file: Mutex<File>,
    answers: Mutex<HashMap<String, StoredAnswer>>,
}

impl Journal {
    /// Opens or creates the file. An incomplete last line, left by a run that was killed, is removed.
    ///
    /// # Errors
    /// Returns [`CollectError::InUse`] if another run uses the file, [`CollectError::Line`] if a line cannot be parsed, or
    /// [`CollectError::Io`].
    pub(crate) fn open(path: &Path) -> Result<Self, CollectError> {
        let io = || CollectError::io(path);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(io())?;
        }
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(io())?;
        file.try_lock().map_err(|e| match e {
            TryLockError::WouldBlock => CollectError::InUse(path.to_owned()),
            TryLockError::Error(cause) => CollectError::Io { path: path.to_owned(), cause },
        })?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(io())?;
        let complete = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |k| k + 1);
        file.set_len(complete as u64).and_then(|()| file.seek(SeekFrom::End(0))).map_err(io())?;
        let mut answers = HashMap::new();
        for (k, line) in bytes[..complete].split(|b| *b == b'\n').enumerate().filter(|(_, l)| !l.is_empty()) {
            let line: JournalLine = serde_json::from_slice(line).map_err(|e| CollectError::Line {
                path: path.to_owned(),
                line: k + 1,
                what: format!("not a journal entry: {e}; move the file away to start over"),
            })?;
            if let JournalEntry::Answer { key, answer } = line.entry {
                answers.insert(key, answer);
            }
        }
        Ok(Self { path: path.to_owned(), file: Mutex::new(file), answers: Mutex::new(answers) })
    }

    /// Returns the answer to a request, if there is one.
    pub(crate) fn answer(&self, key: &str) -> Option<StoredAnswer> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
    }

    /// Returns the total cost of all answers, the highest cost of one, and their tokens.
    pub(crate) fn spent(&self) -> (f64, f64, [u64; 2]) {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.values().fold((0.0, 0.0, [0, 0]), |(sum, most, tokens), a| {
            let tokens = [tokens[0].saturating_add(a.usage[0]), tokens[1].saturating_add(a.usage[1])];
            (sum + a.cost, f64::max(most, a.cost), tokens)
        })
    }

    /// Appends an entry and waits until it is on disk.
    ///
    /// # Errors
    /// Returns [`CollectError::Io`] if the file cannot be written.
    pub(crate) fn append(&self, entry: JournalEntry) -> Result<(), CollectError> {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
        let io = || CollectError::io(&self.path);
        let mut line = serde_json::to_vec(&JournalLine { entry: entry.clone(), time }).map_err(|e| io()(e.into()))?;
        line.push(b'\n');
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.write_all(&line).and_then(|()| file.sync_data()).map_err(io())?;
        if let JournalEntry::Answer { key, answer } = entry {
            self.answers.lock().unwrap_or_else(PoisonError::into_inner).insert(key, answer);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn answer(text: &str, cost: f64) -> StoredAnswer {
        StoredAnswer { text: text.into(), finish: "stop".into(), usage: [3, 4], guessed: false, cost }
    }

    fn journal(dir: &Path) -> PathBuf {
        dir.join("deep/journal.jsonl")
    }

    fn fill(path: &Path, n: usize) {
        let j = Journal::open(path).unwrap();
        for k in 0..n {
            let key = format!("k{k}");
            let text = format!("text {k}\n\u{2028}ü");
            let ask = JournalEntry::Ask {
                key: key.clone(),
                id: "r".into(),
                stage: "diagnosis".into(),
                model: "m".into(),
                system: None,
                user: "u".into(),
                image: "h".into(),
            };
            j.append(ask).unwrap();
            j.append(JournalEntry::Answer { key, answer: answer(&text, 0.5) }).unwrap();
        }
        j.append(JournalEntry::Failed { key: "f".into(), error: "x".into() }).unwrap();
    }

    #[test]
    fn answers_are_kept_and_the_file_is_locked() {
        let dir = tempfile::tempdir().unwrap();
        let path = journal(dir.path());
        fill(&path, 3);
        let j = Journal::open(&path).unwrap();
        assert_eq!(j.answer("k1"), Some(answer("text 1\n\u{2028}ü", 0.5)));
        assert_eq!((j.answer("f"), j.spent()), (None, (1.5, 0.5, [9, 12])));
        assert!(matches!(Journal::open(&path), Err(CollectError::InUse(_))));
        drop(j);
        let text = std::fs::read_to_string(&path).unwrap().replacen("\"kind\"", "\"kin\"", 1);
        std::fs::write(&path, text).unwrap();
        let e = Journal::open(&path).unwrap_err().to_string();
        assert!(e.contains("journal.jsonl:1:") && e.contains("start over"), "{e}");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

        #[test]
        fn truncated_journal_keeps_its_complete_lines(fraction in 0.0f64..1.0) {
            let dir = tempfile::tempdir().unwrap();
            let path = journal(dir.path());
            fill(&path, 3);
            let bytes = std::fs::read(&path).unwrap();
            let cut = &bytes[..(bytes.len() as f64 * fraction) as usize];
            std::fs::write(&path, cut).unwrap();
            let lines = String::from_utf8_lossy(cut).matches('\n').count();
            let j = Journal::open(&path).unwrap();
            let kept = (0..3).filter(|k| j.answer(&format!("k{k}")).is_some()).count();
            prop_assert_eq!(kept, lines / 2);
            j.append(JournalEntry::Answer { key: "new".into(), answer: answer("n", 0.0) }).unwrap();
            drop(j);
            let again = Journal::open(&path).unwrap();
            prop_assert!(again.answer("new").is_some());
        }
    }
}
