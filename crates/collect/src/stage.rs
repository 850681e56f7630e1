//! One record through both prompts: image, request, answer, journal.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use unveil_config::schema::Collect;
use unveil_core::Record;
use unveil_data::records::RecordFile;
use unveil_data::store::ContentHash;
use unveil_service::CancellationToken;
use unveil_service::chat::{ChatClient, ChatError, ChatMessage, ChatPart, ChatReply, ChatRequest, ChatRole};

use crate::answer::{clean, faults, fill};
use crate::journal::{Answer, Entry, Journal};
use crate::ledger::Ledger;
use crate::mark::mark;
use crate::prompts::{Facts, Filled, Region};
use crate::{CollectError, Prompts};

const STAGES: [&str; 2] = ["diagnosis", "reflection"];

/// What all records of a run share.
pub(crate) struct Desk {
    pub(crate) settings: Collect,
    pub(crate) client: ChatClient,
    pub(crate) prompts: Prompts,
    pub(crate) journal: Arc<Journal>,
    pub(crate) ledger: Ledger,
    pub(crate) cancel: CancellationToken,
    pub(crate) asked: AtomicUsize,
    pub(crate) reused: AtomicUsize,
}

/// Why a record has no answer.
#[derive(Debug)]
pub(crate) enum Halt {
    /// This record alone cannot be had.
    Record(String),
    /// No record can be asked about any more.
    Budget,
    /// The endpoint refuses every request.
    Refused(String),
    /// The run was asked to stop.
    Cancelled,
    /// The journal or a prompt failed.
    Fatal(CollectError),
}

struct Sent {
    url: String,
    hash: String,
    facts: Facts,
}

impl Desk {
    /// Asks about one record, or takes what the journal holds.
    pub(crate) async fn serve(&self, file: &Arc<RecordFile>, index: usize) -> Result<Record, Halt> {
        if self.cancel.is_cancelled() {
            return Err(Halt::Cancelled);
        }
        let (shared, side) = (Arc::clone(file), self.settings.max_side);
        let sent = tokio::task::spawn_blocking(move || prepare(&shared, index, side)).await;
        let mut sent = sent.map_err(|e| Halt::Record(e.to_string()))?.map_err(Halt::Record)?;
        let record = &file.records[index];
        let first = self.ask(record, 0, &sent).await?.0;
        sent.facts.diagnosis = clean(&first.text);
        if sent.facts.diagnosis.is_empty() {
            return Err(Halt::Record("the diagnosis is empty".to_owned()));
        }
        let (second, key) = self.ask(record, 1, &sent).await?;
        let text = clean(&second.text);
        let faults = faults(record, &text, &second.finish);
        Ok(fill(record, [&sent.facts.diagnosis, &text], &key, self.client.model(), &faults))
    }

    /// The answer of one stage and its key.
    async fn ask(&self, record: &Record, stage: usize, sent: &Sent) -> Result<(Answer, String), Halt> {
        let filled = self.prompts.fill(stage, &sent.facts).map_err(Halt::Fatal)?;
        let key = self.key(stage, &filled, &sent.hash);
        if let Some(answer) = self.journal.answer(&key) {
            self.reused.fetch_add(1, Ordering::Relaxed);
            return Ok((answer, key));
        }
        if !self.ledger.admit() {
            return Err(Halt::Budget);
        }
        let result = self.send(record, stage, sent, filled, &key).await;
        self.ledger.settle(result.as_ref().map_or(0.0, |a| a.cost));
        Ok((result?, key))
    }

    async fn send(
        &self,
        record: &Record,
        stage: usize,
        sent: &Sent,
        filled: Filled,
        key: &str,
    ) -> Result<Answer, Halt> {
        self.write(Entry::Ask {
            key: key.to_owned(),
            id: record.id.clone(),
            stage: STAGES[stage].to_owned(),
            model: self.client.model().to_owned(),
            system: filled.system.clone(),
            user: filled.user.clone(),
            image: sent.hash.clone(),
        })
        .await?;
        self.asked.fetch_add(1, Ordering::Relaxed);
        let parts = vec![ChatPart::Text(filled.user.clone()), ChatPart::ImageUrl(sent.url.clone())];
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
            () = self.cancel.cancelled() => return Err(Halt::Cancelled),
        };
        match reply {
            Ok(reply) => {
                let answer = self.price(reply, &filled, &sent.url);
                self.write(Entry::Answer { key: key.to_owned(), answer: answer.clone() }).await?;
                Ok(answer)
            }
            Err(e) => {
                self.write(Entry::Failed { key: key.to_owned(), error: e.to_string() }).await?;
                match e {
                    // A key, an address or a model that is wrong is wrong for all records.
                    ChatError::Status { code: 401..=404, .. } => Err(Halt::Refused(e.to_string())),
                    other => Err(Halt::Record(other.to_string())),
                }
            }
        }
    }

    /// An answer with its cost; where the endpoint reports no usage, four bytes are taken for a token.
    fn price(&self, reply: ChatReply, filled: &Filled, url: &str) -> Answer {
        let prompt = filled.user.len() + filled.system.as_ref().map_or(0, String::len) + url.len();
        let guess = [(prompt / 4) as u64, (reply.text.len() / 4) as u64];
        let usage = reply.usage.unwrap_or(guess);
        let (guessed, cost) = (reply.usage.is_none(), self.ledger.cost(usage));
        Answer { text: reply.text, finish: reply.finish, usage, guessed, cost }
    }

    /// What tells a request: all that is sent.
    fn key(&self, stage: usize, filled: &Filled, image: &str) -> String {
        let s = &self.settings;
        let all = serde_json::json!([
            STAGES[stage],
            self.client.model(),
            s.temperature,
            s.max_tokens,
            filled.system,
            filled.user,
            image
        ]);
        ContentHash::of(all.to_string().as_bytes()).to_string()
    }

    async fn write(&self, entry: Entry) -> Result<(), Halt> {
        let journal = Arc::clone(&self.journal);
        match tokio::task::spawn_blocking(move || journal.append(entry)).await {
            Ok(done) => done.map_err(Halt::Fatal),
            Err(e) => Err(Halt::Record(e.to_string())),
        }
    }
}

/// The image as it is sent, and what the prompts say of it.
fn prepare(file: &RecordFile, index: usize, side: u32) -> Result<Sent, String> {
    let record = &file.records[index];
    let image = file.open_image(record).map_err(|e| e.to_string())?;
    let size = Some((image.width(), image.height()));
    if let Some(fault) = record.faults(size).first() {
        return Err(fault.to_string());
    }
    let marked = mark(image, &record.boxes, side);
    let png = marked.image.to_png().map_err(|e| e.to_string())?;
    let label = |k: usize| record.labels.get(k).unwrap_or(&record.category).clone();
    let regions = marked.boxes.iter().enumerate();
    Ok(Sent {
        hash: ContentHash::of(&png).to_string(),
        url: format!("data:image/png;base64,{}", STANDARD.encode(&png)),
        facts: Facts {
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
