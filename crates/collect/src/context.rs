//! Requests for one record: image, both prompts, answers, journal.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use unveil_config::schema::Collect;
use unveil_core::Record;
use unveil_data::image_store::ContentHash;
use unveil_data::records::RecordFile;
use unveil_service::CancellationToken;
use unveil_service::chat::{ChatClient, ChatError, ChatMessage, ChatPart, ChatReply, ChatRequest, ChatRole};

use crate::answer::{clean_answer, collected_record, find_problems};
use crate::budget::BudgetTracker;
use crate::journal::{Journal, JournalEntry, StoredAnswer};
use crate::marks::mark_regions;
use crate::prompts::{FilledPrompt, PromptVariables, Region};
use crate::{CollectError, Prompts};

const STAGES: [&str; 2] = ["diagnosis", "reflection"];

/// State shared by all records of a run.
pub(crate) struct CollectContext {
    pub(crate) settings: Collect,
    pub(crate) client: ChatClient,
    pub(crate) prompts: Prompts,
    pub(crate) journal: Arc<Journal>,
    pub(crate) budget: BudgetTracker,
    pub(crate) cancel: CancellationToken,
    pub(crate) asked: AtomicUsize,
    pub(crate) reused: AtomicUsize,
}

/// Reason why a record has no answer.
#[derive(Debug)]
pub(crate) enum StageError {
    /// Only this record failed.
    Record(String),
    /// The next request could exceed the budget.
    Budget,
    /// The endpoint refuses every request.
    Refused(String),
    /// The run is being stopped.
    Cancelled,
    /// The journal or a prompt failed.
    Fatal(CollectError),
}

/// The image of a record as it is sent, and the variables of its prompts.
struct PreparedRecord {
    url: String,
    hash: String,
    variables: PromptVariables,
}

impl CollectContext {
    /// Sends both prompts for one record, or uses the answers in the journal.
    pub(crate) async fn answer_record(&self, file: &Arc<RecordFile>, index: usize) -> Result<Record, StageError> {
        if self.cancel.is_cancelled() {
            return Err(StageError::Cancelled);
        }
        let shared = Arc::clone(file);
        let side = self.settings.max_side;
        let prepared = tokio::task::spawn_blocking(move || prepare(&shared, index, side)).await;
        let mut prepared = prepared.map_err(|e| StageError::Record(e.to_string()))?.map_err(StageError::Record)?;
        let record = &file.records[index];
        let first = self.ask(record, 0, &prepared).await?.0;
        prepared.variables.diagnosis = clean_answer(&first.text);
        if prepared.variables.diagnosis.is_empty() {
            return Err(StageError::Record("the diagnosis is empty".to_owned()));
        }
        let (second, key) = self.ask(record, 1, &prepared).await?;
        let text = clean_answer(&second.text);
        let problems = find_problems(record, &text, &second.finish);
        Ok(collected_record(record, [&prepared.variables.diagnosis, &text], &key, self.client.model(), &problems))
    }

    /// Returns the answer of one stage and its key.
    async fn ask(
        &self,
        record: &Record,
        stage: usize,
        prepared: &PreparedRecord,
    ) -> Result<(StoredAnswer, String), StageError> {
        let filled = self.prompts.render(stage, &prepared.variables).map_err(StageError::Fatal)?;
        let key = self.key(stage, &filled, &prepared.hash);
        if let Some(answer) = self.journal.answer(&key) {
            self.reused.fetch_add(1, Ordering::Relaxed);
            return Ok((answer, key));
        }
        if !self.budget.try_reserve() {
            return Err(StageError::Budget);
        }
        let result = self.send(record, stage, prepared, filled, &key).await;
        self.budget.settle(result.as_ref().map_or(0.0, |a| a.cost));
        Ok((result?, key))
    }

    /// Sends a request and records it and its outcome in the journal.
    async fn send(
        &self,
        record: &Record,
        stage: usize,
        prepared: &PreparedRecord,
        filled: FilledPrompt,
        key: &str,
    ) -> Result<StoredAnswer, StageError> {
        self.append_to_journal(JournalEntry::Ask {
            key: key.to_owned(),
            id: record.id.clone(),
            stage: STAGES[stage].to_owned(),
            model: self.client.model().to_owned(),
            system: filled.system.clone(),
            user: filled.user.clone(),
            image: prepared.hash.clone(),
        })
        .await?;
        self.asked.fetch_add(1, Ordering::Relaxed);
        let parts = vec![ChatPart::Text(filled.user.clone()), ChatPart::ImageUrl(prepared.url.clone())];
        let system = filled.system.iter().map(|s| ChatMessage::text(ChatRole::System, s.clone()));
        let request = ChatRequest {
            messages: system.chain([ChatMessage { role: ChatRole::User, parts }]).collect(),
            max_tokens: self.settings.max_tokens,
            temperature: self.settings.temperature,
            seed: None,
            json: false,
        };
        let deadline = Duration::from_secs_f64(self.settings.deadline_s);
        let reply = tokio::select! {
            reply = self.client.chat(&request, deadline) => reply,
            () = self.cancel.cancelled() => return Err(StageError::Cancelled),
        };
        match reply {
            Ok(reply) => {
                let answer = self.with_cost(reply, &filled, &prepared.url);
                self.append_to_journal(JournalEntry::Answer { key: key.to_owned(), answer: answer.clone() }).await?;
                Ok(answer)
            }
            Err(e) => {
                self.append_to_journal(JournalEntry::Failed { key: key.to_owned(), error: e.to_string() }).await?;
                match e {
                    // A wrong key, address or model is wrong for all records.
                    ChatError::Status { code: 401..=404, .. } => Err(StageError::Refused(e.to_string())),
                    other => Err(StageError::Record(other.to_string())),
                }
            }
        }
    }

    /// Adds the cost to an answer; if the endpoint reports no usage, four bytes count as a token.
    fn with_cost(&self, reply: ChatReply, filled: &FilledPrompt, url: &str) -> StoredAnswer {
        let prompt = filled.user.len() + filled.system.as_ref().map_or(0, String::len) + url.len();
        let estimate = [(prompt / 4) as u64, (reply.text.len() / 4) as u64];
        let usage = reply.usage.unwrap_or(estimate);
        let guessed = reply.usage.is_none();
        let cost = self.budget.cost(usage);
        StoredAnswer { text: reply.text, finish: reply.finish, usage, guessed, cost }
    }

    /// Returns the key of a request: a hash of everything that is sent.
    fn key(&self, stage: usize, filled: &FilledPrompt, image: &str) -> String {
        let s = &self.settings;
        let content = serde_json::json!([
            STAGES[stage],
            self.client.model(),
            s.temperature,
            s.max_tokens,
            filled.system,
            filled.user,
            image
        ]);
        ContentHash::of(content.to_string().as_bytes()).to_string()
    }

    /// Appends an entry to the journal on a blocking thread.
    async fn append_to_journal(&self, entry: JournalEntry) -> Result<(), StageError> {
        let journal = Arc::clone(&self.journal);
        match tokio::task::spawn_blocking(move || journal.append(entry)).await {
            Ok(done) => done.map_err(StageError::Fatal),
            Err(e) => Err(StageError::Record(e.to_string())),
        }
    }
}

/// Prepares the image of a record and the variables of its prompts.
fn prepare(file: &RecordFile, index: usize, side: u32) -> Result<PreparedRecord, String> {
    let record = &file.records[index];
    let image = file.open_image(record).map_err(|e| e.to_string())?;
    let size = Some((image.width(), image.height()));
    if let Some(problem) = record.faults(size).first() {
        return Err(problem.to_string());
    }
    let marked = mark_regions(image, &record.boxes, side);
    let png = marked.image.to_png().map_err(|e| e.to_string())?;
    let label = |k: usize| record.labels.get(k).unwrap_or(&record.category).clone();
    let regions = marked.boxes.iter().enumerate();
    Ok(PreparedRecord {
        hash: ContentHash::of(&png).to_string(),
        url: format!("data:image/png;base64,{}", STANDARD.encode(&png)),
        variables: PromptVariables {
            category: record.category.clone(),
            modality: record.modality.clone(),
            question: record.question.clone(),
            source: record.source.clone(),
            width: marked.image.width(),
            height: marked.image.height(),
            regions: regions
                .map(|(k, [x1, y1, x2, y2])| Region { label: label(k), x1: *x1, y1: *y1, x2: *x2, y2: *y2 })
                .collect(),
            colour: marked.colour,
            diagnosis: String::new(),
        },
    })
}
