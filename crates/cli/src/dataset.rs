//! `unveil data …`: synthesis, import, checks, statistics, collection and review of records.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::builder::PossibleValuesParser;
use clap::{Args, Subcommand};
use unveil_cli::{ConfigArgs, Stop, run_role};
use unveil_collect::{CollectError, Prompts};
use unveil_config::{Config, ConfigError};
use unveil_core::Record;
use unveil_data::finding::{Finding, Severity};
use unveil_data::image_root::PathPolicy;
use unveil_data::records::RecordFile;
use unveil_datasets::import::{self, ClassFilter, Format, ImportOptions, ImportReport};
use unveil_datasets::synth::{self, SynthSpec};
use unveil_datasets::{check, stats};
use unveil_preprocess::context_fit::{RecordUse, TokenLimits, find_misfits};
use unveil_preprocess::preprocessor::Preprocessor;

use crate::roles::context_length;

#[derive(Subcommand)]
pub(crate) enum DataCommand {
    /// Generates synthetic records with exact boxes.
    Synth {
        /// Number of records, a tenth each for val and test.
        #[arg(long)]
        n: usize,
        /// Seed; the same seed gives the same bytes.
        #[arg(long, default_value_t = 0)]
        seed: u64,
        /// Output directory.
        #[arg(long)]
        out: PathBuf,
        /// Side length of the images in pixels.
        #[arg(long, default_value_t = 96)]
        size: u32,
        /// Fraction of records without a finding.
        #[arg(long)]
        no_finding: Option<f64>,
        /// Fraction of records with two or three lesions.
        #[arg(long)]
        several: Option<f64>,
    },
    /// Imports another format; prints a report as one JSON object.
    Import(ImportArgs),
    /// Checks a record file: prints one JSON line per finding, exits with 1 on errors, else prints the number of checked records and images on
    /// stderr.
    Check {
        /// Record file.
        data: PathBuf,
        /// Also reports near-duplicate images across splits.
        #[arg(long)]
        near: bool,
        /// Allows images outside the directory of the record file, like data.outside = true.
        #[arg(long)]
        outside: bool,
        /// Prints a readable table instead of JSON lines.
        #[arg(long)]
        table: bool,
        /// Also checks that every record fits this model: length of prompt and answer, image size, special tokens.
        #[arg(long, value_name = "DIR")]
        model: Option<PathBuf>,
        #[command(flatten)]
        config: ConfigArgs,
    },
    /// Prints counts and sizes as one JSON object.
    Stats {
        /// Record file.
        data: PathBuf,
        /// Allows images outside the directory of the record file, like data.outside = true.
        #[arg(long)]
        outside: bool,
    },
    /// Collects answers of a vision model for every record with a region, with two prompts; continues an earlier run.
    Collect(CollectArgs),
    /// Writes the final records from the decisions made on the pages of `collect`.
    Review {
        /// Output directory of `collect`.
        #[arg(long)]
        dir: PathBuf,
        /// Decision files downloaded from the pages; the last decision about a record counts.
        #[arg(long, required = true, num_args = 1..)]
        decisions: Vec<PathBuf>,
        /// Record file to write.
        #[arg(long)]
        out: PathBuf,
        /// Also writes answers without a decision.
        #[arg(long)]
        keep_unreviewed: bool,
    },
}

#[derive(Args)]
pub(crate) struct ImportArgs {
    /// Format.
    #[arg(value_parser = PossibleValuesParser::new(Format::ALL.map(Format::name)))]
    format: String,
    /// Source directory.
    #[arg(long)]
    src: PathBuf,
    /// Record file to write.
    #[arg(long)]
    out: PathBuf,
    /// Imports this split only.
    #[arg(long)]
    split: Option<String>,
    /// Imports this class only; images without it become "no finding".
    #[arg(long)]
    class: Option<String>,
    /// Category name for that class.
    #[arg(long, requires = "class")]
    category: Option<String>,
    /// Modality of every record, instead of that in the data set.
    #[arg(long)]
    modality: Option<String>,
    /// Question for images without one.
    #[arg(long)]
    question: Option<String>,
    /// Makes new splits by patient, or by image, instead of using the published ones.
    #[arg(long)]
    resplit: bool,
    /// Directory of the images, if they are not in the source directory.
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,
    /// Task of the benchmark files (med-grit: VG, ROC, RC, MIA), instead of the one in their names.
    #[arg(long)]
    task: Option<String>,
    /// Drops copies of images in several splits; keeps the copy in test, else val, else train.
    #[arg(long)]
    drop_leaks: bool,
}

#[derive(Args)]
pub(crate) struct CollectArgs {
    /// Record file.
    #[arg(long, required_unless_present = "write_prompts")]
    data: Option<PathBuf>,
    /// Output directory for journal, records and pages.
    #[arg(long, required_unless_present = "write_prompts")]
    out: Option<PathBuf>,
    #[command(flatten)]
    config: ConfigArgs,
    /// Writes the built-in prompts to DIR, as templates for `collect.diagnosis_prompt` and `collect.reflection_prompt`.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["data", "out"])]
    write_prompts: Option<PathBuf>,
}

/// Runs `unveil data …`.
pub(crate) fn run(command: &DataCommand) -> anyhow::Result<()> {
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
        DataCommand::Import(args) => import_records(args),
        DataCommand::Check { data, near, outside, table, model, config } => {
            let policy = PathPolicy::new(*outside);
            // Its errors name the file.
            let config = config.load()?;
            let mut report = check::check_file(data, policy, *near, &config.data.question)?;
            if let Some(model) = model {
                let misfits = find_model_misfits(data, policy, model, &config)?;
                report.findings = check::merge_findings(std::mem::take(&mut report.findings), misfits);
            }
            print_check_report(data, &report, *table)
        }
        DataCommand::Stats { data, outside } => {
            let records = RecordFile::load_with(data, PathPolicy::new(*outside))?;
            println!("{}", serde_json::to_string(&stats::stats(&records))?);
            Ok(())
        }
        DataCommand::Collect(args) => collect_answers(args),
        DataCommand::Review { dir, decisions, out, keep_unreviewed } => {
            let report = unveil_collect::review(dir, decisions, out, *keep_unreviewed)?;
            for (reason, ids) in &report.ignored {
                eprintln!("ignored: {reason}: {}", ids.join(", "));
            }
            println!("{}", serde_json::to_string(&report)?);
            Ok(())
        }
    }
}

fn import_records(args: &ImportArgs) -> anyhow::Result<()> {
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
    print_warnings(&report);
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}

/// Prints on stderr what was left out and what leaks between splits; the first of each kind, since the report has all.
fn print_warnings(report: &ImportReport) {
    for note in &report.notes {
        eprintln!("warning: {note}");
    }
    for item in report.left_out.iter().take(20) {
        eprintln!("left out: {} object {} ({}): {}", item.file, item.object, item.label, item.reason);
    }
    if report.left_out_count() > 20 {
        for (reason, count) in &report.left_out_by_reason {
            eprintln!("left out: {count} in all: {reason}");
        }
    }
    if let Some(leak) = report.leaks.first() {
        eprintln!(
            "warning: {} records show an image that is also in another split, e.g. \"{}\" ({}) and \"{}\" ({}): --drop-leaks keeps \
             only the copy in test, else val, else train",
            report.leaks.len(),
            leak.copy,
            leak.copy_split,
            leak.id,
            leak.split
        );
    }
    if let Some(patient) = report.split_patients.first() {
        eprintln!(
            "warning: {} patients have images in more than one split, e.g. \"{patient}\": --resplit keeps them together",
            report.split_patients.len()
        );
    }
}

/// Finds records that do not fit a model. Those of the validation and test splits are only prompted, all others are also trained on.
fn find_model_misfits(data: &Path, policy: PathPolicy, model: &Path, config: &Config) -> anyhow::Result<Vec<Finding>> {
    let preprocessor = Preprocessor::load_with(model, &config.input_settings())?;
    let records = RecordFile::load_lenient(data, policy, |_| ())?;
    let limits = TokenLimits { context: context_length(model)?, new_tokens: config.rollout.max_new_tokens };
    let held_out = [&config.data.val_split, &config.data.test_split];
    let record_use = |r: &Record| if held_out.contains(&&r.split) { RecordUse::Prompted } else { RecordUse::Trained };
    Ok(find_misfits(&records, &preprocessor, &limits, record_use, &|| false))
}

/// Prints the findings of a check; fails if there are errors among them.
fn print_check_report(data: &Path, report: &check::CheckReport, table: bool) -> anyhow::Result<()> {
    if table {
        print!("{}", format_table(&report.findings));
    } else {
        for finding in &report.findings {
            println!("{}", serde_json::to_string(finding)?);
        }
    }
    let [errors, warnings] = [Severity::Error, Severity::Warning].map(|s| report.count(s));
    if errors > 0 {
        bail!("{}: {errors} of {} findings are errors", data.display(), report.findings.len());
    }
    let warnings = match warnings {
        0 => String::new(),
        1 => ", 1 warning".to_owned(),
        n => format!(", {n} warnings"),
    };
    eprintln!("ok: {} records, {} images decoded{warnings}", report.records, report.images);
    Ok(())
}

/// Formats findings in columns: severity, line, record, problem.
fn format_table(findings: &[Finding]) -> String {
    let severity = |f: &Finding| match f.severity {
        Severity::Error => "error",
        Severity::Warning => "warning",
    };
    let line = |f: &Finding| f.file.rsplit(':').next().unwrap_or_default().to_owned();
    let width = |length: &dyn Fn(&Finding) -> usize| findings.iter().map(length).max().unwrap_or(0);
    let lines = width(&|f| line(f).chars().count());
    let ids = width(&|f| escape_control(&f.id).chars().count());
    let row = |f: &Finding| {
        format!(
            "{:<7}  {:>lines$}  {:<ids$}  {}\n",
            severity(f),
            line(f),
            escape_control(&f.id),
            escape_control(&f.what)
        )
    };
    findings.iter().map(row).collect()
}

/// Escapes control characters in a text of a data set, which a terminal would interpret.
fn escape_control(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

fn collect_answers(args: &CollectArgs) -> anyhow::Result<()> {
    if let Some(dir) = &args.write_prompts {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let files = ["diagnosis.txt", "reflection.txt"].map(|n| dir.join(n));
        for (file, text) in files.iter().zip(Prompts::BUILT_IN) {
            unveil_core::write_atomic(file, text.as_bytes())
                .with_context(|| format!("cannot write {}", file.display()))?;
        }
        println!("{}", serde_json::json!({ "prompts": files }));
        return Ok(());
    }
    let (Some(data), Some(out)) = (&args.data, &args.out) else { bail!("--data and --out are required") };
    let settings = args.config.load()?.collect;
    let key = unveil_config::read_secret("collect.key_env", &settings.key_env, "")?;
    let live = std::io::stderr().is_terminal();
    let report_progress = |done: usize, total: usize, cost: f64| {
        if live || done == total || done.is_multiple_of(100) {
            eprint!(
                "{}{done} of {total} answered, {cost:.4} spent{}",
                if live { "\r" } else { "" },
                if live && done < total { "" } else { "\n" }
            );
        }
    };
    let summary = run_role(false, 2, |cancel| async {
        unveil_collect::collect(data, out, &settings, key, cancel, report_progress).await.map_err(classify_error)
    })?;
    println!("{}", serde_json::to_string(&summary)?);
    for failure in summary.failed.iter().take(20) {
        eprintln!("no answer: {}: {}", failure.id, failure.reason);
    }
    match &summary.stopped {
        Some(unveil_collect::StopReason::Interrupted) => Err(Stop::Interrupted.into()),
        Some(unveil_collect::StopReason::Budget) => bail!(
            "the budget of {} is spent ({} of {} records are answered): raise collect.budget and repeat the command",
            settings.budget,
            summary.answered,
            summary.to_ask
        ),
        Some(
            unveil_collect::StopReason::Refused { answer: message }
            | unveil_collect::StopReason::Down { failure: message },
        ) => {
            bail!("{}: {message}; collected answers are kept: repeat the command", settings.base_url)
        }
        None if !summary.failed.is_empty() => {
            bail!("{} of {} records have no answer: repeat the command", summary.failed.len(), summary.to_ask)
        }
        None => Ok(()),
    }
}

/// Turns missing settings into configuration errors (exit code 2).
fn classify_error(e: CollectError) -> anyhow::Error {
    match e {
        CollectError::NoEndpoint => ConfigError::Invalid(vec![e.to_string()]).into(),
        other => other.into(),
    }
}
