//! Number of parameters of a model, from the files in its directory and without loading it.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

/// Maximum header size of a safetensors file in bytes, as specified by the format.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Returns the number of parameters of the model in `dir`: counted from the headers of its safetensors files, or else estimated from
/// `config.json`; `None` if neither can be read.
pub fn count_parameters(dir: &Path) -> Option<u64> {
    count_from_headers(dir).or_else(|| estimate(&read_json(&dir.join("config.json"))?))
}

/// Formats a count for messages: `1.3 M`, `8.3 B`.
pub fn format_count(parameters: u64) -> String {
    let millions = parameters as f64 / 1e6;
    if millions >= 1000.0 { format!("{:.1} B", millions / 1e3) } else { format!("{millions:.1} M") }
}

fn read_json(path: &Path) -> Option<Map<String, Value>> {
    serde_json::from_str(&std::fs::read_to_string(path).ok()?).ok()
}

fn count_from_headers(dir: &Path) -> Option<u64> {
    let index = read_json(&dir.join("model.safetensors.index.json"));
    let files: BTreeSet<PathBuf> = match index.as_ref().and_then(|i| i.get("weight_map")?.as_object()) {
        Some(map) => map.values().filter_map(|file| Some(dir.join(file.as_str()?))).collect(),
        None => [dir.join("model.safetensors")].into(),
    };
    files.iter().map(|file| count_in_file(file)).sum()
}

/// Returns the number of values in all tensors of one file.
fn count_in_file(path: &Path) -> Option<u64> {
    let mut file = std::fs::File::open(path).ok()?;
    let mut length = [0; 8];
    file.read_exact(&mut length).ok()?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES {
        return None;
    }
    let mut header = Vec::new();
    file.take(length).read_to_end(&mut header).ok()?;
    let header: Map<String, Value> = serde_json::from_slice(&header).ok()?;
    let count = |tensor: &Value| -> Option<u64> {
        let shape = tensor.get("shape")?.as_array()?;
        shape.iter().try_fold(1_u64, |product, n| product.checked_mul(n.as_u64()?))
    };
    header.iter().filter(|(name, _)| *name != "__metadata__").try_fold(0_u64, |all, (_, t)| all.checked_add(count(t)?))
}

/// Estimates the number of values in the matrices of the decoder and the vision tower.
fn estimate(config: &Map<String, Value>) -> Option<u64> {
    let text = config.get("text_config").and_then(Value::as_object).unwrap_or(config);
    let number = |of: &Map<String, Value>, key: &str| of.get(key).and_then(Value::as_u64);
    let hidden = number(text, "hidden_size")?;
    let layers = number(text, "num_hidden_layers")?;
    let intermediate = number(text, "intermediate_size")?;
    let vocabulary = number(text, "vocab_size")?;
    let heads = number(text, "num_attention_heads")?.max(1);
    let head_dim = number(text, "head_dim").unwrap_or(hidden / heads);
    let kv_heads = number(text, "num_key_value_heads").unwrap_or(heads);
    let attention = (2 * heads + 2 * kv_heads).checked_mul(head_dim)?.checked_mul(hidden)?;
    let layer = attention.checked_add(3_u64.checked_mul(hidden)?.checked_mul(intermediate)?)?;
    let tied = [text, config].iter().any(|of| of.get("tie_word_embeddings").and_then(Value::as_bool) == Some(true));
    let embeddings = vocabulary.checked_mul(hidden)?.checked_mul(if tied { 1 } else { 2 })?;
    let tower = config.get("vision_config").and_then(Value::as_object).and_then(|v| {
        let hidden = number(v, "hidden_size")?;
        let depth = number(v, "depth")?;
        let mlp = 3 * hidden.checked_mul(number(v, "intermediate_size").unwrap_or(4 * hidden))?;
        depth.checked_mul((4 * hidden.checked_mul(hidden)?).checked_add(mlp)?)
    });
    layers.checked_mul(layer)?.checked_add(embeddings)?.checked_add(tower.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes a file with these shapes in its header and without weights.
    fn write_header(path: &Path, shapes: &[&[u64]]) {
        let tensor = |shape: &&[u64]| serde_json::json!({"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]});
        let tensors = shapes.iter().enumerate().map(|(i, s)| (format!("t{i}"), tensor(s)));
        let mut header: Map<String, Value> = tensors.collect();
        header.insert("__metadata__".into(), serde_json::json!({"format": "pt"}));
        let header = Value::Object(header).to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.into_bytes());
        std::fs::write(path, bytes).unwrap();
    }

    #[test]
    fn parameters_are_counted_from_headers() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(count_parameters(dir.path()), None);
        write_header(&dir.path().join("model.safetensors"), &[&[3, 4], &[5], &[]]);
        assert_eq!(count_parameters(dir.path()), Some(18));
        // With an index, exactly its files count, each once.
        write_header(&dir.path().join("a.safetensors"), &[&[1_000_000, 1_000]]);
        write_header(&dir.path().join("b.safetensors"), &[&[7]]);
        let index = r#"{"metadata":{},"weight_map":{"x":"a.safetensors","y":"a.safetensors","z":"b.safetensors"}}"#;
        std::fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
        assert_eq!(count_parameters(dir.path()), Some(1_000_000_007));
        // Invalid files and absurd sizes yield nothing.
        for bytes in [&b"version https://git-lfs.github.com/spec/v1\n"[..], &[255; 8], b"\x05", b""] {
            std::fs::write(dir.path().join("b.safetensors"), bytes).unwrap();
            assert_eq!(count_parameters(dir.path()), None, "{bytes:?}");
        }
        write_header(&dir.path().join("b.safetensors"), &[&[u64::MAX, 2]]);
        assert_eq!(count_parameters(dir.path()), None);
    }

    #[test]
    fn parameters_are_estimated_from_the_config() {
        let dir = tempfile::tempdir().unwrap();
        // Qwen2.5-VL-7B has 8.29 B parameters.
        let config = r#"{"hidden_size":3584,"num_hidden_layers":28,"intermediate_size":18944,"vocab_size":152064,"num_attention_heads":28,
            "num_key_value_heads":4,"tie_word_embeddings":false,"vision_config":{"hidden_size":1280,"depth":32,"intermediate_size":3420}}"#;
        std::fs::write(dir.path().join("config.json"), config).unwrap();
        let ratio = count_parameters(dir.path()).unwrap() as f64 / 8.29e9;
        assert!((0.98..1.02).contains(&ratio), "{ratio}");
        std::fs::write(dir.path().join("config.json"), r#"{"text_config":{"hidden_size":18446744073709551615}}"#)
            .unwrap();
        assert_eq!(count_parameters(dir.path()), None);
    }

    #[test]
    fn counts_are_formatted() {
        assert_eq!([1_260_000, 499_999_999, 8_292_166_656].map(format_count), ["1.3 M", "500.0 M", "8.3 B"]);
    }
}
