//! Hands cases to a Python script and compares what comes back.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::Value;
use tch::{Kind, Tensor};
use unveil_testkit::python;

/// How far two results may be apart.
#[derive(Clone, Copy)]
pub struct Tolerance {
    /// Largest difference, relative to the largest number of the tensor.
    relative: f64,
    /// For sums, whose terms may cancel: the size that they count as at least.
    sum: f64,
}

/// In f64.
pub const DOUBLE: Tolerance = Tolerance { relative: 1e-9, sum: 1e-6 };
/// In f32.
pub const SINGLE: Tolerance = Tolerance { relative: 1e-5, sum: 0.1 };

/// Seed of a test: a number of its own, moved by `UNVEIL_SEED`.
pub fn seed(own: u64) -> u64 {
    let given = std::env::var("UNVEIL_SEED").map_or(0, |s| s.parse::<u64>().expect("UNVEIL_SEED is a number"));
    given.wrapping_mul(1_000_003).wrapping_add(own)
}

/// Cases for one run of a script: settings by name, and tensors under `name/key`.
#[derive(Default)]
pub struct Cases {
    settings: serde_json::Map<String, Value>,
    tensors: Vec<(String, Tensor)>,
}

impl Cases {
    /// Adds a case.
    pub fn add<'a>(&mut self, name: &str, settings: Value, tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>) {
        assert!(self.settings.insert(name.to_owned(), settings).is_none(), "two cases are called {name}");
        self.tensors.extend(tensors.into_iter().map(|(k, t)| (format!("{name}/{k}"), t.shallow_clone())));
    }

    /// Runs `script` on all of them; results are under `name/key` again.
    pub fn run(&self, script: &str) -> Results {
        // Tests of one process run at once.
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let run = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("unveil-algo-{}-{script}-{}-{run}", std::process::id(), seed(0)));
        std::fs::create_dir_all(&dir).unwrap();
        let (src, dst, set) = (dir.join("in.safetensors"), dir.join("out.safetensors"), dir.join("settings.json"));
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

/// What a script computed.
pub struct Results(HashMap<String, Tensor>);

impl Results {
    /// Fails unless `ours` has the numbers of `name/key`, NaN where they have NaN.
    pub fn close(&self, name: &str, key: &str, ours: &Tensor, tolerance: Tolerance) {
        let found = format!("{name}/{key}");
        let theirs = self.0.get(&found).unwrap_or_else(|| panic!("Python gave no {found}"));
        let host = |t: &Tensor| Vec::<f64>::try_from(t.detach().to_kind(Kind::Double).flatten(0, -1)).unwrap();
        let (a, b) = (host(ours), host(theirs));
        assert_eq!(a.len(), b.len(), "{found}");
        let least = if a.len() == 1 { tolerance.sum } else { 1e-6 };
        let largest = b.iter().copied().filter(|v| v.is_finite()).map(f64::abs).fold(least, f64::max);
        for (i, (x, y)) in a.iter().zip(&b).enumerate() {
            let same = (x.is_nan() && y.is_nan()) || (x - y).abs() <= tolerance.relative * largest;
            assert!(same, "{found}[{i}]: ours {x:e}, theirs {y:e}, largest {largest:e}");
        }
    }
}
