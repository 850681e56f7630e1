//! Near-duplicate images by a perceptual hash: images that look alike get hashes that differ in few bits.
//!
//! The hash is dHash (N. Krawetz, "Kind of Like That", hackerfactor.com, 2013): the signs of the horizontal differences of an image shrunk to
//! 9 x 8 grey cells. A small distance is a hint, not a proof: chest X-rays of different people can be close.

use std::collections::HashMap;

use unveil_data::image_store::Image;

/// Largest number of differing bits of two near hashes.
const MAX_DISTANCE: u32 = 3;
/// Smallest number of rising and of falling differences: an image with fewer has too little content to be compared.
const MIN_CHANGES: u32 = 6;

/// Computes the hash of an image; `None` if it has too little content.
pub(crate) fn dhash(image: &Image) -> Option<u64> {
    let w = image.width() as usize;
    let h = image.height() as usize;
    let range = |k: usize, cells: usize, side: usize| {
        let start = (k * side / cells).min(side - 1);
        start..((k + 1) * side / cells).clamp(start + 1, side)
    };
    let cell = |row: usize, col: usize| {
        let mut sum = 0_u64;
        let mut count = 0_u64;
        for y in range(row, 8, h) {
            for x in range(col, 9, w) {
                let offset = (y * w + x) * 3;
                sum += image.rgb()[offset..offset + 3].iter().map(|v| u64::from(*v)).sum::<u64>();
                count += 1;
            }
        }
        sum * 1000 / count
    };
    let mut hash = 0;
    let mut falling = 0;
    for row in 0..8 {
        for col in 0..8 {
            let left = cell(row, col);
            let right = cell(row, col + 1);
            hash |= u64::from(left < right) << (row * 8 + col);
            falling += u32::from(left > right);
        }
    }
    (hash.count_ones() >= MIN_CHANGES && falling >= MIN_CHANGES).then_some(hash)
}

/// Returns for each hash the index of the first earlier one that is near and for which `differs(index, earlier)` holds.
///
/// Hashes that differ in at most three bits agree in one of their four quarters, so only those are compared.
pub(crate) fn nearest_before(
    hashes: &[Option<u64>],
    mut differs: impl FnMut(usize, usize) -> bool,
) -> Vec<Option<usize>> {
    let mut bands: [HashMap<u16, Vec<usize>>; 4] = Default::default();
    let mut out = vec![None; hashes.len()];
    for (i, hash) in hashes.iter().enumerate().filter_map(|(i, h)| h.map(|h| (i, h))) {
        let quarter = |k: usize| (hash >> (16 * k)) as u16;
        let mut close = Vec::new();
        for (k, band) in bands.iter_mut().enumerate() {
            let list = band.entry(quarter(k)).or_default();
            close.extend(
                list.iter().copied().filter(|j| hashes[*j].is_some_and(|h| (h ^ hash).count_ones() <= MAX_DISTANCE)),
            );
            list.push(i);
        }
        close.sort_unstable();
        out[i] = close.into_iter().find(|j| differs(i, *j));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::{SynthSpec, generate};
    use unveil_preprocess::processor::resize;

    #[test]
    fn hash_is_robust_to_brightness_and_size() {
        let dir = tempfile::tempdir().unwrap();
        let records = generate(&SynthSpec::new(40, 9), dir.path(), |_, _| {}).unwrap();
        let root = unveil_data::image_root::ImageRoot::of(&dir.path().join("r.jsonl"), Default::default());
        let images: Vec<Image> = records.iter().map(|r| root.open(r).unwrap()).collect();
        let mut near = 0;
        let mut apart = 0;
        for (k, image) in images.iter().enumerate() {
            let hash = dhash(image).unwrap();
            let mut brighter = resize(image, 64, 64, unveil_preprocess::processor::Filter::Bicubic);
            brighter.rgb_mut().iter_mut().for_each(|v| *v = v.saturating_add(3));
            near += usize::from((dhash(&brighter).unwrap() ^ hash).count_ones() <= MAX_DISTANCE);
            apart += usize::from((dhash(&images[(k + 1) % 40]).unwrap() ^ hash).count_ones() > MAX_DISTANCE);
        }
        // Not all: the order of neighbouring cells of equal brightness may change.
        assert!(near >= 36 && apart >= 36, "{near} of 40 recognised, {apart} of 40 pairs distinguished");
    }

    #[test]
    fn flat_and_tiny_images_have_no_hash() {
        assert_eq!(dhash(&Image::new(50, 50)), None);
        assert_eq!(dhash(&Image::new(1, 1)), None);
    }

    #[test]
    fn hashes_within_three_bits_are_near() {
        let hashes = [Some(0x0f0f_0f0f_0f0f_0f0f_u64), None, Some(0x0f0f_0f0f_0f0f_0f08), Some(0xf0f0_0f0f_0f0f_0f0f)];
        assert_eq!(nearest_before(&hashes, |_, _| true), [None, None, Some(0), None]);
        assert_eq!(nearest_before(&hashes, |_, _| false), [None; 4]);
    }
}
