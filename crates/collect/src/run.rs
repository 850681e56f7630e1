//! A run: asks about all records with regions, a bounded number at a time, until it is complete, stopped, or out of budget.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::StreamExt;
use serde::Serialize;
use unveil_config::schema::Collect;
use unveil_core::{Record, Secret};
use unveil_data::image_folder::ImageFolder;
use unveil_data::records::{self, RecordFile};
use unveil_service::CancellationToken;
use unveil_service::chat::{ChatClient, ChatOptions};

use crate::budget::BudgetTracker;
use crate::context::{CollectContext, StageError};
use crate::files::{COLLECTED, JOURNAL};
use crate::journal::Journal;
use crate::{CollectError, Prompts, write_pages};

/// Number of consecutive failures per concurrent request after which the endpoint is considered down.
const MAX_CONSECUTIVE_FAILURES: usize = 3;

/// Reason why a run stopped early.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "why", rename_all = "snake_case")]
pub enum StopReason {
    /// The next request could exceed the budget.
    Budget,
    /// The run was interrupted.
    Interrupted,
    /// The endpoint refuses every request.
    Refused {
        /// Its reply.
        answer: String,
    },
    /// Too many consecutive requests failed.
    Down {
        /// The last failure.
        failure: String,
    },
}

/// A record without an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FailedRecord {
    /// Id of the record.
    pub id: String,
    /// Why it failed.
    pub reason: String,
}

/// Result of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CollectSummary {
    /// Number of records with regions, which are asked about.
    pub to_ask: usize,
    /// Number of these that have both answers.
    pub answered: usize,
    /// Number of answers with problems, which the reviewer must look at.
    pub faulty: usize,
    /// Number of requests sent in this run.
    pub asked: usize,
    /// Number of answers taken from the journal in this run.
    pub reused: usize,
    /// Records that failed; the next run asks again.
    pub failed: Vec<FailedRecord>,
    /// Number of tokens of prompts and answers, including earlier runs.
    pub tokens: [u64; 2],
    /// Cost of all answers, including earlier runs, in the currency of the prices.
    pub cost: f64,
    /// Why the run stopped early.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stopped: Option<StopReason>,
    /// The record file.
    pub file: PathBuf,
    /// The review pages.
    pub pages: Vec<PathBuf>,
}

impl CollectSummary {
    /// Returns whether every record has an answer.
    pub fn is_complete(&self) -> bool {
        self.stopped.is_none() && self.failed.is_empty()
    }
}

/// Asks about every record of `data` that has boxes, and writes journal, records and pages into `out`. Calls `progress` with the number of
/// records done, their total, and the amount spent.
///
/// # Errors
/// Returns an error if settings, prompts or files cannot be used. Failures of single records are in the summary.
pub async fn collect(
    data: &Path,
    out: &Path,
    settings: &Collect,
    key: Option<Secret>,
    cancel: CancellationToken,
    mut progress: impl FnMut(usize, usize, f64),
) -> Result<CollectSummary, CollectError> {
    if settings.base_url.is_empty() {
        return Err(CollectError::NoEndpoint);
    }
    let prompts = Prompts::load([&settings.diagnosis_prompt, &settings.reflection_prompt])?;
    let client = ChatClient::new(chat_options(settings, key))?;
    let file = Arc::new(RecordFile::load(data)?);
    let pending: Vec<usize> = (0..file.records.len()).filter(|k| !file.records[*k].boxes.is_empty()).collect();
    if pending.is_empty() {
        return Err(CollectError::NothingToAsk(data.to_owned()));
    }
    let journal = Arc::new(Journal::open(&out.join(JOURNAL))?);
    let (spent, max_cost, _) = journal.spent();
    let prices = [settings.price_prompt, settings.price_answer];
    let context = CollectContext {
        budget: BudgetTracker::new(prices, settings.budget, settings.max_tokens, (spent, max_cost)),
        settings: settings.clone(),
        client,
        prompts,
        journal,
        cancel: cancel.clone(),
        asked: AtomicUsize::new(0),
        reused: AtomicUsize::new(0),
    };
    let mut collected: Vec<Option<Record>> = vec![None; file.records.len()];
    let mut failed = Vec::new();
    let mut stopped = None;
    let mut failures_in_a_row = 0;
    let context_ref = &context;
    let file_ref = &file;
    // When a record stops the run, others may still be in flight: they finish or are dropped with the stream.
    let mut stream = futures::stream::iter(pending.iter().copied())
        .map(|k| async move { (k, context_ref.answer_record(file_ref, k).await) })
        .buffer_unordered(settings.concurrency);
    let mut done = 0;
    while let Some((k, result)) = stream.next().await {
        match result {
            Ok(record) => {
                collected[k] = Some(record);
                (done, failures_in_a_row) = (done + 1, 0);
                progress(done, pending.len(), context.budget.spent());
            }
            Err(StageError::Record(reason)) => {
                failures_in_a_row += 1;
                if failures_in_a_row >= MAX_CONSECUTIVE_FAILURES * settings.concurrency {
                    stopped = Some(StopReason::Down { failure: reason.clone() });
                }
                failed.push(FailedRecord { id: file.records[k].id.clone(), reason });
            }
            // Answers in the journal are still used for the following records.
            Err(StageError::Budget) => stopped = Some(StopReason::Budget),
            Err(StageError::Refused(answer)) => stopped = Some(StopReason::Refused { answer }),
            Err(StageError::Cancelled) => stopped = Some(StopReason::Interrupted),
            Err(StageError::Fatal(e)) => return Err(e),
        }
        if !matches!(stopped, None | Some(StopReason::Budget)) {
            break;
        }
    }
    drop(stream);
    let answered = collected.iter().flatten().count();
    let faulty =
        collected.iter().flatten().filter(|r| !r.extra["collect"]["faults"].as_array().is_none_or(Vec::is_empty));
    let faulty = faulty.count();
    let file_out = write_records(&file, collected, out)?;
    let pages = write_pages(out, settings.page_size)?;
    let (cost, _, tokens) = context.journal.spent();
    Ok(CollectSummary {
        to_ask: pending.len(),
        answered,
        faulty,
        asked: context.asked.load(Ordering::Relaxed),
        reused: context.reused.load(Ordering::Relaxed),
        failed,
        tokens,
        cost,
        stopped,
        file: file_out,
        pages,
    })
}

fn chat_options(s: &Collect, key: Option<Secret>) -> ChatOptions {
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

/// Writes all records of the input, with the collected answers.
fn write_records(file: &RecordFile, collected: Vec<Option<Record>>, out: &Path) -> Result<PathBuf, CollectError> {
    let path = out.join(COLLECTED);
    let io = |(path, cause)| CollectError::Io { path, cause };
    let mut images = ImageFolder::new(file.folder(), &path).map_err(io)?;
    let root = file.root();
    let mut list = Vec::with_capacity(file.records.len());
    for (old, new) in file.records.iter().zip(collected) {
        let mut record = new.unwrap_or_else(|| old.clone());
        // The path of an image that is missing or not allowed is kept; `data check` reports it.
        if let Ok(image) = root.file(old) {
            record.image = images.link(&image).map_err(io)?;
        }
        list.push(record);
    }
    records::write(&path, &list)?;
    Ok(path)
}
