//! `unveil data …`: synthesise, import, check, describe.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::{Subcommand, ValueEnum};
use unveil_data::import::voc::{self, ClassFilter, VocOptions};
use unveil_data::records::RecordFile;
use unveil_data::synth::{self, SynthSpec};
use unveil_data::{check, stats};

/// Annotation formats that can be imported.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Format {
    /// Pascal VOC.
    Voc,
}

#[derive(Subcommand)]
pub enum DataCommand {
    /// Draws synthetic records with exact boxes.
    Synth {
        /// Number of records (a tenth each for val and test).
        #[arg(long)]
        n: usize,
        /// Seed; the same seed gives the same bytes.
        #[arg(long, default_value_t = 0)]
        seed: u64,
        /// Output folder.
        #[arg(long)]
        out: PathBuf,
        /// Side of the images in pixels.
        #[arg(long, default_value_t = 96)]
        size: u32,
        /// Share of records without a finding.
        #[arg(long)]
        no_finding: Option<f64>,
        /// Share of records with two or three lesions.
        #[arg(long)]
        several: Option<f64>,
    },
    /// Imports another format.
    Import {
        /// Format.
        format: Format,
        /// Source folder.
        #[arg(long)]
        src: PathBuf,
        /// Record file to write.
        #[arg(long)]
        out: PathBuf,
        /// Only this split.
        #[arg(long)]
        split: Option<String>,
        /// Only this class; images without it become "no finding".
        #[arg(long)]
        class: Option<String>,
        /// Words for that class.
        #[arg(long, requires = "class")]
        category: Option<String>,
        /// Written to every record.
        #[arg(long, default_value = "")]
        modality: String,
        /// Asked of every image.
        #[arg(long)]
        question: Option<String>,
    },
    /// Looks for faults; one JSON line each, exit code 1 when there is an error among them.
    Check {
        /// Record file.
        data: PathBuf,
    },
    /// Counts and sizes, as one JSON object.
    Stats {
        /// Record file.
        data: PathBuf,
    },
}

/// Runs one command.
pub fn run(command: &DataCommand) -> anyhow::Result<()> {
    match command {
        DataCommand::Synth { n, seed, out, size, no_finding, several } => {
            let mut spec = SynthSpec { size: *size, ..SynthSpec::new(*n, *seed) };
            spec.no_finding = no_finding.unwrap_or(spec.no_finding);
            spec.several = several.unwrap_or(spec.several);
            let records = synth::generate(&spec, out, |_, _| ())?;
            let file = out.join(synth::RECORDS_FILE);
            println!("{}", serde_json::json!({ "records": records.len(), "file": file }));
            Ok(())
        }
        DataCommand::Import { format: Format::Voc, src, out, split, class, category, modality, question } => {
            let filter = class.as_ref().map(|class| ClassFilter {
                class: class.clone(),
                category: category.clone().unwrap_or_else(|| class.clone()),
            });
            let options = VocOptions {
                split: split.clone(),
                class: filter,
                modality: modality.clone(),
                question: question.clone(),
            };
            let report = voc::import(src, out, &options)?;
            for left in &report.left_out {
                eprintln!("left out: {} object {} ({}): {}", left.file, left.object, left.label, left.reason);
            }
            println!("{}", serde_json::to_string(&report)?);
            Ok(())
        }
        DataCommand::Check { data } => checked(data),
        DataCommand::Stats { data } => {
            println!("{}", serde_json::to_string(&stats::stats(&RecordFile::load(data)?))?);
            Ok(())
        }
    }
}

fn checked(data: &Path) -> anyhow::Result<()> {
    let findings = check::check_file(data).with_context(|| format!("checking {}", data.display()))?;
    let mut errors = 0;
    for finding in &findings {
        errors += usize::from(finding.severity == check::Severity::Error);
        println!("{}", serde_json::to_string(finding)?);
    }
    if errors > 0 {
        bail!("{}: {errors} of {} findings are errors", data.display(), findings.len());
    }
    Ok(())
}
