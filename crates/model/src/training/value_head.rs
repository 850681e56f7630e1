//! A linear value head on the last hidden state of the decoder. It is stored in a separate file (`value_head.safetensors`), so that
//! transformers can still load the model directory.

use std::path::Path;

use tch::{Device, Kind, Tensor};

use crate::Result;
use crate::weights::{overwrite, read_safetensors, write_safetensors};

const FILE: &str = "value_head.safetensors";

/// A value head with the parameters `value_head.weight [1, D]` and `value_head.bias [1]`.
#[derive(Debug)]
pub struct ValueHead {
    parameters: Vec<(String, Tensor)>,
}

impl ValueHead {
    /// Creates a head that returns 0 everywhere.
    pub fn new(hidden: i64, (kind, device): (Kind, Device)) -> Self {
        let zeros = |name: &str, shape: &[i64]| (name.to_owned(), Tensor::zeros(shape, (kind, device)));
        Self { parameters: vec![zeros("value_head.weight", &[1, hidden]), zeros("value_head.bias", &[1])] }
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
        let head = Self::new(hidden, options);
        overwrite(&path, &head.parameters, &read_safetensors(&path)?)?;
        Ok(Some(head))
    }

    /// Writes `value_head.safetensors` to a directory.
    ///
    /// # Errors
    /// Returns [`ModelError::Io`](crate::ModelError::Io) if the file cannot be written.
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
        overwrite(Path::new("value head state"), &self.parameters, named)
    }
}
