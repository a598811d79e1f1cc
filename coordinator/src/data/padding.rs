//! Sequences of one length, as Keras' `pad_sequences` makes them.

use protocol::job::Pad;

/// The last `most` items of a sequence.
pub(super) fn last(sequence: &[u16], most: usize) -> &[u16] {
    &sequence[sequence.len().saturating_sub(most)..]
}

/// Makes every sequence `width` items long. Of a longer one the last items are kept, whichever `pad` it is; a shorter
/// one is filled up with `value` in front or behind.
pub(super) fn pad_sequences<'a>(
    sequences: impl IntoIterator<Item = &'a [u16]>,
    width: usize,
    pad: Pad,
    value: u16,
) -> Vec<u16> {
    let mut padded = Vec::new();
    for sequence in sequences {
        let kept = last(sequence, width);
        let filling = std::iter::repeat_n(value, width - kept.len());
        match pad {
            Pad::Pre => padded.extend(filling.chain(kept.iter().copied())),
            Pad::Post => padded.extend(kept.iter().copied().chain(filling)),
        }
    }
    padded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worked_example_of_pad_sequences() {
        let texts: [&[u16]; 4] =
            [&[1, 2, 4, 2, 3], &[0, 1, 2], &[4, 5, 2, 1], &[5, 2, 1, 3, 4, 1, 2, 3, 4, 5]];
        let padded = |pad, value| {
            let padded = pad_sequences(texts, 5, pad, value);
            padded.chunks_exact(5).map(<[u16]>::to_vec).collect::<Vec<_>>()
        };
        assert_eq!(padded(Pad::Pre, 0), [[1, 2, 4, 2, 3], [0, 0, 0, 1, 2], [0, 4, 5, 2, 1], [1, 2, 3, 4, 5]]);
        assert_eq!(
            padded(Pad::Post, 9),
            [[1, 2, 4, 2, 3], [0, 1, 2, 9, 9], [4, 5, 2, 1, 9], [1, 2, 3, 4, 5]]
        );
    }

    #[test]
    fn nothing_is_all_padding() {
        assert_eq!(pad_sequences([&[][..]], 3, Pad::Pre, 7), [7, 7, 7]);
    }
}
