use proptest::prelude::*;

use super::*;

/// Returns an image whose pixels encode their origin: `[x, y, inside a box]`.
fn marked(w: u32, h: u32, boxes: &[BBox]) -> Image {
    let mut i = Image::new(w, h);
    for y in 0..h {
        for x in 0..w {
            let inside = |b: &BBox| {
                let x = x as f32;
                let y = y as f32;
                x >= b.x1 && x < b.x2 && y >= b.y1 && y < b.y2
            };
            i.set_pixel(x, y, [x as u8, y as u8, if boxes.iter().any(inside) { 255 } else { 0 }]);
        }
    }
    i
}

/// Returns the bounding box of the marked pixels.
fn marks(i: &Image) -> Option<BBox> {
    let on: Vec<(u32, u32)> = (0..i.height())
        .flat_map(|y| (0..i.width()).map(move |x| (x, y)))
        .filter(|&(x, y)| i.pixel(x, y)[2] == 255)
        .collect();
    let x1 = on.iter().map(|p| p.0).min()?;
    let x2 = on.iter().map(|p| p.0).max()? + 1;
    let y1 = on.iter().map(|p| p.1).min()?;
    let y2 = on.iter().map(|p| p.1).max()? + 1;
    Some([x1 as f32, y1 as f32, x2 as f32, y2 as f32].into())
}

fn all_geometry() -> AugmentSpec {
    AugmentSpec { crop_min: 0.5, flip_h: true, flip_v: true, turn: true, jitter: 0.0 }
}

prop_compose! {
    fn scene()(w in 20u32..90, h in 20u32..90)(
        w in Just(w), h in Just(h),
        corners in prop::collection::vec((0..w - 4, 0..h - 4, 0.05f32..1.0, 0.05f32..1.0), 0..4),
    ) -> (u32, u32, Vec<BBox>) {
        let boxes = corners.into_iter().map(|(x, y, a, b)| {
            let side = |space: u32, share: f32| (space as f32 * share).ceil().max(1.0);
            let x1 = x as f32;
            let y1 = y as f32;
            [x1, y1, x1 + side(w - x, a), y1 + side(h - y, b)].into()
        });
        (w, h, boxes.collect())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn boxes_stay_valid_and_on_their_pixels((w, h, boxes) in scene(), seed in any::<u64>()) {
        let image = marked(w, h, &boxes[..boxes.len().min(1)]);
        let out = augment(&all_geometry(), seed, 1, "r", &image, &boxes).unwrap();
        prop_assert_eq!(out.boxes.len(), out.kept.len());
        prop_assert_eq!(out.boxes.is_empty(), boxes.is_empty());
        let nw = out.image.width() as f32;
        let nh = out.image.height() as f32;
        prop_assert_eq!(out.image.rgb().len(), (out.image.width() * out.image.height() * 3) as usize);
        for (b, &k) in out.boxes.iter().zip(&out.kept) {
            prop_assert!(b.x1 >= 0.0 && b.y1 >= 0.0 && b.x2 <= nw && b.y2 <= nh && b.area() > 0.0);
            prop_assert!(b.area() >= MIN_KEPT_SHARE * boxes[k].area() - 1e-6);
        }
        if let Some(index) = out.kept.iter().position(|&k| k == 0) {
            prop_assert_eq!(marks(&out.image), Some(out.boxes[index]));
        }
        // Dropped boxes were almost entirely outside.
        for k in (0..boxes.len()).filter(|k| !out.kept.contains(k)) {
            let visible = out.image.rgb().chunks_exact(3).filter(|p| {
                let x = f32::from(p[0]);
                let y = f32::from(p[1]);
                x >= boxes[k].x1 && x < boxes[k].x2 && y >= boxes[k].y1 && y < boxes[k].y2
            });
            prop_assert!((visible.count() as f64) < MAX_DROPPED_SHARE * boxes[k].area() + 1e-6);
        }
    }

    #[test]
    fn two_flips_or_four_rotations_are_the_identity((w, h, boxes) in scene()) {
        let image = marked(w, h, &boxes);
        for (times, f) in [(2, flip_h as fn(&mut Image, &mut [BBox])), (2, flip_v), (4, rotate_clockwise)] {
            let mut i = image.clone();
            let mut b = boxes.clone();
            f(&mut i, &mut b);
            prop_assert_eq!(marks(&i).map(|m| m.area()), marks(&image).map(|m| m.area()));
            (1..times).for_each(|_| f(&mut i, &mut b));
            prop_assert_eq!(&i, &image);
            prop_assert_eq!(&b, &boxes);
        }
    }
}

#[test]
fn result_depends_on_seed_pass_and_id() {
    let boxes: Vec<BBox> = vec![[10.0, 10.0, 30.0, 24.0].into()];
    let image = marked(64, 48, &boxes);
    let run = |seed, pass, id| {
        augment(&AugmentSpec { jitter: 0.2, ..all_geometry() }, seed, pass, id, &image, &boxes).unwrap()
    };
    assert_eq!(run(1, 2, "a"), run(1, 2, "a"));
    assert_ne!(run(1, 2, "a").image, run(2, 2, "a").image);
    assert_ne!(run(1, 2, "a").image, run(1, 3, "a").image);
    assert_ne!(run(1, 2, "a").image, run(1, 2, "b").image);
    let off = AugmentSpec::default();
    assert!(off.is_off() && !all_geometry().is_off());
    assert_eq!(augment(&off, 1, 2, "a", &image, &boxes).unwrap().image, image);
}

#[test]
fn crops_vary_and_jitter_shifts_the_mean() {
    let image = marked(96, 96, &[]);
    let spec = AugmentSpec { crop_min: 0.5, ..AugmentSpec::default() };
    let sides: std::collections::BTreeSet<u32> =
        (0..60).map(|p| augment(&spec, 0, p, "x", &image, &[]).unwrap().image.width()).collect();
    assert!(sides.len() > 20 && sides.iter().all(|s| (48..=96).contains(s)), "{sides:?}");
    let mut grey = Image::from_rgb(1, 1, vec![100; 3]).unwrap();
    jitter(&mut grey, 0.1, 0.0);
    assert_eq!(grey.rgb(), [126, 126, 126]);
    jitter(&mut grey, 1.0, 0.5);
    assert_eq!(grey.rgb(), [255, 255, 255]);
}

#[test]
fn invalid_input_is_named() {
    let image = Image::new(20, 20);
    let run = |spec: AugmentSpec, b: [f32; 4]| augment(&spec, 0, 0, "r9", &image, &[b.into()]).unwrap_err().to_string();
    assert_eq!(run(all_geometry(), [1.0, 1.0, 1.0, 4.0]), "record \"r9\": box 0 has no area");
    assert_eq!(run(all_geometry(), [1.0, 1.0, 40.0, 4.0]), "record \"r9\": box 0 lies outside the image");
    assert_eq!(run(all_geometry(), [20.0, 1.0, 21.0, 4.0]), "record \"r9\": box 0 lies outside the image");
    let edge = augment(
        &AugmentSpec { flip_h: true, ..Default::default() },
        0,
        0,
        "r",
        &image,
        &[[1.0, 1.0, 20.5, 4.0].into()],
    );
    assert!(edge.unwrap().boxes.iter().all(|b| b.x1 >= 0.0 && b.x2 <= 20.0));
    let ok = [1.0, 1.0, 2.0, 2.0];
    assert!(run(AugmentSpec { crop_min: 0.0, ..all_geometry() }, ok).contains("crop_min = 0"));
    assert!(run(AugmentSpec { jitter: f32::NAN, ..all_geometry() }, ok).contains("jitter = NaN"));
}
