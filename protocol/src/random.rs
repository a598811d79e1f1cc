//! Random streams: every random number of a run is a pure function of the job's seed and of *what it is for*.
//!
//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a key and a
//! counter into four words with no state in between, so a mask can be drawn by any thread of any worker, on a CPU
//! or a GPU, and comes out the same. Nothing here depends on the number of shards, on a rank or on a thread.

/// What a stream of random numbers is for. Streams of different purposes never share a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Dropout masks. The counter is [`dropout_counter`].
    Dropout,
    /// Initial parameters. The counter is (element / 4, tensor index).
    Init,
    /// The one-time dealing of samples to shards.
    Deal,
    /// The order of samples inside a shard, drawn anew each epoch.
    Shuffle,
    /// The embedded digits.
    Digits,
    /// Sampling of text.
    Sample,
    /// The order of steps whose rows come from several pools, drawn anew each epoch.
    Pools,
    /// The embedded labelled lines.
    Fields,
}

/// The Philox key of a purpose: for [`Purpose::Dropout`] the seed itself, else the seed mixed with the purpose.
pub fn key(seed: u64, purpose: Purpose) -> [u32; 2] {
    let word = match purpose {
        Purpose::Dropout => seed,
        other => mix64(seed ^ mix64(other as u64)),
    };
    [word as u32, (word >> 32) as u32]
}

/// The counter of the dropout mask of units `4·unit_block .. 4·unit_block + 4`.
///
/// `row` is the global slot index, `position` is `t·L·D + layer·D + direction`. The step counts modulo 2³².
#[inline(always)]
pub fn dropout_counter(step: u64, row: u32, position: u32, unit_block: u32) -> [u32; 4] {
    [step as u32, row, position, unit_block]
}

/// A unit is kept iff its word is below this threshold: `keep · 2³²`, saturated to the largest word.
///
/// `keep = 1` keeps every word but the last; callers skip dropout altogether at `keep = 1`.
pub fn keep_threshold(keep: f32) -> u32 {
    (f64::from(keep) * 4_294_967_296.0) as u32
}

/// One block of Philox4x32-10: four independent words for this key and counter.
#[inline(always)]
pub fn philox4x32_10(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    let [mut k0, mut k1] = key;
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    for _ in 0..10 {
        let p0 = u64::from(c0) * 0xD251_1F53;
        let p1 = u64::from(c2) * 0xCD9E_8D57;
        (c0, c1, c2, c3) = ((p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32);
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [c0, c1, c2, c3]
}

/// The finaliser of SplitMix64: a bijection of 64-bit words whose output bits all depend on all input bits.
#[inline(always)]
pub fn mix64(mut word: u64) -> u64 {
    word = word.wrapping_add(0x9E37_79B9_7F4A_7C15);
    word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    word ^ (word >> 31)
}

/// A sequential reader of one stream, for places where the order of drawing is itself fixed (dealing, shuffling,
/// initialisation). Two readers with the same arguments give the same numbers.
#[derive(Debug, Clone)]
pub struct Stream {
    key: [u32; 2],
    /// The two words that name the stream: e.g. (epoch, shard).
    name: [u32; 2],
    next_block: u64,
    words: [u32; 4],
    used: usize,
}

impl Stream {
    /// The stream of `purpose` named by two words, e.g. (epoch, shard) or (tensor, 0).
    pub fn new(seed: u64, purpose: Purpose, name: [u32; 2]) -> Self {
        Self { key: key(seed, purpose), name, next_block: 0, words: [0; 4], used: 4 }
    }

    /// The next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            let block = self.next_block;
            self.words =
                philox4x32_10(self.key, [block as u32, (block >> 32) as u32, self.name[0], self.name[1]]);
            self.next_block += 1;
            self.used = 0;
        }
        self.used += 1;
        self.words[self.used - 1]
    }

    /// A number uniform in [0, 1), a multiple of 2⁻²⁴.
    pub fn unit_f32(&mut self) -> f32 {
        (self.next_u32() >> 8) as f32 * (1.0 / 16_777_216.0)
    }

    /// A number uniform in `0 .. bound` without bias (Lemire's method: rejects the few words that would favour
    /// some results).
    pub fn below(&mut self, bound: u32) -> u32 {
        assert!(bound > 0, "below: the bound is 0");
        let reject_under = bound.wrapping_neg() % bound;
        loop {
            let product = u64::from(self.next_u32()) * u64::from(bound);
            if product as u32 >= reject_under {
                return (product >> 32) as u32;
            }
        }
    }

    /// Puts the items in a uniformly random order (Fisher–Yates, from the end).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u32 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_known_answers() {
        // The kat_vectors of the Random123 distribution for philox4x32-10.
        let cases = [
            ([0; 2], [0; 4], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([!0; 2], [!0; 4], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0xa409_3822, 0x299f_31d0],
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (key, counter, expected) in cases {
            assert_eq!(philox4x32_10(key, counter), expected);
        }
    }

    #[test]
    fn purposes_never_share_a_key() {
        let all = [
            Purpose::Dropout,
            Purpose::Init,
            Purpose::Deal,
            Purpose::Shuffle,
            Purpose::Digits,
            Purpose::Sample,
            Purpose::Pools,
            Purpose::Fields,
        ];
        for seed in 0..100 {
            for (i, a) in all.iter().enumerate() {
                for b in &all[..i] {
                    assert_ne!(key(seed, *a), key(seed, *b), "seed {seed}: {a:?} and {b:?}");
                }
            }
        }
    }

    #[test]
    fn below_is_uniform() {
        let mut stream = Stream::new(1, Purpose::Deal, [0, 0]);
        let mut seen = [0u32; 7];
        for _ in 0..70_000 {
            seen[stream.below(7) as usize] += 1;
        }
        // Six standard deviations of a binomial count around 10,000 are 555.
        assert!(seen.iter().all(|&n| n.abs_diff(10_000) < 555), "{seen:?}");
    }

    #[test]
    fn shuffle_is_a_permutation_and_depends_on_the_name() {
        let order = |name| {
            let mut items: Vec<u32> = (0..1000).collect();
            Stream::new(7, Purpose::Shuffle, name).shuffle(&mut items);
            items
        };
        let (a, b) = (order([0, 1]), order([1, 0]));
        assert_eq!(a, order([0, 1]));
        assert_ne!(a, b);
        let mut sorted = a.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn keep_threshold_is_the_fraction_of_all_words() {
        assert_eq!(keep_threshold(0.0), 0);
        assert_eq!(keep_threshold(0.5), 1 << 31);
        assert_eq!(keep_threshold(0.75), 3 << 30);
        assert_eq!(keep_threshold(1.0), u32::MAX);
    }
}
