//! Where tensors' numbers lie in an object: a safetensors file (format: huggingface.co/docs/safetensors) whose tensors are stretches
//! of parameters, named by kind, parameter and first number.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// Most bytes of an object's numbers.
pub const OBJECT: u64 = 256 << 20;

/// Kind of numbers, by its name in safetensors files.
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
    /// Bytes of one number.
    pub fn size(self) -> u64 {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::BF16 | Self::F16 => 2,
        }
    }
}

/// A stretch of a parameter's numbers, row by row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// What it is of the parameter: `weight`, `exp_avg`, `exp_avg_sq`.
    pub kind: String,
    /// The parameter.
    pub name: String,
    /// What an export writes it to (`model`, `adapter`); empty = nothing.
    pub part: String,
    /// Kind of numbers.
    pub dtype: Dtype,
    /// Shape of the parameter.
    pub shape: Vec<u64>,
    /// The first number.
    pub begin: u64,
    /// How many.
    pub count: u64,
}

impl Piece {
    /// Bytes.
    pub fn bytes(&self) -> u64 {
        self.count * self.dtype.size()
    }
}

/// An object's pieces and their places.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    pieces: Vec<Piece>,
    header: Vec<u8>,
    at: Vec<u64>,
    size: u64,
}

impl Layout {
    /// Puts pieces one behind another.
    pub fn new(pieces: Vec<Piece>) -> Self {
        let (mut entries, mut at, mut end) = (Map::new(), Vec::with_capacity(pieces.len()), 0);
        entries.insert("__metadata__".into(), json!({"format": "pt"}));
        for p in &pieces {
            let whole = p.begin == 0 && p.count == p.shape.iter().product::<u64>();
            let (name, shape) = if whole {
                (format!("{}:{}", p.kind, p.name), p.shape.clone())
            } else {
                (format!("{}:{}@{}", p.kind, p.name, p.begin), vec![p.count])
            };
            entries.insert(name, entry(p.dtype, &shape, end..end + p.bytes()));
            at.push(end);
            end += p.bytes();
        }
        let header = header(&entries);
        let first = header.len() as u64;
        at.iter_mut().for_each(|a| *a += first);
        Self { pieces, header, at, size: first + end }
    }

    /// Shares pieces out over objects of up to `limit` bytes, of one kind each; larger pieces are cut.
    pub fn divide(pieces: Vec<Piece>, limit: u64) -> Vec<Self> {
        let (mut out, mut open, mut held) = (Vec::new(), Vec::<Piece>::new(), 0);
        for mut rest in pieces {
            while rest.count > 0 {
                let most = limit.saturating_sub(held) / rest.dtype.size();
                if open.last().is_some_and(|p| p.kind != rest.kind) || (most == 0 && !open.is_empty()) {
                    out.push(Self::new(std::mem::take(&mut open)));
                    held = 0;
                    continue;
                }
                let count = rest.count.min(most.max(1));
                held += count * rest.dtype.size();
                let begin = rest.begin;
                open.push(Piece { count, ..rest.clone() });
                (rest.begin, rest.count) = (begin + count, rest.count - count);
            }
        }
        if !open.is_empty() {
            out.push(Self::new(open));
        }
        out
    }

    /// What the object begins with.
    pub fn header(&self) -> &[u8] {
        &self.header
    }

    /// Pieces with the first byte of each in the object.
    pub fn pieces(&self) -> impl Iterator<Item = (&Piece, u64)> {
        self.pieces.iter().zip(self.at.iter().copied())
    }

    /// Bytes of the object.
    pub fn size(&self) -> u64 {
        self.size
    }
}

/// A tensor's entry in a header; the range counts from the end of the header.
pub(crate) fn entry(dtype: Dtype, shape: &[u64], range: std::ops::Range<u64>) -> Value {
    json!({"dtype": dtype, "shape": shape, "data_offsets": [range.start, range.end]})
}

/// The bytes of a header: its length, then JSON, filled up with blanks to a multiple of 8.
pub(crate) fn header(entries: &Map<String, Value>) -> Vec<u8> {
    let mut json = Value::Object(entries.clone()).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut out = (json.len() as u64).to_le_bytes().to_vec();
    out.append(&mut json);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(kind: &str, name: &str, count: u64) -> Piece {
        let (kind, name) = (kind.to_owned(), name.to_owned());
        Piece { kind, name, part: String::new(), dtype: Dtype::F32, shape: vec![count], begin: 0, count }
    }

    #[test]
    fn pieces_are_shared_out_whole_and_in_order() {
        let pieces = vec![piece("weight", "a", 10), piece("weight", "b", 37), piece("exp_avg", "a", 3)];
        let objects = Layout::divide(pieces.clone(), 64);
        let mut covered = vec![0; 3];
        for o in &objects {
            assert!(o.pieces().map(|(p, _)| p.bytes()).sum::<u64>() <= 64);
            assert!(o.pieces().all(|(p, _)| p.kind == o.pieces[0].kind), "one kind each");
            assert_eq!(o.header().len() % 8, 0);
            let mut end = o.header().len() as u64;
            for (p, at) in o.pieces() {
                assert_eq!(at, end);
                end += p.bytes();
                let i = pieces.iter().position(|q| (&q.kind, &q.name) == (&p.kind, &p.name)).unwrap();
                assert_eq!(p.begin, covered[i]);
                covered[i] += p.count;
            }
            assert_eq!(end, o.size());
        }
        assert_eq!(covered, [10, 37, 3]);
        assert_eq!(objects.len(), 4, "16, 16 and 15 numbers of weights, then the moments");
    }

    #[test]
    fn a_number_larger_than_the_limit_goes_alone() {
        let objects = Layout::divide(vec![piece("weight", "a", 3)], 1);
        assert_eq!(objects.iter().map(|o| o.pieces[0].begin).collect::<Vec<_>>(), [0, 1, 2]);
    }
}
