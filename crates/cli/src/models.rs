//! `unveil model`, `generate`, `score` and `learner replay`: commands on models outside of training and evaluation.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use serde_json::json;
use tch::{Device, Kind};
use unveil_cli::{ConfigArgs, init_telemetry};
use unveil_config::schema::Model as ModelConfig;
use unveil_config::{directory_problem, format_count};
use unveil_core::{Family, Sampling, stderr_line};
use unveil_model::{InitSpec, Preset, Vlm, VlmConfig, dtype_name, parse_dtype};
use unveil_preprocess::preprocessor::Preprocessor;
use unveil_preprocess::tokenizer::tiny::{TinyProcessorSpec, write_tiny};
use unveil_rollout::{GenerateOptions, OfflineModel, ScoreOptions, generate_cli, score_cli};
use unveil_trainer::ReplayModels;

use crate::preflight::require_model_dir;

#[derive(Subcommand)]
pub(crate) enum ModelCommand {
    /// Creates a model directory with random weights.
    Init {
        /// Model family.
        #[arg(long, default_value_t = ModelConfig::default().family)]
        family: String,
        /// Preset of the family.
        #[arg(long, default_value_t = ModelConfig::default().preset)]
        preset: String,
        /// Directory to write.
        #[arg(long)]
        out: PathBuf,
        /// Seed of the weights.
        #[arg(long, default_value_t = 0)]
        seed: u64,
        /// Confirms writing a preset with a published shape, which is large and does not have the published tokenizer.
        #[arg(long)]
        yes: bool,
    },
    /// Exports a model directory for transformers, optionally in another dtype or with adapters merged.
    Export {
        /// Model directory.
        dir: PathBuf,
        /// Directory to write.
        #[arg(long)]
        out: PathBuf,
        /// Dtype: float32, bfloat16 or float16; defaults to the stored one.
        #[arg(long, value_parser = parse_dtype)]
        dtype: Option<Kind>,
        /// Directory with adapters in peft format to merge into the weights.
        #[arg(long)]
        adapter: Option<PathBuf>,
    },
    /// Checks a model directory and describes it.
    Inspect {
        /// Model directory.
        dir: PathBuf,
    },
}

/// Model and configuration of a command without training.
#[derive(Args)]
struct OfflineArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Model directory.
    #[arg(long)]
    model: PathBuf,
}

impl OfflineArgs {
    fn load(&self) -> anyhow::Result<OfflineModel> {
        require_model_dir("--model", &self.model)?;
        Ok(OfflineModel { dir: self.model.clone(), config: self.config.load()? })
    }
}

#[derive(Args)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    model: OfflineArgs,
    /// Record file.
    #[arg(long)]
    data: PathBuf,
    /// Responses per record.
    #[arg(long, default_value_t = 1)]
    n: usize,
    /// Sampling temperature; 0 is greedy decoding.
    #[arg(long, default_value_t = 1.0)]
    temperature: f64,
    /// Samples from the k most probable tokens only; 0 disables the filter.
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Samples from the smallest set of most probable tokens that reaches this probability; 1 disables the filter.
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Samples only tokens with at least this fraction of the most probable token's probability; 0 disables the filter.
    #[arg(long, default_value_t = 0.0)]
    min_p: f64,
    /// Maximum response length in tokens.
    #[arg(long, default_value_t = 64)]
    max_new_tokens: usize,
    /// String that ends a response; repeatable.
    #[arg(long)]
    stop: Vec<String>,
    /// Sampling seed.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(Args)]
pub(crate) struct ScoreArgs {
    #[command(flatten)]
    model: OfflineArgs,
    /// Records with `index` and `response` or `tokens`.
    #[arg(long)]
    data: PathBuf,
    /// Temperature of the scored distribution.
    #[arg(long, default_value_t = 1.0)]
    temperature: f64,
    /// Scores the training answers of records without `response` and `tokens`.
    #[arg(long)]
    answers: bool,
    /// Also writes the attention of the tokens that name the class, by layer and head, for `reward calibrate`.
    #[arg(long, value_name = "FILE")]
    heads: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct ReplayArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Model directory before the update.
    #[arg(long)]
    model: PathBuf,
    /// Adapters before the update in peft format, if learner.lora is enabled; defaults to fresh ones.
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Reference model directory of the KL term, if it has a weight; defaults to `--model`.
    #[arg(long)]
    reference: Option<PathBuf>,
    /// Dumped batch: a directory with batch.json and batch.safetensors.
    #[arg(long)]
    batch: PathBuf,
    /// Directory to write.
    #[arg(long)]
    out: PathBuf,
    /// Dtype: float32, or float64 for comparison with other programs.
    #[arg(long, value_parser = parse_training_dtype, default_value = "float32")]
    dtype: Kind,
}

/// Runs `unveil model …`.
pub(crate) fn model(command: &ModelCommand) -> anyhow::Result<()> {
    match command {
        ModelCommand::Init { family, preset, out, seed, yes } => {
            let shape = unveil_model::preset(family, preset)?;
            confirm_published_shape(shape, out, *yes)?;
            std::fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
            let processor = TinyProcessorSpec {
                family: family.parse::<Family>()?,
                patch: shape.patch_size as u32,
                merge: shape.merge_size() as u32,
                temporal: shape.temporal_patch_size() as u32,
                ..Default::default()
            };
            let vocabulary = write_tiny(out, &processor)?;
            let spec = InitSpec {
                family: family.clone(),
                preset: preset.clone(),
                vocab_size: vocabulary.vocab_size,
                seed: *seed,
                special: vocabulary.special,
            };
            let numbers: Vec<u32> = vocabulary.numbers.collect();
            unveil_model::init_with_number_tokens(&spec, &numbers, out)?;
            println!("{}", describe(out)?);
            Ok(())
        }
        ModelCommand::Export { dir, out, dtype, adapter } => {
            require_model_dir("DIR", dir)?;
            if let Some(problem) = adapter.as_deref().and_then(|dir| directory_problem("--adapter", dir)) {
                bail!("{problem}");
            }
            unveil_model::export(dir, out, *dtype, adapter.as_deref())?;
            println!("{}", describe(out)?);
            Ok(())
        }
        ModelCommand::Inspect { dir } => {
            require_model_dir("DIR", dir)?;
            println!("{}", describe(dir)?);
            Ok(())
        }
    }
}

/// Requires `--yes` for a preset with a published shape, and prints its size: it does not have the tokenizer of the published model.
fn confirm_published_shape(shape: &Preset, out: &Path, yes: bool) -> anyhow::Result<()> {
    if shape.vocabulary() == 0 {
        return Ok(());
    }
    let (count, bytes) = shape.size(0);
    let size = format!("{} parameters, {:.1} GB", format_count(count), bytes as f64 / 1e9);
    if !yes {
        bail!(
            "{} of {} has the shape of the published model ({size}) with random weights and the small tokenizer of models from scratch, which \
             does not fill its vocabulary of {}: it is for benchmarks. Add --yes to write it; to train the published model, set model.dir \
             to its directory",
            shape.name,
            shape.family.name(),
            shape.vocabulary()
        );
    }
    stderr_line(&format!("writing {size} to {}", out.display()));
    Ok(())
}

fn parse_training_dtype(name: &str) -> Result<Kind, String> {
    match name {
        "float32" => Ok(Kind::Float),
        "float64" => Ok(Kind::Double),
        other => Err(format!("`{other}`: use float32 or float64")),
    }
}

/// Describes a model directory as JSON.
fn describe(dir: &Path) -> anyhow::Result<serde_json::Value> {
    let preprocessor = Preprocessor::load(dir)?;
    let vlm = Vlm::load(dir, Device::Cpu, VlmConfig::load(dir)?.dtype)?;
    let count = |prefix: &str| -> i64 {
        let parameters = vlm.named_parameters().iter().filter(|(n, _)| n.starts_with(prefix));
        parameters.map(|(_, t)| t.numel() as i64).sum()
    };
    let c = vlm.config();
    Ok(json!({
        "dir": dir, "family": preprocessor.family().name(), "boxes": preprocessor.box_form(), "dtype": dtype_name(c.dtype),
        "parameters": count(""), "vision_parameters": count("visual."),
        "tied": c.tie_word_embeddings,
        "layers": c.text.num_hidden_layers, "hidden": c.text.hidden_size, "vocab": c.text.vocab_size,
        "vision_relevance_layer": c.default_capture_layer(), "tokenizer_vocab": preprocessor.tokenizer().vocab_size(),
    }))
}

/// Runs `unveil generate`.
pub(crate) fn generate(args: &GenerateArgs) -> anyhow::Result<()> {
    let model = args.model.load()?;
    let options = GenerateOptions {
        data: args.data.clone(),
        sampling: Sampling {
            n: args.n,
            temperature: args.temperature,
            top_k: args.top_k,
            top_p: args.top_p,
            min_p: args.min_p,
            max_new_tokens: args.max_new_tokens,
            seed: args.seed,
            logprobs: model.config.rollout.logprobs,
        },
        model,
        stop: args.stop.clone(),
    };
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    generate_cli(&options, &mut out)?;
    Ok(out.flush()?)
}

/// Runs `unveil score`.
pub(crate) fn score(args: &ScoreArgs) -> anyhow::Result<()> {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    let options = ScoreOptions {
        model: args.model.load()?,
        data: args.data.clone(),
        temperature: args.temperature,
        answers: args.answers,
        heads: args.heads.clone(),
    };
    score_cli(&options, &mut out)?;
    Ok(out.flush()?)
}

/// Runs `unveil learner replay`.
pub(crate) fn replay(args: &ReplayArgs) -> anyhow::Result<()> {
    let config = args.config.load()?;
    let _tracing = init_telemetry(&config, "replay", "warn")?;
    require_model_dir("--model", &args.model)?;
    args.reference.as_deref().map_or(Ok(()), |dir| require_model_dir("--reference", dir))?;
    let preprocessor = Preprocessor::load_with(&args.model, &config.input_settings())?;
    let banned = preprocessor.tokenizer().banned();
    println!(
        "{}",
        unveil_trainer::replay(
            &config,
            ReplayModels { model: &args.model, adapter: args.adapter.as_deref(), reference: args.reference.as_deref() },
            &args.batch,
            &args.out,
            banned,
            args.dtype
        )?
    );
    Ok(())
}
