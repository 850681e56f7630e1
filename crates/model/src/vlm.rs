//! A whole model: parameters by name, vision tower, decoder, output matrix; loading, saving, weight swaps, and the
//! three ways of running it (teacher-forced, packed groups, generation).

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use tch::{Device, Kind, Tensor};

use crate::attention::{Capture, CaptureSpec};
use crate::cache::{DecodeOut, GroupCache, Prefill};
use crate::decoder::{Decoder, SequenceAsk, SequenceOut};
use crate::packed::{PackedBatch, image_positions, pad, padding_token};
use crate::rope::rope_positions;
use crate::vision::Vision;
use crate::weights::{self, check_names};
use crate::{GridThw, ModelError, Result, VlmConfig, spec};

/// A prompt as the model takes it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Prompt {
    /// Token ids, one image placeholder per merged image token.
    pub tokens: Vec<u32>,
    /// The images' grids in order.
    pub grids: Vec<GridThw>,
}

/// Result of [`Vlm::forward`].
pub struct ForwardOut {
    /// Hidden states after the final norm `[B, L, D]`.
    pub hidden: Tensor,
    /// Attention rows `[B, Q, V]`, fp32, if captured; 0 at image tokens that are padding.
    pub attention: Option<Tensor>,
}

/// Result of [`Vlm::forward_packed`].
pub struct PackedOut {
    /// Hidden states that predict each response token `[N, D]`.
    pub hidden: Tensor,
    /// Row `[N, V]` of the pass whose input is that response token, fp32, if captured.
    pub attention: Option<Tensor>,
}

/// A vision-language model on one device.
pub struct Vlm {
    config: VlmConfig,
    parameters: Vec<(String, Tensor)>,
    by_name: HashMap<String, usize>,
    vision: Vision,
    decoder: Decoder,
    embedding: Tensor,
    head: Tensor,
}

impl Vlm {
    /// Loads a model directory in Hugging Face layout; no parameter asks for gradients yet.
    pub fn load(dir: &Path, device: Device, kind: Kind) -> Result<Self> {
        let config = VlmConfig::load(dir)?;
        let parameters = weights::load_dir(dir, &config, device, kind)?;
        Self::assemble(config, parameters)
    }

    pub(crate) fn assemble(config: VlmConfig, parameters: Vec<(String, Tensor)>) -> Result<Self> {
        let by_name: HashMap<String, usize> = parameters.iter().enumerate().map(|(i, (n, _))| (n.clone(), i)).collect();
        let get = |name: &str| -> Result<Tensor> {
            let index = by_name.get(name).ok_or_else(|| ModelError::input(format!("no tensor `{name}`")))?;
            Ok(parameters[*index].1.shallow_clone())
        };
        let embedding = get("model.embed_tokens.weight")?;
        let head = if config.tie_word_embeddings { embedding.shallow_clone() } else { get("lm_head.weight")? };
        let (vision, decoder) = (Vision::new(&config.vision, &get)?, Decoder::new(&config.text, &get)?);
        Ok(Self { vision, decoder, embedding, head, config, parameters, by_name })
    }

    /// Writes `model.safetensors`, `config.json` and `generation_config.json`, each whole or not at all. Weights are
    /// stored in the kind that they have here.
    pub fn save(&self, dir: &Path) -> Result<()> {
        std::fs::create_dir_all(dir).map_err(|e| ModelError::io(dir, e))?;
        let mut config = self.config.clone();
        config.dtype = self.kind();
        let tensors: Vec<_> = self.parameters.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
        weights::write_safetensors(&dir.join("model.safetensors"), &tensors)?;
        config.save(dir)
    }

    /// The configuration.
    pub fn config(&self) -> &VlmConfig {
        &self.config
    }

    /// Where the parameters are.
    pub fn device(&self) -> Device {
        self.embedding.device()
    }

    /// What kind of numbers the parameters are.
    pub fn kind(&self) -> Kind {
        self.embedding.kind()
    }

    /// Leaf tensors by published name, always in the same order; a tied output matrix is not listed again.
    pub fn named_parameters(&self) -> &[(String, Tensor)] {
        &self.parameters
    }

    /// One parameter.
    pub fn parameter(&self, name: &str) -> Option<&Tensor> {
        self.by_name.get(name).map(|i| &self.parameters[*i].1)
    }

    /// Asks for gradients exactly where `filter` says so; returns the number of such parameters.
    pub fn set_trainable(&self, filter: impl Fn(&str) -> bool) -> usize {
        let mut on = 0;
        for (name, tensor) in &self.parameters {
            let train = filter(name);
            let _ = tensor.set_requires_grad(train);
            on += usize::from(train);
        }
        on
    }

    /// Overwrites all parameters in place (weight swap). Nothing is touched unless every name and shape fits.
    pub fn load_state(&mut self, named: &[(String, Tensor)]) -> Result<()> {
        let place = Path::new("weight state");
        check_names(
            place,
            &spec::tensors(&self.config),
            &named.iter().map(|(n, t)| (n.as_str(), t.size())).collect::<BTreeMap<_, _>>(),
        )?;
        tch::no_grad(|| {
            for (name, new) in named {
                if let Some(index) = self.by_name.get(name) {
                    self.parameters[*index].1.f_copy_(new)?;
                }
            }
            Ok::<(), ModelError>(())
        })
    }

    /// Features `[sum merged, D]` of images given as patches `[sum t*h*w, patch_len]`, in the processor's order.
    pub fn encode_images(&self, pixel_values: &Tensor, grids: &[GridThw]) -> Result<Tensor> {
        self.vision.forward(pixel_values, grids)
    }

    /// Embeddings `[B, L, D]` of tokens `[B, L]`, placeholders replaced by feature rows in row-major order.
    ///
    /// Errors with [`ModelError::ImageTokens`] when their numbers differ.
    pub fn embed(&self, tokens: &Tensor, image_features: Option<&Tensor>) -> Result<Tensor> {
        let vocab = self.config.text.vocab_size;
        if tokens.numel() > 0 && (tokens.max().int64_value(&[]) >= vocab || tokens.min().int64_value(&[]) < 0) {
            return Err(ModelError::input(format!("a token id is outside the vocabulary of {vocab}")));
        }
        let embeds = Tensor::f_embedding(&self.embedding, tokens, -1, false, false)?;
        let places = tokens.eq(i64::from(self.config.image_token_id));
        let count = places.sum(Kind::Int64).int64_value(&[]);
        let rows = image_features.map_or(0, |f| f.size().first().copied().unwrap_or(0));
        if count != rows {
            return Err(ModelError::ImageTokens { tokens: count, features: rows });
        }
        match image_features {
            Some(features) if count > 0 => {
                Ok(embeds.f_masked_scatter(&places.unsqueeze(-1), &features.to_kind(embeds.kind()))?)
            }
            _ => Ok(embeds),
        }
    }

    /// Teacher-forced pass. `positions [3, B, L]`; `mask` none is causal, bool `[B, 1, L, L]` is true where a row may
    /// attend, any other kind is added to the scores. No row may be masked entirely.
    pub fn forward(
        &self,
        embeds: &Tensor,
        positions: &Tensor,
        mask: Option<&Tensor>,
        capture: Option<&Capture>,
    ) -> Result<ForwardOut> {
        let out = self.sequences(embeds, positions, mask, &SequenceAsk { capture, ..SequenceAsk::default() })?;
        Ok(ForwardOut { hidden: out.hidden, attention: out.attention })
    }

    /// Checks shapes, makes the mask additive, runs the decoder.
    fn sequences(
        &self,
        embeds: &Tensor,
        positions: &Tensor,
        mask: Option<&Tensor>,
        ask: &SequenceAsk<'_>,
    ) -> Result<SequenceOut> {
        let size = embeds.size();
        let [b, l, d] = size[..] else {
            return Err(ModelError::input(format!("embeddings have shape {size:?}, expected [B, L, D]")));
        };
        if d != self.config.text.hidden_size || positions.size() != [3, b, l] {
            return Err(ModelError::input(format!(
                "embeddings {size:?} and positions {:?} do not fit",
                positions.size()
            )));
        }
        if let Some(m) = mask
            && (m.dim() != 4 || m.size()[2..] != [l, l] || ![1, b].contains(&m.size()[0]))
        {
            return Err(ModelError::input(format!("mask has shape {:?}, expected [{b}, 1, {l}, {l}]", m.size())));
        }
        if let Some(c) = ask.capture {
            self.check_layer(c.layer)?;
        }
        let kind = embeds.kind();
        let additive = mask.map(|m| match m.kind() {
            Kind::Bool => {
                Tensor::zeros(m.size().as_slice(), (kind, m.device())).masked_fill(&m.logical_not(), f64::NEG_INFINITY)
            }
            _ => m.to_kind(kind),
        });
        Ok(self.decoder.sequences(embeds, positions, additive.as_ref(), ask))
    }

    /// Logits `[.., V]` of hidden states `[.., D]`; give it only the rows that are needed.
    pub fn lm_head(&self, hidden: &Tensor) -> Tensor {
        hidden.linear(&self.head, None::<Tensor>)
    }

    /// Teacher-forced pass over packed groups.
    pub fn forward_packed(
        &self,
        batch: &PackedBatch,
        image_features: Option<&Tensor>,
        capture: Option<CaptureSpec>,
    ) -> Result<PackedOut> {
        let embeds = self.embed(&batch.tokens, image_features)?;
        let capture = capture.map(|c| Capture {
            layer: c.layer,
            queries: batch.query_index.shallow_clone(),
            image_index: batch.image_index.shallow_clone(),
            image_valid: batch.image_valid.shallow_clone(),
            differentiable: c.differentiable,
        });
        let ask = SequenceAsk { capture: capture.as_ref(), rows: Some(&batch.predict_index), keep_kv: false };
        let out = self.sequences(&embeds, &batch.positions, Some(&batch.mask), &ask)?;
        let attention = match out.attention {
            Some(rows) => {
                let v = rows.size()[2];
                Some(rows.view([-1, v]).f_index_select(0, &batch.query_flat)?)
            }
            None => None,
        };
        Ok(PackedOut { hidden: out.hidden, attention })
    }

    /// Runs prompts and keeps their keys and values. `image_features` holds all images of all prompts, in order.
    pub fn prefill(&self, prompts: &[Prompt], image_features: Option<&Tensor>) -> Result<Prefill> {
        let l = prompts.iter().map(|p| p.tokens.len()).max().unwrap_or(0);
        if let Some(empty) = prompts.iter().position(|p| p.tokens.is_empty()) {
            return Err(ModelError::input(format!("prompt {empty} is empty")));
        }
        if l == 0 {
            return Err(ModelError::input("no prompt was given"));
        }
        let filler = padding_token(&self.config);
        let (mut tokens, mut positions, mut next) = (Vec::new(), Vec::new(), Vec::new());
        for (index, prompt) in prompts.iter().enumerate() {
            let (own, after) = rope_positions(&prompt.tokens, &prompt.grids, &self.config)
                .map_err(|e| ModelError::input(format!("prompt {index}: {e}")))?;
            tokens.extend(prompt.tokens.iter().map(|t| i64::from(*t)).chain(std::iter::repeat(filler)).take(l));
            positions.extend(own.into_iter().chain(std::iter::repeat([0; 3])).take(l).flatten());
            next.push(after);
        }
        let (g, device) = (prompts.len() as i64, self.device());
        let tokens = Tensor::from_slice(&tokens).view([g, l as i64]).to_device(device);
        let positions = Tensor::from_slice(&positions).view([g, l as i64, 3]).to_device(device).permute([2, 0, 1]);
        let embeds = self.embed(&tokens, image_features)?;
        let lengths: Vec<i64> = prompts.iter().map(|p| p.tokens.len() as i64).collect();
        let last: Vec<i64> = lengths.iter().enumerate().map(|(i, len)| (i * l) as i64 + len - 1).collect();
        let last = Tensor::from_slice(&last).to_device(device);
        let out = self.sequences(
            &embeds,
            &positions,
            None,
            &SequenceAsk { capture: None, rows: Some(&last), keep_kv: true },
        )?;
        let images: Vec<Vec<i64>> = prompts.iter().map(|p| image_positions(&p.tokens, &self.config)).collect();
        let (index, valid) = pad(&images);
        Ok(Prefill {
            last_hidden: out.hidden,
            image_tokens: images.iter().map(Vec::len).collect(),
            layers: out.kv,
            lengths,
            next,
            image_index: Tensor::from_slice(&index).view([g, -1]).to_device(device),
            image_valid: Tensor::from_slice(&valid).view([g, -1]).to_kind(Kind::Bool).to_device(device),
        })
    }

    /// Feeds one token per row `[R]` and returns what predicts the next. Rows that are not `active` are computed
    /// (finite, meaningless) but do not advance. Run it without gradients: caches are written in place.
    pub fn decode_step(
        &self,
        cache: &mut GroupCache,
        tokens: &Tensor,
        active: Option<&[bool]>,
        capture_layer: Option<usize>,
    ) -> Result<DecodeOut> {
        if tokens.size() != [cache.rows() as i64] {
            return Err(ModelError::input(format!("{:?} tokens for {} rows", tokens.size(), cache.rows())));
        }
        cache.check_room(active)?;
        if let Some(layer) = capture_layer {
            self.check_layer(layer)?;
        }
        let embeds = Tensor::f_embedding(&self.embedding, &tokens.f_to_device(self.device())?, -1, false, false)?;
        let (hidden, attention) = tch::no_grad(|| self.decoder.step(&embeds, cache, capture_layer));
        cache.advance(active);
        Ok(DecodeOut { hidden, attention })
    }

    fn check_layer(&self, layer: usize) -> Result<()> {
        let layers = self.config.text.num_hidden_layers;
        if layer < layers {
            return Ok(());
        }
        Err(ModelError::input(format!("capture layer {layer} is not among the {layers} layers")))
    }
}
