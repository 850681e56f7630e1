//! Host memory that tensors are copied to and from and that others read and write as bytes.

use tch::{Device, Kind, Tensor, no_grad};

use crate::{ExtError, Result, gpu};

/// Most bytes that are locked with one call.
const CHUNK: usize = 1 << 30;
/// Memory is locked by the page.
const PAGE: usize = 4096;

/// Who locks pages.
trait Pages: Send + Sync + std::fmt::Debug {
    fn lock(&self, memory: &mut [u8]) -> Result<()>;
    fn unlock(&self, memory: &mut [u8]) -> Result<()>;
}

/// The driver of the GPU.
#[derive(Debug)]
struct Driver;

impl Pages for Driver {
    fn lock(&self, memory: &mut [u8]) -> Result<()> {
        gpu::lock(memory)
    }

    fn unlock(&self, memory: &mut [u8]) -> Result<()> {
        gpu::unlock(memory)
    }
}

/// Bytes in host memory; page-locked where tensors come from a GPU, so that copies go at the bus's full rate. The memory is locked
/// where it lies, piece by piece: libtorch's own pinned memory is a second copy for a moment, and takes the next power of two.
#[derive(Debug)]
pub struct HostBuffer {
    /// Whole pages.
    whole: Tensor,
    size: usize,
    /// Bytes from the beginning that are locked, and by whom.
    locked: Option<(usize, usize, &'static dyn Pages)>,
    unlocked: Option<String>,
}

fn refused(what: &'static str) -> impl Fn(tch::TchError) -> ExtError {
    move |e| ExtError::Refused { what, message: e.to_string() }
}

impl HostBuffer {
    /// `size` bytes of undefined contents for tensors of `device`. Where they cannot be locked, copies are slower, and
    /// [`HostBuffer::unlocked`] says why.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn new(size: usize, device: Device) -> Result<Self> {
        Self::locked(size, CHUNK, device.is_cuda().then_some(&Driver))
    }

    fn locked(size: usize, chunk: usize, pages: Option<&'static dyn Pages>) -> Result<Self> {
        let fault = refused("host memory for a copy");
        let all = size.max(1).next_multiple_of(PAGE);
        let count = i64::try_from(all.saturating_add(PAGE)).unwrap_or(i64::MAX);
        let memory = Tensor::f_empty([count], (Kind::Uint8, Device::Cpu)).map_err(&fault)?;
        let first = (memory.data_ptr() as usize).next_multiple_of(PAGE) - memory.data_ptr() as usize;
        let whole = memory.f_narrow(0, first as i64, all as i64).map_err(&fault)?;
        let mut new = Self { whole, size, locked: None, unlocked: None };
        let Some(pages) = pages else { return Ok(new) };
        new.locked = Some((0, chunk, pages));
        while let Some((done, ..)) = new.locked.filter(|(done, ..)| *done < all) {
            let end = all.min(done + chunk);
            if let Err(e) = pages.lock(&mut new.bytes()[done..end]) {
                new.unlock();
                new.unlocked = Some(e.to_string());
                break;
            }
            new.locked = Some((end, chunk, pages));
        }
        Ok(new)
    }

    /// Why the memory is not locked, where it should be.
    pub fn unlocked(&self) -> Option<&str> {
        self.unlocked.as_deref()
    }

    fn unlock(&mut self) {
        let Some((done, chunk, pages)) = self.locked.take() else { return };
        for from in (0..done).step_by(chunk) {
            // Nothing can be done about it; the memory goes with the process at the latest.
            let _refused = pages.unlock(&mut self.bytes()[from..done.min(from + chunk)]);
        }
    }

    /// Whole pages.
    #[allow(unsafe_code)]
    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the tensor is contiguous host memory of that many bytes, and it is borrowed alone: views of it do not leave this type.
        unsafe { std::slice::from_raw_parts_mut(self.whole.data_ptr().cast::<u8>(), self.whole.numel()) }
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
        let own = self.whole.f_narrow(0, 0, i64::try_from(self.size.max(1)).unwrap_or(i64::MAX));
        own.and_then(|t| t.f_narrow(0, at, bytes)).and_then(|t| t.f_view_dtype(kind)).map_err(fault)
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

impl AsMut<[u8]> for HostBuffer {
    fn as_mut(&mut self) -> &mut [u8] {
        let size = self.size;
        &mut self.bytes()[..size]
    }
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        self.unlock();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

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
    /// Remembers what is locked, and refuses when it has had `room` bytes.
    #[derive(Debug)]
    struct Fake {
        room: usize,
        held: Mutex<Vec<(usize, usize)>>,
        most: Mutex<usize>,
    }

    impl Pages for Fake {
        fn lock(&self, memory: &mut [u8]) -> Result<()> {
            let mut held = self.held.lock().unwrap();
            if held.iter().map(|(_, n)| n).sum::<usize>() + memory.len() > self.room {
                return Err(ExtError::Refused { what: "lock", message: "no room".into() });
            }
            let begin = memory.as_ptr() as usize;
            assert!(begin.is_multiple_of(PAGE) && memory.len().is_multiple_of(PAGE), "pages are not shared");
            assert!(held.last().is_none_or(|(at, n)| at + n == begin), "one piece after another");
            held.push((begin, memory.len()));
            *self.most.lock().unwrap() = held.iter().map(|(_, n)| n).sum();
            Ok(())
        }

        fn unlock(&self, memory: &mut [u8]) -> Result<()> {
            let mut held = self.held.lock().unwrap();
            let at = held.iter().position(|h| *h == (memory.as_ptr() as usize, memory.len())).unwrap();
            held.remove(at);
            Ok(())
        }
    }

    fn fake(room: usize) -> &'static Fake {
        Box::leak(Box::new(Fake { room, held: Mutex::default(), most: Mutex::default() }))
    }

    /// A size just above a power of two takes no more than itself, and is locked in pieces.
    #[test]
    fn memory_is_locked_piece_by_piece_and_not_rounded_up() {
        let (size, pages) = ((1 << 20) + 5, fake(usize::MAX));
        let mut b = HostBuffer::locked(size, 16 * PAGE, Some(pages)).unwrap();
        let pieces: Vec<usize> = pages.held.lock().unwrap().iter().map(|(_, n)| *n).collect();
        assert_eq!(pieces, [vec![16 * PAGE; 16], vec![PAGE]].concat());
        assert!(*pages.most.lock().unwrap() < size + PAGE);
        assert_eq!((b.as_ref().len(), b.as_mut().len(), b.unlocked()), (size, size, None));
        drop(b);
        assert!(pages.held.lock().unwrap().is_empty());
    }

    #[test]
    fn memory_that_cannot_be_locked_is_used_as_it_is() {
        let pages = fake(40 * PAGE);
        let mut b = HostBuffer::locked(64 * PAGE, 16 * PAGE, Some(pages)).unwrap();
        assert!(pages.held.lock().unwrap().is_empty() && b.unlocked().unwrap().contains("no room"));
        let t = Tensor::from_slice(&[1.5f32, -2.0]);
        b.copy_in(PAGE, &t, Kind::Float).unwrap();
        let back = Tensor::zeros([2], (Kind::Float, Device::Cpu));
        b.copy_out(PAGE, Kind::Float, &back).unwrap();
        assert_eq!(back, t);
    }
}
