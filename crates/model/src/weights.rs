//! Weights on disk: safetensors files, whole or sharded with an index, memory-mapped on load, written whole and
//! atomically. Checks names and shapes against the configuration and names what is wrong.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::{MmapMut, MmapOptions};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, View};
use tch::{Device, Kind, Tensor};

use crate::error::name_list;
use crate::found;
use crate::spec::{self, TensorSpec};
use crate::{ModelError, Result, VlmConfig};

/// Files from this size on are used where they are mapped, if device and kind of numbers allow.
const MAPPED: usize = 64 << 20;

/// Loads the tensors that `config` calls for from a model directory, in the order of the specification; an output matrix that differs
/// from the embedding is kept, and `config` says so from then on, whatever it said before. There is no second copy in
/// host memory: on the CPU, numbers of the stored kind stay in the file's pages (a page that is written becomes the process's
/// own; the file never changes), others go from there straight to their place on `device`, in `kind`.
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
        for (name, view) in parse(&files[index], map)?.tensors() {
            let name = spec::own_name(&name);
            if spec::ignorable(&name) {
                continue;
            }
            if found.insert(name.clone(), (index, view)).is_some() {
                return Err(ModelError::corrupt(&files[index], format!("tensor `{name}` is stored twice")));
            }
        }
    }
    let quantised =
        found.iter().filter(|(name, (_, view))| found::is_quantised(name, view.dtype())).map(|(name, _)| name);
    if let Some(name) = quantised.min() {
        let what = found::not_quantised(&format!("there is a tensor `{name}`"));
        return Err(ModelError::corrupt(dir, what));
    }
    settle_head(config, &files, &mut found)?;
    let specs = spec::tensors(config);
    check_names(dir, &specs, &found.iter().map(|(n, (_, v))| (n.as_str(), shape_of(v))).collect())?;
    for (name, (index, view)) in &found {
        if !matches!(view.dtype(), Dtype::F32 | Dtype::BF16 | Dtype::F16 | Dtype::F64) {
            return Err(ModelError::corrupt(
                &files[*index],
                format!("tensor `{name}` holds {:?}, expected floating-point numbers", view.dtype()),
            ));
        }
    }
    let mut out = Vec::with_capacity(specs.len());
    for spec in specs {
        let Some((index, view)) = found.get(&spec.name) else { continue };
        let in_place = device == Device::Cpu && kind_of(&files[*index], &spec.name, view)? == kind;
        let mapped = if in_place && maps[*index].len() >= MAPPED { borrow_view(view, kind)? } else { None };
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
        // Tensors outlive the model that they came with, so the map stays for the rest of the process: pages that were not
        // written are the file's and cost no memory of their own.
        std::mem::forget(map);
    }
    Ok(out)
}

const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

/// Where the configuration ties the output matrix to the embedding and the files hold one all the same: it goes where it is the
/// embedding, stands for it where that is missing, and is the model's own where the two differ, as in transformers 5.
fn settle_head(
    config: &mut VlmConfig,
    files: &[PathBuf],
    found: &mut HashMap<String, (usize, TensorView<'_>)>,
) -> Result<()> {
    if !config.tie_word_embeddings {
        return Ok(());
    }
    let Some((file, head)) = found.remove(HEAD) else { return Ok(()) };
    let Some((other, embedding)) = found.get(EMBEDDING) else {
        found.insert(EMBEDDING.to_owned(), (file, head));
        return Ok(());
    };
    let same = head.shape() == embedding.shape()
        && if head.dtype() == embedding.dtype() {
            head.data() == embedding.data()
        } else {
            to_tensor(&files[file], HEAD, &head)?.f_to_kind(Kind::Float)?
                == to_tensor(&files[*other], EMBEDDING, embedding)?.f_to_kind(Kind::Float)?
        };
    if !same {
        config.tie_word_embeddings = false;
        found.insert(HEAD.to_owned(), (file, head));
    }
    Ok(())
}

/// Checks a set of names and shapes against a specification: missing first, then misshapen, then extra.
pub(crate) fn check_names(place: &Path, specs: &[TensorSpec], found: &BTreeMap<&str, Vec<i64>>) -> Result<()> {
    let missing: Vec<&TensorSpec> = specs.iter().filter(|s| !found.contains_key(s.name.as_str())).collect();
    if let Some(first) = missing.first() {
        return Err(ModelError::MissingTensors {
            path: place.to_owned(),
            count: missing.len(),
            names: name_list(missing.iter().map(|s| s.name.as_str())),
            expected: first.shape.clone(),
            instead: found::instead(specs, found.keys().copied()),
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

/// Reads every tensor of one safetensors file to the CPU, in the kind it is stored in, sorted by name.
///
/// Errors: the file is unreadable, cut short (the message names the first tensor that is), or of an unknown kind.
pub fn read_safetensors(path: &Path) -> Result<Vec<(String, Tensor)>> {
    let map = map_file(path)?;
    let mut out = parse(path, &map)?
        .tensors()
        .into_iter()
        .map(|(name, view)| to_tensor(path, &name, &view).map(|t| (name, t)))
        .collect::<Result<Vec<_>>>()?;
    out.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(out)
}

/// Writes tensors to one safetensors file (any device and layout), atomically: a reader sees the old file or the new one.
pub fn write_safetensors(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    let views = tensors
        .iter()
        .map(|(name, tensor)| Ok((name.as_str(), Stored::new(path, name, tensor)?)))
        .collect::<Result<Vec<_>>>()?;
    let metadata = Some(HashMap::from([("format".to_owned(), "pt".to_owned())]));
    write_atomic(path, |tmp| {
        safetensors::serialize_to_file(views, metadata, tmp).map_err(|e| match e {
            safetensors::SafeTensorError::IoError(e) => ModelError::io(path, e),
            e => ModelError::corrupt(path, e.to_string()),
        })
    })
}

/// Writes through a temporary file in the same directory, which is synced and renamed over `path`.
pub(crate) fn write_atomic(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let mut fault = None;
    let written = unveil_core::replace_file(path, unveil_core::FILE_MODE, |temporary| {
        write(temporary).map_err(|e| std::io::Error::other(fault.insert(e).to_string()))
    });
    written.map_err(|e| fault.unwrap_or_else(|| ModelError::io(path, e)))
}

/// The files that hold a directory's weights, ascending.
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
    found::not_a_pointer(&index, text.as_bytes())?;
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

#[allow(unsafe_code)]
fn map_file(path: &Path) -> Result<MmapMut> {
    let file = File::open(path).map_err(|e| ModelError::io(path, e))?;
    // SAFETY: the map is private: what is written to it never reaches the file. Weights files are replaced by rename, never
    // rewritten in place, so the mapped bytes do not change under us.
    unsafe { MmapOptions::new().map_copy(&file) }.map_err(|e| ModelError::io(path, e))
}

fn parse<'a>(path: &Path, bytes: &'a [u8]) -> Result<SafeTensors<'a>> {
    found::not_a_pointer(path, bytes)?;
    SafeTensors::deserialize(bytes).map_err(|e| ModelError::corrupt(path, explain(bytes, &e.to_string())))
}

/// Says which tensor a broken file breaks at, where its header can still be read.
fn explain(bytes: &[u8], error: &str) -> String {
    let header_len = bytes.first_chunk::<8>().map(|n| u64::from_le_bytes(*n) as usize);
    let header = header_len.and_then(|n| bytes.get(8..n.checked_add(8)?));
    let Some(Ok(serde_json::Value::Object(header))) = header.map(serde_json::from_slice) else {
        return format!("not a whole safetensors file (its header cannot be read): {error}");
    };
    let data = bytes.len() - 8 - header_len.unwrap_or(0);
    let end = |v: &serde_json::Value| v.get("data_offsets")?.get(1)?.as_u64();
    let cut = header.iter().filter_map(|(name, v)| Some((end(v)?, name))).filter(|(end, _)| *end > data as u64).min();
    match cut {
        Some((end, name)) => {
            format!("cut short: tensor `{name}` ends at byte {end} of the data, the file holds {data}")
        }
        None => format!("not a valid safetensors file: {error}"),
    }
}

fn shape_of(view: &TensorView<'_>) -> Vec<i64> {
    view.shape().iter().map(|&n| n as i64).collect()
}

fn to_tensor(path: &Path, name: &str, view: &TensorView<'_>) -> Result<Tensor> {
    let mut out = Tensor::f_empty(shape_of(view).as_slice(), (kind_of(path, name, view)?, Device::Cpu))?;
    copy_view(path, name, view, &mut out)?;
    Ok(out)
}

fn kind_of(path: &Path, name: &str, view: &TensorView<'_>) -> Result<Kind> {
    Ok(match view.dtype() {
        Dtype::F32 => Kind::Float,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::F16 => Kind::Half,
        Dtype::F64 => Kind::Double,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        Dtype::U8 => Kind::Uint8,
        Dtype::BOOL => Kind::Bool,
        other => return Err(ModelError::corrupt(path, format!("tensor `{name}` has the unsupported kind {other:?}"))),
    })
}

/// The file's numbers as a tensor where they are; none where they are not aligned. The map must live as long as the tensor.
#[allow(unsafe_code)]
fn borrow_view(view: &TensorView<'_>, kind: Kind) -> Result<Option<Tensor>> {
    let (shape, data) = (shape_of(view), view.data());
    if data.is_empty() || !(data.as_ptr() as usize).is_multiple_of(kind.elt_size_in_bytes()) {
        return Ok(None);
    }
    let mut strides = vec![1i64; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i] * shape[i];
    }
    // SAFETY: the bytes hold exactly this shape and kind (safetensors checks that) and are aligned for it. They belong to a
    // private writable map, which the callers keep: until the tensor is dropped, or for good.
    Ok(Some(unsafe { Tensor::f_from_blob(data.as_ptr(), &shape, &strides, kind, Device::Cpu) }?))
}

/// Copies the file's numbers to `target`, which may be of another kind or on another device.
fn copy_view(path: &Path, name: &str, view: &TensorView<'_>, target: &mut Tensor) -> Result<()> {
    let kind = kind_of(path, name, view)?;
    if target.numel() == 0 {
        return Ok(());
    }
    let source = match borrow_view(view, kind)? {
        Some(source) => source,
        None => Tensor::f_from_data_size(view.data(), &shape_of(view), kind)?,
    };
    Ok(target.f_copy_(&source)?)
}

/// A tensor as the safetensors writer wants it; bytes are copied out only when its turn comes.
struct Stored {
    tensor: Tensor,
    shape: Vec<usize>,
    dtype: Dtype,
}

impl Stored {
    fn new(path: &Path, name: &str, tensor: &Tensor) -> Result<Self> {
        let dtype = match tensor.kind() {
            Kind::Float => Dtype::F32,
            Kind::BFloat16 => Dtype::BF16,
            Kind::Half => Dtype::F16,
            Kind::Double => Dtype::F64,
            Kind::Int64 => Dtype::I64,
            Kind::Int => Dtype::I32,
            Kind::Uint8 => Dtype::U8,
            Kind::Bool => Dtype::BOOL,
            other => {
                return Err(ModelError::corrupt(path, format!("tensor `{name}` of kind {other:?} cannot be stored")));
            }
        };
        let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?;
        let shape = tensor.size().iter().map(|&n| n as usize).collect();
        Ok(Self { tensor, shape, dtype })
    }
}

impl View for Stored {
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
