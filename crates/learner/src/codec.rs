//! Named tensors to safetensors bytes and back, in memory: what goes into a checkpoint object and over the wire.

use std::borrow::Cow;

use safetensors::tensor::{Dtype, SafeTensors, View};
use tch::{Device, Kind, Tensor};

use crate::error::{LearnerError, Result};

struct Stored {
    tensor: Tensor,
    shape: Vec<usize>,
    dtype: Dtype,
}

const KINDS: [(Kind, Dtype); 3] = [(Kind::Float, Dtype::F32), (Kind::BFloat16, Dtype::BF16), (Kind::Half, Dtype::F16)];

impl View for &Stored {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut data = vec![0; self.data_len()];
        self.tensor.copy_data_u8(&mut data, self.tensor.numel());
        data.into()
    }

    fn data_len(&self) -> usize {
        self.tensor.numel() * self.tensor.kind().elt_size_in_bytes()
    }
}

/// Writes floating-point tensors; the same tensors give the same bytes.
pub fn to_bytes(named: &[(String, Tensor)]) -> Result<Vec<u8>> {
    let mut stored = Vec::with_capacity(named.len());
    for (name, tensor) in named {
        let kind = tensor.kind();
        let Some((_, dtype)) = KINDS.iter().find(|(k, _)| *k == kind) else {
            return Err(LearnerError::Setting(format!("tensor `{name}` of kind {kind:?} cannot be stored")));
        };
        let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?;
        let shape = tensor.size().iter().map(|n| *n as usize).collect();
        stored.push((name.as_str(), Stored { tensor, shape, dtype: *dtype }));
    }
    safetensors::serialize(stored.iter().map(|(n, s)| (*n, s)), None)
        .map_err(|e| LearnerError::Setting(format!("tensors cannot be stored: {e}")))
}

/// Reads what [`to_bytes`] wrote, on the host. `what` names the bytes in errors.
pub fn from_bytes(bytes: &[u8], what: &str) -> Result<Vec<(String, Tensor)>> {
    let fail = |why: String| LearnerError::Setting(format!("{what}: {why}"));
    let parsed = SafeTensors::deserialize(bytes).map_err(|e| fail(format!("not a whole safetensors file: {e}")))?;
    let mut out = Vec::with_capacity(parsed.len());
    for (name, view) in parsed.iter() {
        let Some((kind, _)) = KINDS.iter().find(|(_, d)| *d == view.dtype()) else {
            return Err(fail(format!("tensor `{name}` has the unsupported kind {:?}", view.dtype())));
        };
        let shape: Vec<i64> = view.shape().iter().map(|n| *n as i64).collect();
        out.push((name.to_owned(), Tensor::f_from_data_size(view.data(), &shape, *kind)?));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_damage() {
        let named = vec![
            ("b".to_owned(), Tensor::from_slice(&[1.5f32, -2.0, f32::MIN_POSITIVE, 0.0]).view([2, 2])),
            ("a".to_owned(), Tensor::from_slice(&[3.0f32]).to_kind(Kind::BFloat16)),
        ];
        let bytes = to_bytes(&named).unwrap();
        assert_eq!(bytes, to_bytes(&named).unwrap());
        let back = from_bytes(&bytes, "x").unwrap();
        for (name, t) in &named {
            let found = back.iter().find(|(n, _)| n == name).unwrap();
            assert_eq!((found.1.kind(), &found.1), (t.kind(), t));
        }
        let e = from_bytes(&bytes[..bytes.len() - 3], "weights").unwrap_err().to_string();
        assert!(e.starts_with("weights: not a whole"), "{e}");
        assert!(to_bytes(&[("i".to_owned(), Tensor::from_slice(&[1i64]))]).is_err());
    }
}
