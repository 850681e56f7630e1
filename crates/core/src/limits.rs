//! How large things may be that travel between roles: said once, for who sends them and for who checks data before a run.

/// Largest message between roles, in bytes.
pub const MESSAGE: usize = 64 << 20;

/// Largest record that a lease carries, in bytes of its JSON: several go into one message, beside images.
pub const RECORD: usize = MESSAGE / 4;

/// Largest encoded image that is read and sent, in bytes. What does not fit into a message travels in pieces.
pub const IMAGE: u64 = 256 << 20;
