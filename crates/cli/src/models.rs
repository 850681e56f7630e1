//! `unveil model`, `generate`, `score`, `learner replay`: what runs a model outside of training and evaluation.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use serde_json::json;
use tch::{Device, Kind};
use unveil_cli::{ConfigArgs, telemetry};
use unveil_config::schema::Model as ModelConfig;
use unveil_config::{directory_fault, shown_count};
use unveil_core::{Sampling, tell};
use unveil_data::prepare::{Family, Preparer};
use unveil_data::tokenizer::tiny::{TinyProcessorSpec, write_tiny};
use unveil_learner::ReplayModels;
use unveil_model::{InitSpec, Preset, SpecialIds, Vlm, VlmConfig};
use unveil_rollout::{GenerateOptions, OfflineModel, ScoreOptions, generate_cli, score_cli};

use crate::before::model_directory;

#[derive(Subcommand)]
pub enum ModelCommand {
    /// Writes a from-scratch model directory.
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
        /// Also writes a published shape, which is large and has no published tokenizer.
        #[arg(long)]
        yes: bool,
    },
    /// Writes a model directory again, as transformers reads it, in another kind of numbers or with adapters merged if asked.
    Export {
        /// Model directory.
        dir: PathBuf,
        /// Directory to write.
        #[arg(long)]
        out: PathBuf,
        /// float32, bfloat16 or float16; as stored without it.
        #[arg(long, value_parser = kind_of)]
        dtype: Option<Kind>,
        /// Directory with adapters as peft writes them, to be merged into the weights.
        #[arg(long)]
        adapter: Option<PathBuf>,
    },
    /// Checks a model directory and describes it.
    Inspect {
        /// Model directory.
        dir: PathBuf,
    },
}

#[derive(Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Model directory.
    #[arg(long)]
    model: PathBuf,
    /// Record file.
    #[arg(long)]
    data: PathBuf,
    /// Responses per record.
    #[arg(long, default_value_t = 1)]
    n: usize,
    /// 0 is greedy.
    #[arg(long, default_value_t = 1.0)]
    temperature: f64,
    /// Draw among the k most probable tokens only; 0 = all.
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Draw among the most probable tokens that together reach this probability; 1 = all.
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Draw among tokens with at least this share of the most probable one's probability; 0 = all.
    #[arg(long, default_value_t = 0.0)]
    min_p: f64,
    /// Length cap in tokens.
    #[arg(long, default_value_t = 64)]
    max_new_tokens: usize,
    /// Text that ends a response; may be repeated.
    #[arg(long)]
    stop: Vec<String>,
    /// Seed.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(Args)]
pub struct ScoreArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Model directory.
    #[arg(long)]
    model: PathBuf,
    /// Records with `index` and `response` or `tokens`.
    #[arg(long)]
    data: PathBuf,
    /// Temperature of the distribution that is scored.
    #[arg(long, default_value_t = 1.0)]
    temperature: f64,
    /// Scores the training answers of records that have neither `response` nor `tokens`.
    #[arg(long)]
    answers: bool,
    /// Also writes attention by layer and head, of the tokens that name the class: what `reward calibrate` reads.
    #[arg(long, value_name = "FILE")]
    heads: Option<PathBuf>,
}

#[derive(Args)]
pub struct ReplayArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Model directory that the update starts from.
    #[arg(long)]
    model: PathBuf,
    /// Adapters that it starts from as peft writes them, where learner.lora asks for some; fresh ones without it.
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Model directory that KL is to, where it has a weight; as `--model` without it.
    #[arg(long)]
    reference: Option<PathBuf>,
    /// Dumped batch: a directory with batch.json and batch.safetensors.
    #[arg(long)]
    batch: PathBuf,
    /// Directory to write.
    #[arg(long)]
    out: PathBuf,
    /// float32, or float64 to compare with other programs.
    #[arg(long, value_parser = training_kind, default_value = "float32")]
    dtype: Kind,
}

/// `unveil model …`
pub fn model(command: &ModelCommand) -> anyhow::Result<()> {
    match command {
        ModelCommand::Init { family, preset, out, seed, yes } => {
            let shape = unveil_model::preset(family, preset)?;
            large(shape, out, *yes)?;
            std::fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
            let processor = TinyProcessorSpec {
                family: Family::named(family).with_context(|| format!("no processor for the family `{family}`"))?,
                patch: shape.patch_size as u32,
                merge: shape.merge_size() as u32,
                temporal: shape.temporal_patch_size() as u32,
                ..Default::default()
            };
            let vocabulary = write_tiny(out, &processor)?;
            let s = &vocabulary.special;
            let spec = InitSpec {
                family: family.clone(),
                preset: preset.clone(),
                vocab_size: vocabulary.vocab_size,
                seed: *seed,
                special: SpecialIds {
                    image_pad: s.image_pad,
                    video_pad: s.video_pad,
                    vision_start: s.vision_start,
                    vision_end: s.vision_end,
                    bos: None,
                    eos: s.im_end,
                    pad: s.end_of_text,
                },
            };
            let numbers: Vec<u32> = vocabulary.numbers.collect();
            unveil_model::init_with_numbers(&spec, &numbers, out)?;
            println!("{}", describe(out)?);
            Ok(())
        }
        ModelCommand::Export { dir, out, dtype, adapter } => {
            model_directory("DIR", dir)?;
            if let Some(fault) = adapter.as_deref().and_then(|dir| directory_fault("--adapter", dir)) {
                bail!("{fault}");
            }
            unveil_model::export(dir, out, *dtype, adapter.as_deref())?;
            println!("{}", describe(out)?);
            Ok(())
        }
        ModelCommand::Inspect { dir } => {
            model_directory("DIR", dir)?;
            println!("{}", describe(dir)?);
            Ok(())
        }
    }
}

/// Says how large a published shape is before it is written, and asks whether it is meant: the tokenizer that comes with it is not that
/// of the published model.
fn large(shape: &Preset, out: &Path, yes: bool) -> anyhow::Result<()> {
    if shape.vocabulary() == 0 {
        return Ok(());
    }
    let (count, bytes) = shape.size(0);
    let size = format!("{} parameters, {:.1} GB", shown_count(count), bytes as f64 / 1e9);
    if !yes {
        bail!(
            "{} of {} has the shape of the published model ({size}) with fresh weights and with the small tokenizer of models from scratch, \
             which does not fill its vocabulary of {}: it is for measurements. Say --yes if that is meant; to train the published model, \
             name its directory in model.dir",
            shape.name,
            shape.family.name(),
            shape.vocabulary()
        );
    }
    tell(&format!("writing {size} to {}", out.display()));
    Ok(())
}

fn kind_of(name: &str) -> Result<Kind, String> {
    match name {
        "float32" => Ok(Kind::Float),
        "bfloat16" => Ok(Kind::BFloat16),
        "float16" => Ok(Kind::Half),
        other => Err(format!("`{other}`: use float32, bfloat16 or float16")),
    }
}

/// The name that [`kind_of`] reads.
fn kind_name(kind: Kind) -> String {
    match kind {
        Kind::Float => "float32".to_owned(),
        Kind::BFloat16 => "bfloat16".to_owned(),
        Kind::Half => "float16".to_owned(),
        Kind::Double => "float64".to_owned(),
        other => format!("{other:?}").to_lowercase(),
    }
}

fn training_kind(name: &str) -> Result<Kind, String> {
    match name {
        "float32" => Ok(Kind::Float),
        "float64" => Ok(Kind::Double),
        other => Err(format!("`{other}`: use float32 or float64")),
    }
}

fn describe(dir: &Path) -> anyhow::Result<serde_json::Value> {
    let preparer = Preparer::load(dir)?;
    let vlm = Vlm::load(dir, Device::Cpu, VlmConfig::load(dir)?.dtype)?;
    let count = |prefix: &str| -> i64 {
        let of = vlm.named_parameters().iter().filter(|(n, _)| n.starts_with(prefix));
        of.map(|(_, t)| t.numel() as i64).sum()
    };
    let c = vlm.config();
    Ok(json!({
        "dir": dir, "family": preparer.family().name(), "boxes": preparer.box_form(), "dtype": kind_name(c.dtype),
        "parameters": count(""), "vision_parameters": count("visual."),
        "tied": c.tie_word_embeddings,
        "layers": c.text.num_hidden_layers, "hidden": c.text.hidden_size, "vocab": c.text.vocab_size,
        "vision_relevance_layer": c.default_capture_layer(), "tokenizer_vocab": preparer.tokenizer().vocab_size(),
    }))
}

/// `unveil generate`
pub fn generate(args: &GenerateArgs) -> anyhow::Result<()> {
    let model = offline(&args.config, &args.model)?;
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

fn offline(config: &ConfigArgs, dir: &Path) -> anyhow::Result<OfflineModel> {
    model_directory("--model", dir)?;
    Ok(OfflineModel { dir: dir.to_owned(), config: config.load()? })
}

/// `unveil score`
pub fn score(args: &ScoreArgs) -> anyhow::Result<()> {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    let options = ScoreOptions {
        model: offline(&args.config, &args.model)?,
        data: args.data.clone(),
        temperature: args.temperature,
        answers: args.answers,
        heads: args.heads.clone(),
    };
    score_cli(&options, &mut out)?;
    Ok(out.flush()?)
}

/// `unveil learner replay`
pub fn replay(args: &ReplayArgs) -> anyhow::Result<()> {
    let config = args.config.load()?;
    let _tracing = telemetry(&config, "replay", "warn")?;
    model_directory("--model", &args.model)?;
    args.reference.as_deref().map_or(Ok(()), |dir| model_directory("--reference", dir))?;
    let preparer = Preparer::load_with(&args.model, config.model.boxes)?;
    let banned = &preparer.tokenizer().special().banned;
    println!(
        "{}",
        unveil_learner::replay(
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
