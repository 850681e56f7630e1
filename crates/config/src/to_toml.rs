//! Conversion of a configuration to TOML text that loads again.

use toml::Table;

use crate::schema::Config;

/// Numbers below this are written with an exponent.
const EXPONENT_BELOW: f64 = 1e-4;

impl Config {
    /// Returns the complete configuration as TOML, every key with its value.
    ///
    /// # Errors
    /// Returns an error if a value cannot be represented in TOML.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        let text = toml::to_string(self)?;
        let short: String = text.lines().map(|line| with_exponent(line) + "\n").collect();
        // A line of a multi-line string may look like a key: keep the short form only if all values are the same.
        let parsed = |t: &str| t.parse::<Table>().ok();
        Ok(if parsed(&short).is_some_and(|t| Some(t) == parsed(&text)) { short } else { text })
    }
}

/// Rewrites `eps = 0.00000001` as `eps = 1e-8`.
fn with_exponent(line: &str) -> String {
    let small = line.split_once(" = ").and_then(|(key, value)| {
        let number: f64 = value.starts_with("0.0").then(|| value.parse().ok())??;
        (number < EXPONENT_BELOW && number > 0.0).then(|| format!("{key} = {number:e}"))
    });
    small.unwrap_or_else(|| line.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_numbers_are_written_with_an_exponent() {
        let mut c = Config::default();
        c.learner.optimizer.lr = 1e-6;
        c.data.question = "What?\nlr = 0.00001\nend".into();
        let text = c.to_toml().unwrap();
        assert_eq!(toml::from_str::<Config>(&text).unwrap(), c);
        c.data.question = "What?".into();
        let text = c.to_toml().unwrap();
        assert_eq!(toml::from_str::<Config>(&text).unwrap(), c);
        for line in ["lr = 1e-6\n", "eps = 1e-8\n", "lr = 0.001\n", "question = \"What?\"\n", "max_eps = 1e-6\n"] {
            assert!(text.contains(line), "{line}: {text}");
        }
        assert!(!text.contains("0.00000001"), "{text}");
    }
}
