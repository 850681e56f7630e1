//! Driver of the load benchmark (tests/bench/load.py); prints one JSON line per run.
//!
//! `load_bench model DIR DEVICE DTYPE` loads a model directory and then reads one byte of every page of every parameter, so that no page fault is
//! left for later; `load_bench raw DIR` reads the same weights files with read(2) into one buffer.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark may panic, and its results go to stdout")]

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Instant;

use procfs::process::Process;
use tch::{Device, Kind, Tensor};
use unveil_model::{Vlm, device, parse_dtype};

type Error = Box<dyn std::error::Error>;

const PAGE: usize = 4096;
const BUFFER_BYTES: usize = 8 << 20;

/// Loads the directory; the time includes reading its pages afterwards.
fn load_model(dir: &Path, device_name: &str, kind: &str) -> Result<String, Error> {
    let kind = parse_dtype(kind)?;
    let device = device(device_name)?;
    if device != Device::Cpu {
        // Create the GPU context before the clock starts.
        let _ = Tensor::zeros([1], (kind, device)).sum(kind).double_value(&[]);
    }
    let start = Instant::now();
    let vlm = Vlm::load(dir, device, kind)?;
    let loaded = start.elapsed().as_secs_f64();
    let mut bytes = 0;
    let mut check = 0u64;
    for (_, tensor) in vlm.named_parameters() {
        bytes += tensor_bytes(tensor);
        check = check.wrapping_add(touch_pages(tensor));
    }
    let seconds = start.elapsed().as_secs_f64();
    let status = Process::myself()?.status()?;
    Ok(format!(
        "{{\"seconds\":{seconds},\"load_seconds\":{loaded},\"bytes\":{bytes},\"check\":{check},\
         \"peak_kib\":{},\"anonymous_kib\":{},\"file_kib\":{}}}",
        status.vmhwm.unwrap_or(0),
        status.rssanon.unwrap_or(0),
        status.rssfile.unwrap_or(0)
    ))
}

fn tensor_bytes(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

/// Reads a byte of each page of a tensor in host memory; sums a tensor on another device, which waits for its copies.
#[expect(unsafe_code, reason = "reads a tensor's memory in place")]
fn touch_pages(tensor: &Tensor) -> u64 {
    if tensor.device() != Device::Cpu || !tensor.is_contiguous() {
        return tensor.sum(Kind::Float).double_value(&[]).to_bits();
    }
    let start = tensor.data_ptr().cast::<u8>().cast_const();
    let size = tensor_bytes(tensor);
    // SAFETY: the tensor is contiguous, in host memory, outlives this call and is not written to: `size` bytes from its data pointer on
    // can be read.
    let bytes = unsafe { std::slice::from_raw_parts(start, size) };
    bytes.iter().step_by(PAGE).fold(0u64, |sum, b| sum.wrapping_add(u64::from(std::hint::black_box(*b))))
}

/// Reads every weights file from start to end.
fn read_raw(dir: &Path) -> Result<String, Error> {
    let mut files: Vec<_> = std::fs::read_dir(dir)?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
    files.retain(|f| f.extension().is_some_and(|e| e == "safetensors"));
    files.sort();
    // Initialised, so that its pages exist, and page-aligned: some processors copy several times slower otherwise.
    let mut memory = vec![1u8; BUFFER_BYTES + PAGE];
    let start = memory.as_ptr().align_offset(PAGE);
    let buffer = &mut memory[start..start + BUFFER_BYTES];
    let mut bytes = 0;
    let mut check = 0u64;
    let start = Instant::now();
    for path in files {
        let mut file = File::open(path)?;
        loop {
            let count = file.read(buffer)?;
            if count == 0 {
                break;
            }
            bytes += count;
            check = check.wrapping_add(u64::from(std::hint::black_box(buffer[count - 1])));
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    Ok(format!("{{\"seconds\":{seconds},\"bytes\":{bytes},\"check\":{check}}}"))
}

fn main() -> Result<(), Error> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let line = match words[..] {
        ["model", dir, device_name, kind] => load_model(Path::new(dir), device_name, kind)?,
        ["raw", dir] => read_raw(Path::new(dir))?,
        _ => return Err("usage: load_bench model DIR DEVICE DTYPE | load_bench raw DIR".into()),
    };
    println!("{line}");
    Ok(())
}
