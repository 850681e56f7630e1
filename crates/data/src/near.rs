//! A perceptual hash: images that look alike get hashes that differ in few bits.
//!
//! The hash is dHash (N. Krawetz, "Kind of Like That", hackerfactor.com, 2013): the signs of the horizontal differences of an image shrunk to
//! 9 x 8 grey cells. It says "look at these two", not "these are equal": chest X-rays of different people can come close. Pure.

use std::collections::HashMap;

use crate::store::Image;

/// Hashes that differ in so many bits at most are near.
const MOST: u32 = 3;
/// Fewer rising, or fewer falling, differences than this are an image with too little in it to be told from others.
const LEAST: u32 = 6;

/// The hash of an image; none where there is too little in it.
pub(crate) fn dhash(image: &Image) -> Option<u64> {
    let (w, h) = (image.width() as usize, image.height() as usize);
    let range = |k: usize, of: usize, side: usize| {
        let from = (k * side / of).min(side - 1);
        from..((k + 1) * side / of).clamp(from + 1, side)
    };
    let cell = |row: usize, col: usize| {
        let (mut sum, mut count) = (0_u64, 0_u64);
        for y in range(row, 8, h) {
            for x in range(col, 9, w) {
                let at = (y * w + x) * 3;
                sum += image.rgb()[at..at + 3].iter().map(|v| u64::from(*v)).sum::<u64>();
                count += 1;
            }
        }
        sum * 1000 / count
    };
    let (mut hash, mut falling) = (0, 0);
    for row in 0..8 {
        for col in 0..8 {
            let (left, right) = (cell(row, col), cell(row, col + 1));
            hash |= u64::from(left < right) << (row * 8 + col);
            falling += u32::from(left > right);
        }
    }
    (hash.count_ones() >= LEAST && falling >= LEAST).then_some(hash)
}

/// For each hash, the first other one before it that is near.
///
/// Hashes that differ in three bits agree in one of four quarters: only those are compared.
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
            close.extend(list.iter().copied().filter(|j| hashes[*j].is_some_and(|h| (h ^ hash).count_ones() <= MOST)));
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
    use crate::processor::resize;
    use crate::synth::{SynthSpec, generate};

    #[test]
    fn brightness_and_size_hardly_change_it_and_other_images_do() {
        let dir = tempfile::tempdir().unwrap();
        let records = generate(&SynthSpec::new(40, 9), dir.path(), |_, _| {}).unwrap();
        let root = crate::root::Root::of(&dir.path().join("r.jsonl"), Default::default());
        let images: Vec<Image> = records.iter().map(|r| root.open(r).unwrap()).collect();
        let (mut near, mut apart) = (0, 0);
        for (k, image) in images.iter().enumerate() {
            let hash = dhash(image).unwrap();
            let mut brighter = resize(image, 64, 64, crate::processor::Filter::Bicubic);
            brighter.rgb_mut().iter_mut().for_each(|v| *v = v.saturating_add(3));
            near += usize::from((dhash(&brighter).unwrap() ^ hash).count_ones() <= MOST);
            apart += usize::from((dhash(&images[(k + 1) % 40]).unwrap() ^ hash).count_ones() > MOST);
        }
        // A hint, no proof: where neighbouring cells are equally bright, their order may turn.
        assert!(near >= 36 && apart >= 36, "{near} of 40 are found again, {apart} of 40 pairs told apart");
    }

    #[test]
    fn flat_images_have_none_and_small_ones_do_not_fail() {
        assert_eq!(dhash(&Image::new(50, 50)), None);
        assert_eq!(dhash(&Image::new(1, 1)), None);
    }

    #[test]
    fn pairs_within_three_bits() {
        let hashes = [Some(0x0f0f_0f0f_0f0f_0f0f_u64), None, Some(0x0f0f_0f0f_0f0f_0f08), Some(0xf0f0_0f0f_0f0f_0f0f)];
        assert_eq!(nearest_before(&hashes, |_, _| true), [None, None, Some(0), None]);
        assert_eq!(nearest_before(&hashes, |_, _| false), [None; 4]);
    }
}
