//! Sizes and rates of accelerators, from their vendors' data sheets: dense rates without sparsity, memory as the driver reports it.

use crate::error::PlanError;

/// Bytes of a GiB.
pub const GIB: f64 = (1u64 << 30) as f64;
const MIB: u64 = 1 << 20;

/// One device of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Device {
    /// Name that `--gpu` accepts, or `cpu`.
    pub name: &'static str,
    /// Memory in bytes.
    pub memory: u64,
    /// Memory bandwidth in bytes per second.
    pub bandwidth: f64,
    /// Dense bf16 products with fp32 accumulation, in FLOP/s.
    pub bf16: f64,
    /// fp32 products, in FLOP/s.
    pub fp32: f64,
    /// Bandwidth to the other devices of the node in bytes per second, one direction.
    pub link: f64,
}

/// Memory bandwidth of one CPU core, and its rate in fp32 products: a machine of a few years, 3 GHz, AVX2.
const CORE_BANDWIDTH: f64 = 10e9;
const CORE_FLOPS: f64 = 45e9;

const fn gpu(
    name: &'static str,
    memory_mib: u64,
    bandwidth_gb: f64,
    bf16_tflops: f64,
    fp32_tflops: f64,
    link_gb: f64,
) -> Device {
    Device {
        name,
        memory: memory_mib * MIB,
        bandwidth: bandwidth_gb * 1e9,
        bf16: bf16_tflops * 1e12,
        fp32: fp32_tflops * 1e12,
        link: link_gb * 1e9,
    }
}

/// The known GPUs. A link without NVLink is PCIe.
pub const GPUS: &[Device] = &[
    gpu("A10", 23_028, 600.0, 125.0, 31.2, 32.0),
    gpu("A40", 46_068, 696.0, 149.7, 37.4, 56.0),
    gpu("A6000", 49_140, 768.0, 154.8, 38.7, 56.0),
    gpu("A100-40", 40_960, 1555.0, 312.0, 19.5, 300.0),
    gpu("A100-80", 81_920, 2039.0, 312.0, 19.5, 300.0),
    gpu("B200", 183_359, 8000.0, 2250.0, 75.0, 900.0),
    gpu("H20", 97_871, 4000.0, 148.0, 44.0, 450.0),
    gpu("H100", 81_559, 3350.0, 989.0, 66.9, 450.0),
    gpu("H200", 143_771, 4800.0, 989.0, 66.9, 450.0),
    gpu("L4", 23_034, 300.0, 121.0, 30.3, 32.0),
    gpu("L40S", 46_068, 864.0, 362.0, 91.6, 32.0),
    gpu("RTX-3090", 24_576, 936.0, 71.0, 35.6, 32.0),
    gpu("RTX-4090", 24_564, 1008.0, 165.2, 82.6, 32.0),
    gpu("RTX-5090", 32_607, 1792.0, 209.5, 104.8, 64.0),
];

impl Device {
    /// Looks up a GPU; case, white space, `-` and `_` do not matter, and a name may begin with `NVIDIA`, `RTX` or `GeForce`.
    ///
    /// # Errors
    /// Returns [`PlanError::UnknownGpu`] with the known names.
    pub fn gpu(name: &str) -> Result<Self, PlanError> {
        let wanted = fold(name);
        GPUS.iter().find(|g| fold(g.name) == wanted).copied().ok_or_else(|| PlanError::UnknownGpu {
            name: name.to_owned(),
            known: GPUS.iter().map(|g| g.name).collect::<Vec<_>>().join(", "),
        })
    }

    /// Returns a GPU with this memory, and the rates of the known GPU whose memory is closest.
    pub fn with_memory(memory: u64) -> Self {
        let closest = GPUS.iter().min_by_key(|g| g.memory.abs_diff(memory)).copied();
        closest.map_or_else(|| Self::cpu(memory, 1), |g| Self { memory, ..g })
    }

    /// Returns the CPU of a machine with this memory and number of cores. Rates are rough.
    pub fn cpu(memory: u64, cores: usize) -> Self {
        let cores = cores.max(1) as f64;
        let flops = cores * CORE_FLOPS;
        Self { name: "cpu", memory, bandwidth: cores * CORE_BANDWIDTH, bf16: flops, fp32: flops, link: 1e9 }
    }

    /// Returns whether this is a CPU.
    pub fn is_cpu(&self) -> bool {
        self.name == "cpu"
    }
}

/// Returns a name for comparing: lower-case letters and digits, without the vendor and the product line.
fn fold(name: &str) -> String {
    let folded: String = name.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_lowercase();
    let mut rest = folded.as_str();
    while let Some(shorter) = ["nvidia", "geforce", "rtx", "tesla"].iter().find_map(|word| rest.strip_prefix(word)) {
        rest = shorter;
    }
    rest.strip_suffix("gb").filter(|short| short.starts_with("a100")).unwrap_or(rest).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_in_any_spelling() {
        for (spelling, name) in [
            ("a100-80", "A100-80"),
            ("A100 80GB", "A100-80"),
            ("NVIDIA A100_40", "A100-40"),
            ("h200", "H200"),
            ("RTX A6000", "A6000"),
            ("GeForce RTX 4090", "RTX-4090"),
            ("4090", "RTX-4090"),
        ] {
            assert_eq!(Device::gpu(spelling).unwrap().name, name, "{spelling}");
        }
    }

    #[test]
    fn unknown_name_is_answered_with_the_known_ones() {
        for name in ["", "A100", "H300", "cpu"] {
            let e = Device::gpu(name).unwrap_err().to_string();
            assert!(
                e.contains(&format!("`{name}`")) && e.contains("A100-40, A100-80") && e.contains("RTX-4090"),
                "{e}"
            );
        }
    }

    #[test]
    fn entries_are_plausible() {
        for g in GPUS {
            assert_eq!(GPUS.iter().filter(|other| fold(other.name) == fold(g.name)).count(), 1, "{}", g.name);
            assert!((20.0..200.0).contains(&(g.memory as f64 / GIB)), "{}", g.name);
            assert!(g.bf16 > g.fp32 && g.fp32 > 1e13 && g.bandwidth > g.link, "{}", g.name);
        }
        let unknown = Device::with_memory(79 << 30);
        assert_eq!((unknown.memory, unknown.name), (79 << 30, "H100"));
        let cpu = Device::cpu(1 << 34, 2);
        assert!(cpu.is_cpu() && cpu.fp32 < GPUS[0].fp32 / 100.0);
    }
}
