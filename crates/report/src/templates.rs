//! Templates of the pages. Their names end in `.html`, so every value is escaped unless it is marked safe. Only our own style sheets and
//! scripts, and JSON without `<`, are marked safe.

use minijinja::Environment;
use serde::Serialize;

use crate::ReportError;

/// Content security policy of a page without a script: inline images and style only.
pub(crate) const POLICY: &str = "default-src 'none'; img-src data:; style-src 'unsafe-inline'";
/// Content security policy of a page with an inline script.
pub(crate) const SCRIPT_POLICY: &str =
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'";

/// Renders the template `name`.
///
/// # Errors
/// Returns [`ReportError::Template`] if the template does not fit `values`.
pub(crate) fn render(name: &'static str, values: impl Serialize) -> Result<String, ReportError> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    for (name, text) in [
        ("base.html", include_str!("pages/base.html")),
        ("parts.html", include_str!("pages/parts.html")),
        ("report.html", include_str!("pages/report.html")),
        ("samples.html", include_str!("pages/samples.html")),
    ] {
        environment.add_template(name, text).map_err(ReportError::Template)?;
    }
    environment.get_template(name).and_then(|t| t.render(values)).map_err(ReportError::Template)
}
