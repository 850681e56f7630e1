//! Values of parameters and adapters.

use tch::{Device, Tensor};
use unveil_model::Vlm;

/// Returns the values of all parameters.
pub fn weights(vlm: &Vlm) -> Vec<(String, Vec<f32>)> {
    let host = |t: &Tensor| Vec::<f32>::try_from(t.detach().reshape([-1])).expect("fp32 parameters");
    vlm.named_parameters().iter().map(|(n, t)| (n.clone(), host(t))).collect()
}

/// Returns the bytes of a tensor.
pub fn bits(t: &Tensor) -> Vec<u8> {
    let t = t.detach().to_device(Device::Cpu).contiguous();
    let mut out = vec![0; t.numel() * t.kind().elt_size_in_bytes()];
    t.copy_data_u8(&mut out, t.numel());
    out
}

/// Returns copies of all adapters of a model that has some.
pub fn adapters(vlm: &Vlm) -> Vec<(String, Tensor)> {
    let adapters = vlm.adapters().expect("the model has adapters");
    adapters.named_parameters().iter().map(|(n, t)| (n.clone(), t.detach().copy())).collect()
}

/// Overwrites all adapters with noise.
pub fn add_noise(vlm: &mut Vlm, seed: i64) {
    tch::manual_seed(seed);
    let noise: Vec<(String, Tensor)> = adapters(vlm).into_iter().map(|(n, t)| (n, t.randn_like() * 0.1)).collect();
    vlm.load_adapters(&noise).expect("adapters of the same shapes");
}
