//! A batch as a device reads it: which runs its rows are cut into, where each of their steps is, which are whose.
//!
//! All of it is made on the host and travels in one upload.

use std::ops::Range;

use cubecl::prelude::*;
use kernels::cube::buffer::{ALIGNMENT, Buffer};
use kernels::cube::output::RunTables;
use kernels::cube::rows::Extent;
use kernels::cube::shards::ShardTable;
use kernels::cube::softmax::{NO_TARGET, RESULT};
use protocol::batch::{Batch, Inputs};
use protocol::layout::{Head, ModelShape};
use protocol::sums::{StepSums, row_hash};

use crate::device::StepInput;
use crate::rows::{BatchRows, Run, cut, row_starts};

/// What a batch's kernels read besides numbers.
pub(super) struct Tables {
    pub(super) extent: Extent,
    /// Rows of the batch.
    pub(super) rows: usize,
    /// Tokens `[T][Nr]`, where tokens are read; for a direction that reads backwards, turned round.
    pub(super) tokens: [Buffer; 2],
    /// Bytes `[T][Nr][I]`, four in a word, where bytes are read.
    pub(super) bytes: Buffer,
    /// `[T·Nr]` or, where the final state is read, `[rows]`.
    pub(super) targets: Buffer,
    /// Steps of each run, `[Nr]`.
    pub(super) lengths: Buffer,
    /// Of each run: the slot of its row, and the steps of the row before it.
    slots: Buffer,
    first_steps: Buffer,
    /// Of each run: the slot that it goes on from plus one, or 0 for the initial state.
    pub(super) starts: Buffer,
    /// Of each row: its last run, and its first: where the directions have its final state.
    pub(super) final_runs: [Buffer; 2],
    /// Of each run: the row whose final state its end is, plus one, or 0; for each direction.
    pub(super) final_rows: [Buffer; 2],
    /// The shards' pairs of step and run.
    pub(super) pairs: ShardTable,
    /// The shards' rows, as pairs of a single step.
    pub(super) shard_rows: ShardTable,
    /// The shards' runs, the same.
    pub(super) shard_runs: ShardTable,
    /// For the sums: which results are whose.
    host: Results,
}

/// What the host keeps of a batch to add up its results.
#[derive(Default)]
struct Results {
    first_shard: u32,
    /// Of each shard: its rows.
    shards: Vec<Range<usize>>,
    sample_ids: Vec<u64>,
    /// Of each row: its targets, as ranges of positions at a stride.
    targets: Vec<Vec<usize>>,
}

impl Tables {
    /// The tables of a batch.
    pub(super) fn of_batch<R: Runtime>(client: &ComputeClient<R>, shape: &ModelShape, batch: &Batch) -> Self {
        let mut starts = Vec::new();
        row_starts(batch, shape.input.size(), &mut starts);
        let rows = BatchRows { batch, starts: &starts };
        let goes_on = shape.carries_state && !batch.begins_pass();
        let mut runs = Vec::new();
        cut(&rows, 0..batch.rows(), goes_on, shape.reset_token, &mut runs);
        let shards = batch.shards.iter().map(|shard| shard.rows.clone()).collect();
        Builder::new(shape, batch.first_slot, batch.rows(), runs, shards).of(client, &rows)
    }

    /// The tables of one row of one step, without target.
    pub(super) fn of_input<R: Runtime>(
        client: &ComputeClient<R>,
        shape: &ModelShape,
        input: StepInput<'_>,
    ) -> Self {
        let runs = vec![Run { row: 0, start: 0, length: 1, is_fed: false }];
        Builder::new(shape, 0, 1, runs, Vec::new()).of_input(client, input)
    }

    /// The runs as masks see them.
    pub(super) fn runs(&self) -> RunTables<'_> {
        RunTables { lengths: &self.lengths, slots: &self.slots, first_steps: &self.first_steps }
    }

    /// The batch's first shard.
    pub(super) fn first_shard(&self) -> u32 {
        self.host.first_shard
    }

    /// The tokens in the order in which a direction reads them.
    pub(super) fn tokens_of(&self, direction: usize) -> &Buffer {
        &self.tokens[direction]
    }

    /// Adds up the targets' results per shard, rows in their order, steps in theirs.
    pub(super) fn add_up(&self, results: &[f32]) -> Vec<StepSums> {
        let host = &self.host;
        let of_shard = |rows: &Range<usize>| {
            let mut sums = StepSums { rows: rows.len() as u64, ..StepSums::default() };
            for row in rows.clone() {
                let mut loss = 0.0;
                for &target in &host.targets[row] {
                    let [total, margin, is_first] = [0, 1, 2].map(|at| results[RESULT * target + at]);
                    loss += libm::log(f64::from(total)) + f64::from(margin);
                    sums.weight += 1;
                    sums.correct += u64::from(is_first == 1.0);
                }
                sums.loss += loss;
                sums.row_hash = sums.row_hash.wrapping_add(row_hash(host.sample_ids[row]));
            }
            sums.non_finite = !sums.loss.is_finite();
            sums
        };
        host.shards.iter().map(of_shard).collect()
    }
}

/// Makes the tables on the host.
struct Builder<'a> {
    shape: &'a ModelShape,
    first_slot: u32,
    rows: usize,
    runs: Vec<Run>,
    /// Where each row's runs are.
    runs_of: Vec<Range<usize>>,
    shards: Vec<Range<usize>>,
    extent: Extent,
    words: Vec<u32>,
}

impl<'a> Builder<'a> {
    fn new(
        shape: &'a ModelShape,
        first_slot: u32,
        rows: usize,
        runs: Vec<Run>,
        shards: Vec<Range<usize>>,
    ) -> Self {
        let runs_of = (0..rows)
            .map(|row| runs.partition_point(|run| run.row < row)..runs.partition_point(|run| run.row <= row))
            .collect();
        let steps = runs.iter().map(|run| run.length).max().unwrap_or(0);
        let extent = Extent { steps, runs: runs.len() };
        Self { shape, first_slot, rows, runs, runs_of, shards, extent, words: Vec::new() }
    }

    /// Puts a table behind the others; gives its place.
    fn put(&mut self, table: impl IntoIterator<Item = u32>) -> Range<usize> {
        let start = self.words.len();
        self.words.extend(table);
        let end = self.words.len();
        self.words.resize(end.next_multiple_of(ALIGNMENT), 0);
        start..end
    }

    /// Something for each place, `[T][Nr]`; `none` beyond the runs' ends.
    fn by_place(&self, none: u32, of: impl Fn(&Run, usize) -> u32) -> Vec<u32> {
        let mut table = vec![none; self.extent.places()];
        for (at, run) in self.runs.iter().enumerate() {
            for t in 0..run.length {
                table[t * self.extent.runs + at] = of(run, t);
            }
        }
        table
    }

    fn of<R: Runtime>(mut self, client: &ComputeClient<R>, rows: &BatchRows<'_>) -> Tables {
        let batch = rows.batch;
        let token = |run: &Run, t: usize| u32::from(rows.tokens(run.row)[run.start + t]);
        let (mut tokens, mut turned, mut bytes) = (Vec::new(), Vec::new(), Vec::new());
        match &batch.inputs {
            Inputs::Tokens(_) | Inputs::LabelledTokens { .. } => {
                tokens = self.by_place(0, token);
                if self.shape.bidirectional {
                    turned = self.by_place(0, |run, t| token(run, run.length - 1 - t));
                }
            }
            Inputs::Bytes { bytes: all, .. } => {
                let width = self.shape.input.size();
                let mut by_step = vec![0; (self.extent.places() * width).next_multiple_of(4)];
                for (at, run) in self.runs.iter().enumerate() {
                    for t in 0..run.length {
                        let from = rows.starts[run.row] + (run.start + t) * width;
                        by_step[(t * self.extent.runs + at) * width..][..width]
                            .copy_from_slice(&all[from..][..width]);
                    }
                }
                bytes = by_step.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
            }
        }
        let labels = |labels: &[u16]| labels.iter().map(|&label| u32::from(label)).collect();
        let padding = |run: &Run| batch.paddings[run.row] as usize;
        let targets = match &batch.inputs {
            Inputs::Tokens(_) => self.by_place(NO_TARGET, |run, t| match run.start + t < padding(run) {
                true => NO_TARGET,
                false => u32::from(rows.tokens(run.row)[run.start + t + 1]),
            }),
            Inputs::LabelledTokens { labels: all, .. } | Inputs::Bytes { labels: all, .. } => labels(all),
        };
        let targets_of = |row: usize| -> Vec<usize> {
            if self.shape.head == Head::Final {
                return vec![row];
            }
            let runs = self.runs_of[row].clone();
            let places =
                runs.flat_map(|at| (0..self.runs[at].length).map(move |t| t * self.extent.runs + at));
            places.skip(batch.paddings[row] as usize).collect()
        };
        let host = Results {
            first_shard: batch.shard_range().start,
            shards: self.shards.clone(),
            sample_ids: batch.sample_ids.clone(),
            targets: (0..self.rows).map(targets_of).collect(),
        };
        self.upload(client, [tokens, turned, bytes, targets], host)
    }

    fn of_input<R: Runtime>(mut self, client: &ComputeClient<R>, input: StepInput<'_>) -> Tables {
        let (mut tokens, mut words) = (Vec::new(), Vec::new());
        match input {
            StepInput::Token(token) => tokens.push(token),
            StepInput::Bytes(bytes) => {
                let mut bytes = bytes.to_vec();
                bytes.resize(bytes.len().next_multiple_of(4), 0);
                words = bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
            }
        }
        self.upload(client, [tokens, Vec::new(), words, vec![NO_TARGET]], Results::default())
    }

    fn upload<R: Runtime>(
        &mut self,
        client: &ComputeClient<R>,
        inputs: [Vec<u32>; 4],
        host: Results,
    ) -> Tables {
        let inputs = inputs.map(|table| self.put(table));
        let slot = |first_slot: u32, run: &Run| first_slot + run.row as u32;
        let (first_slot, runs) = (self.first_slot, std::mem::take(&mut self.runs));
        let by_run = [
            runs.iter().map(|run| run.length as u32).collect::<Vec<u32>>(),
            runs.iter().map(|run| slot(first_slot, run)).collect(),
            runs.iter().map(|run| run.start as u32).collect(),
            runs.iter().map(|run| if run.is_fed { slot(first_slot, run) + 1 } else { 0 }).collect(),
        ]
        .map(|table| self.put(table));
        // A direction that reads backwards ends where a row begins.
        let ends = [|runs: &Range<usize>| runs.end - 1, |runs: &Range<usize>| runs.start];
        let final_runs = ends.map(|end| self.runs_of.iter().map(|runs| end(runs) as u32).collect::<Vec<_>>());
        let final_rows = final_runs.clone().map(|by_row| {
            let mut rows = vec![0; runs.len()];
            by_row.iter().enumerate().for_each(|(row, &run)| rows[run as usize] = row as u32 + 1);
            rows
        });
        let [final_runs, final_rows] =
            [final_runs, final_rows].map(|tables| tables.map(|table| self.put(table)));
        let (runs_of, shards) = (std::mem::take(&mut self.runs_of), std::mem::take(&mut self.shards));
        let of_shard = |rows: &Range<usize>| match rows.is_empty() {
            true => 0..0,
            false => runs_of[rows.start].start..runs_of[rows.end - 1].end,
        };
        let longest = |own: Range<usize>| runs[own].iter().map(|run| run.length).max().unwrap_or(0);
        let table = |of: &dyn Fn(&Range<usize>) -> [usize; 3]| -> Vec<u32> {
            shards.iter().flat_map(|rows| of(rows).map(|word| word as u32)).collect()
        };
        let shard_tables = [
            table(&|rows| [of_shard(rows).start, of_shard(rows).len(), longest(of_shard(rows))]),
            table(&|rows| [rows.start, rows.len(), 1]),
            table(&|rows| [of_shard(rows).start, of_shard(rows).len(), 1]),
        ]
        .map(|table| self.put(table));

        let all = Buffer::from_words(client, &self.words);
        let part = |range: Range<usize>| all.part(range);
        let [tokens, turned, bytes, targets] = inputs.map(part);
        let [lengths, slots, first_steps, starts] = by_run.map(part);
        let [pairs, shard_rows, shard_runs] = shard_tables.map(part);
        Tables {
            extent: self.extent,
            rows: self.rows,
            tokens: [tokens, turned],
            bytes,
            targets,
            lengths,
            slots,
            first_steps,
            starts,
            final_runs: final_runs.map(part),
            final_rows: final_rows.map(part),
            pairs: ShardTable::new(pairs, runs.len()),
            shard_rows: ShardTable::new(shard_rows, self.rows),
            shard_runs: ShardTable::new(shard_runs, runs.len()),
            host,
        }
    }
}
