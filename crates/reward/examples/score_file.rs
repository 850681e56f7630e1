//! Scores a file of responses with the rewards of a configuration, in this process and without libtorch.
//!
//! ```sh
//! cargo run -p unveil-reward --example score_file -- REWARDS.toml RESPONSES.jsonl
//! ```
//!
//! REWARDS.toml is a configuration of which only the keys about rewards and answers matter:
//!
//! ```toml
//! [reward.localization]
//! weight = 1.0
//! [reward.category]
//! weight = 0.5
//! ```
//!
//! A line of RESPONSES.jsonl is a record with a response and its index; lines with the same `id` are a group:
//!
//! ```json
//! {"id": "a", "image_size": [96, 96], "category": "nodule", "boxes": [[16, 16, 32, 32]], "index": 0, "response": "[16,16,32,32] nodule"}
//! ```

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "an example prints its results")]

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use unveil_core::{Breakdown, Component};
use unveil_reward::{Scorers, read_responses};

type BoxError = Box<dyn std::error::Error>;

/// Writes a line for each response, then the mean of each component over the responses for which it has a value.
async fn score_file(rewards: &Path, responses: &Path, out: &mut dyn Write) -> Result<(), BoxError> {
    let config = unveil_config::load(Some(rewards), &[])?;
    let scorers = Arc::new(Scorers::load(&config)?);
    let mut values: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for (group, _line_numbers) in read_responses(&config, responses)? {
        // A group is scored as a whole: a component that is masked for one response is dropped for all of them.
        for breakdown in Arc::clone(&scorers).score(Arc::new(group)).await {
            writeln!(out, "{}", describe(&breakdown))?;
            for (name, component) in breakdown.components {
                values.entry(name).or_default().extend(component.value);
            }
        }
    }
    for (name, values) in values.iter().filter(|(_, values)| !values.is_empty()) {
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        writeln!(out, "mean {name} {mean:.3} of {}", values.len())?;
    }
    Ok(())
}

/// Describes a breakdown: `ID INDEX total TOTAL, NAME VALUE, …`.
fn describe(breakdown: &Breakdown) -> String {
    let mut line = format!("{} {} total {}", breakdown.id, breakdown.index, number(breakdown.total));
    for (name, component) in &breakdown.components {
        line += &format!(", {name} {}", value_or_reason(component));
    }
    line
}

/// Returns the value, or why there is none: a masked component is not 0.
fn value_or_reason(component: &Component) -> String {
    match &component.reason {
        Some(reason) if component.masked => format!("masked ({reason:?})"),
        _ => number(component.value),
    }
}

fn number(value: Option<f64>) -> String {
    value.map_or_else(|| "masked".to_owned(), |v| format!("{v:.3}"))
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [rewards, responses] = args.as_slice() else {
        return Err("usage: score_file REWARDS.toml RESPONSES.jsonl".into());
    };
    score_file(Path::new(rewards), Path::new(responses), &mut std::io::stdout()).await
}
