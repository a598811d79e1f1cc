//! The coordinator: the only process with a disk. It cuts data sets into batches, decides who trains, and writes
//! down what happened. It knows nothing of gradients.
//!
//! In reading order:
//!
//! - [`run`](mod@run): one run from its first worker to its end.
//! - [`membership`]: who trains, as a pure state machine.
//! - `paces`: how fast members compute; `stragglers`: which is slower than the others.
//! - `deadlines`: which worker hangs; `hang_dump`: what all did before; `profile`: how their time goes.
//! - [`data`]: data sets and which rows each piece of work has.
//! - [`feeder`](mod@feeder): batches to one worker.
//! - [`server`](mod@server): the control port.
//! - [`store`]: run directory, journal, checkpoints; `records` ties them to a run.
//! - [`audit`](mod@audit): whether a run used the rows that its job and data prescribe.
//! - `forecast`, `warm_start`: what takes knowledge of networks and devices, and is handed in.
//! - [`screen`](mod@screen), [`http`](mod@http), [`metrics`](mod@metrics): what is shown; `loss_plot` and `plot`: the
//!   picture of the losses.
#![forbid(unsafe_code)]

pub mod audit;
pub mod data;
mod deadlines;
mod digests;
mod early_end;
mod epoch_clock;
mod epoch_sample;
mod feeder;
mod forecast;
mod hang_dump;
mod hex;
mod http;
mod loss_plot;
pub mod membership;
mod metrics;
mod paces;
mod plot;
mod profile;
mod records;
mod run;
mod screen;
mod server;
mod stage;
mod start;
mod state_stream;
pub mod store;
mod stragglers;
mod warm_start;

pub use forecast::Forecast;
pub use start::{Config, create, run};
pub use warm_start::InitialParameters;
