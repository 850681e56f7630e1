//! Resumes a run from a bucket, takes a step, saves a checkpoint, and verifies every object of it.
//!
//! ```sh
//! cargo run -p unveil-checkpoint --example resume_from_bucket -- s3://bucket/runs/example
//! ```
//!
//! `gs://…`, `az://…` and local directories work too. Credentials come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`,
//! …). The state is one parameter of zeros, to which each step adds 1; a second run continues where the first one ended.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "an example prints its results")]
#![allow(clippy::disallowed_methods, reason = "credentials of the store come from the environment")]

use unveil_checkpoint::{
    Access, CheckpointHeader, CheckpointInfo, Checkpoints, Dtype, MAX_OBJECT_BYTES, Object, ObjectLayout, ReadRequest,
    Reader, Resume, Retention, Store, TensorSlice, verify,
};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

const PARAMETER: &str = "lm_head.weight";
const SHAPE: [u64; 2] = [30, 40];

/// The result of one run of this program.
struct Outcome {
    /// Step of the checkpoint that it resumed from.
    resumed_from: Option<u64>,
    /// Step of the checkpoint that it saved.
    saved: u64,
    /// First element of the parameter, as read back from the store.
    value: f32,
    /// Number of verified objects of the saved checkpoint.
    verified: usize,
}

/// Resumes, takes a step, saves and verifies.
async fn run(url: &str) -> Result<Outcome, BoxError> {
    let store = Store::open(url, std::env::vars(), Access::Write).await?;
    // From here on, a learner that still holds an earlier claim on the run cannot commit.
    let retention = Retention { keep: 2, keep_best: true, keep_every: 0 };
    let mut checkpoints = Checkpoints::claim(store, retention).await?;
    let resumed = newest_valid(&checkpoints).await?;
    let from = resumed.as_ref().map(|(info, _)| info);
    checkpoints.record_resume(from).await?;
    let resumed_from = from.map(|info| info.step);

    let count = SHAPE.iter().product::<u64>() as usize;
    let mut values = resumed.map_or_else(|| vec![0.0; count], |(_, values)| values);
    values.iter_mut().for_each(|v| *v += 1.0);

    let step = resumed_from.unwrap_or(0) + 1;
    let header = CheckpointHeader { step, meta: serde_json::json!({ "example": true }), best: false };
    let saved = checkpoints.save(header, objects(&values)).await?;

    let reopened = Store::open(url, std::env::vars(), Access::Read).await?;
    let value = read(&reopened, &saved).await?[0];
    let checks = verify(&reopened, Some(saved.step)).await?;
    if let Some(bad) = checks.iter().find(|check| !check.ok) {
        return Err(format!("{}: {}", bad.object, bad.reason.as_deref().unwrap_or("damaged")).into());
    }
    Ok(Outcome { resumed_from, saved: saved.step, value, verified: checks.len() })
}

/// Reads the newest checkpoint of the run that is intact; `None` for a new run.
async fn newest_valid(checkpoints: &Checkpoints) -> Result<Option<(CheckpointInfo, Vec<f32>)>, BoxError> {
    let mut candidates = checkpoints.resume_candidates(Resume::Auto)?;
    while let Some(info) = candidates.next_candidate()? {
        match read(checkpoints.store(), &info).await {
            Ok(values) => return Ok(Some((info, values))),
            Err(damage) => candidates.reject(&info, damage)?,
        }
    }
    Ok(None)
}

/// Reads the parameter. A learner would read only the range that its rank owns, whichever ranks had written it.
async fn read(store: &Store, info: &CheckpointInfo) -> unveil_checkpoint::Result<Vec<f32>> {
    let reader = Reader::open(store, info).await?;
    let count: u64 = SHAPE.iter().product();
    let mut bytes = vec![0; count as usize * 4];
    let request = ReadRequest { kind: "weight".into(), name: PARAMETER.into(), begin: 0, count, destination: 0 };
    reader.read(&[request], &mut bytes).await?;
    Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}

/// Lays the parameter out in safetensors objects, as the only writer.
fn objects(values: &[f32]) -> Vec<Object> {
    let slice = TensorSlice {
        kind: "weight".into(),
        name: PARAMETER.into(),
        artifact: "model".into(),
        dtype: Dtype::F32,
        shape: SHAPE.to_vec(),
        begin: 0,
        count: values.len() as u64,
    };
    let object = |(index, layout): (usize, ObjectLayout)| {
        let mut bytes = layout.header().to_vec();
        for (slice, _) in layout.slices() {
            let range = slice.begin as usize..(slice.begin + slice.count) as usize;
            bytes.extend(values[range].iter().flat_map(|v| v.to_le_bytes()));
        }
        Object { name: format!("shards/{index}.safetensors"), bytes: bytes.into(), layout: Some(layout) }
    };
    ObjectLayout::split_into_objects(vec![slice], MAX_OBJECT_BYTES).into_iter().enumerate().map(object).collect()
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let url = std::env::args().nth(1).ok_or("usage: resume_from_bucket URL")?;
    let Outcome { resumed_from, saved, value, verified } = run(&url).await?;
    println!("resumed from {resumed_from:?}, saved step {saved}, value {value}, {verified} objects verified");
    Ok(())
}
