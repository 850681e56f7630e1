//! Loading of models: dtype, device and threads as configured.

use std::path::Path;

use tch::{Device, Kind};
use unveil_config::Config;
use unveil_config::schema::Parallel;
use unveil_model::{Vlm, weight_kind};

use crate::error::Result;

/// Loads a model with weights of dtype `kind` in the configured precision, and sets the number of threads (0: all cores) and deterministic
/// mode.
///
/// # Errors
/// Returns an error of the model if a file cannot be read or does not fit, or the device does not have the precision.
pub fn load_model(config: &Config, threads: usize, dir: &Path, kind: Kind, device: Device) -> Result<Vlm> {
    unveil_torch_ext::set_deterministic(config.run.deterministic)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if threads == 0 { cores } else { threads };
    tch::set_num_threads(threads as i32);
    let mut vlm = Vlm::load(dir, device, kind)?;
    vlm.set_compute(config.run.compute)?;
    Ok(vlm)
}

/// Returns the dtype of weights in the trainer, on the wire and on workers.
pub fn wire_kind(config: &Config) -> Kind {
    weight_kind(config.run.dtype)
}

/// Returns the device of this rank of the learner; see [`device_of_rank`].
///
/// # Errors
/// Returns an error of the model if the configured device does not exist.
pub fn rank_device(config: &Config) -> Result<Device> {
    device_of_rank(config, &config.learner.parallel)
}

/// Returns the device of this one of `parallel` ranks. With several ranks, `auto` and `cuda` select the GPU with the rank's number.
///
/// # Errors
/// Returns an error of the model if the configured device does not exist.
pub fn device_of_rank(config: &Config, parallel: &Parallel) -> Result<Device> {
    let device = unveil_model::device(&config.run.device)?;
    let by_rank = parallel.ranks > 1 && matches!(config.run.device.as_str(), "auto" | "cuda");
    Ok(match device {
        Device::Cuda(_) if by_rank => {
            let count = usize::try_from(tch::Cuda::device_count()).unwrap_or(1).max(1);
            Device::Cuda(parallel.rank % count)
        }
        other => other,
    })
}
