//! Images in every supported format against Pillow and pydicom, and refused images with their error messages.
//!
//! No other test may be in this binary, because the memory of its process is measured.

use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

use proptest::prelude::*;
use serde_json::Value;
use unveil_data::image_store::{Image, ImageError, image_size};
use unveil_testkit::python;

/// Memory in KiB by which the process may grow while it refuses files.
const MAX_REFUSAL_GROWTH: u64 = 48 << 10;

fn generate_images() -> (tempfile::TempDir, Value) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("job.json"), serde_json::json!({"seed": seed()}).to_string()).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/images.py");
    let run = Command::new(python()).arg(script).arg(dir.path()).env("OMP_NUM_THREADS", "1").output().unwrap();
    assert!(run.status.success(), "images.py failed: {}", String::from_utf8_lossy(&run.stderr));
    let listed = serde_json::from_slice(&std::fs::read(dir.path().join("out.json")).unwrap()).unwrap();
    (dir, listed)
}

/// Returns the seed of random input; `UNVEIL_SEED` sets another.
fn seed() -> u64 {
    std::env::var("UNVEIL_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(7)
}

/// Returns the highest resident memory so far in KiB.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn refusal(path: &Path) -> String {
    match Image::open(path) {
        Err(e) => e.to_string(),
        Ok(i) => panic!("{} was decoded as {} x {}", path.display(), i.width(), i.height()),
    }
}

#[test]
fn formats_match_references_and_invalid_files_are_refused() {
    let (dir, listed) = generate_images();
    let root = dir.path();
    refuses_unsupported_files(root);
    refuses_truncated_jpegs(root);
    refuses_decompression_bombs(root);
    let listed = listed.as_array().unwrap();
    assert!(listed.len() > 60, "{}", listed.len());
    let mut deviations = Vec::new();
    for item in listed {
        let file = item["file"].as_str().unwrap();
        let w = item["width"].as_u64().unwrap() as u32;
        let h = item["height"].as_u64().unwrap() as u32;
        let image = Image::open(&root.join(file)).unwrap();
        assert_eq!((image.width(), image.height()), (w, h), "{file}");
        assert_eq!(image_size(&root.join(file)).unwrap(), (w, h), "{file}");
        let theirs = std::fs::read(root.join(format!("{file}.rgb"))).unwrap();
        assert_eq!(image.rgb().len(), theirs.len(), "{file}");
        let worst = image.rgb().iter().zip(&theirs).map(|(a, b)| a.abs_diff(*b)).max().unwrap_or(0);
        // Decoders of lossy JPEG may round their transforms and colours differently.
        let lossy = ["jpeg_colour.dcm", "jpeg_grey.dcm", "jfif_labelled_rgb.dcm", "jfif_labelled_422.dcm"];
        let limit = if file.ends_with(".jpg") || lossy.contains(&file) { 3 } else { 1 };
        if worst > limit {
            deviations.push(format!("{file}: differs by {worst}"));
        }
        println!("{file}: differs by {worst} at most");
    }
    assert!(deviations.is_empty(), "{deviations:?}");
    survives_damaged_files(root);
}

fn refuses_unsupported_files(root: &Path) {
    for (file, needle) in [
        ("other.gif", "GIF"),
        ("other.tiff", "TIFF"),
        ("other.webp", "WEBP"),
        ("other.bmp", "BMP"),
        ("frames.dcm", "12 frames"),
        ("cut.dcm", "21 pixels need 714 bytes"),
        ("no_rows.dcm", "34 x 0 pixels"),
        ("palette.dcm", "PALETTE COLOR"),
        ("deep.dcm", "32 bits"),
        ("jpeg2000.dcm", "JPEG 2000 stream ends within its header"),
        ("j2k_smaller.dcm", "34 x 21 pixels, but its header says 34 x 20"),
        ("j2k_colour.dcm", "3 components"),
        ("cut_j2k_2.dcm", "truncated"),
        ("cut_j2k_20.dcm", "truncated"),
        ("cut_j2k_half.dcm", "truncated"),
        ("cut_htj2k.dcm", "truncated"),
        ("cut_jpeg_2.dcm", "truncated"),
        ("cut_jpeg_20.dcm", "truncated"),
        ("cut_jpeg_half.dcm", "truncated"),
        ("odd422.dcm", "9 columns, which is odd"),
        ("odd422_short.dcm", "9 columns, which is odd"),
        ("odd422_even_area.dcm", "9 columns, which is odd"),
        ("table_short.dcm", "has 50 entries, but its descriptor says 153"),
        ("table.dcm", "modality lookup table"),
        ("cut_deflated.dcm", "deflated data is damaged or truncated"),
        ("empty_deflated.dcm", "deflated data is damaged or truncated"),
        ("encapsulated_short.dcm", "34 x 21 pixels need 714 bytes, but it has 712"),
        ("deflated_frame_short.dcm", "34 x 21 pixels need 714 bytes, but it has 712"),
        ("jpeg_ls.dcm", "1.2.840.10008.1.2.4.80 is not supported; supported are uncompressed"),
        ("no_pixels.dcm", "no pixels"),
    ] {
        let message = refusal(&root.join(file));
        assert!(message.contains(file) && message.contains(needle), "{message}");
        if file.starts_with("other") {
            assert!(message.contains("PNG, JPEG and DICOM"), "{message}");
        }
    }
}

/// A complete JPEG is decoded, and one truncated anywhere is reported as such. Pillow refuses it as well, except that it may ignore the last
/// two bytes of small files.
fn refuses_truncated_jpegs(root: &Path) {
    let verdicts: std::collections::BTreeMap<String, bool> =
        serde_json::from_slice(&std::fs::read(root.join("cut.json")).unwrap()).unwrap();
    assert!(verdicts.len() > 40);
    for (file, accepted) in verdicts {
        let end: usize = file.trim_end_matches(".jpg").rsplit('-').next().unwrap().parse().unwrap();
        assert!(accepted == (end == 0) || end < 3, "Pillow and {file}: {accepted}");
        if end == 0 {
            Image::open(&root.join(&file)).unwrap();
        } else {
            let message = refusal(&root.join(&file));
            assert!(message.contains(&file) && message.contains("truncated"), "{message}");
        }
    }
}

fn refuses_decompression_bombs(root: &Path) {
    let before = peak_memory();
    for (file, needle) in [
        ("long.png", "20000"),
        ("claims.png", "60000"),
        ("area.png", "256000000 pixels"),
        ("huge.dcm", "65535"),
        ("area.dcm", "256000000 pixels"),
    ] {
        let path = root.join(file);
        let message = refusal(&path);
        assert!(message.contains(file) && message.contains(needle) && message.contains("limit"), "{message}");
        assert!(matches!(Image::open(&path), Err(ImageError::TooLarge { .. })), "{message}");
    }
    // Data that unpacks to 400 MiB after headers of a few pixels: anything but pixels is never unpacked completely.
    for file in ["zip.png", "text.png", "profile.png"] {
        if let Ok(image) = Image::open(&root.join(file)) {
            assert!(image.width() <= 16 && image.height() <= 16);
        }
    }
    // A run-length stream of a small image whose header claims a large one.
    let path = root.join("bomb_rle.dcm");
    let mut bytes = std::fs::read(&path).unwrap();
    for tag in [[0x28, 0, 0x10, 0], [0x28, 0, 0x11, 0]] {
        let position = bytes.windows(6).rposition(|w| w[..4] == tag && &w[4..] == b"US").unwrap();
        bytes[position + 8..position + 10].copy_from_slice(&8000u16.to_le_bytes());
    }
    std::fs::write(&path, &bytes).unwrap();
    assert!(refusal(&path).contains("RLE"));
    // A length of almost 4 GiB in a file of a few hundred bytes.
    let mut bytes = std::fs::read(root.join("u8.dcm")).unwrap();
    let position = bytes.windows(8).rposition(|w| w[..6] == [0xe0, 0x7f, 0x10, 0, b'O', b'B']).unwrap();
    bytes[position + 8..position + 12].copy_from_slice(&0xffff_fff0u32.to_le_bytes());
    assert!(Image::decode(&bytes, "lying").unwrap_err().to_string().contains("lying"));
    // An element with two million numbers: those that images need are a few words, and longer ones are skipped unread.
    let whole = std::fs::read(root.join("whole_implicit.dcm")).unwrap();
    let position = whole.windows(4).rposition(|w| w == [0xe0, 0x7f, 0x10, 0]).unwrap();
    let value = b"1\\".repeat(2 << 20);
    let centre = [&[0x28, 0, 0x50, 0x10], &(value.len() as u32).to_le_bytes()[..], &value].concat();
    let long = [&whole[..position], &centre, &whole[position..]].concat();
    assert_eq!(Image::decode(&long, "long").unwrap(), Image::decode(&whole, "whole").unwrap());
    let grown = peak_memory() - before;
    println!("memory grew by {grown} KiB");
    assert!(grown < MAX_REFUSAL_GROWTH, "memory grew by {grown} KiB");
    // A deflated data set may grow to the size of the largest file.
    let path = root.join("bomb_deflated.dcm");
    let message = refusal(&path);
    assert!(message.contains("inflated data set exceeds the limit of 268435456"), "{message}");
    assert!(matches!(Image::open(&path), Err(ImageError::TooLarge { .. })), "{message}");
}

/// Places in the crate's own source that panicked. Panics of decoder libraries are caught and become errors that name the image.
static OWN_PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn record_own_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let own = panic.location().filter(|place| place.file().contains("crates/data/src"));
        OWN_PANICS.lock().unwrap().extend(own.map(ToString::to_string));
    }));
}

/// Damaged files of every format and transfer syntax give errors or other images, never a panic or excessive memory use.
fn survives_damaged_files(root: &Path) {
    let before = peak_memory();
    let files = [
        "u8.dcm",
        "implicit.dcm",
        "big_endian.dcm",
        "deflated.dcm",
        "encapsulated_grey.dcm",
        "deflated_frame_grey.dcm",
        "rle16.dcm",
        "rle_rgb.dcm",
        "jpeg_colour.dcm",
        "lossless_4.dcm",
        "lossless.dcm",
        "j2k_tiled.dcm",
        "j2k_ict.dcm",
        "htj2k_lossless.dcm",
        "htj2k_rpcl.dcm",
        "htj2k.dcm",
        "table_late.dcm",
        "whole_bare.dcm",
        "palette.png",
        "cmyk.jpg",
    ];
    let originals: Vec<Vec<u8>> = files.iter().map(|f| std::fs::read(root.join(f)).unwrap()).collect();
    let strategy = (
        0..files.len(),
        prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        any::<bool>(),
        any::<prop::sample::Index>(),
    );
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 5000,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    record_own_panics();
    let outcome = runner.run(&strategy, |(which, changes, in_header, end)| {
        let mut bytes = originals[which].clone();
        for (position, value) in changes {
            // The structure is in the headers.
            let span = if in_header { 132..bytes.len().min(900) } else { 0..bytes.len() };
            let position = span.start + position.index(span.len());
            bytes[position] = value;
        }
        if end.index(2) == 0 {
            bytes.truncate(end.index(bytes.len()) + 1);
        }
        match Image::decode(&bytes, "damaged") {
            Ok(image) => {
                prop_assert_eq!(image.rgb().len(), image.width() as usize * image.height() as usize * 3);
            }
            Err(e) => prop_assert!(e.to_string().contains("damaged"), "{e}"),
        }
        let own = OWN_PANICS.lock().unwrap().clone();
        prop_assert!(own.is_empty(), "{own:?}");
        Ok(())
    });
    drop(std::panic::take_hook());
    outcome.unwrap();
    let grown = peak_memory() - before;
    assert!(grown < 1 << 20, "memory grew by {grown} KiB");
}

#[test]
fn sixteen_bits_are_scaled_to_eight() {
    use image::{ExtendedColorType, ImageEncoder, codecs::png::PngEncoder};
    let values: Vec<u16> = (0..48).map(|i| i * 1365).collect();
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_ne_bytes()).collect();
    for (colour, width, channels) in [
        (ExtendedColorType::L16, 8, 1),
        (ExtendedColorType::Rgb16, 4, 3),
        (ExtendedColorType::La16, 4, 2),
        (ExtendedColorType::Rgba16, 3, 4),
    ] {
        let height = (values.len() / channels / width) as u32;
        let mut png = Vec::new();
        PngEncoder::new(&mut png).write_image(&bytes, width as u32, height, colour).unwrap();
        let image = Image::decode(&png, "16 bits").unwrap();
        let shown = |v: u16| (f64::from(v) / 257.0).round() as u8;
        let want: Vec<u8> = values
            .chunks(channels)
            .flat_map(|p| if channels < 3 { [p[0]; 3] } else { [p[0], p[1], p[2]] })
            .map(shown)
            .collect();
        assert!(image.rgb().iter().zip(&want).all(|(a, b)| a.abs_diff(*b) <= 1), "{colour:?}");
    }
}
