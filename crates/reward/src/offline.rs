//! `reward score`: reads a file of responses and writes one breakdown per response in the order of the file, without a service.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::StreamExt;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use unveil_config::Config;
use unveil_core::{Attention, BoxForm, Breakdown, Family, Record};
use unveil_data::image_root::{ImageRoot, PathPolicy};
use unveil_data::records::ImageRef;
use unveil_preprocess::codec::Sizes;

use crate::RewardError;
use crate::model_files::ModelFiles;
use crate::score::{GroupInput, ResponseInput};
use crate::scorers::Scorers;
use crate::wire::check_record;

/// Most groups that are scored concurrently.
const MAX_CONCURRENT_GROUPS: usize = 32;

/// A line of a response file: the record and the keys besides the record's own.
#[derive(Debug)]
struct ResponseLine {
    number: usize,
    record: Record,
    index: usize,
    response: Option<String>,
    tokens: Option<Vec<u32>>,
    /// Bytes of `response` that each token covers; an optional key outside the contract.
    spans: Option<Vec<(usize, usize)>>,
    attention: Option<Attention>,
    /// Newest weight version that generated a token; an optional key outside the contract.
    version: Option<u64>,
    /// Size in whose pixels the answer gives its boxes; an optional key outside the contract.
    resized_size: Option<(u32, u32)>,
}

/// A group of a response file and the line number (from 1) of each of its responses.
pub type GroupLines = (GroupInput, Vec<usize>);

/// Scores every response of `data` (see [`read_responses`]) and writes one JSON line for each to `out`. Returns their number.
///
/// # Errors
/// Returns [`RewardError::Line`] for the first unusable line, before anything is written, and [`RewardError::Io`] if the output cannot
/// be written.
pub fn run_score(config: &Config, data: &Path, out: &mut dyn Write) -> Result<usize, RewardError> {
    let mut numbers = Vec::new();
    let mut inputs = Vec::new();
    for (group, lines) in read_responses(config, data)? {
        numbers.extend(lines);
        inputs.push(group);
    }
    let mut scored: Vec<(usize, Breakdown)> = numbers.into_iter().zip(score_all(config, inputs)?).collect();
    scored.sort_by_key(|(number, _)| *number);
    let unwritable = |source| RewardError::Io { path: PathBuf::from("output"), source };
    for (_, breakdown) in &scored {
        let line = serde_json::to_string(breakdown).map_err(|e| unwritable(e.into()))?;
        writeln!(out, "{line}").map_err(unwritable)?;
    }
    out.flush().map_err(unwritable)?;
    Ok(scored.len())
}

/// Reads the responses of `data` (JSON lines: a record plus `index` and `response` or `tokens`, optional `attention`) as groups,
/// in the order of their first lines.
///
/// Responses are grouped by `id`, in any order of lines. Boxes of an answer are read in the form of `model.boxes`, else of the model
/// directory's family, else (without a model directory) of `model.family`. If the form refers to the resized image, its size is
/// `resized_size` of the line, else the size computed by the processor in `model.dir`, else the size of the image. With `model.dir`
/// set, its tokenizer decodes `tokens` and finds the tokens of a mention; without it, responses need text.
///
/// # Errors
/// Returns [`RewardError::Line`] for the first unusable line, [`RewardError::Io`] if the file cannot be read, and
/// [`RewardError::Model`] if the model directory cannot be used.
pub fn read_responses(config: &Config, data: &Path) -> Result<Vec<GroupLines>, RewardError> {
    let model = match config.model.dir.as_str() {
        "" => None,
        dir => Some(ModelFiles::load(Path::new(dir), &config.input_settings())?),
    };
    let family = || config.model.family.parse::<Family>().ok().map(Family::box_form);
    let boxes = match &model {
        Some(model) => model.box_form(),
        None => config.model.boxes.or_else(family).unwrap_or_default(),
    };
    let mut order: Vec<String> = Vec::new();
    let mut groups: HashMap<String, Vec<ResponseLine>> = HashMap::new();
    for line in read_lines(data)? {
        let group = groups.entry(line.record.id.clone()).or_default();
        if group.is_empty() {
            order.push(line.record.id.clone());
        }
        group.push(line);
    }
    let root = ImageRoot::of(data, PathPolicy::new(config.data.outside));
    let group = |id| {
        let lines = groups.remove(&id).unwrap_or_default();
        let numbers = lines.iter().map(|l| l.number).collect();
        Ok((group_input((data, &root), model.as_ref(), boxes, lines)?, numbers))
    };
    order.into_iter().map(group).collect()
}

/// Scores groups on all cores and returns the breakdowns in order; concurrency is high enough for the judge's own limits to decide.
fn score_all(config: &Config, inputs: Vec<GroupInput>) -> Result<Vec<Breakdown>, RewardError> {
    let no_runtime = |source| RewardError::Io { path: PathBuf::from("runtime"), source };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(no_runtime)?;
    runtime.block_on(async {
        let scorers = Arc::new(Scorers::load(config)?);
        let calls = inputs.into_iter().map(|group| Arc::clone(&scorers).score(Arc::new(group)));
        let scored: Vec<Vec<Breakdown>> = futures::stream::iter(calls).buffered(MAX_CONCURRENT_GROUPS).collect().await;
        Ok(scored.into_iter().flatten().collect())
    })
}

fn read_lines(data: &Path) -> Result<Vec<ResponseLine>, RewardError> {
    let io = |source| RewardError::Io { path: data.to_owned(), source };
    let mut out = Vec::new();
    for (index, text) in BufReader::new(std::fs::File::open(data).map_err(io)?).lines().enumerate() {
        let text = text.map_err(io)?;
        if text.trim().is_empty() {
            continue;
        }
        let line = parse_line(index + 1, &text);
        out.push(line.map_err(|what| RewardError::Line { path: data.to_owned(), line: index + 1, what })?);
    }
    Ok(out)
}

fn parse_line(number: usize, text: &str) -> Result<ResponseLine, String> {
    let mut record = Record::parse(text).map_err(|e| e.to_string())?;
    if record.id.trim().is_empty() {
        return Err("the record has no id".to_owned());
    }
    let line = ResponseLine {
        number,
        index: take_key(&mut record, "index")?
            .ok_or("`index` is missing: give the response's position in its group")?,
        response: take_key(&mut record, "response")?,
        tokens: take_key(&mut record, "tokens")?,
        spans: take_key(&mut record, "spans")?,
        attention: take_key(&mut record, "attention")?,
        version: take_key(&mut record, "version")?,
        resized_size: take_key(&mut record, "resized_size")?,
        record,
    };
    if line.response.is_none() && line.tokens.is_none() {
        return Err("neither `response` nor `tokens`: give the text or the token ids".to_owned());
    }
    if line.resized_size.is_some_and(|(w, h)| w == 0 || h == 0) {
        return Err("`resized_size` is 0".to_owned());
    }
    Ok(line)
}

fn take_key<T: DeserializeOwned>(record: &mut Record, key: &str) -> Result<Option<T>, String> {
    let value = record.extra.remove(key);
    value.map_or(Ok(None), |v| Option::<T>::deserialize(v).map_err(|e| format!("`{key}`: {e}")))
}

fn group_input(
    (data, root): (&Path, &ImageRoot),
    model: Option<&ModelFiles>,
    boxes: BoxForm,
    lines: Vec<ResponseLine>,
) -> Result<GroupInput, RewardError> {
    let fail = |line: usize, what: String| RewardError::Line { path: data.to_owned(), line, what };
    let Some(first) = lines.first() else {
        return Err(RewardError::request("responses", "is empty"));
    };
    let record = first.record.clone();
    let image = image_size(root, &record).map_err(|what| fail(first.number, what))?;
    check_record(&record, image).map_err(|what| fail(first.number, format!("the record {what}")))?;
    let sizes = match (first.resized_size, model) {
        (Some(resized), _) => Sizes { original: image, resized },
        (None, Some(m)) => m.sizes(image).map_err(|what| fail(first.number, what))?,
        (None, None) => Sizes { original: image, resized: image },
    };
    let first_number = first.number;
    let mut seen = std::collections::BTreeSet::new();
    let mut responses = Vec::with_capacity(lines.len());
    for line in lines {
        let same = line.record.boxes == record.boxes && line.record.category == record.category;
        if !same || line.record.image != record.image || line.record.image_size != record.image_size {
            let what = format!("the record `{}` differs from the one in line {first_number}", record.id);
            return Err(fail(line.number, what));
        }
        if !seen.insert(line.index) {
            return Err(fail(line.number, format!("index {} of `{}` occurs twice", line.index, record.id)));
        }
        let number = line.number;
        responses.push(response(model, line).map_err(|what| fail(number, what))?);
    }
    Ok(GroupInput { record, sizes, boxes, responses })
}

fn response(model: Option<&ModelFiles>, line: ResponseLine) -> Result<ResponseInput, String> {
    let given = line.tokens.as_ref().map(Vec::len);
    let (text, spans) = match (line.response, line.tokens, model) {
        (_, Some(tokens), Some(m)) => m.decode_tokens(&tokens),
        (Some(text), None, Some(m)) => m.tokenize_text(text)?,
        (Some(text), _, None) => (text, Vec::new()),
        (None, Some(_), None) => {
            return Err("has `tokens` but no `response`, and decoding tokens needs a tokenizer: \
                        set model.dir (--set model.dir=DIR), or give the text"
                .to_owned());
        }
        (None, None, _) => return Err("neither `response` nor `tokens`".to_owned()),
    };
    let spans = line.spans.unwrap_or(spans);
    if let Some(i) = spans.iter().position(|&(b, e)| b > e || e > text.len()) {
        return Err(format!("`spans[{i}]` is not a byte range of the text ({} bytes)", text.len()));
    }
    let tokens = given.or(Some(spans.len())).filter(|tokens| *tokens > 0);
    let version = line.version.unwrap_or(0);
    Ok(ResponseInput { index: line.index, text, spans, attention: line.attention, version, tokens })
}

/// Returns `(width, height)` in pixels from the record, else from the image's header.
fn image_size(root: &ImageRoot, record: &Record) -> Result<(u32, u32), String> {
    if let Some(size) = record.image_size {
        return if size.contains(&0) { Err("`image_size` is 0".to_owned()) } else { Ok(size.into()) };
    }
    match root.image_ref(record) {
        ImageRef::File(_) => {
            root.file(record).and_then(|path| unveil_data::image_store::image_size(&path)).map_err(|e| e.to_string())
        }
        ImageRef::Url(url) => Err(format!("the size of {url} is unknown: give `image_size`")),
        ImageRef::None => Err("the record has neither `image` nor `image_size`".to_owned()),
    }
}
