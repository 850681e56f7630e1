//! The BERT encoder: embeddings, post-norm layers with full attention, exact GELU.

use ndarray::{Array1, Array2, ArrayView1, Axis, s};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

#[derive(Debug, Deserialize)]
struct Config {
    model_type: String,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    type_vocab_size: usize,
    layer_norm_eps: f32,
    hidden_act: String,
    #[serde(default = "absolute")]
    position_embedding_type: String,
}

fn absolute() -> String {
    "absolute".to_owned()
}

/// The map `x W^T + b`, with W stored transposed.
#[derive(Debug)]
struct Linear {
    weight: Array2<f32>,
    bias: Array1<f32>,
}

#[derive(Debug)]
struct Norm {
    weight: Array1<f32>,
    bias: Array1<f32>,
    eps: f32,
}

#[derive(Debug)]
struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    output_norm: Norm,
    up: Linear,
    down: Linear,
    down_norm: Norm,
}

/// The encoder.
#[derive(Debug)]
pub(super) struct Bert {
    words: Array2<f32>,
    positions: Array2<f32>,
    types: Array2<f32>,
    norm: Norm,
    layers: Vec<Layer>,
    heads: usize,
}

impl Bert {
    /// Loads the encoder from the bytes of `config.json` and `model.safetensors`.
    pub(super) fn load(config: &[u8], weights: &[u8]) -> Result<Self, String> {
        let c: Config = serde_json::from_slice(config).map_err(|e| format!("config.json: {e}"))?;
        let fits = c.model_type == "bert" && c.hidden_act == "gelu" && c.position_embedding_type == "absolute";
        if !fits || c.num_attention_heads == 0 || !c.hidden_size.is_multiple_of(c.num_attention_heads) {
            return Err(format!(
                "config.json: only BERT with gelu and absolute positions is supported, not {} with {} and {}",
                c.model_type, c.hidden_act, c.position_embedding_type
            ));
        }
        let file = SafeTensors::deserialize(weights).map_err(|e| format!("model.safetensors: {e}"))?;
        let w = TensorReader {
            prefix: if file.tensor("bert.embeddings.word_embeddings.weight").is_ok() { "bert." } else { "" },
            file,
        };
        let d = c.hidden_size;
        let i = c.intermediate_size;
        let linear = |name: &str, rows: usize, cols: usize| -> Result<Linear, String> {
            let weight = w.matrix(&format!("{name}.weight"), rows, cols)?;
            Ok(Linear {
                weight: weight.t().as_standard_layout().into_owned(),
                bias: w.vector(&format!("{name}.bias"), rows)?,
            })
        };
        let norm = |name: &str| -> Result<Norm, String> {
            let weight = w.vector(&format!("{name}.weight"), d)?;
            let bias = w.vector(&format!("{name}.bias"), d)?;
            Ok(Norm { weight, bias, eps: c.layer_norm_eps })
        };
        let layer = |n: usize| -> Result<Layer, String> {
            let name = |module: &str| format!("encoder.layer.{n}.{module}");
            Ok(Layer {
                query: linear(&name("attention.self.query"), d, d)?,
                key: linear(&name("attention.self.key"), d, d)?,
                value: linear(&name("attention.self.value"), d, d)?,
                output: linear(&name("attention.output.dense"), d, d)?,
                output_norm: norm(&name("attention.output.LayerNorm"))?,
                up: linear(&name("intermediate.dense"), i, d)?,
                down: linear(&name("output.dense"), d, i)?,
                down_norm: norm(&name("output.LayerNorm"))?,
            })
        };
        Ok(Self {
            words: w.matrix("embeddings.word_embeddings.weight", c.vocab_size, d)?,
            positions: w.matrix("embeddings.position_embeddings.weight", c.max_position_embeddings, d)?,
            types: w.matrix("embeddings.token_type_embeddings.weight", c.type_vocab_size, d)?,
            norm: norm("embeddings.LayerNorm")?,
            layers: (0..c.num_hidden_layers).map(layer).collect::<Result<_, _>>()?,
            heads: c.num_attention_heads,
        })
    }

    /// Returns the length of the longest input in tokens.
    pub(super) fn positions(&self) -> usize {
        self.positions.nrows()
    }

    /// Returns the mean of the last hidden states of one sequence.
    pub(super) fn mean_state(&self, ids: &[u32], types: &[u32]) -> Result<Vec<f32>, String> {
        if ids.is_empty() || ids.len() > self.positions() || ids.len() != types.len() {
            return Err(format!("{} tokens cannot be embedded (1 to {})", ids.len(), self.positions()));
        }
        let mut x = Array2::zeros((ids.len(), self.words.ncols()));
        for (at, (&id, &kind)) in ids.iter().zip(types).enumerate() {
            let id = id as usize;
            let kind = kind as usize;
            if id >= self.words.nrows() || kind >= self.types.nrows() {
                return Err(format!("the tokenizer gives token {id} of type {kind}, which the model does not have"));
            }
            let sum = &self.words.row(id) + &self.positions.row(at) + self.types.row(kind);
            x.row_mut(at).assign(&sum);
        }
        self.norm.apply(&mut x);
        for layer in &self.layers {
            layer.apply(&mut x, self.heads);
        }
        let mean = x.mean_axis(Axis(0)).ok_or("no tokens")?;
        Ok(mean.to_vec())
    }
}

impl Layer {
    fn apply(&self, x: &mut Array2<f32>, heads: usize) {
        let q = self.query.apply(x);
        let k = self.key.apply(x);
        let v = self.value.apply(x);
        let width = q.ncols() / heads;
        let scale = 1.0 / (width as f32).sqrt();
        let mut joined = Array2::zeros(q.raw_dim());
        for h in 0..heads {
            let head = s![.., h * width..(h + 1) * width];
            let mut p = q.slice(head).dot(&k.slice(head).t()) * scale;
            for mut row in p.rows_mut() {
                let most = row.fold(f32::NEG_INFINITY, |a, b| a.max(*b));
                row.mapv_inplace(|v| (v - most).exp());
                let sum = row.sum();
                row.mapv_inplace(|v| v / sum);
            }
            joined.slice_mut(head).assign(&p.dot(&v.slice(head)));
        }
        *x += &self.output.apply(&joined);
        self.output_norm.apply(x);
        let up = self.up.apply(x).mapv_into(gelu);
        *x += &self.down.apply(&up);
        self.down_norm.apply(x);
    }
}

impl Linear {
    fn apply(&self, x: &Array2<f32>) -> Array2<f32> {
        x.dot(&self.weight) + &self.bias
    }
}

impl Norm {
    fn apply(&self, x: &mut Array2<f32>) {
        for mut row in x.rows_mut() {
            let mean = row.sum() / row.len() as f32;
            let variance = row.fold(0.0, |a, v| a + (v - mean).powi(2)) / row.len() as f32;
            let scale = 1.0 / (variance + self.eps).sqrt();
            row.mapv_inplace(|v| (v - mean) * scale);
            row *= &self.weight;
            row += &self.bias;
        }
    }
}

/// Returns `x Phi(x)` with the exact normal distribution.
fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + libm::erff(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// Reader of f32 tensors by name.
struct TensorReader<'a> {
    file: SafeTensors<'a>,
    prefix: &'static str,
}

impl TensorReader<'_> {
    fn numbers(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, String> {
        let name = format!("{}{name}", self.prefix);
        let t = self.file.tensor(&name).map_err(|e| format!("model.safetensors: {name}: {e}"))?;
        if t.shape() != shape {
            return Err(format!("model.safetensors: {name} has shape {:?}, config.json requires {shape:?}", t.shape()));
        }
        if t.dtype() != Dtype::F32 {
            return Err(format!("model.safetensors: {name} is {:?}: export the model in float32", t.dtype()));
        }
        Ok(t.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }

    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Array2<f32>, String> {
        let numbers = self.numbers(name, &[rows, cols])?;
        Array2::from_shape_vec((rows, cols), numbers).map_err(|e| format!("model.safetensors: {name}: {e}"))
    }

    fn vector(&self, name: &str, n: usize) -> Result<Array1<f32>, String> {
        Ok(ArrayView1::from(&self.numbers(name, &[n])?).to_owned())
    }
}
