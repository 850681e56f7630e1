//! The event log `events.jsonl`, one JSON object per line, and its mirror as TensorBoard scalars.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;
use unveil_core::redact;

use crate::tensorboard::TensorBoard;

/// Appends events of one role; numbers of `sft`, `train` and `eval` events are also written to TensorBoard.
#[derive(Debug)]
pub struct EventLog {
    path: PathBuf,
    file: File,
    board: TensorBoard,
}

impl EventLog {
    /// Opens `<run>/events.jsonl` for appending, and a TensorBoard file in `<run>/metrics/<role>`.
    ///
    /// # Errors
    /// Returns an error if one of the files cannot be opened.
    pub fn open(run: &Path, role: &str) -> std::io::Result<Self> {
        let path = run.join("events.jsonl");
        let with_path =
            |e: std::io::Error| std::io::Error::new(e.kind(), format!("cannot write {}: {e}", path.display()));
        std::fs::create_dir_all(run).map_err(with_path)?;
        let mut file = OpenOptions::new().create(true).read(true).append(true).open(&path).map_err(with_path)?;
        terminate_last_line(&mut file).map_err(with_path)?;
        let board = TensorBoard::create(&run.join("metrics").join(role))?;
        Ok(Self { path, file, board })
    }

    /// Appends one event in a single write, so that lines of several processes never interleave.
    ///
    /// # Errors
    /// Returns an error if a file cannot be written.
    pub fn append(&mut self, event: &Value) -> std::io::Result<()> {
        let mut line = redact(&event.to_string()).into_owned();
        line.push('\n');
        self.file
            .write_all(line.as_bytes())
            .map_err(|e| std::io::Error::new(e.kind(), format!("cannot write {}: {e}", self.path.display())))?;
        let kind = event["kind"].as_str().unwrap_or_default();
        if let (true, Some(step)) = (matches!(kind, "sft" | "train" | "eval"), event["step"].as_i64()) {
            let prefix = if kind == "eval" {
                format!("eval/{}", event["stage"].as_str().unwrap_or("run"))
            } else {
                kind.to_owned()
            };
            let mut scalars = Vec::new();
            collect_scalars(&prefix, event, &mut scalars);
            self.board.scalars(step, &scalars)?;
        }
        Ok(())
    }
}

/// Terminates a line that a crash has truncated, so that the next event starts on its own line.
fn terminate_last_line(file: &mut File) -> std::io::Result<()> {
    if file.seek(SeekFrom::End(0))? == 0 {
        return Ok(());
    }
    file.seek(SeekFrom::End(-1))?;
    let mut last = [0];
    file.read_exact(&mut last)?;
    if last == *b"\n" { Ok(()) } else { file.write_all(b"\n") }
}

/// Collects the numbers of an event under `prefix/key` names.
fn collect_scalars(prefix: &str, value: &Value, out: &mut Vec<(String, f32)>) {
    match value {
        Value::Number(n) => out.push((prefix.to_owned(), n.as_f64().unwrap_or(f64::NAN) as f32)),
        Value::Object(map) => {
            for (k, v) in map.iter().filter(|(k, _)| !matches!(k.as_str(), "step" | "kind" | "stage" | "term")) {
                collect_scalars(&format!("{prefix}/{k}"), v, out);
            }
        }
        _ => {}
    }
}

/// Reads all events of a run; lines that are not JSON (truncated by a crash) are left out.
///
/// # Errors
/// Returns an error if the file exists but cannot be read.
pub fn read_events(run: &Path) -> std::io::Result<Vec<Value>> {
    let path = run.join("events.jsonl");
    let file = match File::open(&path) {
        Ok(f) => f,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(std::io::Error::new(e.kind(), format!("cannot read {}: {e}", path.display()))),
    };
    let mut out = Vec::new();
    for line in BufReader::new(file).lines() {
        if let Ok(v) = serde_json::from_str(&line?) {
            out.push(v);
        }
    }
    Ok(out)
}

/// Returns the events of the lineage that led to the newest state. If a stage was restarted or resumed from an earlier step, its events
/// beyond that step are left out, and so are events of a learner whose term is over.
///
/// # Examples
/// ```
/// use serde_json::json;
/// use unveil_report::lineage;
///
/// // Step 2 was lost with its learner, which resumed from step 1.
/// let kept = lineage(vec![
///     json!({"kind": "train", "step": 1, "loss": 0.9}),
///     json!({"kind": "train", "step": 2, "loss": 0.8}),
///     json!({"kind": "resumed", "stage": "rl", "step": 1}),
///     json!({"kind": "train", "step": 2, "loss": 0.7}),
/// ]);
/// assert_eq!(kept.len(), 3);
/// assert_eq!(kept[2]["loss"], 0.7);
/// ```
pub fn lineage(events: Vec<Value>) -> Vec<Value> {
    let stage = |e: &Value| match e["kind"].as_str() {
        Some("sft") => "sft".to_owned(),
        Some("train") => "rl".to_owned(),
        _ => e["stage"].as_str().unwrap_or_default().to_owned(),
    };
    let mut out: Vec<Value> = Vec::with_capacity(events.len());
    let mut newest_term = 0;
    for event in events {
        if let Some(term) = event["term"].as_u64() {
            // A fresh start counts terms from 1 again.
            if term < newest_term && event["kind"] != "started" {
                continue;
            }
            newest_term = term;
        }
        if let (Some("started" | "resumed"), Some(from)) = (event["kind"].as_str(), event["step"].as_u64()) {
            let restarted = stage(&event);
            out.retain(|e| stage(e) != restarted || e["step"].as_u64().is_none_or(|s| s <= from));
        }
        out.push(event);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn lineage_leaves_out_repeated_steps() {
        let train = |step: u64, v: f64| json!({"kind": "train", "step": step, "v": v});
        let all = vec![
            json!({"kind": "sft", "step": 3}),
            json!({"kind": "started", "stage": "rl", "step": 0}),
            train(1, 0.0),
            train(2, 0.0),
            json!({"kind": "eval", "stage": "rl", "step": 2}),
            json!({"kind": "resumed", "stage": "rl", "step": 1}),
            json!({"kind": "train", "step": 2, "term": 1, "v": 2.0}),
            json!({"kind": "resumed", "stage": "rl", "step": 1, "term": 2}),
            json!({"kind": "train", "step": 3, "term": 1, "v": 3.0}),
            train(2, 1.0),
        ];
        let kept = lineage(all);
        let steps: Vec<_> = kept.iter().filter(|e| e["kind"] == "train").map(|e| (&e["step"], &e["v"])).collect();
        assert_eq!(steps, [(&json!(1), &json!(0.0)), (&json!(2), &json!(1.0))]);
        assert!(kept.iter().any(|e| e["kind"] == "sft") && !kept.iter().any(|e| e["kind"] == "eval"));
    }

    #[test]
    fn truncated_lines_are_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = EventLog::open(dir.path(), "learner").unwrap();
        log.append(&json!({"kind": "train", "step": 1, "reward": {"total": 0.5}})).unwrap();
        drop(log);
        let mut f = OpenOptions::new().append(true).open(dir.path().join("events.jsonl")).unwrap();
        f.write_all(b"{\"kind\": \"tra").unwrap();
        drop(f);
        let files = std::fs::read_dir(dir.path().join("metrics/learner")).unwrap().count();
        assert_eq!(files, 1);
        assert_eq!(read_events(dir.path()).unwrap().len(), 1);
        let mut again = EventLog::open(dir.path(), "learner").unwrap();
        again.append(&json!({"kind": "train", "step": 2})).unwrap();
        let steps: Vec<_> = read_events(dir.path()).unwrap().into_iter().map(|e| e["step"].clone()).collect();
        assert_eq!(steps, [json!(1), json!(2)], "the truncated line does not damage the next one");
    }
}
