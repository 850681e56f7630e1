//! The bytes of a version in the buckets that are broadcast: from the host's chunks, or from tensors that stay on their device.
//! Must not know: who gets them.

use std::collections::HashMap;
use std::sync::Arc;

use tch::{Device, Kind, Tensor};
use unveil_model::Adapters;
use unveil_proto::weights::BUCKET;

use super::weights::{NewWeights, Packed};
use crate::error::{LearnerError, Result};

/// Bytes of a word; buckets hold whole words.
const WORD: usize = 8;

/// Where the bytes are.
pub(super) enum Source {
    /// In host memory.
    Host(Vec<Arc<Packed>>),
    /// On a device: flat tensors of bytes, which nobody else writes to.
    Device(Vec<Tensor>),
}

impl Source {
    /// A copy of the same tensors on `device`, as they are now in `new`. It takes their size in the device's memory until the
    /// version is sent.
    ///
    /// # Errors
    /// A tensor is somewhere else, or there is no memory for the copy.
    pub fn copied(&self, new: &NewWeights<'_>, device: Device) -> Result<Self> {
        let Self::Host(tensors) = self else {
            return Err(LearnerError::Setting("the tensors are on a device already".into()));
        };
        let adapters =
            new.adapters.map_or(&[][..], Adapters::named_parameters).iter().map(|(n, t)| (n, t, Kind::Float));
        let all = new.named.iter().map(|(n, t)| (n, t, new.kind)).chain(adapters);
        let all: HashMap<&str, (&Tensor, Kind)> = all.map(|(n, t, kind)| (n.as_str(), (t, kind))).collect();
        let copy = |packed: &Arc<Packed>| {
            let found = all.get(packed.name()).filter(|(t, _)| t.device() == device);
            let (tensor, kind) =
                found.ok_or_else(|| LearnerError::Setting(format!("`{}` is not on {device:?}", packed.name())))?;
            let mut own = Tensor::f_empty(tensor.size(), (*kind, device))?;
            own.f_copy_(&tensor.f_detach()?)?;
            Ok(own.f_view([-1])?.f_view_dtype(Kind::Uint8)?)
        };
        let copies = tensors.iter().filter(|t| t.bytes() > 0).map(copy).collect::<Result<Vec<_>>>()?;
        if let Device::Cuda(index) = device {
            // The thread that sends has another stream than the one that trains.
            tch::Cuda::synchronize(index as i64);
        }
        Ok(Self::Device(copies))
    }

    /// Gives the bytes in buckets of [`BUCKET`] bytes as 64-bit words on `device`; the last one is filled up with zeros.
    ///
    /// # Errors
    /// Those of `give`; a bucket cannot be made.
    pub fn each(&self, device: Device, mut give: impl FnMut(Tensor) -> Result<()>) -> Result<()> {
        match self {
            Self::Host(tensors) => {
                let mut bucket: Vec<u8> = Vec::with_capacity(BUCKET);
                let mut give = |bucket: &mut Vec<u8>| {
                    bucket.resize(bucket.len().next_multiple_of(WORD), 0);
                    let words = Tensor::f_from_data_size(bucket, &[(bucket.len() / WORD) as i64], Kind::Int64)?;
                    bucket.clear();
                    give(words.f_to_device(device)?)
                };
                for mut data in tensors.iter().flat_map(|t| t.data()) {
                    while !data.is_empty() {
                        let (part, rest) = data.split_at(data.len().min(BUCKET - bucket.len()));
                        bucket.extend_from_slice(part);
                        data = rest;
                        if bucket.len() == BUCKET {
                            give(&mut bucket)?;
                        }
                    }
                }
                if bucket.is_empty() { Ok(()) } else { give(&mut bucket) }
            }
            Self::Device(tensors) => {
                let mut left: usize = tensors.iter().map(Tensor::numel).sum();
                let (mut tensors, mut at) = (tensors.iter(), 0);
                let mut present = tensors.next();
                while left > 0 {
                    let size = left.min(BUCKET);
                    let words = Tensor::f_zeros([size.div_ceil(WORD) as i64], (Kind::Int64, device))?;
                    let (bytes, mut filled) = (words.f_view_dtype(Kind::Uint8)?, 0);
                    while let Some(tensor) = present.filter(|_| filled < size) {
                        let count = (tensor.numel() - at).min(size - filled);
                        let from = tensor.f_narrow(0, at as i64, count as i64)?;
                        bytes.f_narrow(0, filled as i64, count as i64)?.f_copy_(&from)?;
                        (at, filled) = (at + count, filled + count);
                        if at == tensor.numel() {
                            (present, at) = (tensors.next(), 0);
                        }
                    }
                    left -= size;
                    give(words)?;
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

    fn buckets(source: &Source) -> Vec<Vec<i64>> {
        let mut out = Vec::new();
        let give = |words: Tensor| {
            out.push(Vec::<i64>::try_from(words)?);
            Ok(())
        };
        source.each(Device::Cpu, give).unwrap();
        out
    }

    #[test]
    fn a_copy_on_the_device_gives_the_same_buckets_as_the_host() {
        let count = BUCKET as i64 / 2;
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
            let new = NewWeights { version: 1, named: &named, kind, adapters: None, changes: &|_| true };
            let host = Source::Host(Published::make(&new, None).unwrap().changed(0).1);
            let device = host.copied(&new, Device::Cpu).unwrap();
            let wanted = buckets(&host);
            // The copy stays what it was while training goes on.
            named.iter().for_each(|(_, t)| drop(t.shallow_clone().fill_(0.0)));
            let found = buckets(&device);
            assert!(found == wanted, "{kind:?}, {sizes:?}");
            let bytes = sizes.iter().sum::<i64>() as usize * kind.elt_size_in_bytes();
            assert_eq!(found.iter().map(Vec::len).sum::<usize>(), bytes.div_ceil(WORD));
            assert_eq!(found.len(), bytes.div_ceil(BUCKET));
        }
    }

    #[test]
    fn what_is_elsewhere_is_not_copied() {
        let named = [("a".to_owned(), Tensor::zeros([3], (Kind::Float, Device::Cpu)))];
        let new = NewWeights { version: 1, named: &named, kind: Kind::Float, adapters: None, changes: &|_| true };
        let host = Source::Host(Published::make(&new, None).unwrap().changed(0).1);
        let text = host.copied(&new, Device::Cuda(0)).map(drop).unwrap_err().to_string();
        assert!(text.contains("`a` is not on Cuda(0)"), "{text}");
    }
}
