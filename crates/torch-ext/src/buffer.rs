//! Host memory that tensors are copied to and from and that others read and write as bytes.

use tch::{Device, Kind, Tensor, no_grad};

use crate::{ExtError, Result};

/// Bytes in host memory; page-locked where tensors come from a GPU, so that copies go at the bus's full rate.
#[derive(Debug)]
pub struct HostBuffer {
    whole: Tensor,
    size: usize,
}

fn refused(what: &'static str) -> impl Fn(tch::TchError) -> ExtError {
    move |e| ExtError::Refused { what, message: e.to_string() }
}

impl HostBuffer {
    /// `size` bytes of undefined contents for tensors of `device`.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn new(size: usize, device: Device) -> Result<Self> {
        let fault = refused("host memory for a copy");
        let count = i64::try_from(size.max(1)).unwrap_or(i64::MAX);
        let mut whole = Tensor::f_empty([count], (Kind::Uint8, Device::Cpu)).map_err(&fault)?;
        if device.is_cuda() {
            whole = whole.f_pin_memory(device).map_err(&fault)?;
        }
        Ok(Self { whole, size })
    }

    /// Bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// `count` numbers of `kind` from byte `at` on, as a tensor over the same memory.
    fn view(&self, at: usize, count: usize, kind: Kind) -> Result<Tensor> {
        let fault = refused("numbers of host memory");
        let bytes = count * kind.elt_size_in_bytes();
        let (at, bytes) = (i64::try_from(at).unwrap_or(i64::MAX), i64::try_from(bytes).unwrap_or(i64::MAX));
        self.whole.f_narrow(0, at, bytes).and_then(|t| t.f_view_dtype(kind)).map_err(fault)
    }

    /// Copies a tensor's numbers to byte `at` (a multiple of their width) on, as `kind`. The copy is done when it returns; it runs on as
    /// many threads as libtorch has.
    ///
    /// # Errors
    /// There is no room for it.
    pub fn copy_in(&mut self, at: usize, from: &Tensor, kind: Kind) -> Result<()> {
        let to = self.view(at, from.numel(), kind)?;
        let flat = from.f_detach().and_then(|t| t.f_reshape([-1]));
        no_grad(|| flat.and_then(|f| to.shallow_clone().f_copy_(&f))).map(drop).map_err(refused("copy to the host"))
    }

    /// Copies numbers of `kind` from byte `at` on to all of a tensor, which must be contiguous.
    ///
    /// # Errors
    /// There are not so many.
    pub fn copy_out(&self, at: usize, kind: Kind, to: &Tensor) -> Result<()> {
        let from = self.view(at, to.numel(), kind)?;
        let flat = to.f_detach().and_then(|t| t.f_view([-1]));
        no_grad(|| flat.and_then(|mut f| f.f_copy_(&from))).map(drop).map_err(refused("copy from the host"))
    }
}

#[allow(unsafe_code)]
impl AsRef<[u8]> for HostBuffer {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the tensor is contiguous host memory of that many bytes, which nothing writes without `&mut self`: views of it do not
        // leave this type.
        unsafe { std::slice::from_raw_parts(self.whole.data_ptr().cast::<u8>(), self.size) }
    }
}

#[allow(unsafe_code)]
impl AsMut<[u8]> for HostBuffer {
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and it is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.whole.data_ptr().cast::<u8>(), self.size) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_go_in_and_out_as_bytes() {
        let mut b = HostBuffer::new(32, Device::Cpu).unwrap();
        b.as_mut().fill(7);
        let t = Tensor::from_slice(&[1.5f32, -2.0, 3.0, 0.25]).view([2, 2]);
        b.copy_in(8, &t, Kind::Float).unwrap();
        assert_eq!(b.as_ref()[8..12], 1.5f32.to_le_bytes());
        assert!(b.as_ref()[..8].iter().chain(&b.as_ref()[24..]).all(|x| *x == 7), "nothing beside it is written");
        let back = Tensor::zeros([2, 2], (Kind::Double, Device::Cpu)).set_requires_grad(true);
        b.copy_out(8, Kind::Float, &back).unwrap();
        assert_eq!(back, t.to_kind(Kind::Double));
        b.copy_in(16, &t.narrow(0, 1, 1), Kind::BFloat16).unwrap();
        assert_eq!(b.as_ref()[16..20], [0x40, 0x40, 0x80, 0x3e], "3.0 and 0.25 as bf16");
        assert!(b.copy_in(24, &t, Kind::Float).is_err() && b.copy_in(2, &t.narrow(0, 0, 1), Kind::Float).is_err());
        assert_eq!((b.size(), HostBuffer::new(0, Device::Cpu).unwrap().as_ref().len()), (32, 0));
    }
}
