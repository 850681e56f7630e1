//! `manifest.json`: what a checkpoint consists of. The last object of a checkpoint to be written.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::layout::{Dtype, Piece};

/// Version of the format that is written and read.
pub const FORMAT: u32 = 2;

/// A checkpoint's manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this format, [`FORMAT`].
    pub format: u32,
    /// Step after which it was taken.
    pub step: u64,
    /// Term of the learner that wrote it.
    pub term: u64,
    /// Clock of the writer.
    pub created_unix_s: u64,
    /// Version of the program.
    pub code_version: String,
    /// What the caller wants to find again (configuration, position in the data, counters…).
    pub meta: Value,
    /// The objects.
    pub objects: Vec<ManifestObject>,
    /// The tensors in them.
    pub tensors: Vec<ManifestTensor>,
}

/// One object of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestObject {
    /// Name relative to the checkpoint's folder.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// BLAKE3, hex.
    pub blake3: String,
    /// BLAKE3 chaining values of its parts of 16 MiB, hex: a range is checked by those of its parts. None where there is one part.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<String>,
}

/// One tensor and where its numbers lie.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestTensor {
    /// The parameter.
    pub name: String,
    /// What it is of the parameter: `weight`, `exp_avg`, `exp_avg_sq`.
    pub kind: String,
    /// What an export writes it to; empty = nothing.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub part: String,
    /// Kind of numbers.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<u64>,
    /// Its stretches, in order; together they are all of it.
    pub pieces: Vec<TensorPiece>,
}

impl ManifestTensor {
    /// How many numbers it has.
    pub fn count(&self) -> u64 {
        self.shape.iter().product()
    }
}

/// A stretch of a tensor in an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorPiece {
    /// The object, by its place in the list.
    pub object: usize,
    /// Its first byte there.
    pub at: u64,
    /// The first number, counted over the whole tensor row by row.
    pub begin: u64,
    /// How many.
    pub count: u64,
}

/// What one writer of a checkpoint has written.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Report {
    /// Its objects.
    pub objects: Vec<ManifestObject>,
    /// Pieces with object (by its place in the list) and first byte there.
    pub pieces: Vec<(Piece, usize, u64)>,
}

/// Joins the reports of all writers.
///
/// # Errors
/// Says which tensor is not whole, or is not the same to all writers.
pub(crate) fn join(reports: Vec<Report>) -> Result<(Vec<ManifestObject>, Vec<ManifestTensor>), String> {
    let (mut objects, mut tensors) = (Vec::new(), Vec::<ManifestTensor>::new());
    let mut known: HashMap<(String, String), usize> = HashMap::new();
    for report in reports {
        let first = objects.len();
        objects.extend(report.objects);
        for (p, object, at) in report.pieces {
            let index = *known.entry((p.kind.clone(), p.name.clone())).or_insert_with(|| {
                let (name, kind, part, shape) = (p.name.clone(), p.kind.clone(), p.part.clone(), p.shape.clone());
                tensors.push(ManifestTensor { name, kind, part, dtype: p.dtype, shape, pieces: Vec::new() });
                tensors.len() - 1
            });
            let t = &mut tensors[index];
            if t.shape != p.shape || t.dtype != p.dtype || t.part != p.part {
                return Err(format!("{} of `{}` has another shape or kind of numbers at another rank", p.kind, p.name));
            }
            t.pieces.push(TensorPiece { object: first + object, at, begin: p.begin, count: p.count });
        }
    }
    for t in &mut tensors {
        t.pieces.sort_by_key(|p| p.begin);
        let mut end = 0;
        for p in &t.pieces {
            if p.begin != end {
                return Err(format!("{} of `{}` has a gap or an overlap at number {end}", t.kind, t.name));
            }
            end += p.count;
        }
        if end != t.count() {
            return Err(format!("{} of `{}` has {end} of {} numbers", t.kind, t.name, t.count()));
        }
    }
    Ok((objects, tensors))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(pieces: &[(u64, u64)]) -> Report {
        let object = |i: usize| ManifestObject { name: i.to_string(), size: 9, blake3: String::new(), parts: vec![] };
        let piece = |(begin, count): &(u64, u64)| Piece {
            kind: "weight".into(),
            name: "a".into(),
            part: String::new(),
            dtype: Dtype::F32,
            shape: vec![2, 3],
            begin: *begin,
            count: *count,
        };
        let pieces: Vec<_> = pieces.iter().enumerate().map(|(i, p)| (piece(p), i, 8)).collect();
        Report { objects: (0..pieces.len()).map(object).collect(), pieces }
    }

    #[test]
    fn reports_make_whole_tensors_or_an_error() {
        let (objects, tensors) = join(vec![report(&[(4, 2)]), report(&[(0, 1), (1, 3)])]).unwrap();
        assert_eq!(objects.len(), 3);
        let places: Vec<_> = tensors[0].pieces.iter().map(|p| (p.object, p.begin, p.count)).collect();
        assert_eq!(places, [(1, 0, 1), (2, 1, 3), (0, 4, 2)]);
        for (bad, why) in [
            (vec![report(&[(0, 4)])], "4 of 6"),
            (vec![report(&[(0, 4)]), report(&[(3, 3)])], "overlap at number 4"),
            (vec![report(&[(0, 2), (3, 3)])], "gap"),
        ] {
            let e = join(bad).unwrap_err();
            assert!(e.contains(why) && e.contains("`a`"), "{e}");
        }
        let mut other = report(&[(3, 3)]);
        other.pieces[0].0.shape = vec![6];
        assert!(join(vec![report(&[(0, 3)]), other]).unwrap_err().contains("another shape"));
    }
}
