//! `reward score`: a file of responses in, one breakdown per response out, in the order of the file. No service needed.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::StreamExt;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use unveil_config::Config;
use unveil_core::{Attention, BoxForm, Breakdown, Record};
use unveil_data::codec::Sizes;
use unveil_data::prepare::Family;
use unveil_data::records::ImageRef;
use unveil_data::root::{Reach, Root};

use crate::RewardError;
use crate::model::ModelSide;
use crate::score::{GroupInput, ResponseInput};
use crate::scorers::Scorers;
use crate::wire::check_record;

/// Groups that are scored at the same time.
const GROUPS_AT_ONCE: usize = 32;

/// Keys of a response line besides the record's own.
#[derive(Debug)]
struct Line {
    number: usize,
    record: Record,
    index: usize,
    response: Option<String>,
    tokens: Option<Vec<u32>>,
    /// Not in the contract, taken when there: bytes of `response` per token.
    spans: Option<Vec<(usize, usize)>>,
    attention: Option<Attention>,
    /// Not in the contract, taken when there: newest weight version that made a token.
    version: Option<u64>,
    /// Not in the contract, taken when there: pixels in which the answer gives its boxes.
    resized_size: Option<(u32, u32)>,
}

/// A group of a response file, and the line (from 1) of each of its responses.
pub type GroupLines = (GroupInput, Vec<usize>);

/// Scores every response of `data` (see [`read_responses`]) and writes one JSON line each to `out`. Returns how many.
///
/// # Errors
/// The first line that cannot be used, as `file:line: what`; nothing is written then.
pub fn run_score(config: &Config, data: &Path, out: &mut dyn Write) -> Result<usize, RewardError> {
    let (mut numbers, mut inputs) = (Vec::new(), Vec::new());
    for (group, lines) in read_responses(config, data)? {
        numbers.extend(lines);
        inputs.push(group);
    }
    let mut done: Vec<(usize, Breakdown)> = numbers.into_iter().zip(score_all(config, inputs)?).collect();
    done.sort_by_key(|(number, _)| *number);
    let unwritable = |source| RewardError::Io { path: PathBuf::from("output"), source };
    for (_, breakdown) in &done {
        let line = serde_json::to_string(breakdown).map_err(|e| unwritable(e.into()))?;
        writeln!(out, "{line}").map_err(unwritable)?;
    }
    out.flush().map_err(unwritable)?;
    Ok(done.len())
}

/// Reads the responses of `data` (JSON lines: a record plus `index` and `response` or `tokens`, optional `attention`) as groups,
/// in the order of their first lines.
///
/// Responses are grouped by `id`, wherever they stand. Boxes of an answer are read in the form of `model.boxes`, else in that of the
/// model directory's family, else (no model directory) in that of `model.family`. Where the form speaks of the resized image, its size
/// is `resized_size` in the line, else what the processor in `model.dir` makes of the image, else the image's own. With `model.dir`
/// set, its tokenizer turns `tokens` into text and finds the tokens of a mention; without it, responses need text.
///
/// # Errors
/// The first line that cannot be used, as `file:line: what`.
pub fn read_responses(config: &Config, data: &Path) -> Result<Vec<GroupLines>, RewardError> {
    let model = match config.model.dir.as_str() {
        "" => None,
        dir => Some(ModelSide::load(Path::new(dir), config.model.boxes)?),
    };
    let family = || Family::named(&config.model.family).map(Family::box_form);
    let boxes = match &model {
        Some(model) => model.box_form(),
        None => config.model.boxes.or_else(family).unwrap_or_default(),
    };
    let mut order: Vec<String> = Vec::new();
    let mut groups: HashMap<String, Vec<Line>> = HashMap::new();
    for line in read_lines(data)? {
        let group = groups.entry(line.record.id.clone()).or_default();
        if group.is_empty() {
            order.push(line.record.id.clone());
        }
        group.push(line);
    }
    let root = Root::of(data, Reach::new(config.data.outside));
    let group = |id| {
        let lines = groups.remove(&id).unwrap_or_default();
        let numbers = lines.iter().map(|l| l.number).collect();
        Ok((group_input((data, &root), model.as_ref(), boxes, lines)?, numbers))
    };
    order.into_iter().map(group).collect()
}

/// Groups in their order, on all cores; so many at once that a judge's limits decide, not ours.
fn score_all(config: &Config, inputs: Vec<GroupInput>) -> Result<Vec<Breakdown>, RewardError> {
    let unready = |source| RewardError::Io { path: PathBuf::from("runtime"), source };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(unready)?;
    runtime.block_on(async {
        let scorers = Arc::new(Scorers::load(config)?);
        let calls = inputs.into_iter().map(|group| Arc::clone(&scorers).score(Arc::new(group)));
        let scored: Vec<Vec<Breakdown>> = futures::stream::iter(calls).buffered(GROUPS_AT_ONCE).collect().await;
        Ok(scored.into_iter().flatten().collect())
    })
}

fn read_lines(data: &Path) -> Result<Vec<Line>, RewardError> {
    let io = |source| RewardError::Io { path: data.to_owned(), source };
    let mut out = Vec::new();
    for (at, text) in BufReader::new(std::fs::File::open(data).map_err(io)?).lines().enumerate() {
        let text = text.map_err(io)?;
        if text.trim().is_empty() {
            continue;
        }
        let line = parse_line(at + 1, &text);
        out.push(line.map_err(|what| RewardError::Line { path: data.to_owned(), line: at + 1, what })?);
    }
    Ok(out)
}

fn parse_line(number: usize, text: &str) -> Result<Line, String> {
    let mut record = Record::parse(text).map_err(|e| e.to_string())?;
    if record.id.trim().is_empty() {
        return Err("the record has no id".to_owned());
    }
    let line = Line {
        number,
        index: take(&mut record, "index")?.ok_or("`index` is missing: give the response's position in its group")?,
        response: take(&mut record, "response")?,
        tokens: take(&mut record, "tokens")?,
        spans: take(&mut record, "spans")?,
        attention: take(&mut record, "attention")?,
        version: take(&mut record, "version")?,
        resized_size: take(&mut record, "resized_size")?,
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

fn take<T: DeserializeOwned>(record: &mut Record, key: &str) -> Result<Option<T>, String> {
    let value = record.extra.remove(key);
    value.map_or(Ok(None), |v| Option::<T>::deserialize(v).map_err(|e| format!("`{key}`: {e}")))
}

fn group_input(
    (data, root): (&Path, &Root),
    model: Option<&ModelSide>,
    boxes: BoxForm,
    lines: Vec<Line>,
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
            return Err(fail(line.number, format!("index {} of `{}` comes twice", line.index, record.id)));
        }
        let number = line.number;
        responses.push(response(model, line).map_err(|what| fail(number, what))?);
    }
    Ok(GroupInput { record, sizes, boxes, responses })
}

fn response(model: Option<&ModelSide>, line: Line) -> Result<ResponseInput, String> {
    let (text, spans) = match (line.response, line.tokens, model) {
        (_, Some(tokens), Some(m)) => m.read_tokens(&tokens),
        (Some(text), None, Some(m)) => m.read_text(text)?,
        (Some(text), _, None) => (text, Vec::new()),
        (None, Some(_), None) => {
            return Err("has `tokens` but no `response`, and reading tokens needs a tokenizer: \
                        set model.dir (--set model.dir=DIR), or give the text"
                .to_owned());
        }
        (None, None, _) => return Err("neither `response` nor `tokens`".to_owned()),
    };
    let spans = line.spans.unwrap_or(spans);
    if let Some(i) = spans.iter().position(|&(b, e)| b > e || e > text.len()) {
        return Err(format!("`spans[{i}]` is not a byte range of the text ({} bytes)", text.len()));
    }
    Ok(ResponseInput { index: line.index, text, spans, attention: line.attention, version: line.version.unwrap_or(0) })
}

/// `(width, height)` from the record, else from the image's header.
fn image_size(root: &Root, record: &Record) -> Result<(u32, u32), String> {
    if let Some(size) = record.image_size {
        return if size.contains(&0) { Err("`image_size` is 0".to_owned()) } else { Ok(size.into()) };
    }
    match root.image_ref(record) {
        ImageRef::File(_) => {
            root.file(record).and_then(|path| unveil_data::store::image_size(&path)).map_err(|e| e.to_string())
        }
        ImageRef::Url(url) => Err(format!("the size of {url} is not known here: give `image_size`")),
        ImageRef::None => Err("the record has neither `image` nor `image_size`".to_owned()),
    }
}
