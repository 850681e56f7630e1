//! Names of dtypes on the wire, which both ends of the protocol use.

use tch::Kind;

/// Dtypes in which weights are sent, by name.
const WIRE_DTYPES: [(&str, Kind); 3] = [("F32", Kind::Float), ("BF16", Kind::BFloat16), ("F16", Kind::Half)];

/// Returns the wire name of a dtype; `None` if weights of that dtype cannot be sent.
pub(crate) fn wire_name(kind: Kind) -> Option<&'static str> {
    WIRE_DTYPES.iter().find(|(_, k)| *k == kind).map(|(name, _)| *name)
}

/// Returns the dtype with a wire name.
///
/// # Errors
/// Returns a message that lists the known names.
pub(crate) fn wire_kind(name: &str) -> Result<Kind, String> {
    WIRE_DTYPES.iter().find(|(n, _)| *n == name).map(|(_, kind)| *kind).ok_or_else(|| {
        let known = WIRE_DTYPES.map(|(n, _)| n).join(", ");
        format!("its dtype `{name}` is not one of {known}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_inverse_and_unknown_ones_refused() {
        for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
            assert_eq!(wire_name(kind).map(wire_kind), Some(Ok(kind)));
        }
        assert_eq!(wire_name(Kind::Double), None);
        assert_eq!(wire_kind("F64"), Err("its dtype `F64` is not one of F32, BF16, F16".to_owned()));
    }
}
