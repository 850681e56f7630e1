//! The journal: JSON lines of every request and answer, each on disk before the run goes on. What it holds is never asked again.

use std::collections::HashMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::CollectError;

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum Entry {
    /// A request that is about to be sent. The image is told by the hash of what is sent.
    Ask { key: String, id: String, stage: String, model: String, system: Option<String>, user: String, image: String },
    /// Its answer.
    Answer {
        key: String,
        #[serde(flatten)]
        answer: Answer,
    },
    /// Its failure, after all tries.
    Failed { key: String, error: String },
}

/// An answer with what it cost.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Answer {
    pub(crate) text: String,
    pub(crate) finish: String,
    /// Tokens of the prompt and of the answer.
    pub(crate) usage: [u64; 2],
    /// The endpoint did not report them: they are a guess.
    #[serde(default)]
    pub(crate) guessed: bool,
    /// In the currency of the configured prices.
    pub(crate) cost: f64,
}

#[derive(Serialize, Deserialize)]
struct Line {
    #[serde(flatten)]
    entry: Entry,
    /// Seconds since 1970.
    time: f64,
}

/// The journal file, held against other runs.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    file: Mutex<File>,
    answers: Mutex<HashMap<String, Answer>>,
}

impl Journal {
    /// Opens or makes the file. A last line without an end was being written when a run died: it is cut off.
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
        let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |k| k + 1);
        file.set_len(whole as u64).and_then(|()| file.seek(SeekFrom::End(0))).map_err(io())?;
        let mut answers = HashMap::new();
        for (k, line) in bytes[..whole].split(|b| *b == b'\n').enumerate().filter(|(_, l)| !l.is_empty()) {
            let line: Line = serde_json::from_slice(line).map_err(|e| CollectError::Line {
                path: path.to_owned(),
                line: k + 1,
                what: format!("no line of a journal: {e}; move the file away to start afresh"),
            })?;
            if let Entry::Answer { key, answer } = line.entry {
                answers.insert(key, answer);
            }
        }
        Ok(Self { path: path.to_owned(), file: Mutex::new(file), answers: Mutex::new(answers) })
    }

    /// The answer to a request, where there is one.
    pub(crate) fn answer(&self, key: &str) -> Option<Answer> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
    }

    /// What all answers cost so far, the largest cost of one, and their tokens.
    pub(crate) fn spent(&self) -> (f64, f64, [u64; 2]) {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.values().fold((0.0, 0.0, [0, 0]), |(sum, most, tokens), a| {
            let tokens = [tokens[0].saturating_add(a.usage[0]), tokens[1].saturating_add(a.usage[1])];
            (sum + a.cost, f64::max(most, a.cost), tokens)
        })
    }

    /// Writes a line and waits until it is on disk.
    pub(crate) fn append(&self, entry: Entry) -> Result<(), CollectError> {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
        let io = || CollectError::io(&self.path);
        let mut line = serde_json::to_vec(&Line { entry: entry.clone(), time }).map_err(|e| io()(e.into()))?;
        line.push(b'\n');
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.write_all(&line).and_then(|()| file.sync_data()).map_err(io())?;
        if let Entry::Answer { key, answer } = entry {
            self.answers.lock().unwrap_or_else(PoisonError::into_inner).insert(key, answer);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn answer(text: &str, cost: f64) -> Answer {
        Answer { text: text.into(), finish: "stop".into(), usage: [3, 4], guessed: false, cost }
    }

    fn journal(dir: &Path) -> PathBuf {
        dir.join("deep/journal.jsonl")
    }

    fn fill(path: &Path, n: usize) {
        let j = Journal::open(path).unwrap();
        for k in 0..n {
            let (key, text) = (format!("k{k}"), format!("text {k}\n\u{2028}ü"));
            let ask = Entry::Ask {
                key: key.clone(),
                id: "r".into(),
                stage: "diagnosis".into(),
                model: "m".into(),
                system: None,
                user: "u".into(),
                image: "h".into(),
            };
            j.append(ask).unwrap();
            j.append(Entry::Answer { key, answer: answer(&text, 0.5) }).unwrap();
        }
        j.append(Entry::Failed { key: "f".into(), error: "x".into() }).unwrap();
    }

    #[test]
    fn it_remembers_and_holds_others_off() {
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
        assert!(e.contains("journal.jsonl:1:") && e.contains("start afresh"), "{e}");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

        #[test]
        fn a_journal_cut_anywhere_opens_with_its_whole_lines(at in 0.0f64..1.0) {
            let dir = tempfile::tempdir().unwrap();
            let path = journal(dir.path());
            fill(&path, 3);
            let bytes = std::fs::read(&path).unwrap();
            let cut = &bytes[..(bytes.len() as f64 * at) as usize];
            std::fs::write(&path, cut).unwrap();
            let whole = String::from_utf8_lossy(cut).matches('\n').count();
            let j = Journal::open(&path).unwrap();
            let kept = (0..3).filter(|k| j.answer(&format!("k{k}")).is_some()).count();
            prop_assert_eq!(kept, whole / 2);
            j.append(Entry::Answer { key: "new".into(), answer: answer("n", 0.0) }).unwrap();
            drop(j);
            let again = Journal::open(&path).unwrap();
            prop_assert!(again.answer("new").is_some());
        }
    }
}
