//! Splits the bytes of a version into the buckets of a broadcast: from chunks in host memory, or from tensors on a
//! device.

use std::collections::HashMap;
use std::sync::Arc;

use tch::{Device, Kind, Tensor};
use unveil_model::Adapters;

use super::error::{Result, ServerError};
use super::weights::{NewWeights, PackedTensor};
use crate::checksum::BUCKET_BYTES;

/// Bytes per word; buckets consist of whole words.
const WORD: usize = 8;

/// Location of the bytes to broadcast.
pub(super) enum BucketSource {
    /// Chunks in host memory.
    Host(Vec<Arc<PackedTensor>>),
    /// Flat byte tensors on a device, not written to by anything else.
    Device(Vec<Tensor>),
}

impl BucketSource {
    /// Copies the current tensors of `new` on `device`. The copy takes device memory until the version is sent.
    ///
    /// # Errors
    /// Returns [`ServerError::Unsendable`] if a tensor is on another device, and [`ServerError::Torch`] if there is no
    /// memory for the copy.
    pub(super) fn copy_to_device(&self, new: &NewWeights<'_>, device: Device) -> Result<Self> {
        let Self::Host(tensors) = self else {
            return Err(ServerError::Unsendable("the tensors are already on a device".into()));
        };
        let adapters =
            new.adapters.map_or(&[][..], Adapters::named_parameters).iter().map(|(n, t)| (n, t, Kind::Float));
        let all = new.named.iter().map(|(n, t)| (n, t, new.kind)).chain(adapters);
        let all: HashMap<&str, (&Tensor, Kind)> = all.map(|(n, t, kind)| (n.as_str(), (t, kind))).collect();
        let copy = |packed: &Arc<PackedTensor>| {
            let entry = all.get(packed.name()).filter(|(t, _)| t.device() == device);
            let (tensor, kind) =
                entry.ok_or_else(|| ServerError::Unsendable(format!("`{}` is not on {device:?}", packed.name())))?;
            let mut copy = Tensor::f_empty(tensor.size(), (*kind, device))?;
            copy.f_copy_(&tensor.f_detach()?)?;
            Ok(copy.f_view([-1])?.f_view_dtype(Kind::Uint8)?)
        };
        let copies = tensors.iter().filter(|t| t.bytes() > 0).map(copy).collect::<Result<Vec<_>>>()?;
        if let Device::Cuda(index) = device {
            // The sending thread uses another CUDA stream than the training thread.
            tch::Cuda::synchronize(index as i64);
        }
        Ok(Self::Device(copies))
    }

    /// Passes the bytes to `send` in buckets of [`BUCKET_BYTES`] bytes, as 64-bit words on `device`; the last bucket is
    /// padded with zeros.
    ///
    /// # Errors
    /// Returns the errors of `send`, and [`ServerError::Torch`] if a bucket cannot be created.
    pub(super) fn for_each_bucket(&self, device: Device, mut send: impl FnMut(Tensor) -> Result<()>) -> Result<()> {
        match self {
            Self::Host(tensors) => {
                let mut bucket: Vec<u8> = Vec::with_capacity(BUCKET_BYTES);
                let mut send_bytes = |bucket: &mut Vec<u8>| {
                    bucket.resize(bucket.len().next_multiple_of(WORD), 0);
                    let words = Tensor::f_from_data_size(bucket, &[(bucket.len() / WORD) as i64], Kind::Int64)?;
                    bucket.clear();
                    send(words.f_to_device(device)?)
                };
                for mut data in tensors.iter().flat_map(|t| t.data()) {
                    while !data.is_empty() {
                        let (part, rest) = data.split_at(data.len().min(BUCKET_BYTES - bucket.len()));
                        bucket.extend_from_slice(part);
                        data = rest;
                        if bucket.len() == BUCKET_BYTES {
                            send_bytes(&mut bucket)?;
                        }
                    }
                }
                if bucket.is_empty() { Ok(()) } else { send_bytes(&mut bucket) }
            }
            Self::Device(tensors) => {
                let mut left: usize = tensors.iter().map(Tensor::numel).sum();
                let mut tensors = tensors.iter();
                let mut current = tensors.next();
                let mut offset = 0;
                while left > 0 {
                    let size = left.min(BUCKET_BYTES);
                    let words = Tensor::f_zeros([size.div_ceil(WORD) as i64], (Kind::Int64, device))?;
                    let bytes = words.f_view_dtype(Kind::Uint8)?;
                    let mut filled = 0;
                    while let Some(tensor) = current.filter(|_| filled < size) {
                        let count = (tensor.numel() - offset).min(size - filled);
                        let from = tensor.f_narrow(0, offset as i64, count as i64)?;
                        bytes.f_narrow(0, filled as i64, count as i64)?.f_copy_(&from)?;
                        offset += count;
                        filled += count;
                        if offset == tensor.numel() {
                            current = tensors.next();
                            offset = 0;
                        }
                    }
                    left -= size;
                    send(words)?;
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::weights::Published;
    use super::*;

    fn buckets(source: &BucketSource) -> Vec<Vec<i64>> {
        let mut out = Vec::new();
        let collect = |words: Tensor| {
            out.push(Vec::<i64>::try_from(words)?);
            Ok(())
        };
        source.for_each_bucket(Device::Cpu, collect).unwrap();
        out
    }

    #[test]
    fn device_copies_and_host_chunks_give_equal_buckets() {
        let count = BUCKET_BYTES as i64 / 2;
        for (kind, sizes) in [
            (Kind::BFloat16, vec![count, 3]),
            (Kind::Float, vec![1001, 1, count, count / 3]),
            (Kind::Float, vec![7]),
            (Kind::BFloat16, vec![0, 5, 0]),
        ] {
            tch::manual_seed(3);
            let named: Vec<(String, Tensor)> = sizes
                .iter()
                .enumerate()
                .map(|(i, n)| (format!("t{i}"), Tensor::randn([*n], (Kind::Float, Device::Cpu))))
                .collect();
            let new = NewWeights { version: 1, named: &named, kind, adapters: None, may_change: &|_| true };
            let host = BucketSource::Host(Published::pack(&new, None).unwrap().changed_after(0).1);
            let device = host.copy_to_device(&new, Device::Cpu).unwrap();
            let expected = buckets(&host);
            // The copy does not change when training continues.
            named.iter().for_each(|(_, t)| drop(t.shallow_clone().fill_(0.0)));
            let copied = buckets(&device);
            assert!(copied == expected, "{kind:?}, {sizes:?}");
            let bytes = sizes.iter().sum::<i64>() as usize * kind.elt_size_in_bytes();
            assert_eq!(copied.iter().map(Vec::len).sum::<usize>(), bytes.div_ceil(WORD));
            assert_eq!(copied.len(), bytes.div_ceil(BUCKET_BYTES));
        }
    }

    #[test]
    fn tensors_on_other_devices_are_refused() {
        let named = [("a".to_owned(), Tensor::zeros([3], (Kind::Float, Device::Cpu)))];
        let new = NewWeights { version: 1, named: &named, kind: Kind::Float, adapters: None, may_change: &|_| true };
        let host = BucketSource::Host(Published::pack(&new, None).unwrap().changed_after(0).1);
        let text = host.copy_to_device(&new, Device::Cuda(0)).map(drop).unwrap_err().to_string();
        assert!(text.contains("`a` is not on Cuda(0)"), "{text}");
    }
}
