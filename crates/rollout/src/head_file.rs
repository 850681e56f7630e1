//! Writes the calibration data of `score --heads`: one line per response that names its class, as soon as it is scored.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use unveil_core::Record;
use unveil_engine::{Engine, ScoreRequest};
use unveil_reward::calibrate::{HeadRow, HeadSample};

use crate::text::ImageGeometry;
use crate::{Result, RolloutError};

/// Responses whose rows are in memory at a time; each has a row for every head.
const RESPONSES_IN_MEMORY: usize = 8;

/// Open file of calibration data.
pub(crate) struct HeadFile {
    path: PathBuf,
    out: BufWriter<File>,
}

impl HeadFile {
    /// Creates the file.
    ///
    /// # Errors
    /// Returns [`RolloutError::Io`] if it cannot be created.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(RolloutError::io(path.display().to_string()))?;
        Ok(Self { path: path.to_owned(), out: BufWriter::new(file) })
    }

    /// Writes the lines of the responses to one image and question; `named` holds each response's record and the tokens that name the
    /// class. A response without such tokens gets no line.
    ///
    /// # Errors
    /// Returns [`RolloutError::Io`] if the file cannot be written, and [`RolloutError::Engine`] if the engine fails.
    pub(crate) fn write(
        &mut self,
        engine: &mut Engine,
        geometry: &ImageGeometry,
        request: &ScoreRequest,
        named: &[(&Record, Vec<usize>)],
    ) -> Result<()> {
        let io = || RolloutError::io(self.path.display().to_string());
        for (responses, named) in request.responses.chunks(RESPONSES_IN_MEMORY).zip(named.chunks(RESPONSES_IN_MEMORY)) {
            let request = ScoreRequest { input: request.input.clone(), responses: responses.to_vec() };
            let tokens: Vec<Vec<usize>> = named.iter().map(|(_, tokens)| tokens.clone()).collect();
            let rows = engine.head_rows(&request, &tokens)?;
            for ((record, _), rows) in named.iter().zip(&rows).filter_map(|(n, r)| Some((n, r.as_ref()?))) {
                let row = |(layer, head, row): (usize, usize, &[f32])| HeadRow { layer, head, row: row.to_vec() };
                let sample = HeadSample {
                    id: record.id.clone(),
                    image_size: geometry.original(),
                    boxes: record.boxes.clone(),
                    grid: [geometry.grid.rows, geometry.grid.cols],
                    heads: rows.rows().map(row).collect(),
                };
                serde_json::to_writer(&mut self.out, &sample).map_err(|e| io()(e.into()))?;
                self.out.write_all(b"\n").map_err(io())?;
            }
        }
        self.out.flush().map_err(io())
    }
}
