//! TensorBoard event files: TFRecord framing (masked CRC-32C) around the `Event` message of TensorFlow's event.proto.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
    #[prost(message, optional, tag = "7")]
    session_log: Option<SessionLog>,
}

/// Marks that a program started to write at the event's step: readers drop later steps of earlier files.
#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// `SessionLog.SessionStatus.START`.
const START: i32 = 1;

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<SummaryValue>,
}

#[derive(Clone, PartialEq, Message)]
struct SummaryValue {
    #[prost(string, tag = "1")]
    tag: String,
    /// Optional, so that 0 is written, too: an omitted value is missing.
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

/// Writes scalars to one event file.
#[derive(Debug)]
pub struct TensorBoard {
    file: File,
    /// Only the file version has been written.
    fresh: bool,
}

impl TensorBoard {
    /// Creates a new event file in `dir`, next to earlier files. Readers show each step of a resumed run once.
    ///
    /// # Errors
    /// Returns an error if the file cannot be created.
    pub fn create(dir: &Path) -> std::io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let now = now();
        let name =
            format!("events.out.tfevents.{:010}.{}.{}", now as u64, std::process::id(), (now.fract() * 1e6) as u64);
        let mut board = Self { file: File::create(dir.join(name))?, fresh: true };
        let file_version = Some("brain.Event:2".into());
        board.record(&Event { wall_time: now, file_version, ..Event::default() })?;
        Ok(board)
    }

    /// Writes the scalars of one step.
    ///
    /// # Errors
    /// Returns an error if the file cannot be written.
    pub fn scalars(&mut self, step: i64, scalars: &[(String, f32)]) -> std::io::Result<()> {
        if std::mem::take(&mut self.fresh) {
            let session_log = Some(SessionLog { status: START });
            self.record(&Event { wall_time: now(), step, session_log, ..Event::default() })?;
        }
        let value = scalars.iter().map(|(tag, v)| SummaryValue { tag: tag.clone(), simple_value: Some(*v) }).collect();
        self.record(&Event { wall_time: now(), step, summary: Some(Summary { value }), ..Event::default() })
    }

    fn record(&mut self, event: &Event) -> std::io::Result<()> {
        let data = event.encode_to_vec();
        let length = (data.len() as u64).to_le_bytes();
        let mut out = Vec::with_capacity(data.len() + 16);
        out.extend_from_slice(&length);
        out.extend_from_slice(&masked_crc(&length).to_le_bytes());
        out.extend_from_slice(&data);
        out.extend_from_slice(&masked_crc(&data).to_le_bytes());
        self.file.write_all(&out)
    }
}

/// Computes the masked CRC-32C of TFRecord.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensorboard_reads_the_scalars() {
        let dir = tempfile::tempdir().unwrap();
        let mut b = TensorBoard::create(dir.path()).unwrap();
        b.scalars(3, &[("train/loss".into(), 0.25), ("train/reward/total".into(), -1.5)]).unwrap();
        b.scalars(4, &[("train/loss".into(), 0.125)]).unwrap();
        assert_eq!(read_scalars(dir.path()), "[(3, 0.25), (4, 0.125)] -1.5");
    }

    #[test]
    fn repeated_steps_of_a_resumed_run_are_shown_once() {
        let dir = tempfile::tempdir().unwrap();
        for (steps, factor) in [(1..=18, 1.0), (11..=20, 100.0)] {
            let mut b = TensorBoard::create(dir.path()).unwrap();
            for step in steps {
                b.scalars(step, &[("train/loss".into(), step as f32 * factor), ("train/reward/total".into(), 0.0)])
                    .unwrap();
            }
        }
        let expected: Vec<String> =
            (1..=20).map(|s| format!("({s}, {:?})", if s > 10 { s as f32 * 100.0 } else { s as f32 })).collect();
        assert_eq!(read_scalars(dir.path()), format!("[{}] 0.0", expected.join(", ")));
    }

    /// Returns the scalars that TensorBoard reads from a folder.
    fn read_scalars(dir: &Path) -> String {
        let script = "import sys\n\
            from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n\
            a = EventAccumulator(sys.argv[1]); a.Reload()\n\
            print([(e.step, e.value) for e in a.Scalars('train/loss')], a.Scalars('train/reward/total')[0].value)";
        let python = unveil_testkit::python();
        let out = std::process::Command::new(&python).args(["-c", script]).arg(dir).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).trim().to_owned()
    }
}
