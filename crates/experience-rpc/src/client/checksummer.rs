//! Computes CRC-32C where the bytes are: on the host by CPU instructions, on a device by tensor operations, so that weights broadcast
//! between GPUs are verified without passing through host memory.
//!
//! A CRC register is linear over GF(2) in its start value and in the message, as used by zlib's `crc32_combine`: the register after a
//! block is the exclusive or of the contributions of its bytes. So every byte is looked up in a table by its value and its position in
//! the block, and the results are folded in halves; then the registers of blocks are folded in the same way, byte by byte, until one is
//! left. Zeros before a message do not change a register of zero, so blocks are padded in front.

use tch::{Device, Kind, TchError, Tensor};

use crate::checksum::{BUCKET_BYTES, Checksum};

/// Items of a block, which are folded together.
const BLOCK_ITEMS: usize = 256;
/// Number of values of a byte.
const BYTE_VALUES: usize = 256;
/// Levels of folding, for up to `BLOCK_ITEMS`^3 bytes.
const LEVELS: u32 = 3;
const _: () = assert!(BUCKET_BYTES <= BLOCK_ITEMS.pow(LEVELS));

/// Computes checksums of bytes on the host and on one device.
pub(super) struct Checksummer {
    device: Device,
    tables: Option<CrcTables>,
    host: Vec<u8>,
}

impl Checksummer {
    /// Creates a checksummer for bytes on the host and on `device`.
    pub(super) fn new(device: Device) -> Self {
        Self { device, tables: None, host: Vec::new() }
    }

    /// Returns the checksum of flat, contiguous bytes.
    ///
    /// # Errors
    /// Returns a [`TchError`] if they are on another device, or memory is insufficient.
    pub(super) fn checksum(&mut self, bytes: &Tensor) -> Result<Checksum, TchError> {
        if bytes.device() == Device::Cpu {
            self.host.resize(bytes.numel(), 0);
            bytes.f_copy_data_u8(&mut self.host, bytes.numel())?;
            return Ok(Checksum::of(&self.host));
        }
        let tables = match self.tables.take() {
            Some(tables) => tables,
            None => CrcTables::build(self.device)?,
        };
        let sum = tables.sum(bytes);
        self.tables = Some(tables);
        sum
    }
}

/// Contribution of each byte of a block to the register: one table per level, indexed by position * 256 + value.
struct CrcTables(Vec<Tensor>);

impl CrcTables {
    fn build(device: Device) -> Result<Self, TchError> {
        let empty = register(&[0]);
        let bytes: Vec<u32> = (0..8).map(|bit| register(&[1 << bit]) ^ empty).collect();
        let registers: Vec<u32> = (0..32).map(|bit| 1 << bit).collect();
        let level = |level: u32| {
            let bits = if level == 0 { &bytes } else { &registers };
            Tensor::f_from_slice(&table(bits, BLOCK_ITEMS.pow(level)))?.f_to_device(device)
        };
        Ok(Self((0..LEVELS).map(level).collect::<Result<_, _>>()?))
    }

    fn sum(&self, bytes: &Tensor) -> Result<Checksum, TchError> {
        let total = bytes.numel();
        let mut sum = Checksum::default();
        for at in (0..total).step_by(BUCKET_BYTES) {
            let count = BUCKET_BYTES.min(total - at);
            let last = self.fold(&bytes.f_narrow(0, at as i64, count as i64)?)?;
            // CRC-32C starts from a register of ones and ends with its complement.
            let crc32c = last ^ shifted(u32::MAX, count) ^ u32::MAX;
            sum = sum.concat(Checksum { crc32c, bytes: count as u64 });
        }
        Ok(sum)
    }

    /// Returns the register after `bytes`, starting from zero.
    fn fold(&self, bytes: &Tensor) -> Result<u32, TchError> {
        let mut items = bytes.shallow_clone();
        for table in &self.0 {
            let device = items.device();
            let row = table.numel() / BYTE_VALUES;
            let lead = items.numel().next_multiple_of(row) - items.numel();
            if lead > 0 {
                let zeros = Tensor::f_zeros([lead as i64], (Kind::Uint8, device))?;
                items = Tensor::f_cat(&[zeros, items], 0)?;
            }
            let offsets = Tensor::f_arange(row as i64, (Kind::Int64, device))?.f_mul_scalar(BYTE_VALUES as i64)?;
            let index = items.f_view([-1, row as i64])?.f_to_kind(Kind::Int64)?.f_add(&offsets)?;
            let mut registers = table.f_take(&index)?;
            let mut width = row as i64;
            while width > 1 {
                width /= 2;
                registers =
                    registers.f_narrow(1, 0, width)?.f_bitwise_xor_tensor(&registers.f_narrow(1, width, width)?)?;
            }
            registers = registers.f_reshape([-1])?;
            if registers.numel() == 1 {
                return Ok(registers.f_int64_value(&[0])? as u32);
            }
            items = registers.f_view_dtype(Kind::Uint8)?;
        }
        Err(TchError::Torch(format!("{} bytes are more than {LEVELS} levels can fold", bytes.numel())))
    }
}

/// Returns the contributions of a block's items, each followed by the rest of its block. `bits` are the contributions of an item's bits
/// from the lowest byte on; items are `step` bytes of the message apart.
fn table(bits: &[u32], step: usize) -> Vec<i32> {
    let step_images: Vec<u32> = (0..32).map(|bit| shifted(1 << bit, step)).collect();
    let mut bits = bits.to_vec();
    let width = bits.len() / 8;
    let mut out = vec![0; BLOCK_ITEMS * width * BYTE_VALUES];
    for position in (0..BLOCK_ITEMS).rev() {
        for (byte, bits) in bits.chunks(8).enumerate() {
            let begin = (position * width + byte) * BYTE_VALUES;
            for value in 0..BYTE_VALUES {
                out[begin + value] = apply_linear(bits, value as u32) as i32;
            }
        }
        bits.iter_mut().for_each(|b| *b = apply_linear(&step_images, *b));
    }
    out
}

/// Applies a linear map over GF(2), given by the images of the bits, to a value.
fn apply_linear(images: &[u32], value: u32) -> u32 {
    images.iter().enumerate().filter(|(bit, _)| value >> bit & 1 == 1).fold(0, |all, (_, image)| all ^ image)
}

/// Returns the register after `zeros` further bytes of zero.
fn shifted(register: u32, zeros: usize) -> u32 {
    Checksum { crc32c: register, bytes: 1 }.concat(Checksum { crc32c: 0, bytes: zeros as u64 }).crc32c
}

fn register(bytes: &[u8]) -> u32 {
    Checksum::of(bytes).crc32c
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensor_operations_match_host_checksums() {
        let tables = CrcTables::build(Device::Cpu).unwrap();
        let check = Tensor::from_slice(b"123456789");
        assert_eq!(tables.sum(&check).unwrap(), Checksum { crc32c: 0xe306_9283, bytes: 9 });
        tch::manual_seed(11);
        let all = Tensor::randint(256, [2 * BUCKET_BYTES as i64 + 77], (Kind::Uint8, Device::Cpu));
        let mut host = Checksummer::new(Device::Cpu);
        for size in
            [1, 3, 255, 256, 257, 65_535, 65_536, 65_537, 300_001, BUCKET_BYTES - 1, BUCKET_BYTES, 2 * BUCKET_BYTES + 5]
        {
            for from in [0, 1, 72] {
                let bytes = all.narrow(0, from, size as i64);
                assert_eq!(tables.sum(&bytes).unwrap(), host.checksum(&bytes).unwrap(), "{size} bytes from {from}");
            }
        }
        // Zeros in front count.
        let zeros = Tensor::zeros([300], (Kind::Uint8, Device::Cpu));
        assert_eq!(tables.sum(&zeros).unwrap(), Checksum::of(&[0; 300]));
        assert_eq!(tables.sum(&zeros.narrow(0, 0, 0)).unwrap(), Checksum::default());
    }
}
