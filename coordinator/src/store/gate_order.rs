//! In which order other programs keep the gates of a cell, by name. Our own order is PyTorch's.

use protocol::cell::Cell;

/// A gate, by our names. Others call the LSTM's g also j (TensorFlow 1) or c (Keras), the GRU's z also u (TensorFlow 1),
/// and its n also c (TensorFlow 1), h (Keras) or g (Haste).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// The RNN's only one.
    Hidden,
    /// The LSTM's i.
    Input,
    /// The LSTM's f.
    Forget,
    /// The LSTM's g, that which may enter the cell.
    Candidate,
    /// The LSTM's o.
    Output,
    /// The GRU's r.
    Reset,
    /// The GRU's z: the share of the old state that stays.
    Update,
    /// The GRU's n.
    New,
}

/// An order of gates, by the program that has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateOrder {
    /// `tf.compat.v1.nn.rnn_cell`.
    Tf1,
    /// Keras 2.
    Keras,
    /// PyTorch and cuDNN; ours.
    Pytorch,
    /// torch-rnn.
    TorchRnn,
    /// Haste.
    Haste,
}

impl GateOrder {
    /// All orders, by name.
    pub const ALL: [(&'static str, Self); 5] = [
        ("tf1", Self::Tf1),
        ("keras", Self::Keras),
        ("pytorch", Self::Pytorch),
        ("torch-rnn", Self::TorchRnn),
        ("haste", Self::Haste),
    ];

    /// The gates of a cell in this order. `None` of torch-rnn's GRU, whose u is the share that is new: no order turns it
    /// into ours.
    pub fn gates(self, cell: Cell) -> Option<&'static [Gate]> {
        use Gate::{Candidate, Forget, Hidden, Input, New, Output, Reset, Update};
        Some(match (cell, self) {
            (Cell::Rnn, _) => &[Hidden],
            (Cell::Lstm, Self::Tf1 | Self::Haste) => &[Input, Candidate, Forget, Output],
            (Cell::Lstm, Self::Keras | Self::Pytorch) => &[Input, Forget, Candidate, Output],
            (Cell::Lstm, Self::TorchRnn) => &[Input, Forget, Output, Candidate],
            (Cell::Gru, Self::Tf1 | Self::Pytorch) => &[Reset, Update, New],
            (Cell::Gru, Self::Keras | Self::Haste) => &[Update, Reset, New],
            (Cell::Gru, Self::TorchRnn) => return None,
        })
    }

    /// For each of our gates, in our order, its place in this one.
    pub fn places(self, cell: Cell) -> Option<Vec<usize>> {
        let (ours, theirs) = (Self::Pytorch.gates(cell)?, self.gates(cell)?);
        ours.iter().map(|gate| theirs.iter().position(|other| other == gate)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_order_has_every_gate_once() {
        for (name, order) in GateOrder::ALL {
            for cell in [Cell::Rnn, Cell::Lstm, Cell::Gru] {
                let Some(mut places) = order.places(cell) else {
                    assert_eq!((name, cell), ("torch-rnn", Cell::Gru));
                    continue;
                };
                places.sort_unstable();
                assert_eq!(places, (0..cell.gates()).collect::<Vec<_>>(), "{name} {cell}");
            }
        }
    }

    #[test]
    fn ours_is_pytorchs_and_the_others_are_told_apart() {
        assert_eq!(GateOrder::Pytorch.places(Cell::Lstm).unwrap(), [0, 1, 2, 3]);
        assert_eq!(GateOrder::Pytorch.places(Cell::Gru).unwrap(), [0, 1, 2]);
        // i, j, f, o has our f third and our g second.
        assert_eq!(GateOrder::Tf1.places(Cell::Lstm).unwrap(), [0, 2, 1, 3]);
        assert_eq!(GateOrder::TorchRnn.places(Cell::Lstm).unwrap(), [0, 1, 3, 2]);
        assert_eq!(GateOrder::Keras.places(Cell::Gru).unwrap(), [1, 0, 2]);
    }
}
