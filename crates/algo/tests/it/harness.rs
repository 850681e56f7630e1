//! Runs a Python script on cases and compares its results with ours.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::Value;
use tch::{Kind, Tensor};
use unveil_testkit::python;

/// Largest allowed difference of two results.
#[derive(Clone, Copy)]
pub(crate) struct Tolerance {
    /// Largest difference relative to the largest value of the tensor.
    relative: f64,
    /// For sums, whose terms may cancel: minimum of that largest value.
    sum: f64,
}

/// In f64.
pub(crate) const DOUBLE: Tolerance = Tolerance { relative: 1e-9, sum: 1e-6 };
/// In f32.
pub(crate) const SINGLE: Tolerance = Tolerance { relative: 1e-5, sum: 0.1 };

/// Returns the seed of a test: its number, shifted by `UNVEIL_SEED`.
pub(crate) fn seed(test: u64) -> u64 {
    let given = std::env::var("UNVEIL_SEED").map_or(0, |s| s.parse::<u64>().expect("UNVEIL_SEED is a number"));
    given.wrapping_mul(1_000_003).wrapping_add(test)
}

/// Cases for one run of a script: settings by name, and tensors under `name/key`.
#[derive(Default)]
pub(crate) struct Cases {
    settings: serde_json::Map<String, Value>,
    tensors: Vec<(String, Tensor)>,
}

impl Cases {
    /// Adds a case.
    pub(crate) fn add<'a>(
        &mut self,
        name: &str,
        settings: Value,
        tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
    ) {
        assert!(self.settings.insert(name.to_owned(), settings).is_none(), "two cases are called {name}");
        self.tensors.extend(tensors.into_iter().map(|(k, t)| (format!("{name}/{k}"), t.shallow_clone())));
    }

    /// Runs `script` on all cases and returns its results, again under `name/key`.
    pub(crate) fn run(&self, script: &str) -> Results {
        // Tests of one process run concurrently.
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let run = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("unveil-algo-{}-{script}-{}-{run}", std::process::id(), seed(0)));
        std::fs::create_dir_all(&dir).unwrap();
        let src = dir.join("in.safetensors");
        let dst = dir.join("out.safetensors");
        let set = dir.join("settings.json");
        Tensor::write_safetensors(&self.tensors, &src).unwrap();
        std::fs::write(&set, Value::Object(self.settings.clone()).to_string()).unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(script);
        let mut command = Command::new(python());
        command.arg(&script).args([&src, &dst, &set]).env("OMP_NUM_THREADS", "1");
        let run = command.output().unwrap();
        assert!(run.status.success(), "{}: {}", script.display(), String::from_utf8_lossy(&run.stderr));
        let named = Tensor::read_safetensors(&dst).unwrap().into_iter().collect();
        std::fs::remove_dir_all(&dir).unwrap();
        Results(named)
    }
}

/// Results of a script.
pub(crate) struct Results(HashMap<String, Tensor>);

impl Results {
    /// Fails unless `ours` is close to `name/key`, with NaN at the same places.
    pub(crate) fn assert_close(&self, name: &str, key: &str, ours: &Tensor, tolerance: Tolerance) {
        let full_key = format!("{name}/{key}");
        let theirs = self.0.get(&full_key).unwrap_or_else(|| panic!("Python returned no {full_key}"));
        let to_host = |t: &Tensor| Vec::<f64>::try_from(t.detach().to_kind(Kind::Double).flatten(0, -1)).unwrap();
        let a = to_host(ours);
        let b = to_host(theirs);
        assert_eq!(a.len(), b.len(), "{full_key}");
        let least = if a.len() == 1 { tolerance.sum } else { 1e-6 };
        let largest = b.iter().copied().filter(|v| v.is_finite()).map(f64::abs).fold(least, f64::max);
        for (i, (x, y)) in a.iter().zip(&b).enumerate() {
            let same = (x.is_nan() && y.is_nan()) || (x - y).abs() <= tolerance.relative * largest;
            assert!(same, "{full_key}[{i}]: ours {x:e}, theirs {y:e}, largest {largest:e}");
        }
    }
}
