//! What `score --heads` writes: calibration data, a line per response that names its class, written as soon as it is known.
//!
//! Must not know: how heads are chosen.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use unveil_core::Record;
use unveil_engine::{Engine, ScoreRequest};
use unveil_reward::calibrate::{HeadRow, HeadSample};

use crate::text::Frame;
use crate::{Result, RolloutError};

/// Responses whose rows are in memory at once: each has a row for every head.
const AT_ONCE: usize = 8;

/// The open file.
pub(crate) struct HeadFile {
    path: PathBuf,
    out: BufWriter<File>,
}

impl HeadFile {
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(RolloutError::io(path.display().to_string()))?;
        Ok(Self { path: path.to_owned(), out: BufWriter::new(file) })
    }

    /// Lines of the responses to one image and question: each has its record, and the tokens that name the class. A response without such
    /// tokens has no line.
    pub fn write(
        &mut self,
        engine: &mut Engine,
        frame: &Frame,
        request: &ScoreRequest,
        named: &[(&Record, Vec<usize>)],
    ) -> Result<()> {
        let io = || RolloutError::io(self.path.display().to_string());
        for (responses, named) in request.responses.chunks(AT_ONCE).zip(named.chunks(AT_ONCE)) {
            let part = ScoreRequest { input: request.input.clone(), responses: responses.to_vec() };
            let tokens: Vec<Vec<usize>> = named.iter().map(|(_, tokens)| tokens.clone()).collect();
            let rows = engine.head_rows(&part, &tokens)?;
            for ((record, _), rows) in named.iter().zip(&rows).filter_map(|(n, r)| Some((n, r.as_ref()?))) {
                let row = |(layer, head, row): (usize, usize, &[f32])| HeadRow { layer, head, row: row.to_vec() };
                let sample = HeadSample {
                    id: record.id.clone(),
                    image_size: frame.original(),
                    boxes: record.boxes.clone(),
                    grid: [frame.grid.rows, frame.grid.cols],
                    heads: rows.rows().map(row).collect(),
                };
                serde_json::to_writer(&mut self.out, &sample).map_err(|e| io()(e.into()))?;
                self.out.write_all(b"\n").map_err(io())?;
            }
        }
        self.out.flush().map_err(io())
    }
}
