//! Host memory that tensors are copied to and from and that other code reads and writes as bytes.

use tch::{Device, Kind, Tensor, no_grad};

use crate::{ExtError, Result, gpu};

/// Most bytes that are page-locked with one call.
const MAX_PIN_BYTES: usize = 1 << 30;
/// Granularity of page-locking, in bytes.
const PAGE: usize = 4096;

/// Page-locks host memory.
trait PagePinner: Send + Sync + std::fmt::Debug {
    fn pin(&self, memory: &mut [u8]) -> Result<()>;
    fn unpin(&self, memory: &mut [u8]) -> Result<()>;
}

/// The driver of the GPU.
#[derive(Debug)]
struct Driver;

impl PagePinner for Driver {
    fn pin(&self, memory: &mut [u8]) -> Result<()> {
        gpu::pin(memory)
    }

    fn unpin(&self, memory: &mut [u8]) -> Result<()> {
        gpu::unpin(memory)
    }
}

/// Bytes in host memory; page-locked (pinned) if tensors come from a GPU, so that copies run at the full rate of the bus. The memory
/// is pinned in place, piece by piece: libtorch's own pinning would hold a second copy for a moment and round its size up to the next
/// power of two.
#[derive(Debug)]
pub struct HostBuffer {
    /// Whole pages.
    whole: Tensor,
    size: usize,
    /// Bytes pinned so far, counted from the start, the bytes pinned by one call, and the pinner.
    pinned: Option<(usize, usize, &'static dyn PagePinner)>,
    pin_error: Option<String>,
}

fn refused(what: &'static str) -> impl Fn(tch::TchError) -> ExtError {
    move |e| ExtError::Refused { what, message: e.to_string() }
}

impl HostBuffer {
    /// Allocates `size` bytes with undefined contents for tensors of `device`. If they cannot be pinned, copies are slower, and
    /// [`HostBuffer::pin_error`] says why.
    ///
    /// # Errors
    /// Returns [`ExtError::Refused`] if there is not enough memory.
    pub fn new(size: usize, device: Device) -> Result<Self> {
        Self::allocate(size, MAX_PIN_BYTES, device.is_cuda().then_some(&Driver))
    }

    fn allocate(size: usize, chunk: usize, pinner: Option<&'static dyn PagePinner>) -> Result<Self> {
        let fail = refused("allocate host memory for a copy");
        let all = size.max(1).next_multiple_of(PAGE);
        let count = i64::try_from(all.saturating_add(PAGE)).unwrap_or(i64::MAX);
        let memory = Tensor::f_empty([count], (Kind::Uint8, Device::Cpu)).map_err(&fail)?;
        let first = (memory.data_ptr() as usize).next_multiple_of(PAGE) - memory.data_ptr() as usize;
        let whole = memory.f_narrow(0, first as i64, all as i64).map_err(&fail)?;
        let mut new = Self { whole, size, pinned: None, pin_error: None };
        let Some(pinner) = pinner else { return Ok(new) };
        new.pinned = Some((0, chunk, pinner));
        while let Some((done, ..)) = new.pinned.filter(|(done, ..)| *done < all) {
            let end = all.min(done + chunk);
            if let Err(e) = pinner.pin(&mut new.whole_pages()[done..end]) {
                new.unpin();
                new.pin_error = Some(e.to_string());
                break;
            }
            new.pinned = Some((end, chunk, pinner));
        }
        Ok(new)
    }

    /// Returns why the memory is not pinned, if pinning was tried and failed.
    pub fn pin_error(&self) -> Option<&str> {
        self.pin_error.as_deref()
    }

    fn unpin(&mut self) {
        let Some((done, chunk, pinner)) = self.pinned.take() else { return };
        for from in (0..done).step_by(chunk) {
            // A failure cannot be handled; the memory is released with the process at the latest.
            let _refused = pinner.unpin(&mut self.whole_pages()[from..done.min(from + chunk)]);
        }
    }

    /// Returns the whole pages as bytes.
    fn whole_pages(&mut self) -> &mut [u8] {
        // SAFETY: the tensor is contiguous host memory of that many bytes, and it is borrowed exclusively: views of it do not leave this type.
        unsafe { std::slice::from_raw_parts_mut(self.whole.data_ptr().cast::<u8>(), self.whole.numel()) }
    }

    /// Returns the size in bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Views `count` numbers of dtype `kind`, starting at byte `at`, as a tensor over the same memory.
    fn view(&self, at: usize, count: usize, kind: Kind) -> Result<Tensor> {
        let fail = refused("view host memory as a tensor");
        let bytes = count * kind.elt_size_in_bytes();
        let at = i64::try_from(at).unwrap_or(i64::MAX);
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        let used = self.whole.f_narrow(0, 0, i64::try_from(self.size.max(1)).unwrap_or(i64::MAX));
        used.and_then(|t| t.f_narrow(0, at, bytes)).and_then(|t| t.f_view_dtype(kind)).map_err(fail)
    }

    /// Copies a tensor to byte `at` (a multiple of the element size), converted to `kind`. The copy has finished when this returns; it
    /// runs on libtorch's threads.
    ///
    /// # Errors
    /// Returns [`ExtError::Refused`] if the tensor does not fit or `at` is not aligned.
    pub fn copy_in(&mut self, at: usize, from: &Tensor, kind: Kind) -> Result<()> {
        let to = self.view(at, from.numel(), kind)?;
        let flat = from.f_detach().and_then(|t| t.f_reshape([-1]));
        no_grad(|| flat.and_then(|f| to.shallow_clone().f_copy_(&f))).map(drop).map_err(refused("copy to the host"))
    }

    /// Fills a contiguous tensor with numbers of dtype `kind`, starting at byte `at`.
    ///
    /// # Errors
    /// Returns [`ExtError::Refused`] if the buffer holds fewer numbers than the tensor.
    pub fn copy_out(&self, at: usize, kind: Kind, to: &Tensor) -> Result<()> {
        let from = self.view(at, to.numel(), kind)?;
        let flat = to.f_detach().and_then(|t| t.f_view([-1]));
        no_grad(|| flat.and_then(|mut f| f.f_copy_(&from))).map(drop).map_err(refused("copy from the host"))
    }
}

impl AsRef<[u8]> for HostBuffer {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the tensor is contiguous host memory of that many bytes, which nothing writes without `&mut self`: views of it do not
        // leave this type.
        unsafe { std::slice::from_raw_parts(self.whole.data_ptr().cast::<u8>(), self.size) }
    }
}

impl AsMut<[u8]> for HostBuffer {
    fn as_mut(&mut self) -> &mut [u8] {
        let size = self.size;
        &mut self.whole_pages()[..size]
    }
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        self.unpin();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn tensors_round_trip_as_bytes() {
        let mut b = HostBuffer::new(32, Device::Cpu).unwrap();
        b.as_mut().fill(7);
        let t = Tensor::from_slice(&[1.5f32, -2.0, 3.0, 0.25]).view([2, 2]);
        b.copy_in(8, &t, Kind::Float).unwrap();
        assert_eq!(b.as_ref()[8..12], 1.5f32.to_le_bytes());
        assert!(b.as_ref()[..8].iter().chain(&b.as_ref()[24..]).all(|x| *x == 7), "nothing else is written");
        let back = Tensor::zeros([2, 2], (Kind::Double, Device::Cpu)).set_requires_grad(true);
        b.copy_out(8, Kind::Float, &back).unwrap();
        assert_eq!(back, t.to_kind(Kind::Double));
        b.copy_in(16, &t.narrow(0, 1, 1), Kind::BFloat16).unwrap();
        assert_eq!(b.as_ref()[16..20], [0x40, 0x40, 0x80, 0x3e], "3.0 and 0.25 as bf16");
        assert!(b.copy_in(24, &t, Kind::Float).is_err() && b.copy_in(2, &t.narrow(0, 0, 1), Kind::Float).is_err());
        assert_eq!((b.size(), HostBuffer::new(0, Device::Cpu).unwrap().as_ref().len()), (32, 0));
    }

    /// Remembers what is pinned, and refuses more than `capacity` bytes.
    #[derive(Debug)]
    struct FakePinner {
        capacity: usize,
        held: Mutex<Vec<(usize, usize)>>,
        most: Mutex<usize>,
    }

    impl PagePinner for FakePinner {
        fn pin(&self, memory: &mut [u8]) -> Result<()> {
            let mut held = self.held.lock().unwrap();
            if held.iter().map(|(_, n)| n).sum::<usize>() + memory.len() > self.capacity {
                return Err(ExtError::Refused { what: "pin", message: "over capacity".into() });
            }
            let begin = memory.as_ptr() as usize;
            assert!(begin.is_multiple_of(PAGE) && memory.len().is_multiple_of(PAGE), "pages are not shared");
            assert!(held.last().is_none_or(|(at, n)| at + n == begin), "one piece after another");
            held.push((begin, memory.len()));
            *self.most.lock().unwrap() = held.iter().map(|(_, n)| n).sum();
            Ok(())
        }

        fn unpin(&self, memory: &mut [u8]) -> Result<()> {
            let mut held = self.held.lock().unwrap();
            let at = held.iter().position(|h| *h == (memory.as_ptr() as usize, memory.len())).unwrap();
            held.remove(at);
            Ok(())
        }
    }

    fn fake(capacity: usize) -> &'static FakePinner {
        Box::leak(Box::new(FakePinner { capacity, held: Mutex::default(), most: Mutex::default() }))
    }

    /// A size just above a power of two is not rounded up to the next, and is pinned in pieces.
    #[test]
    fn memory_is_pinned_in_pieces_without_rounding_up() {
        let size = (1 << 20) + 5;
        let pinner = fake(usize::MAX);
        let mut b = HostBuffer::allocate(size, 16 * PAGE, Some(pinner)).unwrap();
        let pieces: Vec<usize> = pinner.held.lock().unwrap().iter().map(|(_, n)| *n).collect();
        assert_eq!(pieces, [vec![16 * PAGE; 16], vec![PAGE]].concat());
        assert!(*pinner.most.lock().unwrap() < size + PAGE);
        assert_eq!((b.as_ref().len(), b.as_mut().len(), b.pin_error()), (size, size, None));
        drop(b);
        assert!(pinner.held.lock().unwrap().is_empty());
    }

    #[test]
    fn unpinned_memory_is_usable() {
        let pinner = fake(40 * PAGE);
        let mut b = HostBuffer::allocate(64 * PAGE, 16 * PAGE, Some(pinner)).unwrap();
        assert!(pinner.held.lock().unwrap().is_empty() && b.pin_error().unwrap().contains("over capacity"));
        let t = Tensor::from_slice(&[1.5f32, -2.0]);
        b.copy_in(PAGE, &t, Kind::Float).unwrap();
        let back = Tensor::zeros([2], (Kind::Float, Device::Cpu));
        b.copy_out(PAGE, Kind::Float, &back).unwrap();
        assert_eq!(back, t);
    }
}
