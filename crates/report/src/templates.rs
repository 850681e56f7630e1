//! The pages' templates. Their names end in `.html`, so every value is escaped unless it is marked safe; safe are our own style sheets,
//! scripts, and JSON in which no `<` is left. Must not know: what the pages show.

use minijinja::Environment;
use serde::Serialize;

use crate::ReportError;

/// What a page without a script may load: images that are data, its own style.
pub(crate) const POLICY: &str = "default-src 'none'; img-src data:; style-src 'unsafe-inline'";
/// The same of a page with a script of its own.
pub(crate) const SCRIPT_POLICY: &str =
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'";

/// Fills the template `name`.
///
/// # Errors
/// [`ReportError::Template`]: a template and its values do not fit each other.
pub(crate) fn render(name: &'static str, values: impl Serialize) -> Result<String, ReportError> {
    let mut all = Environment::new();
    all.set_trim_blocks(true);
    all.set_lstrip_blocks(true);
    for (name, text) in [
        ("base.html", include_str!("pages/base.html")),
        ("parts.html", include_str!("pages/parts.html")),
        ("report.html", include_str!("pages/report.html")),
        ("samples.html", include_str!("pages/samples.html")),
    ] {
        all.add_template(name, text).map_err(ReportError::Template)?;
    }
    all.get_template(name).and_then(|t| t.render(values)).map_err(ReportError::Template)
}
