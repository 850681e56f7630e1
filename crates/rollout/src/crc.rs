//! CRC-32C of bytes where they lie: of the host's by its own instructions, of a device's by tensor operations there, so that
//! weights that come from GPU to GPU are checked without passing through host memory. Must not know: what the bytes are.
//!
//! A CRC register is linear over GF(2) in its start value and in the message, as `crc32_combine` of zlib makes use of:
//! the register after a block is the exclusive or of what each byte alone leaves there. So every byte is looked up in a
//! table by its value and its place in the block, and the results are folded in halves; then the registers of blocks in the same way,
//! byte by byte, until one is left. Zeros before a message leave a register of zero as it is, so blocks are filled up in front.

use tch::{Device, Kind, TchError, Tensor};
use unveil_proto::weights::{BUCKET, Sum};

/// Items that are folded at a time.
const BLOCK: usize = 256;
/// Values of a byte.
const VALUES: usize = 256;
/// So many levels fold `BLOCK`^3 bytes.
const LEVELS: u32 = 3;
const _: () = assert!(BUCKET <= BLOCK.pow(LEVELS));

/// Sums of bytes on the host and on one device.
pub(crate) struct Checks {
    device: Device,
    tables: Option<Tables>,
    host: Vec<u8>,
}

impl Checks {
    /// For bytes on the host and on `device`.
    pub fn new(device: Device) -> Self {
        Self { device, tables: None, host: Vec::new() }
    }

    /// The sum of flat, contiguous bytes.
    ///
    /// # Errors
    /// They are on another device, or there is no memory for the work.
    pub fn of(&mut self, bytes: &Tensor) -> Result<Sum, TchError> {
        if bytes.device() == Device::Cpu {
            self.host.resize(bytes.numel(), 0);
            bytes.f_copy_data_u8(&mut self.host, bytes.numel())?;
            return Ok(Sum::of(&self.host));
        }
        let tables = match self.tables.take() {
            Some(tables) => tables,
            None => Tables::on(self.device)?,
        };
        let sum = tables.sum(bytes);
        self.tables = Some(tables);
        sum
    }
}

/// What each byte of a block leaves in the register: one table per level, indexed by place * 256 + value.
struct Tables(Vec<Tensor>);

impl Tables {
    fn on(device: Device) -> Result<Self, TchError> {
        let empty = register(&[0]);
        let bytes: Vec<u32> = (0..8).map(|bit| register(&[1 << bit]) ^ empty).collect();
        let registers: Vec<u32> = (0..32).map(|bit| 1 << bit).collect();
        let level = |level: u32| {
            let of = if level == 0 { &bytes } else { &registers };
            Tensor::f_from_slice(&table(of, BLOCK.pow(level)))?.f_to_device(device)
        };
        Ok(Self((0..LEVELS).map(level).collect::<Result<_, _>>()?))
    }

    fn sum(&self, bytes: &Tensor) -> Result<Sum, TchError> {
        let (total, mut sum) = (bytes.numel(), Sum::default());
        for at in (0..total).step_by(BUCKET) {
            let count = BUCKET.min(total - at);
            let last = self.fold(&bytes.f_narrow(0, at as i64, count as i64)?)?;
            // From a register of ones to its complement, as CRC-32C has it.
            let crc32c = last ^ shifted(u32::MAX, count) ^ u32::MAX;
            sum = sum.then(Sum { crc32c, bytes: count as u64 });
        }
        Ok(sum)
    }

    /// The register after some bytes that it was zero before.
    fn fold(&self, bytes: &Tensor) -> Result<u32, TchError> {
        let mut items = bytes.shallow_clone();
        for table in &self.0 {
            let device = items.device();
            let row = table.numel() / VALUES;
            let lead = items.numel().next_multiple_of(row) - items.numel();
            if lead > 0 {
                let zeros = Tensor::f_zeros([lead as i64], (Kind::Uint8, device))?;
                items = Tensor::f_cat(&[zeros, items], 0)?;
            }
            let places = Tensor::f_arange(row as i64, (Kind::Int64, device))?.f_mul_scalar(VALUES as i64)?;
            let index = items.f_view([-1, row as i64])?.f_to_kind(Kind::Int64)?.f_add(&places)?;
            let mut found = table.f_take(&index)?;
            let mut wide = row as i64;
            while wide > 1 {
                wide /= 2;
                found = found.f_narrow(1, 0, wide)?.f_bitwise_xor_tensor(&found.f_narrow(1, wide, wide)?)?;
            }
            found = found.f_reshape([-1])?;
            if found.numel() == 1 {
                return Ok(found.f_int64_value(&[0])? as u32);
            }
            items = found.f_view_dtype(Kind::Uint8)?;
        }
        Err(TchError::Torch(format!("{} bytes are more than {LEVELS} levels fold", bytes.numel())))
    }
}

/// What a block's items leave, each followed by the rest of its block; items are given by what their bits leave, from the lowest
/// byte on, and are `step` bytes of the message apart.
fn table(bits: &[u32], step: usize) -> Vec<i32> {
    let further: Vec<u32> = (0..32).map(|bit| shifted(1 << bit, step)).collect();
    let mut bits = bits.to_vec();
    let width = bits.len() / 8;
    let mut out = vec![0; BLOCK * width * VALUES];
    for place in (0..BLOCK).rev() {
        for (byte, bits) in bits.chunks(8).enumerate() {
            let begin = (place * width + byte) * VALUES;
            for value in 0..VALUES {
                out[begin + value] = linear(bits, value as u32) as i32;
            }
        }
        bits.iter_mut().for_each(|b| *b = linear(&further, *b));
    }
    out
}

/// The exclusive or of the images of a value's bits.
fn linear(images: &[u32], value: u32) -> u32 {
    images.iter().enumerate().filter(|(bit, _)| value >> bit & 1 == 1).fold(0, |all, (_, image)| all ^ image)
}

/// The register `zeros` bytes of zero later.
fn shifted(register: u32, zeros: usize) -> u32 {
    Sum { crc32c: register, bytes: 1 }.then(Sum { crc32c: 0, bytes: zeros as u64 }).crc32c
}

fn register(bytes: &[u8]) -> u32 {
    Sum::of(bytes).crc32c
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensor_operations_find_the_sums_of_the_host() {
        let tables = Tables::on(Device::Cpu).unwrap();
        let check = Tensor::from_slice(b"123456789");
        assert_eq!(tables.sum(&check).unwrap(), Sum { crc32c: 0xe306_9283, bytes: 9 });
        tch::manual_seed(11);
        let all = Tensor::randint(256, [2 * BUCKET as i64 + 77], (Kind::Uint8, Device::Cpu));
        let mut host = Checks::new(Device::Cpu);
        for size in [1, 3, 255, 256, 257, 65_535, 65_536, 65_537, 300_001, BUCKET - 1, BUCKET, 2 * BUCKET + 5] {
            for from in [0, 1, 72] {
                let bytes = all.narrow(0, from, size as i64);
                assert_eq!(tables.sum(&bytes).unwrap(), host.of(&bytes).unwrap(), "{size} bytes from {from}");
            }
        }
        // Zeros in front count.
        let zeros = Tensor::zeros([300], (Kind::Uint8, Device::Cpu));
        assert_eq!(tables.sum(&zeros).unwrap(), Sum::of(&[0; 300]));
        assert_eq!(tables.sum(&zeros.narrow(0, 0, 0)).unwrap(), Sum::default());
    }
}
