//! Selection of a device by name. libtorch's CUDA library is loaded at run time, so that one build serves hosts with and without a GPU.

use tch::Device;
use unveil_torch_ext::load_cuda;

use crate::{ModelError, Result};

/// Returns the device that a configuration names: `cpu`; `auto` for the first usable GPU, else the CPU; `cuda` or `cuda:N` for that GPU.
///
/// # Errors
/// Returns [`ModelError::Input`] for an unusable GPU (the message says why) or an unknown name.
pub fn device(name: &str) -> Result<Device> {
    let index = match name {
        "cpu" => return Ok(Device::Cpu),
        "auto" => return Ok(if load_cuda().is_ok() { Device::cuda_if_available() } else { Device::Cpu }),
        "cuda" => Some(0),
        other => other.strip_prefix("cuda:").and_then(|n| n.parse::<usize>().ok()),
    };
    let index = index.ok_or_else(|| ModelError::input(format!("device `{name}`: use auto, cpu, cuda or cuda:N")))?;
    load_cuda().map_err(|why| ModelError::input(format!("device `{name}`: {why}; use auto or cpu")))?;
    let usable = tch::Cuda::device_count();
    if (index as i64) < usable {
        Ok(Device::Cuda(index))
    } else {
        Err(ModelError::input(format!("device `{name}`: {usable} GPU(s) are usable; use another number, auto or cpu")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names() {
        assert_eq!(device("cpu").unwrap(), Device::Cpu);
        assert!(device("gpu").unwrap_err().to_string().contains("auto, cpu, cuda or cuda:N"));
        let has_gpu = std::fs::exists("/dev/nvidia0").unwrap_or(false);
        assert_eq!(device("auto").unwrap() != Device::Cpu, has_gpu);
        assert!(device("cuda:99").unwrap_err().to_string().contains("cuda:99"));
    }
}
