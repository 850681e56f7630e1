//! `events.jsonl`: one JSON object per line, appended whole. Owns the file and its mirror as TensorBoard scalars.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::tensorboard::TensorBoard;

/// Appends events of one role; numbers of `sft`, `train` and `eval` events also go to TensorBoard.
pub struct EventLog {
    path: PathBuf,
    file: File,
    board: TensorBoard,
}

impl EventLog {
    /// Opens `<run>/events.jsonl` for appending and a TensorBoard file in `<run>/metrics/<role>`.
    pub fn open(run: &Path, role: &str) -> std::io::Result<Self> {
        let path = run.join("events.jsonl");
        let at = |e: std::io::Error| std::io::Error::new(e.kind(), format!("cannot write {}: {e}", path.display()));
        std::fs::create_dir_all(run).map_err(at)?;
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(at)?;
        let board = TensorBoard::create(&run.join("metrics").join(role))?;
        Ok(Self { path, file, board })
    }

    /// Appends one event in a single write, so that lines of several processes never mix.
    pub fn append(&mut self, event: &Value) -> std::io::Result<()> {
        let mut line = event.to_string();
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
            flatten(&prefix, event, &mut scalars);
            self.board.scalars(step, &scalars)?;
        }
        Ok(())
    }
}

fn flatten(prefix: &str, value: &Value, out: &mut Vec<(String, f32)>) {
    match value {
        Value::Number(n) => out.push((prefix.to_owned(), n.as_f64().unwrap_or(f64::NAN) as f32)),
        Value::Object(map) => {
            for (k, v) in map.iter().filter(|(k, _)| !matches!(k.as_str(), "step" | "kind" | "stage")) {
                flatten(&format!("{prefix}/{k}"), v, out);
            }
        }
        _ => {}
    }
}

/// Reads every whole event of a run; a last line cut by a crash is left out.
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn appends_and_skips_a_torn_line() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = EventLog::open(dir.path(), "learner").unwrap();
        log.append(&json!({"kind": "train", "step": 1, "reward": {"total": 0.5}})).unwrap();
        drop(log);
        let mut f = OpenOptions::new().append(true).open(dir.path().join("events.jsonl")).unwrap();
        f.write_all(b"{\"kind\": \"tra").unwrap();
        assert_eq!(read_events(dir.path()).unwrap().len(), 1);
        let boards = std::fs::read_dir(dir.path().join("metrics/learner")).unwrap().count();
        assert_eq!(boards, 1);
    }
}
