//! A whole run: all records with regions, a bounded number at once, until done, stopped, or out of budget.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::StreamExt;
use serde::Serialize;
use unveil_config::schema::Collect;
use unveil_core::{Record, Secret};
use unveil_data::reach::ImageFolder;
use unveil_data::records::{self, RecordFile};
use unveil_service::CancellationToken;
use unveil_service::chat::{ChatClient, ChatOptions};

use crate::journal::Journal;
use crate::ledger::Ledger;
use crate::stage::{Desk, Halt};
use crate::{CollectError, Prompts, write_pages};

/// Name of the journal in the output folder.
pub const JOURNAL: &str = "journal.jsonl";
/// Name of the record file in the output folder: every record of the input, those that were answered with their answers.
pub const COLLECTED: &str = "collected.jsonl";

/// So many failures in a row, for each request that may be under way, are taken for an endpoint that is down.
const PATIENCE: usize = 3;

/// Why a run ended before all records were asked about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "why", rename_all = "snake_case")]
pub enum Stop {
    /// The next request could pass the budget.
    Budget,
    /// It was asked to.
    Interrupted,
    /// The endpoint refuses every request.
    Refused {
        /// What it said.
        answer: String,
    },
    /// Request after request failed.
    Down {
        /// The last failure.
        failure: String,
    },
}

/// A record without an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Failure {
    /// The record.
    pub id: String,
    /// Why.
    pub reason: String,
}

/// What a run did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Records with regions: those that are asked about.
    pub to_ask: usize,
    /// Of these, those that have both answers now.
    pub answered: usize,
    /// Answers with faults that a person must look at.
    pub faulty: usize,
    /// Requests sent in this run.
    pub asked: usize,
    /// Answers taken from the journal in this run.
    pub reused: usize,
    /// Records that failed, with reasons; the next run asks again.
    pub failed: Vec<Failure>,
    /// Tokens of prompts and answers, earlier runs included.
    pub tokens: [u64; 2],
    /// Cost of all answers, earlier runs included, in the currency of the prices.
    pub cost: f64,
    /// Why it ended early.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stopped: Option<Stop>,
    /// The records.
    pub file: PathBuf,
    /// Pages for review.
    pub pages: Vec<PathBuf>,
}

impl Summary {
    /// Whether every record has its answer.
    pub fn is_complete(&self) -> bool {
        self.stopped.is_none() && self.failed.is_empty()
    }
}

/// Asks about every record of `data` that has boxes, and writes journal, records and pages into `out`. `progress` hears how many are done,
/// of how many, and what was spent.
///
/// # Errors
/// Settings, prompts or files that cannot be used. What happens to single records is in the summary.
pub async fn collect(
    data: &Path,
    out: &Path,
    settings: &Collect,
    key: Option<Secret>,
    cancel: CancellationToken,
    mut progress: impl FnMut(usize, usize, f64),
) -> Result<Summary, CollectError> {
    if settings.base_url.is_empty() {
        return Err(CollectError::NoEndpoint);
    }
    let prompts = Prompts::load([&settings.diagnosis_prompt, &settings.reflection_prompt])?;
    let client = ChatClient::new(options(settings, key))?;
    let file = Arc::new(RecordFile::load(data)?);
    let todo: Vec<usize> = (0..file.records.len()).filter(|k| !file.records[*k].boxes.is_empty()).collect();
    if todo.is_empty() {
        return Err(CollectError::Nothing(data.to_owned()));
    }
    let journal = Arc::new(Journal::open(&out.join(JOURNAL))?);
    let (spent, most, _) = journal.spent();
    let prices = [settings.price_prompt, settings.price_answer];
    let desk = Desk {
        ledger: Ledger::new(prices, settings.budget, settings.max_tokens, (spent, most)),
        settings: settings.clone(),
        client,
        prompts,
        journal,
        cancel: cancel.clone(),
        asked: AtomicUsize::new(0),
        reused: AtomicUsize::new(0),
    };
    let mut collected: Vec<Option<Record>> = vec![None; file.records.len()];
    let (mut failed, mut stopped, mut in_a_row) = (Vec::new(), None, 0);
    let (desk_ref, file_ref) = (&desk, &file);
    // Records behind the one that stops the run may still be in flight: they end by themselves or are dropped with the stream.
    let mut stream = futures::stream::iter(todo.iter().copied())
        .map(|k| async move { (k, desk_ref.serve(file_ref, k).await) })
        .buffer_unordered(settings.concurrency);
    let mut done = 0;
    while let Some((k, result)) = stream.next().await {
        match result {
            Ok(record) => {
                collected[k] = Some(record);
                (done, in_a_row) = (done + 1, 0);
                progress(done, todo.len(), desk.ledger.spent());
            }
            Err(Halt::Record(reason)) => {
                in_a_row += 1;
                if in_a_row >= PATIENCE * settings.concurrency {
                    stopped = Some(Stop::Down { failure: reason.clone() });
                }
                failed.push(Failure { id: file.records[k].id.clone(), reason });
            }
            // What the journal holds is still taken over for the records that follow.
            Err(Halt::Budget) => stopped = Some(Stop::Budget),
            Err(Halt::Refused(answer)) => stopped = Some(Stop::Refused { answer }),
            Err(Halt::Cancelled) => stopped = Some(Stop::Interrupted),
            Err(Halt::Fatal(e)) => return Err(e),
        }
        if !matches!(stopped, None | Some(Stop::Budget)) {
            break;
        }
    }
    drop(stream);
    let answered = collected.iter().flatten().count();
    let faulty =
        collected.iter().flatten().filter(|r| !r.extra["collect"]["faults"].as_array().is_none_or(Vec::is_empty));
    let faulty = faulty.count();
    let file_out = write(&file, collected, out)?;
    let pages = write_pages(out, settings.page_size)?;
    let (cost, _, tokens) = desk.journal.spent();
    Ok(Summary {
        to_ask: todo.len(),
        answered,
        faulty,
        asked: desk.asked.load(Ordering::Relaxed),
        reused: desk.reused.load(Ordering::Relaxed),
        failed,
        tokens,
        cost,
        stopped,
        file: file_out,
        pages,
    })
}

fn options(s: &Collect, key: Option<Secret>) -> ChatOptions {
    ChatOptions {
        base_url: s.base_url.clone(),
        key,
        ca: Some(PathBuf::from(&s.ca)).filter(|p| !p.as_os_str().is_empty()),
        model: s.model.clone(),
        concurrency: s.concurrency,
        per_minute: s.per_minute,
        attempt: Duration::from_secs_f64(s.attempt_s),
        tries: s.tries,
        ..ChatOptions::default()
    }
}

/// Writes all records of the input, those that were answered with their answers.
fn write(file: &RecordFile, collected: Vec<Option<Record>>, out: &Path) -> Result<PathBuf, CollectError> {
    let path = out.join(COLLECTED);
    let io = |(path, cause)| CollectError::Io { path, cause };
    let mut images = ImageFolder::new(file.folder(), &path).map_err(io)?;
    let (root, mut list) = (file.root(), Vec::with_capacity(file.records.len()));
    for (old, new) in file.records.iter().zip(collected) {
        let mut record = new.unwrap_or_else(|| old.clone());
        // An image that is not there, or may not be read, stays named as it was: `data check` tells of it.
        if let Ok(image) = root.file(old) {
            record.image = images.reach(&image).map_err(io)?;
        }
        list.push(record);
    }
    records::write(&path, &list)?;
    Ok(path)
}
