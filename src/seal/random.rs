//! Randomness: the operating system's. In a simulation it comes from a seed, because the order of random names decides what is
//! read first.

#[cfg(test)]
thread_local! {
    /// What this thread takes instead of the operating system's randomness.
    pub(crate) static SEED: std::cell::Cell<Option<u64>> = const { std::cell::Cell::new(None) };
}

/// Fills `bytes`.
pub(crate) fn fill(bytes: &mut [u8]) -> Result<(), getrandom::Error> {
    #[cfg(test)]
    if let Some(seed) = SEED.get() {
        let mut digest = blake3::Hasher::new();
        digest.update(&seed.to_le_bytes());
        digest.finalize_xof().fill(bytes);
        SEED.set(Some(seed.wrapping_add(1)));
        return Ok(());
    }
    getrandom::fill(bytes)
}
