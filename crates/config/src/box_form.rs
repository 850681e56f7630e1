//! Serialisation of a box form or `auto`.

use serde::{Deserialize, Deserializer, Serializer, de::Error};
use unveil_core::BoxForm;

/// Serialises the name of the form, or `auto` for `None`.
pub(crate) fn serialize<S: Serializer>(form: &Option<BoxForm>, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(form.map_or("auto", BoxForm::name))
}

/// Deserialises `auto` (`None`) or the name of a form.
pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Option<BoxForm>, D::Error> {
    match String::deserialize(d)?.as_str() {
        "auto" => Ok(None),
        name => name.parse().map(Some).map_err(|e| D::Error::custom(format!("{e}, or auto"))),
    }
}
