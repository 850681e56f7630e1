//! Dtypes of weights: their names in files and configurations, and libtorch's kinds.

use tch::Kind;
use unveil_core::Dtype;

/// Returns libtorch's kind of a configured dtype.
pub fn weight_kind(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::Float32 => Kind::Float,
        Dtype::Bfloat16 => Kind::BFloat16,
    }
}

/// Parses the name of a dtype in which weights can be stored.
///
/// # Errors
/// Returns a message that lists the supported dtypes.
pub fn parse_dtype(name: &str) -> Result<Kind, String> {
    match name {
        "float32" => Ok(Kind::Float),
        "bfloat16" => Ok(Kind::BFloat16),
        "float16" => Ok(Kind::Half),
        other => Err(format!("dtype `{other}` is not supported, expected float32, bfloat16 or float16")),
    }
}

/// Returns the name of a dtype in which weights are stored: the inverse of [`parse_dtype`].
pub fn dtype_name(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        _ => "float32",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_inverse_and_unknown_ones_refused() {
        for name in ["float32", "bfloat16", "float16"] {
            assert_eq!(parse_dtype(name).map(dtype_name).as_deref(), Ok(name));
        }
        for dtype in [Dtype::Float32, Dtype::Bfloat16] {
            let name = serde_json::to_value(dtype).expect("a name");
            assert_eq!(name, dtype_name(weight_kind(dtype)));
        }
        for unknown in ["float64", "torch.float32", ""] {
            let e = parse_dtype(unknown).unwrap_err();
            assert!(e.contains(&format!("`{unknown}`")) && e.contains("bfloat16"), "{e}");
        }
    }
}
