//! Size limits of what roles send each other, shared by the senders and by the data checks before a run.

/// Largest message between roles, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// Largest record in a lease, in bytes of its JSON: one message holds several records, and images.
pub const MAX_RECORD_BYTES: usize = MAX_MESSAGE_BYTES / 4;

/// Largest encoded image that is read and sent, in bytes. An image larger than a message is sent in chunks.
pub const MAX_IMAGE_BYTES: u64 = 256 << 20;
