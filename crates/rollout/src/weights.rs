//! Weights on the wire: chunks of one safetensors file, each with its CRC-32C, and how many bytes there are in all.

use safetensors::tensor::{Dtype, SafeTensors};
use tch::{Kind, Tensor};
use unveil_proto::v1::WeightsChunk;

/// Bytes that are reserved before they have arrived.
const RESERVE: u64 = 256 << 20;

/// Collects the chunks of one stream.
#[derive(Debug, Default)]
pub(crate) struct Assembly {
    version: Option<u64>,
    total: u64,
    bytes: Vec<u8>,
}

impl Assembly {
    /// Takes the next chunk; the error says what is wrong with it.
    pub fn push(&mut self, chunk: &WeightsChunk) -> Result<(), String> {
        match self.version {
            None => {
                (self.version, self.total) = (Some(chunk.version), chunk.total_bytes);
                self.bytes.reserve_exact(chunk.total_bytes.min(RESERVE) as usize);
            }
            Some(v) if v != chunk.version || self.total != chunk.total_bytes => {
                return Err(format!("the stream of version {v} went on with version {}", chunk.version));
            }
            Some(_) => {}
        }
        let at = self.bytes.len() as u64;
        let found = crc32c::crc32c(&chunk.data);
        if found != chunk.crc32c {
            return Err(format!(
                "the chunk at byte {at} of version {} has CRC-32C {found:08x}, {:08x} was announced: it was damaged on the way",
                chunk.version, chunk.crc32c
            ));
        }
        if at + chunk.data.len() as u64 > self.total {
            return Err(format!("more than the announced {} bytes of version {} arrived", self.total, chunk.version));
        }
        self.bytes.extend_from_slice(&chunk.data);
        Ok(())
    }

    /// Version and bytes of the whole; none when nothing was sent.
    pub fn finish(self) -> Result<Option<(u64, Vec<u8>)>, String> {
        let Some(version) = self.version else { return Ok(None) };
        let (found, total) = (self.bytes.len() as u64, self.total);
        if found != total {
            return Err(format!("the stream of version {version} ended after {found} of {total} bytes"));
        }
        Ok(Some((version, self.bytes)))
    }
}

/// The tensors of a safetensors file in memory.
pub(crate) fn tensors(bytes: &[u8]) -> Result<Vec<(String, Tensor)>, String> {
    let file = SafeTensors::deserialize(bytes).map_err(|e| format!("not a whole safetensors file: {e}"))?;
    let mut out = Vec::with_capacity(file.len());
    for (name, view) in file.iter() {
        let kind = match view.dtype() {
            Dtype::F32 => Kind::Float,
            Dtype::BF16 => Kind::BFloat16,
            Dtype::F16 => Kind::Half,
            Dtype::F64 => Kind::Double,
            other => return Err(format!("tensor `{name}` is {other:?}, weights are floating-point numbers")),
        };
        let shape: Vec<i64> = view.shape().iter().map(|&d| d as i64).collect();
        let tensor =
            Tensor::f_from_data_size(view.data(), &shape, kind).map_err(|e| format!("tensor `{name}`: {e}"))?;
        out.push((name.to_owned(), tensor));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(data: &'static [u8], total: u64) -> WeightsChunk {
        WeightsChunk { version: 3, total_bytes: total, data: data.into(), crc32c: crc32c::crc32c(data) }
    }

    #[test]
    fn whole_and_damaged_streams() {
        let mut a = Assembly::default();
        a.push(&chunk(b"ab", 4)).unwrap();
        a.push(&chunk(b"cd", 4)).unwrap();
        assert!(a.push(&chunk(b"e", 4)).unwrap_err().contains("more than"));
        assert_eq!(a.finish().unwrap(), Some((3, b"abcd".to_vec())));
        assert_eq!(Assembly::default().finish().unwrap(), None);

        let mut a = Assembly::default();
        a.push(&chunk(b"ab", 4)).unwrap();
        assert!(a.push(&WeightsChunk { version: 4, ..chunk(b"cd", 4) }).unwrap_err().contains("version 4"));
        let bad = WeightsChunk { crc32c: 1, ..chunk(b"cd", 4) };
        assert!(a.push(&bad).unwrap_err().contains("CRC-32C"));
        assert!(a.finish().unwrap_err().contains("2 of 4"));
        assert!(tensors(b"nothing").unwrap_err().contains("safetensors"));
    }
}
