//! Generates synthetic records: `cargo run -p unveil-data --example synth -- OUT N SEED`.
use std::path::Path;
use std::time::Instant;

use unveil_data::synth::{SynthSpec, generate};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [out, n, seed] = args.as_slice() else { return Err("usage: synth OUT N SEED".into()) };
    let start = Instant::now();
    let records = generate(&SynthSpec::new(n.parse()?, seed.parse()?), Path::new(out), |_, _| {})?;
    let rate = records.len() as f64 / start.elapsed().as_secs_f64();
    println!("{} records in {out}, {rate:.0} a second", records.len());
    Ok(())
}
