//! Every option of cells, rows and training, crossed: what the tables of tests run through.

use protocol::cell::Cell;
use protocol::job::Task;

use super::setup::{Setup, Sizes};

type Settings = &'static [(&'static str, &'static str)];

/// Every cell with every option of its own.
const CELL_OPTIONS: [(&str, Cell, Settings); 14] = [
    ("rnn tanh", Cell::Rnn, &[]),
    ("rnn relu", Cell::Rnn, &[("activation", "relu")]),
    ("lstm", Cell::Lstm, &[]),
    ("lstm forget_bias", Cell::Lstm, &[("forget_bias", "1.0")]),
    ("lstm hard_sigmoid", Cell::Lstm, &[("recurrent_activation", "hard_sigmoid")]),
    ("lstm peepholes", Cell::Lstm, &[("peepholes", "true")]),
    ("lstm cell_clip", Cell::Lstm, &[("cell_clip", "0.15")]),
    ("lstm projection", Cell::Lstm, &[("projection", "3")]),
    (
        "lstm everything",
        Cell::Lstm,
        &[
            ("forget_bias", "1.0"),
            ("recurrent_activation", "hard_sigmoid"),
            ("peepholes", "true"),
            ("cell_clip", "0.2"),
            ("projection", "5"),
        ],
    ),
    ("gru", Cell::Gru, &[]),
    ("gru hard_sigmoid", Cell::Gru, &[("recurrent_activation", "hard_sigmoid")]),
    ("gru before", Cell::Gru, &[("reset", "before")]),
    ("gru before hard_sigmoid", Cell::Gru, &[("reset", "before"), ("recurrent_activation", "hard_sigmoid")]),
    ("lstm keras", Cell::Lstm, &[("recurrent_activation", "hard_sigmoid"), ("init", "orthogonal")]),
];

/// Every way in which rows come, and what goes with one task only.
const ROWS: [(&str, Task, Settings); 11] = [
    ("stream", Task::Chars, &[]),
    ("stream with resets", Task::Chars, &[("reset_at", "x")]),
    ("stream, state not carried", Task::Chars, &[("carry_state", "false")]),
    ("lines", Task::Chars, &[("mode", "lines")]),
    ("lines, padded in front", Task::Chars, &[("mode", "lines"), ("pad", "pre")]),
    ("lines, embedding", Task::Chars, &[("mode", "lines"), ("embedding_size", "4")]),
    ("stream with resets, embedding", Task::Chars, &[("reset_at", "x"), ("embedding_size", "6")]),
    ("classify", Task::Classify, &[]),
    (
        "classify, bidirectional, embedding",
        Task::Classify,
        &[("bidirectional", "true"), ("embedding_size", "4")],
    ),
    (
        "classify, bidirectional, padded in front",
        Task::Classify,
        &[("bidirectional", "true"), ("pad", "pre")],
    ),
    ("images, bidirectional", Task::Rows, &[("bidirectional", "true")]),
];

/// What goes with everything.
const EXTRAS: [(&str, Settings); 5] = [
    ("", &[]),
    ("keep_prob", &[("keep_prob", "0.7")]),
    ("variational, per layer", &[("keep_probs", "[0.6, 1.0]"), ("variational_dropout", "true")]),
    ("widths", &[("hidden_sizes", "[7, 4]")]),
    ("learnt start", &[("initial_state", "learnt")]),
];

/// One combination.
pub(crate) struct Combination {
    pub(crate) name: String,
    pub(crate) setup: Setup,
}

/// All of them, small: two layers of 6 units, 5 rows of up to 7 steps in 3 shards.
pub(crate) fn combinations() -> impl Iterator<Item = Combination> {
    combinations_with(&EXTRAS)
}

/// Every cell with every way in which rows come, and each of these with it.
pub(crate) fn combinations_with(extras: &[(&'static str, Settings)]) -> impl Iterator<Item = Combination> {
    let sizes = |cell, task| Sizes {
        cell,
        task,
        num_layers: 2,
        hidden_size: 6,
        seq_len: 7,
        batch_size: 5,
        shards: 3,
    };
    CELL_OPTIONS.into_iter().flat_map(move |(cell_name, cell, of_cell)| {
        ROWS.into_iter().flat_map(move |(rows_name, task, of_rows)| {
            extras.iter().map(move |&(extra_name, of_extra)| Combination {
                name: format!("{cell_name}; {rows_name}; {extra_name}"),
                setup: setup(sizes(cell, task), &[of_cell, of_rows, of_extra].concat()),
            })
        })
    })
}

/// A job with these settings. Random text of 13 characters has a reset about twice in a row where it has one at all.
pub(crate) fn setup(sizes: Sizes, settings: &[(&str, &str)]) -> Setup {
    let setup = Setup::new(sizes, settings);
    if setup.job.text.reset_at.is_empty() { setup } else { setup.with_reset_token(3) }
}
