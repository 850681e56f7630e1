//! `unveil data …`: synthesise, import, check, describe, collect, review.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::builder::PossibleValuesParser;
use clap::{Args, Subcommand};
use unveil_cli::{ConfigArgs, Stop, run_role};
use unveil_collect::{CollectError, Prompts};
use unveil_config::{Config, ConfigError};
use unveil_core::Record;
use unveil_data::fits::{Limits, Use, misfits};
use unveil_data::import::{self, ClassFilter, Format, ImportOptions, ImportReport};
use unveil_data::prepare::Preparer;
use unveil_data::records::RecordFile;
use unveil_data::root::Reach;
use unveil_data::synth::{self, SynthSpec};
use unveil_data::{check, stats};

use crate::roles::context;

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
    /// Imports another format; the report is one JSON object.
    Import(ImportArgs),
    /// Looks for faults; one JSON line each, exit code 1 when there is an error among them. Ends with a line on stderr that says how much
    /// was looked at.
    Check {
        /// Record file.
        data: PathBuf,
        /// Also names images that look alike across splits.
        #[arg(long)]
        near: bool,
        /// Images may lie outside the folder of the record file, as with data.outside = true.
        #[arg(long)]
        outside: bool,
        /// A table for people instead of JSON lines.
        #[arg(long)]
        table: bool,
        /// Also whether every record fits this model: length of prompt and answer, image sizes, special tokens.
        #[arg(long, value_name = "DIR")]
        model: Option<PathBuf>,
        #[command(flatten)]
        config: ConfigArgs,
    },
    /// Counts and sizes, as one JSON object.
    Stats {
        /// Record file.
        data: PathBuf,
        /// Images may lie outside the folder of the record file, as with data.outside = true.
        #[arg(long)]
        outside: bool,
    },
    /// Asks a vision model about every record with a region, by two prompts; goes on where an earlier run ended.
    Collect(CollectArgs),
    /// Makes the final records of what a person decided on the pages of `collect`.
    Review {
        /// Output folder of `collect`.
        #[arg(long)]
        dir: PathBuf,
        /// Files that the pages hand back; of several decisions about a record the last counts.
        #[arg(long, required = true, num_args = 1..)]
        decisions: Vec<PathBuf>,
        /// Record file to write.
        #[arg(long)]
        out: PathBuf,
        /// Also writes answers that nobody decided about.
        #[arg(long)]
        keep_unreviewed: bool,
    },
}

#[derive(Args)]
pub struct ImportArgs {
    /// Format.
    #[arg(value_parser = PossibleValuesParser::new(Format::ALL.map(Format::name)))]
    format: String,
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
    /// Written to every record in place of what the data set says.
    #[arg(long)]
    modality: Option<String>,
    /// Asked of every image that brings no question of its own.
    #[arg(long)]
    question: Option<String>,
    /// Splits by patient, or image, instead of the published ones.
    #[arg(long)]
    resplit: bool,
    /// Folder of images that are not in the source folder.
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,
    /// Task of the benchmark that the files belong to (med-grit: VG, ROC, RC, MIA), in place of what their names say.
    #[arg(long)]
    task: Option<String>,
    /// Leaves out images that are also in another split: the copy in test stays before val before train.
    #[arg(long)]
    drop_leaks: bool,
}

#[derive(Args)]
pub struct CollectArgs {
    /// Record file.
    #[arg(long, required_unless_present = "write_prompts")]
    data: Option<PathBuf>,
    /// Output folder: journal, records and pages.
    #[arg(long, required_unless_present = "write_prompts")]
    out: Option<PathBuf>,
    #[command(flatten)]
    config: ConfigArgs,
    /// Writes the built-in prompts into DIR, to be changed and named by `collect.diagnosis_prompt` and `collect.reflection_prompt`.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["data", "out"])]
    write_prompts: Option<PathBuf>,
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
        DataCommand::Import(args) => imported(args),
        DataCommand::Check { data, near, outside, table, model, config } => {
            let reach = Reach::new(*outside);
            // Its errors begin with the file.
            let mut found = check::check_file(data, reach, *near)?;
            if let Some(model) = model {
                let more = unfit(data, reach, model, &config.load()?)?;
                found.findings = check::joined(std::mem::take(&mut found.findings), more);
            }
            checked(data, &found, *table)
        }
        DataCommand::Stats { data, outside } => {
            let records = RecordFile::load_with(data, Reach::new(*outside))?;
            println!("{}", serde_json::to_string(&stats::stats(&records))?);
            Ok(())
        }
        DataCommand::Collect(args) => collected(args),
        DataCommand::Review { dir, decisions, out, keep_unreviewed } => {
            let report = unveil_collect::review(dir, decisions, out, *keep_unreviewed)?;
            for (reason, ids) in &report.ignored {
                eprintln!("not followed: {reason}: {}", ids.join(", "));
            }
            println!("{}", serde_json::to_string(&report)?);
            Ok(())
        }
    }
}

fn imported(args: &ImportArgs) -> anyhow::Result<()> {
    let class = args.class.as_ref().map(|class| ClassFilter {
        class: class.clone(),
        category: args.category.clone().unwrap_or_else(|| class.clone()),
    });
    let options = ImportOptions {
        split: args.split.clone(),
        class,
        modality: args.modality.clone(),
        question: args.question.clone(),
        resplit: args.resplit,
        images: args.images.clone(),
        task: args.task.clone(),
        drop_leaks: args.drop_leaks,
    };
    let report = import::import(args.format.parse()?, &args.src, &args.out, &options)?;
    warn(&report);
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}

/// Says on stderr what was left out and what leaks; the first of each kind in words, all in the report.
fn warn(report: &ImportReport) {
    for note in &report.notes {
        eprintln!("warning: {note}");
    }
    for left in report.left_out.iter().take(20) {
        eprintln!("left out: {} object {} ({}): {}", left.file, left.object, left.label, left.reason);
    }
    if report.left_out_count() > 20 {
        for (reason, count) in &report.left_out_by_reason {
            eprintln!("left out: {count} in all: {reason}");
        }
    }
    if let Some(l) = report.leaks.first() {
        eprintln!(
            "warning: {} records show an image that is also in another split, e.g. \"{}\" ({}) and \"{}\" ({}): --drop-leaks keeps the \
             copy in test before val before train",
            report.leaks.len(),
            l.copy,
            l.copy_split,
            l.id,
            l.split
        );
    }
    if let Some(patient) = report.split_patients.first() {
        eprintln!(
            "warning: {} patients have images in more than one split, e.g. \"{patient}\": --resplit keeps them together",
            report.split_patients.len()
        );
    }
}

/// Records that do not fit a model. Those of the validation and test splits are only asked, all others are also learnt.
fn unfit(data: &Path, reach: Reach, model: &Path, config: &Config) -> anyhow::Result<Vec<check::Finding>> {
    let preparer = Preparer::load_with(model, config.model.boxes)?;
    let records = RecordFile::load_some(data, reach, |_| ())?;
    let limits = Limits {
        context: context(model)?,
        new_tokens: config.rollout.max_new_tokens,
        question: config.data.question.clone(),
    };
    let asked = [&config.data.val_split, &config.data.test_split];
    let used = |r: &Record| if asked.contains(&&r.split) { Use::Asked } else { Use::Trained };
    Ok(misfits(&records, &preparer, &limits, used, &|| false))
}

fn checked(data: &Path, checked: &check::Checked, table: bool) -> anyhow::Result<()> {
    if table {
        print!("{}", as_table(&checked.findings));
    } else {
        for finding in &checked.findings {
            println!("{}", serde_json::to_string(finding)?);
        }
    }
    let [errors, warnings] = [check::Severity::Error, check::Severity::Warning].map(|s| checked.count(s));
    if errors > 0 {
        bail!("{}: {errors} of {} findings are errors", data.display(), checked.findings.len());
    }
    let warnings = match warnings {
        0 => String::new(),
        1 => ", 1 warning".to_owned(),
        n => format!(", {n} warnings"),
    };
    eprintln!("ok: {} records, {} images decoded{warnings}", checked.records, checked.images);
    Ok(())
}

/// Findings in columns: how bad, the line, the record, what is wrong.
fn as_table(findings: &[check::Finding]) -> String {
    let severity = |f: &check::Finding| match f.severity {
        check::Severity::Error => "error",
        check::Severity::Warning => "warning",
    };
    let line = |f: &check::Finding| f.file.rsplit(':').next().unwrap_or_default().to_owned();
    let width = |of: &dyn Fn(&check::Finding) -> usize| findings.iter().map(of).max().unwrap_or(0);
    let (lines, ids) = (width(&|f| line(f).chars().count()), width(&|f| plain(&f.id).chars().count()));
    let row = |f: &check::Finding| {
        format!("{:<7}  {:>lines$}  {:<ids$}  {}\n", severity(f), line(f), plain(&f.id), plain(&f.what))
    };
    findings.iter().map(row).collect()
}

/// A text of a data set without what a terminal would obey.
fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

fn collected(args: &CollectArgs) -> anyhow::Result<()> {
    if let Some(dir) = &args.write_prompts {
        std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        let files = ["diagnosis.txt", "reflection.txt"].map(|n| dir.join(n));
        for (file, text) in files.iter().zip(Prompts::BUILT_IN) {
            unveil_core::write_atomic(file, text.as_bytes()).with_context(|| format!("writing {}", file.display()))?;
        }
        println!("{}", serde_json::json!({ "prompts": files }));
        return Ok(());
    }
    let (Some(data), Some(out)) = (&args.data, &args.out) else { bail!("--data and --out are needed") };
    let settings = args.config.load()?.collect;
    let key = unveil_config::secret("collect.key_env", &settings.key_env, "")?;
    let live = std::io::stderr().is_terminal();
    let told = |done: usize, of: usize, cost: f64| {
        if live || done == of || done.is_multiple_of(100) {
            eprint!(
                "{}{done} of {of} answered, {cost:.4} spent{}",
                if live { "\r" } else { "" },
                if live && done < of { "" } else { "\n" }
            );
        }
    };
    let summary = run_role(false, 2, |cancel| async {
        unveil_collect::collect(data, out, &settings, key, cancel, told).await.map_err(wrong_settings)
    })?;
    println!("{}", serde_json::to_string(&summary)?);
    for failure in summary.failed.iter().take(20) {
        eprintln!("no answer: {}: {}", failure.id, failure.reason);
    }
    match &summary.stopped {
        Some(unveil_collect::Stop::Interrupted) => Err(Stop::Interrupted.into()),
        Some(unveil_collect::Stop::Budget) => bail!(
            "the budget of {} is spent ({} of {} records are answered): raise collect.budget and run this again",
            settings.budget,
            summary.answered,
            summary.to_ask
        ),
        Some(unveil_collect::Stop::Refused { answer: said } | unveil_collect::Stop::Down { failure: said }) => {
            bail!("{}: {said}; what was answered is kept: run this again", settings.base_url)
        }
        None if !summary.failed.is_empty() => {
            bail!("{} of {} records have no answer: run this again", summary.failed.len(), summary.to_ask)
        }
        None => Ok(()),
    }
}

/// Settings that are missing are wrong configuration (exit code 2), not a failure.
fn wrong_settings(e: CollectError) -> anyhow::Error {
    match e {
        CollectError::NoEndpoint => ConfigError::Invalid(vec![e.to_string()]).into(),
        other => other.into(),
    }
}
