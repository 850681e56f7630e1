//! `unveil generate` and `unveil score`: run the worker's engine over a file and write one JSON line per response.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use unveil_config::Config;
use unveil_core::mention::overlapping_tokens;
use unveil_core::{Attention, BBox, Finish, Record, Sampling, redact, stderr_line};
use unveil_data::image_root::{ImageRoot, PathPolicy};
use unveil_data::image_store::ContentHash;
use unveil_data::records::RecordsError;
use unveil_data::records::{RecordFile, path_problem};
use unveil_engine::random::group_key;
use unveil_engine::{Engine, EngineError, GroupRequest, PromptInput, ScoreRequest};
use unveil_preprocess::preprocessor::Preprocessor;
use unveil_reward::Scoring;
use unveil_reward::vision::{AttendedResponse, Region, VisionRule, score_vision_relevance};

use crate::engine::stop_rule;
use crate::head_file::HeadFile;
use crate::text::{self, ImageGeometry};
use crate::{Result, RolloutError, open_engine};

/// Records in memory at a time.
const RECORDS_IN_MEMORY: usize = 32;

/// Model and configuration shared by `generate` and `score`.
#[derive(Debug, Clone)]
pub struct OfflineModel {
    /// Model directory.
    pub dir: PathBuf,
    /// Device, threads, dtype, captured attention and its scoring, question for records without one, synonyms.
    pub config: Config,
}

/// Options of `unveil generate`.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// Model.
    pub model: OfflineModel,
    /// Record file.
    pub data: PathBuf,
    /// Number of responses per record, filters, length limit; the seed and the record's id determine the random numbers.
    pub sampling: Sampling,
    /// Strings that end a response.
    pub stop: Vec<String>,
}

/// Options of `unveil score`.
#[derive(Debug, Clone)]
pub struct ScoreOptions {
    /// Model.
    pub model: OfflineModel,
    /// Response file: records with `response` (text) or `tokens` (ids, verbatim), and `index`.
    pub data: PathBuf,
    /// Whether to score the training answers of records without a response, instead of leaving them out.
    pub answers: bool,
    /// File for calibration data: rows of every head for each response that names its class, one line per response.
    pub heads: Option<PathBuf>,
    /// Temperature of the scored distribution; 1 is the model's own.
    pub temperature: f64,
}

/// Output line of `generate`.
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

/// Output line of `score`.
#[derive(Serialize)]
struct ScoredLine<'a> {
    id: &'a str,
    index: usize,
    tokens: &'a [u32],
    logprobs: &'a [f32],
    vision_relevance: Option<f64>,
}

struct LoadedModel {
    engine: Engine,
    preprocessor: Arc<Preprocessor>,
    scoring: Scoring,
}

impl LoadedModel {
    fn open(options: &OfflineModel) -> Result<Self> {
        let config = &options.config;
        let dir = &options.dir;
        let preprocessor = Arc::new(Preprocessor::load_with(dir, &config.input_settings())?);
        let engine = open_engine(config, dir, config.run.threads, preprocessor.tokenizer().banned())?;
        Ok(Self { engine, preprocessor, scoring: Scoring::new(config) })
    }

    fn input(&self, root: &ImageRoot, record: &Record) -> Result<(PromptInput, ImageGeometry)> {
        let image = root.open(record)?;
        let prepared = self
            .preprocessor
            .prepare(&image, record)
            .map_err(|e| RolloutError::Prepare { record: record.id.clone(), source: Box::new(e) })?;
        Ok(text::group_input(&record.id, Some(ContentHash::of(image.rgb())), prepared))
    }

    /// Scores vision relevance as configured in `[reward.vision_relevance]`; `None` if it is undefined (no true box, the whole image, a
    /// record answered in text).
    fn vision_relevance(
        &self,
        record: &Record,
        geometry: &ImageGeometry,
        text: &str,
        spans: &[(usize, usize)],
        attention: Option<&Attention>,
    ) -> Option<f64> {
        if record.is_text() {
            return None;
        }
        let mut region = Region::new(&record.boxes, geometry.original());
        let names = self.scoring.names(&record.category);
        let rule = VisionRule::new(&self.scoring.reward.vision_relevance);
        let response = AttendedResponse { text, reader: &self.scoring.reader, spans, attention };
        score_vision_relevance(response, &names, &mut region, rule).value
    }

    /// Returns the tokens that name the class; empty if vision relevance is undefined for the record.
    fn naming_tokens(
        &self,
        record: &Record,
        geometry: &ImageGeometry,
        text: &str,
        spans: &[(usize, usize)],
    ) -> Vec<usize> {
        let applicable = Region::new(&record.boxes, geometry.original()).is_applicable();
        let mention = self.scoring.find_mention(record, text).filter(|_| applicable);
        mention.map_or_else(Vec::new, |m| overlapping_tokens(&m, spans))
    }

    /// Returns the tokens of a given response, or of the record's training answer.
    fn tokens(&self, given: &GivenResponse, geometry: &ImageGeometry) -> Result<Vec<u32>> {
        let failed = |e| RolloutError::Prepare { record: given.record.id.clone(), source: Box::new(e) };
        let answer = || self.preprocessor.target_ids(&given.record, &geometry.sizes).map_err(failed);
        given.tokens.clone().map_or_else(answer, Ok)
    }
}

/// Unusable records and lines. Each is named on stderr and skipped; at the end, an error reports their number.
#[derive(Default)]
struct SkippedRecords {
    count: usize,
    first: Option<Box<RolloutError>>,
}

impl SkippedRecords {
    /// Records an error that concerns one record or line, and returns `None`; any other error ends the command.
    fn skip_unusable<T>(&mut self, result: Result<T>) -> Result<Option<T>> {
        let why = match result {
            Ok(value) => return Ok(Some(value)),
            Err(why) => why,
        };
        let concerns_one = match &why {
            RolloutError::Image(_) | RolloutError::Prepare { .. } | RolloutError::Line { .. } => true,
            RolloutError::Records(e) => !matches!(e, RecordsError::Io { .. }),
            RolloutError::Engine(e) => {
                matches!(e, EngineError::Context { .. } | EngineError::ImageTokens { .. } | EngineError::Request { .. })
            }
            _ => false,
        };
        if !concerns_one {
            return Err(why);
        }
        stderr_line(&format!("left out: {}", redact(&why.to_string())));
        self.count += 1;
        self.first.get_or_insert(Box::new(why));
        Ok(None)
    }

    /// Returns an error if any of `total` records or lines was skipped.
    fn finish(self, total: usize) -> Result<()> {
        let count = self.count;
        self.first.map_or(Ok(()), |first| Err(RolloutError::LeftOut { count, total, first }))
    }
}

/// Generates n responses to every record of a file and writes a line for each: records in the order of the file, responses by
/// index. `vision_relevance` is null if it is undefined. An unusable record is left out and named on stderr.
///
/// # Errors
/// Returns an error if the model or the file cannot be used or the output cannot be written, and [`RolloutError::LeftOut`] at the end if
/// records were left out.
pub fn generate_cli(options: &GenerateOptions, out: &mut dyn Write) -> Result<()> {
    let mut skipped = SkippedRecords::default();
    let mut bad_lines = Vec::new();
    let data = RecordFile::load_lenient(&options.data, path_policy(&options.model), |e| bad_lines.push(e))?;
    let root = data.root();
    let total = data.records.len() + bad_lines.len();
    for line in bad_lines {
        skipped.skip_unusable(Err::<(), _>(line.into()))?;
    }
    let mut model = LoadedModel::open(&options.model)?;
    let stop = stop_rule(&model.preprocessor, &options.stop);
    for records in data.records.chunks(RECORDS_IN_MEMORY) {
        let mut usable = Vec::with_capacity(records.len());
        let mut requests = Vec::with_capacity(records.len());
        for record in records {
            let checked = model.input(&root, record).and_then(|(input, geometry)| {
                model.engine.check_input(&input, options.sampling.max_new_tokens)?;
                Ok((input, geometry))
            });
            let Some((input, geometry)) = skipped.skip_unusable(checked)? else { continue };
            let key = group_key(&[record.id.as_bytes()]);
            requests.push(GroupRequest { input, key, sampling: options.sampling, stop: stop.clone() });
            usable.push((record, geometry));
        }
        let outputs = model.engine.generate(&requests, None)?;
        for ((record, geometry), output) in usable.iter().zip(outputs) {
            for raw in output.responses {
                let (r, spans, rows) = text::response(model.preprocessor.tokenizer(), raw);
                let attention = geometry.attention(rows.as_ref());
                let line = GeneratedLine {
                    id: &record.id,
                    index: r.index,
                    tokens: &r.tokens,
                    text: &r.text,
                    logprobs: &r.logprobs,
                    boxes: model.preprocessor.read_answer(&model.scoring.reader, &r.text, &geometry.sizes).boxes,
                    finish: r.finish,
                    vision_relevance: model.vision_relevance(record, geometry, &r.text, &spans, attention.as_ref()),
                };
                write_line(out, &line)?;
            }
        }
        out.flush().map_err(RolloutError::io("the output"))?;
    }
    skipped.finish(total)
}

/// A line of a response file.
struct GivenResponse {
    record: Record,
    index: usize,
    /// Token ids; `None`: the record's training answer is scored.
    tokens: Option<Vec<u32>>,
}

/// Scores given responses under a model and writes a line for each, in the order of the file.
///
/// A `response` text is encoded and followed by the end token; `tokens` are used verbatim. The log-probability of a token that is never
/// sampled is null (image placeholders are refused). `heads` costs a second forward pass over the responses that name their class. An unusable line is left out and named on stderr.
///
/// # Errors
/// Returns an error if the model or the file cannot be used or the output cannot be written, and [`RolloutError::LeftOut`] at the end if
/// lines were left out.
pub fn score_cli(options: &ScoreOptions, out: &mut dyn Write) -> Result<()> {
    let mut model = LoadedModel::open(&options.model)?;
    let mut skipped = SkippedRecords::default();
    let policy = path_policy(&options.model);
    let given = read_responses(&options.data, policy, &model.preprocessor, options.answers, &mut skipped)?;
    let total = given.len() + skipped.count;
    let mut heads = options.heads.as_deref().map(HeadFile::create).transpose()?;
    let root = ImageRoot::of(&options.data, policy);
    // Neighbouring lines of one record are one group: its image is encoded once.
    let same_group = |a: &GivenResponse, b: &GivenResponse| {
        let prompt = |g: &GivenResponse| model.preprocessor.prompt_text(&g.record).ok();
        a.record.id == b.record.id && a.record.image == b.record.image && prompt(a) == prompt(b)
    };
    let groups: Vec<&[GivenResponse]> = given.chunk_by(same_group).collect();
    for chunk in groups.chunks(RECORDS_IN_MEMORY) {
        let mut usable = Vec::with_capacity(chunk.len());
        let mut requests = Vec::with_capacity(chunk.len());
        for group in chunk {
            let input = model.input(&root, &group[0].record);
            let Some((input, geometry)) = skipped.skip_unusable(input)? else {
                skipped.count += group.len() - 1;
                continue;
            };
            let mut lines = Vec::with_capacity(group.len());
            let mut responses = Vec::with_capacity(group.len());
            for g in *group {
                let checked = model.tokens(g, &geometry).and_then(|tokens| {
                    let request = ScoreRequest { input: input.clone(), responses: vec![tokens] };
                    model.engine.check_score_request(&request)?;
                    Ok(request.responses)
                });
                let Some(tokens) = skipped.skip_unusable(checked)? else { continue };
                responses.extend(tokens);
                lines.push(g);
            }
            if lines.is_empty() {
                continue;
            }
            requests.push(ScoreRequest { input, responses });
            usable.push((lines, geometry));
        }
        let scored = model.engine.score(&requests, options.temperature)?;
        for (((group, geometry), request), scored) in usable.iter().zip(&requests).zip(scored) {
            let mut named = Vec::with_capacity(group.len());
            for ((g, tokens), s) in group.iter().zip(&request.responses).zip(scored) {
                let (text, spans) = text::decode(model.preprocessor.tokenizer(), tokens);
                let attention = geometry.attention(s.attention.as_ref());
                let line = ScoredLine {
                    id: &g.record.id,
                    index: g.index,
                    tokens,
                    logprobs: &s.logprobs,
                    vision_relevance: model.vision_relevance(&g.record, geometry, &text, &spans, attention.as_ref()),
                };
                write_line(out, &line)?;
                named.push((&g.record, model.naming_tokens(&g.record, geometry, &text, &spans)));
            }
            if let Some(heads) = &mut heads {
                heads.write(&mut model.engine, geometry, request, &named)?;
            }
        }
        out.flush().map_err(RolloutError::io("the output"))?;
    }
    skipped.finish(total)
}

/// Reads a response file, in which ids may repeat. A line without `index` continues from the last index of its id. With `answers`, a line
/// without a response is scored by the record's training answer.
fn read_responses(
    path: &Path,
    policy: PathPolicy,
    preprocessor: &Preprocessor,
    answers: bool,
    skipped: &mut SkippedRecords,
) -> Result<Vec<GivenResponse>> {
    let io = || RolloutError::io(path.display().to_string());
    let reader = BufReader::new(std::fs::File::open(path).map_err(io())?);
    let mut next: HashMap<String, usize> = HashMap::new();
    let mut out = Vec::new();
    for (number, text) in reader.lines().enumerate() {
        let text = text.map_err(io())?;
        if text.trim().is_empty() {
            continue;
        }
        let read = read_line(&text, policy, preprocessor, answers, &mut next).map_err(|what| RolloutError::Line {
            path: path.to_owned(),
            line: number + 1,
            what,
        });
        out.extend(skipped.skip_unusable(read)?);
    }
    Ok(out)
}

/// Reads one line; `next` holds the next index of each id.
fn read_line(
    text: &str,
    policy: PathPolicy,
    preprocessor: &Preprocessor,
    answers: bool,
    next: &mut HashMap<String, usize>,
) -> Result<GivenResponse, String> {
    let mut record = Record::parse(text).map_err(|e| e.to_string())?;
    if record.id.trim().is_empty() {
        return Err("the record's `id` is empty".to_owned());
    }
    if let Some(problem) = path_problem(&record.image, policy) {
        return Err(format!("image \"{}\" {problem}", record.image));
    }
    let id = &record.id;
    let mut take_key = |name: &str| record.extra.remove(name).filter(|v| !v.is_null());
    let tokens = match (take_key("tokens"), take_key("response")) {
        (Some(ids), _) => Some(serde_json::from_value(ids).map_err(|e| format!("`tokens` of record \"{id}\": {e}"))?),
        (None, Some(serde_json::Value::String(text))) => {
            let encoded = preprocessor.tokenizer().encode(&text);
            let mut ids = encoded.map_err(|e| format!("`response` of record \"{id}\": {e}"))?;
            ids.push(preprocessor.tokenizer().special().im_end);
            Some(ids)
        }
        (None, None) if answers => None,
        _ => return Err(format!("record \"{id}\" has neither `response` (a text) nor `tokens` (ids)")),
    };
    let index = match take_key("index") {
        Some(value) => {
            let number = value.as_u64();
            number.ok_or_else(|| format!("`index` of record \"{id}\" is {value}: use a whole number"))? as usize
        }
        None => next.get(id).copied().unwrap_or(0),
    };
    next.insert(id.clone(), index + 1);
    Ok(GivenResponse { record, index, tokens })
}

/// Returns the policy for image paths of records.
fn path_policy(model: &OfflineModel) -> PathPolicy {
    PathPolicy::new(model.config.data.outside)
}

fn write_line(out: &mut dyn Write, line: &impl Serialize) -> Result<()> {
    let io = || RolloutError::io("the output");
    serde_json::to_writer(&mut *out, line).map_err(|e| io()(e.into()))?;
    out.write_all(b"\n").map_err(io())
}
