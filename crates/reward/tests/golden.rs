//! Localization against torchvision and scipy on random cases (golden.py).

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};
use unveil_core::BBox;
use unveil_reward::assignment::max_assignment;
use unveil_reward::localization::localization;

#[derive(Serialize)]
struct Case {
    predicted: Vec<[f64; 4]>,
    r#true: Vec<[f64; 4]>,
}

#[derive(Serialize)]
struct Cases {
    cases: Vec<Case>,
    matrices: Vec<Vec<Vec<f64>>>,
}

#[derive(Deserialize)]
struct Golden {
    iou: Vec<Vec<Vec<f64>>>,
    soft_f1: Vec<f64>,
    optimum: Vec<f64>,
}

/// A small linear congruential generator: repeatable numbers in [0, 1).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() * n as f64) as usize
    }

    /// Coordinates that f32 holds exactly, so that both sides read the same numbers.
    fn boxes(&mut self, n: usize) -> Vec<[f64; 4]> {
        let mut one = || {
            let (x, y) = (self.next() * 150.0, self.next() * 90.0);
            [x, y, x + 1.0 + self.next() * 49.0, y + 1.0 + self.next() * 29.0].map(|v| f64::from(v as f32))
        };
        (0..n).map(|_| one()).collect()
    }
}

/// The interpreter of the set-up environment; its absence is a failure, not a skip.
fn python() -> PathBuf {
    let local = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../.venv/bin/python");
    std::env::var_os("UNVEIL_PYTHON").map_or(local, PathBuf::from)
}

fn golden(cases: &Cases) -> Golden {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden.py");
    let python = python();
    let mut child = Command::new(&python)
        .arg(script)
        .env("OMP_NUM_THREADS", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{}: {e}; run `make setup`, or set UNVEIL_PYTHON", python.display()));
    child.stdin.take().unwrap().write_all(&serde_json::to_vec(cases).unwrap()).unwrap();
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success(), "golden.py failed");
    serde_json::from_slice(&out.stdout).unwrap()
}

#[test]
fn iou_soft_f1_and_assignment_equal_torchvision_and_scipy() {
    let mut rng = Numbers(7);
    let cases: Vec<Case> = (0..300)
        .map(|_| {
            let (p, t) = (1 + rng.below(12), 1 + rng.below(8));
            Case { predicted: rng.boxes(p), r#true: rng.boxes(t) }
        })
        .collect();
    let matrices: Vec<Vec<Vec<f64>>> = (0..200)
        .map(|_| {
            let (rows, columns) = (1 + rng.below(40), 1 + rng.below(40));
            // Rounded, so that ties are common.
            (0..rows).map(|_| (0..columns).map(|_| (rng.next() * 10.0).round() / 10.0).collect()).collect()
        })
        .collect();
    let request = Cases { cases, matrices };
    let golden = golden(&request);
    assert_eq!((golden.soft_f1.len(), golden.optimum.len()), (300, 200));
    for (i, case) in request.cases.iter().enumerate() {
        let list = |b: &[[f64; 4]]| b.iter().map(|b| BBox::from(b.map(|v| v as f32))).collect::<Vec<_>>();
        let (p, t) = (list(&case.predicted), list(&case.r#true));
        for (a, row) in p.iter().zip(&golden.iou[i]) {
            for (b, expected) in t.iter().zip(row) {
                assert!((a.iou(b) - expected).abs() < 1e-9, "case {i}: {} {expected}", a.iou(b));
            }
        }
        let ours = localization(&p, false, &t, [200, 120]);
        assert!((ours.value.unwrap() - golden.soft_f1[i]).abs() < 1e-9, "case {i}: {ours:?} {}", golden.soft_f1[i]);
    }
    for (i, (m, expected)) in request.matrices.iter().zip(&golden.optimum).enumerate() {
        let pairs = max_assignment(m.len(), m[0].len(), |r, c| m[r][c]);
        assert_eq!(pairs.len(), m.len().min(m[0].len()));
        let ours: f64 = pairs.iter().map(|&(r, c)| m[r][c]).sum();
        assert!((ours - expected).abs() < 1e-9, "matrix {i}: {ours} {expected}");
    }
}
