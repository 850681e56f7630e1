//! Progress of a stage on stderr: a bar with rate, reward components and remaining time on a terminal, else a line every few seconds.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use unveil_core::stderr_line;

/// Interval between progress lines where stderr is not a terminal.
const PRINT_INTERVAL: Duration = Duration::from_secs(5);

/// Progress of one stage, on stderr.
#[derive(Debug)]
pub struct StageProgress {
    name: String,
    total: u64,
    unit: &'static str,
    started: Instant,
    first: Option<u64>,
    bar: Option<ProgressBar>,
    printed: Option<Instant>,
}

impl StageProgress {
    /// Starts a stage of `total` steps; the rate counts the `unit` (images, responses) passed to [`StageProgress::update`].
    pub fn new(name: &str, total: u64, unit: &'static str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(total);
            let style = ProgressStyle::with_template("{prefix:>9} {bar:24} {pos}/{len} {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            bar.set_style(style);
            bar.set_prefix(name.to_owned());
            bar
        });
        Self { name: name.to_owned(), total, unit, started: Instant::now(), first: None, bar, printed: None }
    }

    /// Shows step `step`; `done` is the number of units this process has processed, `parts` are named numbers to show.
    pub fn update(&mut self, step: u64, done: u64, parts: &[(&str, f64)]) {
        let first = *self.first.get_or_insert(step.saturating_sub(1));
        let elapsed = self.started.elapsed().as_secs_f64().max(1e-3);
        let steps = step.saturating_sub(first).max(1);
        let remaining = elapsed / steps as f64 * self.total.saturating_sub(step) as f64;
        let shown: Vec<String> = parts.iter().map(|(k, v)| format!("{k} {v:.3}")).collect();
        let message = format!(
            "{:.1} {}/s  {}  {} left",
            done as f64 / elapsed,
            self.unit,
            shown.join("  "),
            format_duration(remaining)
        );
        if let Some(bar) = &self.bar {
            bar.set_position(step);
            bar.set_message(message);
        } else if step >= self.total || self.printed.is_none_or(|t| t.elapsed() > PRINT_INTERVAL) {
            stderr_line(&format!("{:>9} {step}/{}  {message}", self.name, self.total));
            self.printed = Some(Instant::now());
        }
    }

    /// Prints a line above the bar.
    pub fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => _ = stderr_line(text),
        }
    }

    /// Ends the bar, leaving its last state on the screen.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }
}

/// Formats seconds as hours and minutes, or as minutes and seconds.
fn format_duration(seconds: f64) -> String {
    let s = seconds.round().clamp(0.0, 1e9) as u64;
    if s >= 3600 { format!("{}h{:02}m", s / 3600, s / 60 % 60) } else { format!("{}m{:02}s", s / 60, s % 60) }
}

#[cfg(test)]
mod tests {
    #[test]
    fn durations_are_formatted() {
        assert_eq!(super::format_duration(59.6), "1m00s");
        assert_eq!(super::format_duration(3725.0), "1h02m");
    }
}
