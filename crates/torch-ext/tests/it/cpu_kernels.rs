//! Decode steps of odd sizes: a row's results are bit for bit the same whichever other rows are fed, on every instruction set that this
//! machine supports and with any number of threads.

use tch::{Device, Kind, Tensor};
use unveil_torch_ext::{DecodeLayer, DecodeStep, decode, instruction_sets, with_instruction_set};

const SLOTS: i64 = 3;
const N: i64 = 5;
const PROMPT: i64 = 70;
const RESPONSE: i64 = 9;
const IMAGES: i64 = 20;

fn random(size: &[i64], scale: f64) -> Tensor {
    Tensor::randn(size, (Kind::Float, Device::Cpu)) * scale
}

/// One layer of random weights, with its KV caches.
struct Fixture {
    heads: (i64, i64),
    vectors: [Tensor; 7],
    matrices: [Tensor; 7],
    prefix: [Tensor; 2],
    suffix: [Tensor; 2],
    image_k: Tensor,
    x: Tensor,
    rotary: [Tensor; 2],
}

impl Fixture {
    /// Sizes: hidden, intermediate, query heads, key/value heads, head.
    fn new([hidden, inner, hq, hkv, d]: [i64; 5]) -> Self {
        let rows = SLOTS * N;
        let matrix = |out: i64, from: i64| random(&[out, from], 0.1);
        let bias = |n: i64| random(&[n], 0.1);
        Self {
            heads: (hq, hkv),
            vectors: [
                random(&[hidden], 1.0),
                random(&[hidden], 1.0),
                random(&[d], 1.0),
                random(&[d], 1.0),
                bias(hq * d),
                bias(hkv * d),
                bias(hkv * d),
            ],
            matrices: [
                matrix(hq * d, hidden),
                matrix(hkv * d, hidden),
                matrix(hkv * d, hidden),
                matrix(hidden, hq * d),
                matrix(inner, hidden),
                matrix(inner, hidden),
                matrix(hidden, inner),
            ],
            prefix: [0, 1].map(|_| random(&[SLOTS, hkv, PROMPT, d], 1.0)),
            suffix: [0, 1].map(|_| random(&[rows, hkv, RESPONSE, d], 1.0)),
            image_k: random(&[SLOTS, hkv, IMAGES, d], 1.0),
            x: random(&[rows, hidden], 1.0),
            rotary: [0, 1].map(|_| random(&[rows, d / 2], 1.0)),
        }
    }

    /// Returns hidden states `[A, D]` and attention `[A, Hkv, V]` of the given rows, without changing the caches.
    fn step(&self, rows: &[i64]) -> (Tensor, Tensor) {
        let suffix = [0, 1].map(|i| self.suffix[i].copy());
        let [norm1, norm2, q_norm, k_norm, q_bias, k_bias, v_bias] = &self.vectors;
        let [q, k, v, o, gate, up, down] = &self.matrices;
        let layer = DecodeLayer {
            norm1,
            qkv: [q, k, v],
            qkv_bias: Some([q_bias, k_bias, v_bias]),
            qk_norm: Some((q_norm, k_norm)),
            o,
            norm2,
            gate_up: [gate, up],
            down,
            prefix: [&self.prefix[0], &self.prefix[1]],
            suffix: [&suffix[0], &suffix[1]],
            capture: Some((&self.image_k, None)),
        };
        let index = Tensor::from_slice(rows);
        let fed = |t: &Tensor| t.index_select(0, &index);
        let rotary = [0, 1].map(|i| fed(&self.rotary[i]));
        let step = DecodeStep {
            heads: self.heads,
            n: N,
            eps: 1e-6,
            x: &fed(&self.x),
            rotary: [&rotary[0], &rotary[1]],
            rows,
            lengths: &rows.iter().map(|r| r * 7 % RESPONSE).collect::<Vec<_>>(),
            prefix: &[PROMPT, PROMPT - 3, 0],
            images: &[IMAGES, IMAGES - 7, 0],
            head_weight: 0.1,
        };
        let (hidden, attention) = decode(&step, &[layer]).unwrap();
        (hidden, attention.unwrap().transpose(0, 1).contiguous())
    }
}

#[test]
fn rows_are_independent_of_each_other() {
    tch::manual_seed(11);
    let every: Vec<i64> = (0..SLOTS * N).collect();
    for sizes in [[64, 128, 4, 2, 16], [48, 100, 6, 2, 8], [40, 52, 5, 5, 10], [96, 72, 8, 1, 24]] {
        let fixture = Fixture::new(sizes);
        let mut results: Vec<(&str, Tensor)> = Vec::new();
        for set in instruction_sets() {
            let check = || {
                let alone: Vec<_> = every.iter().map(|r| fixture.step(&[*r])).collect();
                for pattern in 1u32..60 {
                    tch::set_num_threads(1 + (pattern % 3) as i32);
                    let chosen =
                        |r: &&i64| **r == 14 || pattern.wrapping_mul(2_654_435_761).rotate_left(**r as u32) & 1 == 1;
                    let rows: Vec<i64> = every.iter().filter(chosen).copied().collect();
                    let (hidden, attention) = fixture.step(&rows);
                    for (i, r) in rows.iter().enumerate() {
                        let (expected_hidden, expected_attention) = &alone[*r as usize];
                        let i = i as i64;
                        assert_eq!(&hidden.narrow(0, i, 1), expected_hidden, "{set} {sizes:?}: row {r} among {rows:?}");
                        assert_eq!(
                            &attention.narrow(0, i, 1),
                            expected_attention,
                            "{set} {sizes:?}: row {r} among {rows:?}"
                        );
                    }
                }
                Tensor::cat(&alone.into_iter().map(|(h, _)| h).collect::<Vec<_>>(), 0)
            };
            results.push((set, with_instruction_set(set, check).unwrap()));
        }
        // Between instruction sets only rounding differs.
        for (set, hidden) in &results {
            let off = (hidden - &results[0].1).abs().max().double_value(&[]);
            assert!(off < 1e-4, "{set} and {} differ by {off} {sizes:?}", results[0].0);
        }
    }
}
