//! KV bytes that can be checked: a pure function of namespace, block hash and layer.
//!
//! The simulated model "computes" this pattern into its pool. So the bytes that come back from a donor, the host
//! tier or the pool itself can be compared, byte by byte, with the expected bytes. A stale slot, a wrong layer,
//! another tenant's block and a copy of the wrong length all differ from the first word on.

use swiftcache_proto::domain::BlockHash;

/// 2^64 / phi (the golden ratio), an odd number. Adding it again and again visits every 64-bit word.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finalizer of SplitMix64: a bijection of 64-bit words in which every input bit affects every output bit.
pub(crate) const fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// The random number generator SplitMix64. It gives the same numbers on every machine and in every release.
#[derive(Clone, Debug)]
pub(crate) struct SplitMix(u64);

impl SplitMix {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) const fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        mix(self.0)
    }

    /// Uniform in [0, 1), 53 bits.
    pub(crate) fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// The bytes of every block of one namespace.
#[derive(Clone, Debug)]
pub struct Pattern {
    namespace: u64,
}

/// The first byte that differs from the pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrongByte {
    /// Position of the byte in the layer's bytes.
    pub offset: usize,
    /// The expected byte.
    pub expected: u8,
    /// The byte found.
    pub found: u8,
}

impl Pattern {
    /// The pattern of `namespace`.
    pub fn new(namespace: &str) -> Self {
        let fold = |state: u64, byte: u8| mix(state.wrapping_add(GOLDEN) ^ u64::from(byte));
        Self {
            namespace: namespace.bytes().fold(0, fold),
        }
    }

    fn seed(&self, block: &BlockHash, layer: usize) -> u64 {
        let half = |range: std::ops::Range<usize>| {
            block.0[range]
                .iter()
                .fold(0, |word: u64, byte| word << 8 | u64::from(*byte))
        };
        let high = mix(self.namespace ^ half(0..8));
        let low = mix(high.wrapping_add(GOLDEN) ^ half(8..16));
        mix(low.wrapping_add(GOLDEN) ^ layer as u64)
    }

    /// Fills `out` with the bytes of layer `layer` of `block`.
    pub fn fill(&self, block: &BlockHash, layer: usize, out: &mut [u8]) {
        let mut words = SplitMix::new(self.seed(block, layer));
        let (whole, rest) = out.as_chunks_mut::<8>();
        for word in whole {
            *word = words.next_u64().to_le_bytes();
        }
        let last = words.next_u64().to_le_bytes();
        rest.iter_mut()
            .zip(last)
            .for_each(|(byte, value)| *byte = value);
    }

    /// Compares every byte of `bytes` with layer `layer` of `block`.
    ///
    /// # Errors
    /// The first byte that differs.
    pub fn check(&self, block: &BlockHash, layer: usize, bytes: &[u8]) -> Result<(), WrongByte> {
        let mut words = SplitMix::new(self.seed(block, layer));
        let (whole, rest) = bytes.as_chunks::<8>();
        let differs = |at: usize, expected: [u8; 8], found: &[u8]| {
            let pairs = expected.into_iter().zip(found.iter().copied());
            let wrong = pairs
                .enumerate()
                .find(|(_, (expected, found))| expected != found);
            wrong.map(|(index, (expected, found))| WrongByte {
                offset: at + index,
                expected,
                found,
            })
        };
        for (index, word) in whole.iter().enumerate() {
            let expected = words.next_u64().to_le_bytes();
            if *word != expected
                && let Some(wrong) = differs(index * 8, expected, word)
            {
                return Err(wrong);
            }
        }
        let expected = words.next_u64().to_le_bytes();
        differs(whole.len() * 8, expected, rest).map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn block(id: u8) -> BlockHash {
        BlockHash([id; 16])
    }

    fn bytes(namespace: &str, id: u8, layer: usize, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        Pattern::new(namespace).fill(&block(id), layer, &mut out);
        out
    }

    #[test]
    fn differs_by_namespace_block_and_layer_from_the_first_word_on() {
        let base = bytes("model", 1, 0, 64);
        for other in [
            bytes("model/", 1, 0, 64),
            bytes("model", 2, 0, 64),
            bytes("model", 1, 1, 64),
        ] {
            let same = base.chunks(8).zip(other.chunks(8)).filter(|(a, b)| a == b);
            assert_eq!(same.count(), 0);
        }
    }

    #[test]
    fn every_half_of_a_hash_counts() {
        let mut low = block(7);
        low.0[15] ^= 1;
        let mut high = block(7);
        high.0[0] ^= 1;
        let pattern = Pattern::new("m");
        let seeds = [block(7), low, high].map(|hash| pattern.seed(&hash, 3));
        assert!(seeds[0] != seeds[1] && seeds[0] != seeds[2] && seeds[1] != seeds[2]);
    }

    #[test]
    fn bytes_are_evenly_spread() {
        let mut counts = [0u32; 256];
        for byte in bytes("spread", 9, 5, 1 << 20) {
            counts[usize::from(byte)] += 1;
        }
        // Chi-square with 255 degrees of freedom: only about one fair draw in 10^4 lies outside 180 to 340.
        let expected = f64::from(1u32 << 12);
        let chi: f64 = counts
            .iter()
            .map(|count| (f64::from(*count) - expected).powi(2) / expected)
            .sum();
        assert!((180.0..340.0).contains(&chi), "chi-square {chi}");
    }

    proptest! {
        #[test]
        fn a_whole_copy_passes_and_one_wrong_byte_is_named(
            len in 1usize..200, at in 0usize..200, flip in 1u8.., id: u8, layer in 0usize..128,
        ) {
            let pattern = Pattern::new("twin");
            let mut copy = bytes("twin", id, layer, len);
            prop_assert_eq!(pattern.check(&block(id), layer, &copy), Ok(()));
            let at = at % len;
            let expected = copy[at];
            copy[at] ^= flip;
            let wrong = WrongByte { offset: at, expected, found: expected ^ flip };
            prop_assert_eq!(pattern.check(&block(id), layer, &copy), Err(wrong));
        }
    }
}
