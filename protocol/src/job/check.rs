//! Which jobs mean something: every value on its own, and what goes with what.

use crate::cell::{Activation, Cell, RecurrentActivation, Reset};
use crate::message::WORKER_LIMIT;
use crate::problem::Problem;

use super::{
    EpsilonPlacement, Init, JobFile, JobSpec, MOST_STEPS, MOST_THREADS, Optimizer, Pad, Targets, Task,
    TextMode,
};

impl JobFile {
    /// Checks all keys.
    ///
    /// # Errors
    /// The first value that is out of range, or that means nothing beside the others.
    pub(super) fn check(&self) -> Result<(), Problem> {
        let job = &self.job;
        let positive = [
            ("num_layers", job.num_layers),
            ("hidden_size", job.hidden_size),
            ("batch_size", job.batch_size),
            ("seq_len", job.seq_len),
            ("shards", job.shards),
            ("decay_epochs", job.decay_epochs),
            ("workers", self.fleet.workers),
        ];
        let of_layers = job.hidden_sizes.iter().map(|&size| ("hidden_sizes", size));
        for (key, value) in positive.into_iter().chain(of_layers.clone()) {
            if value == 0 {
                return Err(Problem::usage(format!("{key} is 0, it must be at least 1")));
            }
        }
        if job.shards > job.batch_size {
            return Err(Problem::usage(format!(
                "shards is {} but batch_size is {}: a shard would have no row",
                job.shards, job.batch_size
            ))
            .hint(format!("choose --shards {} or less", job.batch_size)));
        }
        for (key, count) in [("hidden_sizes", job.hidden_sizes.len()), ("keep_probs", job.keep_probs.len())] {
            if count > 0 && count != job.num_layers as usize {
                return Err(Problem::usage(format!(
                    "{key} has {count} numbers but num_layers is {}",
                    job.num_layers
                ))
                .hint(format!("give one number for each layer, or set num_layers = {count}")));
            }
        }
        let unit = |key: &str, value: f64, closed: bool| {
            if value > 0.0 && (value < 1.0 || closed && value == 1.0) {
                return Ok(());
            }
            let range = if closed { "(0, 1]" } else { "(0, 1)" };
            Err(Problem::usage(format!("{key} is {value}, it must lie in {range}")))
        };
        // As the kernels take it: what is above 0 must be so there too.
        unit("keep_prob", f64::from(job.keep_prob as f32), true)?;
        for keep_prob in &job.keep_probs {
            unit("a number of keep_probs", f64::from(*keep_prob as f32), true)?;
        }
        unit("validation_fraction", job.validation_fraction, false)?;
        unit("beta1", f64::from(job.beta1 as f32), false)?;
        unit("beta2", f64::from(job.beta2 as f32), false)?;
        unit("decay_factor", job.decay_factor, true)?;
        for (key, value) in [
            ("learning_rate", job.learning_rate),
            ("clip_norm", job.clip_norm),
            ("epsilon", job.epsilon),
            ("sample_temperature", self.run.sample_temperature),
        ] {
            if !(value > 0.0 && value.is_finite()) {
                return Err(Problem::usage(format!("{key} is {value}, it must be a number above 0")));
            }
            // Above 0 as the kernels take it, in 32 bits.
            if !(value as f32 > 0.0 && (value as f32).is_finite()) {
                return Err(Problem::usage(format!("{key} is {value:e}, which has no 32-bit number"))
                    .hint("choose a number between 1e-38 and 1e38"));
            }
        }
        for (key, value) in [("cell_clip", job.cell_clip), ("init_scale", job.init_scale)] {
            let is_usable = |value: f64| value >= 0.0 && value.is_finite();
            // As the kernels take it: what is above 0 must be so there too.
            if !is_usable(value)
                || !is_usable(f64::from(value as f32))
                || (value > 0.0 && value as f32 == 0.0)
            {
                return Err(Problem::usage(format!("{key} is {value}, it must be 0 or a number above it")));
            }
        }
        if !(job.forget_bias as f32).is_finite() {
            return Err(Problem::usage(format!("forget_bias is {}, it must be a number", job.forget_bias)));
        }
        if job.skip_limit == 0 {
            return Err(Problem::usage("skip_limit is 0, it must be at least 1")
                .hint("non_finite = \"fail\" ends the run at the first step that is not finite"));
        }
        if !(job.divergence_factor == 0.0 || job.divergence_factor > 1.0) {
            return Err(Problem::usage(format!(
                "divergence_factor is {}, it must be 0 or above 1",
                job.divergence_factor
            )));
        }
        if !(0.0..1.0).contains(&(job.momentum as f32)) {
            return Err(Problem::usage(format!("momentum is {}, it must lie in [0, 1)", job.momentum)));
        }
        let limits = [
            ("num_layers", job.num_layers, 64),
            ("hidden_size", job.hidden_size, 16_384),
            ("projection", job.projection, 16_384),
            ("embedding_size", job.embedding_size, 16_384),
            ("batch_size", job.batch_size, 65_536),
            ("seq_len", job.seq_len, MOST_STEPS),
            ("text.max_len", job.text.max_len, MOST_STEPS),
            ("shards", job.shards, 16_384),
            ("sample_chars", self.run.sample_chars, 10_000),
            ("workers", self.fleet.workers, WORKER_LIMIT as u32),
            ("threads", self.fleet.threads, MOST_THREADS as u32),
            ("park_timeout_seconds", self.fleet.park_timeout_seconds, 604_800),
        ];
        let of_layers = of_layers.map(|(key, value)| (key, value, 16_384));
        for (key, value, most) in limits.into_iter().chain(of_layers) {
            if value > most {
                return Err(Problem::usage(format!("{key} is {value}, the most supported is {most}")));
            }
        }
        job.check_combinations()?;
        let is_sha256 = |text: &str| text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
        if !job.init_from.is_empty() && !is_sha256(&job.init_from) {
            return Err(Problem::usage(format!(
                "init_from is '{}', it must be the sha256 of parameters",
                job.init_from
            ))
            .hint("it is never set by hand: give --init-from RUN|FILE"));
        }
        let at_least_one = [
            ("checkpoint_seconds", self.run.checkpoint_seconds),
            ("keep_checkpoints", self.run.keep_checkpoints.into()),
        ];
        if let Some((key, _)) = at_least_one.into_iter().find(|(_, value)| *value == 0) {
            return Err(Problem::usage(format!("{key} is 0, it must be at least 1")));
        }
        if self.run.epochs == 0 && self.run.steps == 0 {
            return Err(Problem::usage("epochs and steps are both 0: there is nothing to do")
                .hint("give --epochs or --steps"));
        }
        Ok(())
    }
}

impl JobSpec {
    /// What is set must mean something in this job. (Numbers that another key switches on, such as `decay_factor`, may
    /// be there beforehand.)
    fn check_combinations(&self) -> Result<(), Problem> {
        let (is_rnn, is_lstm, is_gru) =
            (self.cell == Cell::Rnn, self.cell == Cell::Lstm, self.cell == Cell::Gru);
        let (is_chars, is_rows) = (self.task == Task::Chars, self.task == Task::Rows);
        let is_lines = is_chars && self.text.mode == TextMode::Lines;
        let is_stream = is_chars && !is_lines;
        let needs_cell =
            |key, is_set, cells: &'static str, has_it| (key, is_set, has_it, format!("cell {cells}"));
        let needs = |key, is_set, what: &str, has_it| (key, is_set, has_it, what.to_owned());
        let conditions = [
            needs_cell("activation", self.activation != Activation::Tanh, "\"rnn\"", is_rnn),
            needs_cell(
                "recurrent_activation",
                self.recurrent_activation != RecurrentActivation::Sigmoid,
                "\"lstm\" or \"gru\"",
                !is_rnn,
            ),
            needs_cell("forget_bias", self.forget_bias != 0.0, "\"lstm\"", is_lstm),
            needs_cell("peepholes", self.peepholes, "\"lstm\"", is_lstm),
            needs_cell("cell_clip", self.cell_clip != 0.0, "\"lstm\"", is_lstm),
            needs_cell("projection", self.projection != 0, "\"lstm\"", is_lstm),
            needs_cell("reset", self.reset != Reset::After, "\"gru\"", is_gru),
            needs("bidirectional", self.bidirectional, "task \"rows\" or \"classify\"", !is_chars),
            needs("embedding_size", self.embedding_size != 0, "task \"chars\" or \"classify\"", !is_rows),
            needs("carry_state", !self.carry_state, "task \"chars\" and text.mode \"stream\"", is_stream),
            needs("momentum", self.momentum != 0.0, "optimizer \"sgd\"", self.optimizer == Optimizer::Sgd),
            needs(
                "epsilon_placement",
                self.epsilon_placement != EpsilonPlacement::AfterCorrection,
                "optimizer \"adam\"",
                self.optimizer == Optimizer::Adam,
            ),
            needs(
                "init_scale",
                self.init_scale != 0.0,
                "an init other than \"glorot\" and \"pytorch\"",
                !matches!(self.init, Init::Glorot | Init::Pytorch),
            ),
            needs(
                "variational_dropout",
                self.variational_dropout,
                "a keep_prob below 1",
                self.layer_keep_probs().iter().any(|&keep_prob| keep_prob < 1.0),
            ),
            needs("text.mode", self.text.mode == TextMode::Lines, "task \"chars\"", is_chars),
            needs(
                "text.targets",
                self.text.targets == Targets::Wrap,
                "task \"chars\" and text.mode \"stream\"",
                is_stream,
            ),
            needs(
                "text.reset_at",
                !self.text.reset_at.is_empty(),
                "task \"chars\" and text.mode \"stream\"",
                is_stream,
            ),
            needs(
                "text.max_len",
                self.text.max_len != 0,
                "text.mode \"lines\" or task \"classify\"",
                !is_rows && !is_stream,
            ),
            needs(
                "text.pad",
                self.text.pad == Pad::Pre,
                "text.mode \"lines\" or task \"classify\"",
                !is_rows && !is_stream,
            ),
            needs("validation_samples", self.validation_samples != 0, "task \"rows\"", is_rows),
            needs("train_samples", self.train_samples != 0, "task \"rows\"", is_rows),
        ];
        for (key, is_set, has_it, what) in conditions {
            if is_set && !has_it {
                return Err(Problem::usage(format!("{key} is set, but it means something for {what} only"))
                    .hint(format!("leave out {key}, or choose {what}")));
            }
        }
        if self.task != Task::Chars
            && self.layer_keep_probs().last().is_some_and(|&keep_prob| keep_prob < 1.0)
        {
            // Of stacked layers one keep_prob means those whose output is read.
            if self.num_layers == 1 || !self.keep_probs.is_empty() {
                let key =
                    if self.keep_probs.is_empty() { "keep_prob" } else { "the last number of keep_probs" };
                return Err(Problem::usage(format!(
                    "{key} is below 1, but where the final state is classified nobody reads the last layer's output"
                ))
                .hint("leave it at 1; the outputs of the layers below can be dropped"));
            }
        }
        if self.text.reset_at.chars().count() > 1 {
            return Err(Problem::usage(format!(
                "text.reset_at is {:?}, it must be one character",
                self.text.reset_at
            ))
            .hint(r#"write --set 'text.reset_at="\n"'"#));
        }
        if is_rows && self.patience > 0 && self.validation_samples == 0 {
            return Err(Problem::usage("patience is set, but the test images are never used to stop early")
                .hint("hold training images out with --set validation_samples=5000"));
        }
        Ok(())
    }
}
