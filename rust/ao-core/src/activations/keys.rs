//! Keys of activations: what the target had read when it made them.

use xxhash_rust::xxh3::xxh3_128;

/// For each position of a context its key: the xxh3-128 of the key before it (16 bytes, little-endian; 0 at the start)
/// and its token id (4 bytes). Two contexts share the keys of what they begin with, and no others.
#[must_use]
pub fn context_keys(ids: &[i32]) -> Vec<u128> {
    let mut link = [0; 20];
    ids.iter()
        .map(|id| {
            link[16..].copy_from_slice(&id.to_le_bytes());
            let key = xxh3_128(&link);
            link[..16].copy_from_slice(&key.to_le_bytes());
            key
        })
        .collect()
}
