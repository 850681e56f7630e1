//! Weights on disk: safetensors files, single or sharded with an index, memory-mapped on load and replaced atomically. Names and shapes
//! are checked against the configuration.

pub(crate) mod fused_weights;
pub(crate) mod init;
pub(crate) mod shards;
pub(crate) mod unsupported;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::{MmapMut, MmapOptions};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, View};
use tch::{Device, Kind, Tensor};

use crate::config::parameters::{self, Init, TensorSpec};
use crate::error::{name_list, quantised_error};
use crate::files::{refuse_lfs_pointer, write_atomic};
use crate::{ModelError, Result, VlmConfig};

/// Size in bytes from which tensors of a file stay in its memory map, if device and dtype allow.
const MIN_MAPPED_BYTES: usize = 64 << 20;

/// The dtypes that files may have, as safetensors and as libtorch name them.
const DTYPES: [(Dtype, Kind); 8] = [
    (Dtype::F32, Kind::Float),
    (Dtype::BF16, Kind::BFloat16),
    (Dtype::F16, Kind::Half),
    (Dtype::F64, Kind::Double),
    (Dtype::I64, Kind::Int64),
    (Dtype::I32, Kind::Int),
    (Dtype::U8, Kind::Uint8),
    (Dtype::BOOL, Kind::Bool),
];

/// Loads the tensors that `config` requires from a model directory, in the order of the specification. An output matrix that differs
/// from the embedding is kept, and `config` is changed to untied then. There is no second copy in host memory: on the CPU, tensors of
/// the requested dtype stay in the pages of the file (a written page becomes private to the process; the file never changes), others
/// are copied from there directly to `device` as `kind`.
pub(crate) fn load_dir(
    dir: &Path,
    config: &mut VlmConfig,
    device: Device,
    kind: Kind,
) -> Result<Vec<(String, Tensor)>> {
    let files = weight_files(dir)?;
    let maps = files.iter().map(|path| map_file(path)).collect::<Result<Vec<_>>>()?;
    let mut kept = vec![false; files.len()];
    let mut found: HashMap<String, (usize, TensorView<'_>)> = HashMap::new();
    for (index, map) in maps.iter().enumerate() {
        for (name, view) in parse_safetensors(&files[index], map)?.tensors() {
            let name = parameters::canonical_name(&name);
            if parameters::is_computed(&name) {
                continue;
            }
            if found.insert(name.clone(), (index, view)).is_some() {
                return Err(ModelError::corrupt(&files[index], format!("tensor `{name}` is stored twice")));
            }
        }
    }
    let quantised = found
        .iter()
        .filter(|(name, (_, view))| unsupported::is_quantised_tensor(name, view.dtype()))
        .map(|(name, _)| name);
    if let Some(name) = quantised.min() {
        let message = quantised_error(&format!("tensor `{name}`"));
        return Err(ModelError::corrupt(dir, message));
    }
    resolve_lm_head(config, &files, &mut found)?;
    let specs = parameters::tensor_specs(config);
    check_names_and_shapes(dir, &specs, &found.iter().map(|(n, (_, v))| (n.as_str(), shape_of(v))).collect())?;
    for (name, (index, view)) in &found {
        if !matches!(view.dtype(), Dtype::F32 | Dtype::BF16 | Dtype::F16 | Dtype::F64) {
            return Err(ModelError::corrupt(
                &files[*index],
                format!("tensor `{name}` has dtype {:?}, expected a floating-point dtype", view.dtype()),
            ));
        }
    }
    let mut out = Vec::with_capacity(specs.len());
    for spec in specs {
        let Some((index, view)) = found.get(&spec.name) else { continue };
        let in_place = device == Device::Cpu && view_kind(&files[*index], &spec.name, view)? == kind;
        let mapped = if in_place && maps[*index].len() >= MIN_MAPPED_BYTES { borrow_view(view, kind)? } else { None };
        kept[*index] |= mapped.is_some();
        let tensor = match mapped {
            Some(tensor) => tensor,
            None => {
                let mut tensor = Tensor::f_empty(spec.shape.as_slice(), (kind, device))?;
                copy_view(&files[*index], &spec.name, view, &mut tensor)?;
                tensor
            }
        };
        out.push((spec.name, tensor));
    }
    drop(found);
    for (map, _) in maps.into_iter().zip(kept).filter(|(_, kept)| *kept) {
        // Tensors may outlive their model, so the map is kept for the rest of the process: pages that were not written belong to the
        // file and cost no memory.
        std::mem::forget(map);
    }
    Ok(out)
}

const LM_HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

/// Handles an output matrix in the files of a model whose configuration ties it to the embedding, as transformers 5 does: it is dropped
/// if it equals the embedding, used as the embedding if that is missing, and kept as a separate matrix if the two differ.
fn resolve_lm_head(
    config: &mut VlmConfig,
    files: &[PathBuf],
    found: &mut HashMap<String, (usize, TensorView<'_>)>,
) -> Result<()> {
    if !config.tie_word_embeddings {
        return Ok(());
    }
    let Some((file, head)) = found.remove(LM_HEAD) else { return Ok(()) };
    let Some((other, embedding)) = found.get(EMBEDDING) else {
        found.insert(EMBEDDING.to_owned(), (file, head));
        return Ok(());
    };
    let equal = head.shape() == embedding.shape()
        && if head.dtype() == embedding.dtype() {
            head.data() == embedding.data()
        } else {
            to_tensor(&files[file], LM_HEAD, &head)?.f_to_kind(Kind::Float)?
                == to_tensor(&files[*other], EMBEDDING, embedding)?.f_to_kind(Kind::Float)?
        };
    if !equal {
        config.tie_word_embeddings = false;
        found.insert(LM_HEAD.to_owned(), (file, head));
    }
    Ok(())
}

/// Checks a set of names and shapes against a specification.
///
/// # Errors
/// Returns [`ModelError::MissingTensors`], else [`ModelError::Shape`], else [`ModelError::ExtraTensors`].
pub(crate) fn check_names_and_shapes(
    place: &Path,
    specs: &[TensorSpec],
    found: &BTreeMap<&str, Vec<i64>>,
) -> Result<()> {
    let missing: Vec<&TensorSpec> = specs.iter().filter(|s| !found.contains_key(s.name.as_str())).collect();
    if let Some(first) = missing.first() {
        return Err(ModelError::MissingTensors {
            path: place.to_owned(),
            count: missing.len(),
            names: name_list(missing.iter().map(|s| s.name.as_str())),
            expected: first.shape.clone(),
            instead: unsupported::describe_other_tensors(specs, found.keys().copied()),
        });
    }
    for spec in specs {
        if let Some(shape) = found.get(spec.name.as_str()).filter(|shape| **shape != spec.shape) {
            return Err(ModelError::Shape {
                path: place.to_owned(),
                name: spec.name.clone(),
                expected: spec.shape.clone(),
                found: shape.clone(),
            });
        }
    }
    let known: std::collections::HashSet<&str> = specs.iter().map(|s| s.name.as_str()).collect();
    let extra: Vec<(&str, &Vec<i64>)> =
        found.iter().filter(|(n, _)| !known.contains(*n)).map(|(n, s)| (*n, s)).collect();
    if let Some((_, shape)) = extra.first() {
        return Err(ModelError::ExtraTensors {
            path: place.to_owned(),
            count: extra.len(),
            names: name_list(extra.iter().map(|(n, _)| *n)),
            found: (*shape).clone(),
        });
    }
    Ok(())
}

/// Overwrites all `parameters` in place with the tensors of the same names in `new`, after checking all names and shapes. `source` is the
/// path that errors name.
///
/// # Errors
/// Returns an error that names the tensor that is missing, extra or of another shape; no parameter has changed then.
pub(crate) fn overwrite<'p>(
    source: &Path,
    parameters: impl IntoIterator<Item = &'p (String, Tensor)>,
    new: &[(String, Tensor)],
) -> Result<()> {
    let parameters: Vec<&(String, Tensor)> = parameters.into_iter().collect();
    let spec = |(name, t): &&(String, Tensor)| TensorSpec { name: name.clone(), shape: t.size(), init: Init::Zeros };
    let specs: Vec<TensorSpec> = parameters.iter().map(spec).collect();
    check_names_and_shapes(source, &specs, &new.iter().map(|(n, t)| (n.as_str(), t.size())).collect())?;
    let new: HashMap<&str, &Tensor> = new.iter().map(|(n, t)| (n.as_str(), t)).collect();
    tch::no_grad(|| {
        for (name, tensor) in parameters {
            if let Some(new) = new.get(name.as_str()) {
                tensor.shallow_clone().f_copy_(new)?;
            }
        }
        Ok(())
    })
}

/// Reads every tensor of one safetensors file to the CPU, in its stored dtype, sorted by name.
///
/// # Errors
/// Returns [`ModelError::Io`] if the file cannot be read, and [`ModelError::Corrupt`] if it is truncated (with the first affected
/// tensor), invalid, or has an unsupported dtype.
pub fn read_safetensors(path: &Path) -> Result<Vec<(String, Tensor)>> {
    let map = map_file(path)?;
    let mut out = parse_safetensors(path, &map)?
        .tensors()
        .into_iter()
        .map(|(name, view)| to_tensor(path, &name, &view).map(|t| (name, t)))
        .collect::<Result<Vec<_>>>()?;
    out.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(out)
}

/// Writes tensors (on any device, in any layout) to one safetensors file, atomically: a reader sees the old file or the new one.
///
/// # Errors
/// Returns [`ModelError::Io`] if the file cannot be written, and [`ModelError::Corrupt`] for an unsupported dtype.
pub fn write_safetensors(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    let views = tensors
        .iter()
        .map(|(name, tensor)| Ok((name.as_str(), StoredTensor::new(path, name, tensor)?)))
        .collect::<Result<Vec<_>>>()?;
    let metadata = Some(HashMap::from([("format".to_owned(), "pt".to_owned())]));
    write_atomic(path, |tmp| {
        safetensors::serialize_to_file(views, metadata, tmp).map_err(|e| match e {
            safetensors::SafeTensorError::IoError(e) => ModelError::io(path, e),
            e => ModelError::corrupt(path, e.to_string()),
        })
    })
}

/// Returns the weights files of a directory, sorted by name.
pub(crate) fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let single = dir.join("model.safetensors");
    if single.exists() {
        return Ok(vec![single]);
    }
    let index = dir.join("model.safetensors.index.json");
    if !index.exists() {
        let missing = std::io::Error::new(
            std::io::ErrorKind::NotFound,
            "no model.safetensors and no model.safetensors.index.json",
        );
        return Err(ModelError::io(dir, missing));
    }
    let text = std::fs::read_to_string(&index).map_err(|e| ModelError::io(&index, e))?;
    refuse_lfs_pointer(&index, text.as_bytes())?;
    let value: serde_json::Value =
        serde_json::from_str(&text).map_err(|e| ModelError::corrupt(&index, format!("not JSON: {e}")))?;
    let Some(map) = value.get("weight_map").and_then(|m| m.as_object()) else {
        return Err(ModelError::corrupt(&index, "has no `weight_map`"));
    };
    let mut files: Vec<&str> = map.values().filter_map(|v| v.as_str()).collect();
    files.sort_unstable();
    files.dedup();
    if let Some(outside) = files.iter().find(|f| Path::new(f).components().count() != 1 || **f == "..") {
        return Err(ModelError::corrupt(&index, format!("names a file outside the directory: `{outside}`")));
    }
    Ok(files.into_iter().map(|f| dir.join(f)).collect())
}

#[expect(unsafe_code, reason = "maps a file into memory")]
fn map_file(path: &Path) -> Result<MmapMut> {
    let file = File::open(path).map_err(|e| ModelError::io(path, e))?;
    // SAFETY: the map is private: writes to it never reach the file. Weights files are replaced by rename, never rewritten in place, so
    // the mapped bytes do not change.
    unsafe { MmapOptions::new().map_copy(&file) }.map_err(|e| ModelError::io(path, e))
}

fn parse_safetensors<'a>(path: &Path, bytes: &'a [u8]) -> Result<SafeTensors<'a>> {
    refuse_lfs_pointer(path, bytes)?;
    SafeTensors::deserialize(bytes).map_err(|e| ModelError::corrupt(path, explain_corruption(bytes, &e.to_string())))
}

/// Describes a broken file, with the first truncated tensor if its header can still be read.
fn explain_corruption(bytes: &[u8], error: &str) -> String {
    let header_len = bytes.first_chunk::<8>().map(|n| u64::from_le_bytes(*n) as usize);
    let header = header_len.and_then(|n| bytes.get(8..n.checked_add(8)?));
    let Some(Ok(serde_json::Value::Object(header))) = header.map(serde_json::from_slice) else {
        return format!("not a complete safetensors file (its header cannot be read): {error}");
    };
    let data = bytes.len() - 8 - header_len.unwrap_or(0);
    let end = |v: &serde_json::Value| v.get("data_offsets")?.get(1)?.as_u64();
    let truncated =
        header.iter().filter_map(|(name, v)| Some((end(v)?, name))).filter(|(end, _)| *end > data as u64).min();
    match truncated {
        Some((end, name)) => {
            format!("truncated: tensor `{name}` ends at byte {end} of the data, but the file has {data}")
        }
        None => format!("not a valid safetensors file: {error}"),
    }
}

fn shape_of(view: &TensorView<'_>) -> Vec<i64> {
    view.shape().iter().map(|&n| n as i64).collect()
}

fn to_tensor(path: &Path, name: &str, view: &TensorView<'_>) -> Result<Tensor> {
    let mut out = Tensor::f_empty(shape_of(view).as_slice(), (view_kind(path, name, view)?, Device::Cpu))?;
    copy_view(path, name, view, &mut out)?;
    Ok(out)
}

fn view_kind(path: &Path, name: &str, view: &TensorView<'_>) -> Result<Kind> {
    let dtype = view.dtype();
    let known = DTYPES.iter().find(|(stored, _)| *stored == dtype);
    known
        .map(|(_, kind)| *kind)
        .ok_or_else(|| ModelError::corrupt(path, format!("tensor `{name}` has the unsupported dtype {dtype:?}")))
}

/// Returns a tensor over the mapped bytes; `None` if they are not aligned. The map must live as long as the tensor.
#[expect(unsafe_code, reason = "borrows mapped memory as a tensor")]
fn borrow_view(view: &TensorView<'_>, kind: Kind) -> Result<Option<Tensor>> {
    let shape = shape_of(view);
    let data = view.data();
    if data.is_empty() || !(data.as_ptr() as usize).is_multiple_of(kind.elt_size_in_bytes()) {
        return Ok(None);
    }
    let mut strides = vec![1i64; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i] * shape[i];
    }
    // SAFETY: the bytes have exactly this shape and dtype (safetensors checks that) and are aligned for it. They belong to a private
    // writable map, which callers keep until the tensor is dropped, or for the rest of the process.
    Ok(Some(unsafe { Tensor::f_from_blob(data.as_ptr(), &shape, &strides, kind, Device::Cpu) }?))
}

/// Copies a stored tensor to `target`, which may have another dtype or device.
fn copy_view(path: &Path, name: &str, view: &TensorView<'_>, target: &mut Tensor) -> Result<()> {
    let kind = view_kind(path, name, view)?;
    if target.numel() == 0 {
        return Ok(());
    }
    let source = match borrow_view(view, kind)? {
        Some(source) => source,
        None => Tensor::f_from_data_size(view.data(), &shape_of(view), kind)?,
    };
    Ok(target.f_copy_(&source)?)
}

/// A tensor to be written by safetensors; its bytes are copied only when they are written.
struct StoredTensor {
    tensor: Tensor,
    shape: Vec<usize>,
    dtype: Dtype,
}

impl StoredTensor {
    fn new(path: &Path, name: &str, tensor: &Tensor) -> Result<Self> {
        let kind = tensor.kind();
        let Some((dtype, _)) = DTYPES.iter().find(|(_, known)| *known == kind) else {
            let message = format!("tensor `{name}` has dtype {kind:?}, which cannot be stored");
            return Err(ModelError::corrupt(path, message));
        };
        let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?;
        let shape = tensor.size().iter().map(|&n| n as usize).collect();
        Ok(Self { tensor, shape, dtype: *dtype })
    }
}

impl View for StoredTensor {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut data = vec![0u8; self.data_len()];
        let numel = self.tensor.numel();
        self.tensor.copy_data_u8(&mut data, numel);
        data.into()
    }

    fn data_len(&self) -> usize {
        self.tensor.numel() * self.tensor.kind().elt_size_in_bytes()
    }
}
