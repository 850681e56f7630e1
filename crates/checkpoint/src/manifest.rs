//! `manifest.json`, which lists the contents of a checkpoint. It is the last object of a checkpoint to be written.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::layout::{Dtype, TensorSlice};

/// Version of the format that this crate writes and reads.
pub const FORMAT: u32 = 2;

/// A checkpoint's manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the format, [`FORMAT`].
    pub format: u32,
    /// Step after which it was taken.
    pub step: u64,
    /// Term of the learner that wrote it.
    pub term: u64,
    /// Time of the writer's clock, in Unix seconds.
    pub created_unix_s: u64,
    /// Version of the program.
    pub code_version: String,
    /// The caller's metadata (configuration, position in the data, counters…).
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
    /// Size in bytes.
    pub size: u64,
    /// BLAKE3, hex.
    pub blake3: String,
    /// BLAKE3 chaining values of its parts of 16 MiB, hex, by which ranges are verified. Empty if there is one part.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<String>,
}

/// One tensor and the locations of its slices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestTensor {
    /// Name of the parameter.
    pub name: String,
    /// Kind of the tensor: `weight`, `exp_avg`, `exp_avg_sq`.
    pub kind: String,
    /// Export that includes the tensor; empty: no export.
    #[serde(rename = "part", default, skip_serializing_if = "String::is_empty")]
    pub artifact: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<u64>,
    /// Its slices, in order and without gaps.
    #[serde(rename = "pieces")]
    pub slices: Vec<SliceLocation>,
}

impl ManifestTensor {
    /// Returns the number of elements.
    pub fn count(&self) -> u64 {
        self.shape.iter().product()
    }
}

/// Location of a tensor's slice in an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SliceLocation {
    /// Index of the object in [`Manifest::objects`].
    pub object: usize,
    /// Byte offset in the object.
    #[serde(rename = "at")]
    pub offset: u64,
    /// Index of the first element in the whole tensor, in row-major order.
    pub begin: u64,
    /// Number of elements.
    pub count: u64,
}

/// The objects that one writer of a checkpoint has written.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct WriteReport {
    /// The objects.
    pub objects: Vec<ManifestObject>,
    /// The slices, each with the index of its object and the byte offset in it.
    #[serde(rename = "pieces")]
    pub slices: Vec<(TensorSlice, usize, u64)>,
}

/// Merges the reports of all writers.
///
/// # Errors
/// Returns a text that names the tensor that is incomplete, or that differs between writers.
pub(crate) fn merge_reports(reports: Vec<WriteReport>) -> Result<(Vec<ManifestObject>, Vec<ManifestTensor>), String> {
    let mut objects = Vec::new();
    let mut tensors = Vec::<ManifestTensor>::new();
    let mut index_by_key: HashMap<(String, String), usize> = HashMap::new();
    for report in reports {
        let first_object = objects.len();
        objects.extend(report.objects);
        for (slice, object, offset) in report.slices {
            let index = *index_by_key.entry((slice.kind.clone(), slice.name.clone())).or_insert_with(|| {
                tensors.push(ManifestTensor {
                    name: slice.name.clone(),
                    kind: slice.kind.clone(),
                    artifact: slice.artifact.clone(),
                    dtype: slice.dtype,
                    shape: slice.shape.clone(),
                    slices: Vec::new(),
                });
                tensors.len() - 1
            });
            let tensor = &mut tensors[index];
            if tensor.shape != slice.shape || tensor.dtype != slice.dtype || tensor.artifact != slice.artifact {
                return Err(format!(
                    "{} of `{}` has different shapes or dtypes on different ranks",
                    slice.kind, slice.name
                ));
            }
            let object = first_object + object;
            tensor.slices.push(SliceLocation { object, offset, begin: slice.begin, count: slice.count });
        }
    }
    for t in &mut tensors {
        t.slices.sort_by_key(|s| s.begin);
        let mut end = 0;
        for slice in &t.slices {
            if slice.begin != end {
                return Err(format!("{} of `{}` has a gap or an overlap at element {end}", t.kind, t.name));
            }
            end += slice.count;
        }
        if end != t.count() {
            return Err(format!("{} of `{}` has {end} of {} elements", t.kind, t.name, t.count()));
        }
    }
    Ok((objects, tensors))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(ranges: &[(u64, u64)]) -> WriteReport {
        let object = |i: usize| ManifestObject { name: i.to_string(), size: 9, blake3: String::new(), parts: vec![] };
        let slice = |(begin, count): &(u64, u64)| TensorSlice {
            kind: "weight".into(),
            name: "a".into(),
            artifact: String::new(),
            dtype: Dtype::F32,
            shape: vec![2, 3],
            begin: *begin,
            count: *count,
        };
        let slices: Vec<_> = ranges.iter().enumerate().map(|(i, range)| (slice(range), i, 8)).collect();
        WriteReport { objects: (0..slices.len()).map(object).collect(), slices }
    }

    #[test]
    fn reports_must_form_complete_tensors() {
        let (objects, tensors) = merge_reports(vec![report(&[(4, 2)]), report(&[(0, 1), (1, 3)])]).unwrap();
        assert_eq!(objects.len(), 3);
        let locations: Vec<_> = tensors[0].slices.iter().map(|s| (s.object, s.begin, s.count)).collect();
        assert_eq!(locations, [(1, 0, 1), (2, 1, 3), (0, 4, 2)]);
        for (reports, why) in [
            (vec![report(&[(0, 4)])], "4 of 6"),
            (vec![report(&[(0, 4)]), report(&[(3, 3)])], "overlap at element 4"),
            (vec![report(&[(0, 2), (3, 3)])], "gap"),
        ] {
            let e = merge_reports(reports).unwrap_err();
            assert!(e.contains(why) && e.contains("`a`"), "{e}");
        }
        let mut reshaped = report(&[(3, 3)]);
        reshaped.slices[0].0.shape = vec![6];
        assert!(merge_reports(vec![report(&[(0, 3)]), reshaped]).unwrap_err().contains("different shapes"));
    }
}
