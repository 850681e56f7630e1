//! A box form or `auto`, as one word of the configuration.

use serde::{Deserialize, Deserializer, Serializer, de::Error};
use unveil_core::BoxForm;

/// Writes `auto` for none.
pub(crate) fn serialize<S: Serializer>(form: &Option<BoxForm>, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(form.map_or("auto", BoxForm::name))
}

/// Reads `auto` or the name of a form.
pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Option<BoxForm>, D::Error> {
    match String::deserialize(d)?.as_str() {
        "auto" => Ok(None),
        name => name.parse().map(Some).map_err(|e| D::Error::custom(format!("{e}, or auto"))),
    }
}
