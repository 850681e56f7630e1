//! Layout of tensor slices in an object: a safetensors file (format: huggingface.co/docs/safetensors) whose tensors are slices of
//! parameters, named by kind, parameter and first element.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// Maximum size of an object's tensor data, in bytes.
pub const MAX_OBJECT_BYTES: u64 = 256 << 20;

/// Element type, by its name in safetensors files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Dtype {
    /// fp64.
    F64,
    /// fp32.
    F32,
    /// bfloat16.
    BF16,
    /// fp16.
    F16,
}

impl Dtype {
    /// Returns the size of an element, in bytes.
    pub fn size(self) -> u64 {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::BF16 | Self::F16 => 2,
        }
    }
}

/// A contiguous slice of a parameter (or of a moment), in row-major order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorSlice {
    /// Kind of the tensor: `weight`, `exp_avg`, `exp_avg_sq`.
    pub kind: String,
    /// Name of the parameter.
    pub name: String,
    /// Export that includes the tensor (`model`, `adapter`); empty: no export.
    #[serde(rename = "part")]
    pub artifact: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape of the parameter.
    pub shape: Vec<u64>,
    /// Index of the first element.
    pub begin: u64,
    /// Number of elements.
    pub count: u64,
}

impl TensorSlice {
    /// Returns the size in bytes.
    pub fn bytes(&self) -> u64 {
        self.count * self.dtype.size()
    }
}

/// The slices of an object and their byte offsets.
#[derive(Debug, Clone, PartialEq)]
pub struct ObjectLayout {
    slices: Vec<TensorSlice>,
    header: Vec<u8>,
    offsets: Vec<u64>,
    size: u64,
}

impl ObjectLayout {
    /// Lays out slices one after another.
    pub fn new(slices: Vec<TensorSlice>) -> Self {
        let mut entries = Map::new();
        let mut offsets = Vec::with_capacity(slices.len());
        let mut end = 0;
        entries.insert("__metadata__".into(), json!({"format": "pt"}));
        for slice in &slices {
            let is_whole = slice.begin == 0 && slice.count == slice.shape.iter().product::<u64>();
            let (name, shape) = if is_whole {
                (format!("{}:{}", slice.kind, slice.name), slice.shape.clone())
            } else {
                (format!("{}:{}@{}", slice.kind, slice.name, slice.begin), vec![slice.count])
            };
            entries.insert(name, header_entry(slice.dtype, &shape, end..end + slice.bytes()));
            offsets.push(end);
            end += slice.bytes();
        }
        let header = header(&entries);
        let header_len = header.len() as u64;
        offsets.iter_mut().for_each(|offset| *offset += header_len);
        Self { slices, header, offsets, size: header_len + end }
    }

    /// Distributes slices over objects of up to `limit` bytes, each with slices of one kind; larger slices are split.
    pub fn split_into_objects(slices: Vec<TensorSlice>, limit: u64) -> Vec<Self> {
        let mut objects = Vec::new();
        let mut current = Vec::<TensorSlice>::new();
        let mut current_bytes = 0;
        for mut rest in slices {
            while rest.count > 0 {
                let fitting = limit.saturating_sub(current_bytes) / rest.dtype.size();
                if current.last().is_some_and(|s| s.kind != rest.kind) || (fitting == 0 && !current.is_empty()) {
                    objects.push(Self::new(std::mem::take(&mut current)));
                    current_bytes = 0;
                    continue;
                }
                let count = rest.count.min(fitting.max(1));
                current_bytes += count * rest.dtype.size();
                current.push(TensorSlice { count, ..rest.clone() });
                rest.begin += count;
                rest.count -= count;
            }
        }
        if !current.is_empty() {
            objects.push(Self::new(current));
        }
        objects
    }

    /// Returns the bytes at the start of the object: the safetensors header.
    pub fn header(&self) -> &[u8] {
        &self.header
    }

    /// Returns the slices, each with its byte offset in the object.
    pub fn slices(&self) -> impl Iterator<Item = (&TensorSlice, u64)> {
        self.slices.iter().zip(self.offsets.iter().copied())
    }

    /// Returns the size of the object, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
}

/// Builds a tensor's entry in a header; the byte range counts from the end of the header.
pub(crate) fn header_entry(dtype: Dtype, shape: &[u64], range: std::ops::Range<u64>) -> Value {
    json!({"dtype": dtype, "shape": shape, "data_offsets": [range.start, range.end]})
}

/// Encodes a header: its length, then JSON, padded with blanks to a multiple of 8 bytes.
pub(crate) fn header(entries: &Map<String, Value>) -> Vec<u8> {
    let mut json = Value::Object(entries.clone()).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(kind: &str, name: &str, count: u64) -> TensorSlice {
        TensorSlice {
            kind: kind.to_owned(),
            name: name.to_owned(),
            artifact: String::new(),
            dtype: Dtype::F32,
            shape: vec![count],
            begin: 0,
            count,
        }
    }

    #[test]
    fn slices_are_distributed_completely_and_in_order() {
        let slices = vec![slice("weight", "a", 10), slice("weight", "b", 37), slice("exp_avg", "a", 3)];
        let objects = ObjectLayout::split_into_objects(slices.clone(), 64);
        let mut covered = vec![0; 3];
        for o in &objects {
            assert!(o.slices().map(|(s, _)| s.bytes()).sum::<u64>() <= 64);
            assert!(o.slices().all(|(s, _)| s.kind == o.slices[0].kind), "one kind each");
            assert_eq!(o.header().len() % 8, 0);
            let mut end = o.header().len() as u64;
            for (s, offset) in o.slices() {
                assert_eq!(offset, end);
                end += s.bytes();
                let i = slices.iter().position(|t| (&t.kind, &t.name) == (&s.kind, &s.name)).unwrap();
                assert_eq!(s.begin, covered[i]);
                covered[i] += s.count;
            }
            assert_eq!(end, o.size());
        }
        assert_eq!(covered, [10, 37, 3]);
        assert_eq!(objects.len(), 4, "16, 16 and 15 elements of weights, then the moments");
    }

    #[test]
    fn element_larger_than_the_limit_gets_its_own_object() {
        let objects = ObjectLayout::split_into_objects(vec![slice("weight", "a", 3)], 1);
        assert_eq!(objects.iter().map(|o| o.slices[0].begin).collect::<Vec<_>>(), [0, 1, 2]);
    }
}
