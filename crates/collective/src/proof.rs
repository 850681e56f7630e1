//! Proofs by which ranks show each other that they have the same token, over a store that anyone may read and write.
//!
//! Each rank publishes a nonce; its proof is a keyed hash (BLAKE3, sections 2.3 and 2.6 of its paper) over all nonces, its rank and
//! its fingerprint.

use unveil_core::Secret;

/// Key derivation context: no other use of the token derives the same key.
const CONTEXT: &str = "unveil 2026-11 rendezvous of ranks";

/// Returns 256 random bits in hex.
pub(crate) fn nonce() -> String {
    blake3::Hash::from_bytes(rand::random()).to_hex().to_string()
}

/// Returns the proof of `rank` with this fingerprint, in a rendezvous with these nonces.
pub(crate) fn prove(token: &Secret, nonces: &[Vec<u8>], rank: usize, fingerprint: &str) -> String {
    let key = blake3::derive_key(CONTEXT, token.reveal().as_bytes());
    let mut hash = blake3::Hasher::new_keyed(&key);
    for field in nonces.iter().map(Vec::as_slice).chain([fingerprint.as_bytes()]) {
        hash.update(&(field.len() as u64).to_le_bytes()).update(field);
    }
    hash.update(&(rank as u64).to_le_bytes());
    hash.finalize().to_hex().to_string()
}

/// Returns whether a proof equals the expected one, in constant time.
pub(crate) fn verify(proof: &str, expected: &str) -> bool {
    match (blake3::Hash::from_hex(proof), blake3::Hash::from_hex(expected)) {
        (Ok(proof), Ok(expected)) => proof == expected,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proofs_depend_on_token_rank_fingerprint_and_nonces() {
        let token = Secret::new("a token of ranks");
        let nonces = vec![nonce().into_bytes(), nonce().into_bytes()];
        let expected = prove(&token, &nonces, 1, "v1");
        assert!(verify(&expected, &prove(&token, &nonces, 1, "v1")));
        let other_nonces = vec![nonces[0].clone(), nonce().into_bytes()];
        let shifted_nonces = vec![[nonces[0].clone(), vec![b'x']].concat(), nonces[1][1..].to_vec()];
        for wrong in [
            prove(&Secret::new("another of ranks"), &nonces, 1, "v1"),
            prove(&token, &nonces, 0, "v1"),
            prove(&token, &nonces, 1, "v2"),
            prove(&token, &other_nonces, 1, "v1"),
            prove(&token, &shifted_nonces, 1, "v1"),
            String::new(),
            "0".repeat(64),
        ] {
            assert!(!verify(&wrong, &expected), "{wrong}");
        }
        assert_ne!(nonce(), nonce());
    }
}
