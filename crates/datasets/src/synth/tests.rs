use unveil_data::records::RecordFile;

use super::*;

fn spec(n: usize, seed: u64) -> SynthSpec {
    SynthSpec::new(n, seed)
}

#[test]
fn shares_match_the_specification() {
    let s = SynthSpec::default();
    let n = 20_000;
    let mut none = 0;
    let mut several = 0;
    let mut three = 0;
    let mut by = std::collections::BTreeMap::<_, usize>::new();
    for i in 0..n {
        let p = plan(&s, i);
        match p.count {
            0 => none += 1,
            1 => {}
            k => {
                several += 1;
                three += usize::from(k == 3);
            }
        }
        assert_eq!(p.category.is_none(), p.count == 0);
        *by.entry(p.category.map(Category::name)).or_default() += 1;
    }
    // Four standard deviations of a binomial share.
    let near = |k: usize, of: usize, p: f64| {
        let x = k as f64 / of as f64;
        let sd = (p * (1.0 - p) / of as f64).sqrt();
        assert!((x - p).abs() < 4.0 * sd, "{x} is not {p}");
    };
    near(none, n, 0.12);
    near(several, n, 0.22);
    near(three, several, 0.5);
    assert_eq!(by.len(), 6);
    by.iter().filter(|(k, _)| k.is_some()).for_each(|(_, &k)| near(k, n, 0.88 / 5.0));
}

#[test]
fn boxes_are_the_exact_bounds_of_the_masks() {
    let s = spec(0, 7);
    for i in 0..300 {
        let x = sample(&s, i).unwrap();
        assert_eq!(x.plan, plan(&s, i));
        assert_eq!((x.boxes.len(), x.masks.len()), (x.plan.count, x.plan.count));
        let mut any = vec![false; 96 * 96];
        for (b, m) in x.boxes.iter().zip(&x.masks) {
            // Computes the box independently: tight on every side.
            let on = |x: usize, y: usize| m.inside[y * 96 + x];
            let cols: Vec<usize> = (0..96).filter(|&c| (0..96).any(|r| on(c, r))).collect();
            let rows: Vec<usize> = (0..96).filter(|&r| (0..96).any(|c| on(c, r))).collect();
            let hand = [cols[0], rows[0], cols[cols.len() - 1] + 1, rows[rows.len() - 1] + 1].map(|v| v as f32);
            assert_eq!(<[f32; 4]>::from(*b), hand);
            assert_eq!(b.fault(96.0, 96.0), None);
            for side in [b.x2 - b.x1, b.y2 - b.y1] {
                assert!((13.0..=41.0).contains(&side), "record {i}: side {side}");
            }
            any.iter_mut().zip(&m.inside).for_each(|(a, &b)| *a |= b);
        }
        for a in 0..x.boxes.len() {
            for b in 0..a {
                assert!(x.boxes[a].iou(&x.boxes[b]) < 0.05);
            }
        }
        // Pixels outside the masks are unchanged.
        for (k, (p, q)) in x.image.rgb().chunks_exact(3).zip(x.clean.rgb().chunks_exact(3)).enumerate() {
            assert!(any[k] || p == q, "record {i}: pixel {k} outside the mask differs");
        }
    }
}

/// The mean difference that a lesion makes inside its mask must be clearly visible, for every category.
#[test]
fn lesions_are_visible() {
    let s = spec(0, 3);
    let mut worst = std::collections::BTreeMap::new();
    for i in 0..400 {
        let x = sample(&s, i).unwrap();
        let Some(c) = x.plan.category else { continue };
        for m in &x.masks {
            let mut sum = 0.0;
            let mut k = 0;
            for (j, _) in m.inside.iter().enumerate().filter(|(_, on)| **on) {
                let d = (0..3).map(|ch| x.image.rgb()[3 * j + ch].abs_diff(x.clean.rgb()[3 * j + ch])).max().unwrap();
                sum += f64::from(d);
                k += 1;
            }
            let w = worst.entry(c.name()).or_insert(f64::MAX);
            *w = w.min(sum / f64::from(k));
        }
    }
    assert_eq!(worst.len(), 5);
    assert!(worst.values().all(|&v| v > 14.0), "{worst:?}");
}

#[test]
fn records_depend_on_seed_and_index_only() {
    let a = tempfile::tempdir().unwrap();
    let b = tempfile::tempdir().unwrap();
    let mut calls = Vec::new();
    let few = generate(&spec(10, 7), a.path(), |k, n| calls.push((k, n))).unwrap();
    assert_eq!((calls.len(), calls[9]), (10, (10, 10)));
    let many = generate(&SynthSpec { train: 13, val: 0, test: 0, ..spec(0, 7) }, b.path(), |_, _| {}).unwrap();
    assert_eq!(few[3].id, "synth-7-000003");
    for (x, y) in few.iter().zip(&many) {
        assert_eq!((&x.id, &x.boxes, &x.category), (&y.id, &y.boxes, &y.category));
        let read = |d: &tempfile::TempDir| std::fs::read(d.path().join(&x.image)).unwrap();
        assert_eq!(read(&a), read(&b));
    }
    let splits: Vec<&str> = few.iter().map(|r| r.split.as_str()).collect();
    assert_eq!((splits[7], splits[8], splits[9]), ("train", "val", "test"));
    assert_ne!(sample(&spec(0, 8), 3).unwrap().image, sample(&spec(0, 7), 3).unwrap().image);
    let file = RecordFile::load(&a.path().join(RECORDS_FILE)).unwrap();
    assert_eq!(file.records, few);
    for (i, r) in file.records.iter().enumerate() {
        assert_eq!(file.open_image(r).unwrap(), sample(&spec(10, 7), i).unwrap().image);
        assert!(r.faults(None).is_empty());
    }
}

#[test]
fn lesions_scale_with_the_image_size() {
    for size in [48, 112, 224] {
        let s = SynthSpec { size, ..spec(0, 1) };
        for i in 0..10 {
            let x = sample(&s, i).unwrap();
            assert_eq!(x.image.width(), size);
            for b in &x.boxes {
                let side = (b.x2 - b.x1) / size as f32 * 96.0;
                assert!((12.0..=42.0).contains(&side), "{side}");
            }
        }
    }
}

#[test]
fn invalid_specifications_are_rejected() {
    let e = |s: SynthSpec| s.validate().unwrap_err().to_string();
    assert!(e(SynthSpec { size: 8, ..spec(1, 0) }).contains("size = 8"));
    assert!(e(SynthSpec { several: 0.9, no_finding: 0.3, ..spec(1, 0) }).contains("several = 0.9"));
    assert!(e(SynthSpec { no_finding: f64::NAN, ..spec(1, 0) }).contains("no_finding"));
    assert!(e(SynthSpec { contrast: 0.0, ..spec(1, 0) }).contains("contrast"));
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), "").unwrap();
    let r = generate(&spec(1, 0), &dir.path().join("file"), |_, _| {});
    assert!(r.unwrap_err().to_string().contains("file"));
}
