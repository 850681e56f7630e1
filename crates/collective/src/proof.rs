//! How ranks prove to each other that they know one token, over a store that anybody may read and write.
//!
//! Each rank puts a nonce there; its proof is a keyed hash (BLAKE3, sections 2.3 and 2.6 of its paper) over all nonces, its rank and
//! what it runs. Must not know: the store.

use unveil_core::Secret;

/// What the key is for: no other use of the token gives the same one.
const CONTEXT: &str = "unveil 2026-11 rendezvous of ranks";

/// 256 random bits, hex.
pub(crate) fn nonce() -> String {
    blake3::Hash::from_bytes(rand::random()).to_hex().to_string()
}

/// The proof of `rank`, which runs `print`, in a meeting with these nonces.
pub(crate) fn of(token: &Secret, nonces: &[Vec<u8>], rank: usize, print: &str) -> String {
    let key = blake3::derive_key(CONTEXT, token.reveal().as_bytes());
    let mut hash = blake3::Hasher::new_keyed(&key);
    for part in nonces.iter().map(Vec::as_slice).chain([print.as_bytes()]) {
        hash.update(&(part.len() as u64).to_le_bytes()).update(part);
    }
    hash.update(&(rank as u64).to_le_bytes());
    hash.finalize().to_hex().to_string()
}

/// Whether a proof is the right one, compared in constant time.
pub(crate) fn same(said: &str, right: &str) -> bool {
    match (blake3::Hash::from_hex(said), blake3::Hash::from_hex(right)) {
        (Ok(said), Ok(right)) => said == right,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_holds_for_one_token_rank_and_meeting() {
        let (token, nonces) = (Secret::new("a token of ranks"), vec![nonce().into_bytes(), nonce().into_bytes()]);
        let right = of(&token, &nonces, 1, "v1");
        assert!(same(&right, &of(&token, &nonces, 1, "v1")));
        let other = vec![nonces[0].clone(), nonce().into_bytes()];
        let moved = vec![[nonces[0].clone(), vec![b'x']].concat(), nonces[1][1..].to_vec()];
        for wrong in [
            of(&Secret::new("another of ranks"), &nonces, 1, "v1"),
            of(&token, &nonces, 0, "v1"),
            of(&token, &nonces, 1, "v2"),
            of(&token, &other, 1, "v1"),
            of(&token, &moved, 1, "v1"),
            String::new(),
            "0".repeat(64),
        ] {
            assert!(!same(&wrong, &right), "{wrong}");
        }
        assert_ne!(nonce(), nonce());
    }
}
