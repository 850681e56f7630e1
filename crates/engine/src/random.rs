//! Counter-based random numbers: Philox 4x32 with 10 rounds (Salmon et al., SC 2011, "Parallel random numbers: as easy as
//! 1, 2, 3"). A random number is a function of key and counter, so there is no state to share or save.

const ROUNDS: usize = 10;
const MULTIPLIERS: [u64; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Computes Philox 4x32-10: 128 random bits from a 128-bit counter and a 64-bit key.
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..ROUNDS {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let a = MULTIPLIERS[0] * u64::from(counter[0]);
        let b = MULTIPLIERS[1] * u64::from(counter[2]);
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
    }
    counter
}

/// Returns the uniform number in `[0, 1)` that selects token `position` of response `index` of a group.
///
/// It has 52 bits, so that `uniform * total` stays below `total` in f64 for any positive total.
pub fn uniform(seed: u64, group: u64, index: u32, position: u32) -> f64 {
    let words = philox([group as u32, (group >> 32) as u32, index, position], [seed as u32, (seed >> 32) as u32]);
    let bits = (u64::from(words[1]) << 32 | u64::from(words[0])) >> 12;
    bits as f64 / (1u64 << 52) as f64
}

/// Derives a group's 64-bit key from byte strings (FNV-1a over the length-prefixed strings, then a finaliser). Stable across versions
/// and machines.
pub fn group_key(parts: &[&[u8]]) -> u64 {
    let mut h = 0xcbf2_9ce4_8422_2325_u64;
    let mut update = |byte: u8| h = (h ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    for part in parts {
        (part.len() as u64).to_le_bytes().into_iter().for_each(&mut update);
        part.iter().copied().for_each(&mut update);
    }
    h = (h ^ (h >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    h = (h ^ (h >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    h ^ (h >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers from the Random123 library.
    #[test]
    fn philox_matches_known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([!0; 4], [!0; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn uniform_is_uniform_and_depends_on_every_argument() {
        let n = 20_000;
        let draws: Vec<f64> = (0..n).map(|p| uniform(7, 11, 3, p)).collect();
        assert!(draws.iter().all(|u| (0.0..1.0).contains(u)));
        let mut bins = [0u32; 10];
        draws.iter().for_each(|u| bins[(u * 10.0) as usize] += 1);
        let chi: f64 = bins.iter().map(|&b| (f64::from(b) - 2000.0).powi(2) / 2000.0).sum();
        assert!(chi < 27.9, "chi-square {chi} with 9 degrees of freedom");
        let base = uniform(1, 2, 3, 4);
        for other in [
            uniform(2, 2, 3, 4),
            uniform(1, 3, 3, 4),
            uniform(1, 2, 4, 4),
            uniform(1, 2, 3, 5),
            uniform(1 << 40, 2, 3, 4),
            uniform(1, 2 | 1 << 40, 3, 4),
        ] {
            assert_ne!(base, other);
        }
        assert_eq!(base, uniform(1, 2, 3, 4));
    }

    #[test]
    fn group_keys_depend_on_part_boundaries() {
        assert_ne!(group_key(&[b"ab", b"c"]), group_key(&[b"a", b"bc"]));
        assert_eq!(group_key(&[b"a"]), group_key(&[b"a"]));
        let spread: std::collections::HashSet<u64> =
            (0..1000u64).map(|i| group_key(&[&i.to_le_bytes()]) >> 48).collect();
        assert!(spread.len() > 950, "{}", spread.len());
    }
}
