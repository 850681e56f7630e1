//! `unveil generate` and `unveil score`: the worker's engine over a file, one JSON line per response on the output.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use unveil_config::Config;
use unveil_core::{Attention, BBox, Finish, Record, Sampling, redact, tell};
use unveil_data::prepare::Preparer;
use unveil_data::records::RecordsError;
use unveil_data::records::{RecordFile, path_fault};
use unveil_data::root::{Reach, Root};
use unveil_data::store::ContentHash;
use unveil_engine::random::group_key;
use unveil_engine::{Engine, EngineError, GroupInput, GroupRequest, ScoreRequest};
use unveil_reward::Scoring;
use unveil_reward::mention::tokens_of;
use unveil_reward::vision::{Region, Seen, VisionRule, look};

use crate::engine::stop_rule;
use crate::heads::HeadFile;
use crate::text::{self, Frame};
use crate::{Result, RolloutError, open_engine};

/// Records that are in memory at once.
const CHUNK: usize = 32;

/// The model and how its attention is judged; what `generate` and `score` share.
#[derive(Debug, Clone)]
pub struct OfflineModel {
    /// Model directory.
    pub dir: PathBuf,
    /// Device, threads, kind of numbers, attention that is read and how it is judged, question where a record has none, synonyms.
    pub config: Config,
}

/// `unveil generate`.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// Model.
    pub model: OfflineModel,
    /// Record file.
    pub data: PathBuf,
    /// Responses per record, filters, length cap; the seed and the record's id decide the random numbers.
    pub sampling: Sampling,
    /// Texts that end a response.
    pub stop: Vec<String>,
}

/// `unveil score`.
#[derive(Debug, Clone)]
pub struct ScoreOptions {
    /// Model.
    pub model: OfflineModel,
    /// Response file: records with `response` (text) or `tokens` (ids, verbatim), and `index`.
    pub data: PathBuf,
    /// Scores the training answers of records that have neither, in place of refusing them.
    pub answers: bool,
    /// Writes calibration data: rows of every head where a response names its class, a line per response.
    pub heads: Option<PathBuf>,
    /// Temperature of the distribution that is scored; 1 = the model's own.
    pub temperature: f64,
}

/// One line of `generate`.
#[derive(Serialize)]
struct GeneratedLine<'a> {
    id: &'a str,
    index: usize,
    tokens: &'a [u32],
    text: &'a str,
    logprobs: &'a [f32],
    boxes: Vec<BBox>,
    finish: Finish,
    vision_relevance: Option<f64>,
}

/// One line of `score`.
#[derive(Serialize)]
struct ScoredLine<'a> {
    id: &'a str,
    index: usize,
    tokens: &'a [u32],
    logprobs: &'a [f32],
    vision_relevance: Option<f64>,
}

struct Loaded<'a> {
    engine: Engine,
    preparer: Arc<Preparer>,
    scoring: Scoring,
    options: &'a OfflineModel,
}

impl<'a> Loaded<'a> {
    fn open(options: &'a OfflineModel) -> Result<Self> {
        let (config, dir) = (&options.config, &options.dir);
        let preparer = Arc::new(Preparer::load_with(dir, config.model.boxes)?);
        let engine = open_engine(config, dir, config.run.threads, &preparer.tokenizer().special().banned)?;
        Ok(Self { engine, preparer, scoring: Scoring::new(config), options })
    }

    fn input(&self, root: &Root, record: &Record) -> Result<(GroupInput, Frame)> {
        let image = root.open(record)?;
        let question = if record.question.is_empty() { &self.options.config.data.question } else { &record.question };
        let prepared = self
            .preparer
            .prepare(&image, question)
            .map_err(|e| RolloutError::Prepare { record: record.id.clone(), source: Box::new(e) })?;
        Ok(text::group_input(&record.id, Some(ContentHash::of(image.rgb())), prepared))
    }

    /// The vision relevance as `[reward.vision_relevance]` has it; none where it is not defined (no true box, the whole image, a record
    /// that is answered in text).
    fn relevance(
        &self,
        record: &Record,
        frame: &Frame,
        text: &str,
        spans: &[(usize, usize)],
        attention: Option<&Attention>,
    ) -> Option<f64> {
        if record.is_text() {
            return None;
        }
        let mut region = Region::new(&record.boxes, frame.original());
        let names = self.scoring.names(&record.category);
        let rule = VisionRule::new(&self.scoring.reward.vision_relevance);
        look(Seen { text, reading: &self.scoring.reading, spans, attention }, &names, &mut region, rule).value
    }

    /// The tokens that name the class; empty where there is nothing to look at either.
    fn named(&self, record: &Record, frame: &Frame, text: &str, spans: &[(usize, usize)]) -> Vec<usize> {
        let applicable = Region::new(&record.boxes, frame.original()).is_applicable();
        let mention = self.scoring.mention(record, text).filter(|_| applicable);
        mention.map_or_else(Vec::new, |m| tokens_of(&m, spans))
    }

    /// The tokens of a given response, else those of the record's training answer.
    fn tokens(&self, given: &Given, frame: &Frame) -> Result<Vec<u32>> {
        let failed = |e| RolloutError::Prepare { record: given.record.id.clone(), source: Box::new(e) };
        let answer = || self.preparer.target_ids(&given.record, &frame.sizes).map_err(failed);
        given.tokens.clone().map_or_else(answer, Ok)
    }
}

/// What could not be used. Each is named on stderr when it comes up, the others go on, and the end is an error that counts them.
#[derive(Default)]
struct LeftOut {
    count: usize,
    first: Option<Box<RolloutError>>,
}

impl LeftOut {
    /// Notes what is wrong with one record or line; every other error ends the command.
    fn take<T>(&mut self, made: Result<T>) -> Result<Option<T>> {
        let why = match made {
            Ok(made) => return Ok(Some(made)),
            Err(why) => why,
        };
        let of_one = match &why {
            RolloutError::Image(_) | RolloutError::Prepare { .. } | RolloutError::Line { .. } => true,
            RolloutError::Records(e) => !matches!(e, RecordsError::Io { .. }),
            RolloutError::Engine(e) => {
                matches!(e, EngineError::Context { .. } | EngineError::ImageTokens { .. } | EngineError::Request { .. })
            }
            _ => false,
        };
        if !of_one {
            return Err(why);
        }
        tell(&format!("left out: {}", redact(&why.to_string())));
        self.count += 1;
        self.first.get_or_insert(Box::new(why));
        Ok(None)
    }

    fn end(self, of: usize) -> Result<()> {
        let count = self.count;
        self.first.map_or(Ok(()), |first| Err(RolloutError::LeftOut { count, of, first }))
    }
}

/// Generates n responses to every record of a file and writes a line for each: records in the file's order, responses by
/// index. `vision_relevance` is null where it is not defined. A record that cannot be used is left out and named on stderr.
///
/// # Errors
/// The model or the file cannot be used; the output cannot be written; at the end, that records were left out.
pub fn generate_cli(options: &GenerateOptions, out: &mut dyn Write) -> Result<()> {
    let (mut left, mut bad) = (LeftOut::default(), Vec::new());
    let data = RecordFile::load_some(&options.data, reach(&options.model), |e| bad.push(e))?;
    let (root, of) = (data.root(), data.records.len() + bad.len());
    for line in bad {
        left.take(Err::<(), _>(line.into()))?;
    }
    let mut model = Loaded::open(&options.model)?;
    let stop = stop_rule(&model.preparer, &options.stop);
    for records in data.records.chunks(CHUNK) {
        let mut usable = Vec::with_capacity(records.len());
        let mut requests = Vec::with_capacity(records.len());
        for record in records {
            let made = model.input(&root, record).and_then(|(input, frame)| {
                model.engine.check(&input, options.sampling.max_new_tokens)?;
                Ok((input, frame))
            });
            let Some((input, frame)) = left.take(made)? else { continue };
            let key = group_key(&[record.id.as_bytes()]);
            requests.push(GroupRequest { input, key, sampling: options.sampling, stop: stop.clone() });
            usable.push((record, frame));
        }
        let outputs = model.engine.generate(&requests, None)?;
        for ((record, frame), output) in usable.iter().zip(outputs) {
            for raw in output.responses {
                let (r, spans, rows) = text::response(model.preparer.tokenizer(), raw);
                let attention = frame.attention(rows.as_ref());
                let line = GeneratedLine {
                    id: &record.id,
                    index: r.index,
                    tokens: &r.tokens,
                    text: &r.text,
                    logprobs: &r.logprobs,
                    boxes: model.preparer.read_answer(&model.scoring.reading, &r.text, &frame.sizes).boxes,
                    finish: r.finish,
                    vision_relevance: model.relevance(record, frame, &r.text, &spans, attention.as_ref()),
                };
                write_line(out, &line)?;
            }
        }
        out.flush().map_err(RolloutError::io("the output"))?;
    }
    left.end(of)
}

/// A line of a response file.
struct Given {
    record: Record,
    index: usize,
    /// None = the record's training answer.
    tokens: Option<Vec<u32>>,
}

/// Scores given responses under a model and writes a line for each, in the file's order.
///
/// A `response` text is encoded and closed with the end token; `tokens` are taken as they are. The log-probability of a
/// token that is never sampled (an image placeholder apart, which is refused) is null. `heads` costs a second pass over the responses
/// that name their class. A line that cannot be used is left out and named on stderr.
///
/// # Errors
/// The model or the file cannot be used; the output cannot be written; at the end, that lines were left out.
pub fn score_cli(options: &ScoreOptions, out: &mut dyn Write) -> Result<()> {
    let mut model = Loaded::open(&options.model)?;
    let mut left = LeftOut::default();
    let given = read_responses(&options.data, reach(&options.model), &model.preparer, options.answers, &mut left)?;
    let of = given.len() + left.count;
    let mut heads = options.heads.as_deref().map(HeadFile::create).transpose()?;
    let root = Root::of(&options.data, reach(&options.model));
    // Neighbouring lines of one record are one group: its image is encoded once.
    let same = |a: &Given, b: &Given| {
        a.record.id == b.record.id && a.record.image == b.record.image && a.record.question == b.record.question
    };
    let groups: Vec<&[Given]> = given.chunk_by(same).collect();
    for chunk in groups.chunks(CHUNK) {
        let mut usable = Vec::with_capacity(chunk.len());
        let mut requests = Vec::with_capacity(chunk.len());
        for group in chunk {
            let made = model.input(&root, &group[0].record);
            let Some((input, frame)) = left.take(made)? else {
                left.count += group.len() - 1;
                continue;
            };
            let (mut lines, mut responses) = (Vec::with_capacity(group.len()), Vec::with_capacity(group.len()));
            for g in *group {
                let made = model.tokens(g, &frame).and_then(|tokens| {
                    let one = ScoreRequest { input: input.clone(), responses: vec![tokens] };
                    model.engine.check_scored(&one)?;
                    Ok(one.responses)
                });
                let Some(tokens) = left.take(made)? else { continue };
                responses.extend(tokens);
                lines.push(g);
            }
            if lines.is_empty() {
                continue;
            }
            requests.push(ScoreRequest { input, responses });
            usable.push((lines, frame));
        }
        let scored = model.engine.score(&requests, options.temperature)?;
        for (((group, frame), request), scored) in usable.iter().zip(&requests).zip(scored) {
            let mut named = Vec::with_capacity(group.len());
            for ((g, tokens), s) in group.iter().zip(&request.responses).zip(scored) {
                let (text, spans) = text::decode(model.preparer.tokenizer(), tokens);
                let attention = frame.attention(s.attention.as_ref());
                let line = ScoredLine {
                    id: &g.record.id,
                    index: g.index,
                    tokens,
                    logprobs: &s.logprobs,
                    vision_relevance: model.relevance(&g.record, frame, &text, &spans, attention.as_ref()),
                };
                write_line(out, &line)?;
                named.push((&g.record, model.named(&g.record, frame, &text, &spans)));
            }
            if let Some(heads) = &mut heads {
                heads.write(&mut model.engine, frame, request, &named)?;
            }
        }
        out.flush().map_err(RolloutError::io("the output"))?;
    }
    left.end(of)
}

/// Reads a response file; the same id may come often. A line without `index` counts on from the id's last one. With `answers`, one
/// without a response stands for the record's training answer.
fn read_responses(
    path: &Path,
    reach: Reach,
    preparer: &Preparer,
    answers: bool,
    left: &mut LeftOut,
) -> Result<Vec<Given>> {
    let io = || RolloutError::io(path.display().to_string());
    let reader = BufReader::new(std::fs::File::open(path).map_err(io())?);
    let mut next: HashMap<String, usize> = HashMap::new();
    let mut out = Vec::new();
    for (number, text) in reader.lines().enumerate() {
        let text = text.map_err(io())?;
        if text.trim().is_empty() {
            continue;
        }
        let read = read_line(&text, reach, preparer, answers, &mut next).map_err(|what| RolloutError::Line {
            path: path.to_owned(),
            line: number + 1,
            what,
        });
        out.extend(left.take(read)?);
    }
    Ok(out)
}

/// Reads one line; `next` counts the responses of each id.
fn read_line(
    text: &str,
    reach: Reach,
    preparer: &Preparer,
    answers: bool,
    next: &mut HashMap<String, usize>,
) -> Result<Given, String> {
    let mut record = Record::parse(text).map_err(|e| e.to_string())?;
    if record.id.trim().is_empty() {
        return Err("the record's `id` is empty".to_owned());
    }
    if let Some(fault) = path_fault(&record.image, reach) {
        return Err(format!("image \"{}\" {fault}", record.image));
    }
    let id = &record.id;
    let mut key = |name: &str| record.extra.remove(name).filter(|v| !v.is_null());
    let tokens = match (key("tokens"), key("response")) {
        (Some(ids), _) => Some(serde_json::from_value(ids).map_err(|e| format!("`tokens` of record \"{id}\": {e}"))?),
        (None, Some(serde_json::Value::String(text))) => {
            let encoded = preparer.tokenizer().encode(&text);
            let mut ids = encoded.map_err(|e| format!("`response` of record \"{id}\": {e}"))?;
            ids.push(preparer.tokenizer().special().im_end);
            Some(ids)
        }
        (None, None) if answers => None,
        _ => return Err(format!("record \"{id}\" has neither `response` (a text) nor `tokens` (ids)")),
    };
    let index = match key("index") {
        Some(value) => {
            let number = value.as_u64();
            number.ok_or_else(|| format!("`index` of record \"{id}\" is {value}, a whole number is needed"))? as usize
        }
        None => next.get(id).copied().unwrap_or(0),
    };
    next.insert(id.clone(), index + 1);
    Ok(Given { record, index, tokens })
}

/// How far paths of records may reach.
fn reach(model: &OfflineModel) -> Reach {
    Reach::new(model.config.data.outside)
}

fn write_line(out: &mut dyn Write, line: &impl Serialize) -> Result<()> {
    let io = || RolloutError::io("the output");
    serde_json::to_writer(&mut *out, line).map_err(|e| io()(e.into()))?;
    out.write_all(b"\n").map_err(io())
}
