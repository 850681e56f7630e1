//! A linear value head on the last hidden state of the decoder. It is stored in a separate file (`value_head.safetensors`), so that
//! transformers can still load the model directory.

use std::path::Path;

use tch::{Device, Kind, Tensor};

use crate::config::parameters::{Init, TensorSpec};
use crate::weights::{check_names_and_shapes, read_safetensors, write_safetensors};
use crate::{ModelError, Result};

const FILE: &str = "value_head.safetensors";

/// A value head with the parameters `value_head.weight [1, D]` and `value_head.bias [1]`.
pub struct ValueHead {
    parameters: Vec<(String, Tensor)>,
}

impl ValueHead {
    /// Creates a head that returns 0 everywhere.
    pub fn new(hidden: i64, (kind, device): (Kind, Device)) -> Self {
        let parameters =
            specs(hidden).into_iter().map(|s| (s.name, Tensor::zeros(s.shape.as_slice(), (kind, device)))).collect();
        Self { parameters }
    }

    /// Reads the head of a model directory; `None` if there is none.
    ///
    /// # Errors
    /// Returns an error that names the file, and the tensor that is missing, extra or of another shape.
    pub fn load(dir: &Path, hidden: i64, options: (Kind, Device)) -> Result<Option<Self>> {
        let path = dir.join(FILE);
        if !path.exists() {
            return Ok(None);
        }
        let mut head = Self::new(hidden, options);
        head.copy_values(&path, &read_safetensors(&path)?)?;
        Ok(Some(head))
    }

    /// Writes `value_head.safetensors` to a directory.
    ///
    /// # Errors
    /// Returns [`ModelError::Io`] if the file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let tensors: Vec<_> = self.parameters.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
        write_safetensors(&dir.join(FILE), &tensors)
    }

    /// Returns the values `[N]` of hidden states `[N, D]`, in the dtype of the head.
    pub fn forward(&self, hidden: &Tensor) -> Tensor {
        let [(_, weight), (_, bias)] = self.parameters.as_slice() else { return Tensor::new() };
        hidden.to_kind(weight.kind()).linear(weight, Some(bias)).squeeze_dim(-1)
    }

    /// Returns weight and bias.
    pub fn named_parameters(&self) -> &[(String, Tensor)] {
        &self.parameters
    }

    /// Sets whether the parameters need gradients.
    pub fn set_trainable(&self, trainable: bool) {
        for (_, tensor) in &self.parameters {
            let _ = tensor.set_requires_grad(trainable);
        }
    }

    /// Overwrites the parameters in place, after checking names and shapes.
    ///
    /// # Errors
    /// Returns an error that names the tensor that is missing, extra or of another shape.
    pub fn load_state(&mut self, named: &[(String, Tensor)]) -> Result<()> {
        self.copy_values(Path::new("value head state"), named)
    }

    fn copy_values(&mut self, source: &Path, named: &[(String, Tensor)]) -> Result<()> {
        let hidden = self.parameters.first().map_or(0, |(_, w)| w.size()[1]);
        check_names_and_shapes(source, &specs(hidden), &named.iter().map(|(n, t)| (n.as_str(), t.size())).collect())?;
        tch::no_grad(|| {
            for (name, tensor) in &mut self.parameters {
                if let Some((_, new)) = named.iter().find(|(n, _)| n == name) {
                    tensor.f_copy_(new)?;
                }
            }
            Ok::<(), ModelError>(())
        })
    }
}

fn specs(hidden: i64) -> Vec<TensorSpec> {
    let spec = |name: &str, shape: &[i64]| TensorSpec { name: name.into(), shape: shape.to_vec(), init: Init::Zeros };
    vec![spec("value_head.weight", &[1, hidden]), spec("value_head.bias", &[1])]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let dir = tempfile::tempdir().expect("temporary directory");
        assert!(ValueHead::load(dir.path(), 4, (Kind::Float, Device::Cpu)).expect("none").is_none());
        let mut head = ValueHead::new(4, (Kind::Float, Device::Cpu));
        let named = vec![
            ("value_head.weight".to_owned(), Tensor::from_slice(&[1f32, 2.0, 3.0, 4.0]).view([1, 4])),
            ("value_head.bias".to_owned(), Tensor::from_slice(&[0.5f32])),
        ];
        head.load_state(&named).expect("fits");
        head.save(dir.path()).expect("saves");
        let loaded = ValueHead::load(dir.path(), 4, (Kind::Float, Device::Cpu)).expect("loads").expect("is there");
        assert_eq!(loaded.forward(&Tensor::ones([1, 4], (Kind::Float, Device::Cpu))).double_value(&[0]), 10.5);
        let wrong = ValueHead::load(dir.path(), 5, (Kind::Float, Device::Cpu)).err().expect("misshapen").to_string();
        assert!(wrong.contains("value_head.weight") && wrong.contains("[1, 4]"), "{wrong}");
    }
}
