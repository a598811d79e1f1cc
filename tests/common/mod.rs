//! What the end-to-end tests share: the program, started the way a user starts it.
//!
//! - [`folder`]: a temporary folder with the texts and run directories of one test.
//! - [`run`]: one run directory: train in it, inspect it, read its metrics.
//! - [`process`]: one started process: its output while it runs, how it ended. Killed when dropped.
//! - [`by_hand`]: a coordinator and workers started one by one.
//! - [`failing`]: a run whose processes do something at failpoints.
//! - [`in_process`]: a coordinator and workers inside the test, on devices of the test's own.
//! - [`meddling`]: a device that hands other rows to the kernels, breaks steps, or says that it computes other bits.
//! - [`refusal`]: what every refused command has in common.
//! - [`mounts`]: commands with file systems of their own.
//! - [`http`]: one GET.
//! - [`played`]: a coordinator that a test plays itself.
//! - [`proxy`]: a network that can be cut, slowed down and broken.

#![allow(dead_code, unused_imports, reason = "each test file uses its own part")]

mod by_hand;
mod failing;
mod folder;
mod http;
mod in_process;
mod meddling;
mod mounts;
pub(crate) mod played;
mod process;
mod proxy;
mod refusal;
mod run;

pub(crate) use by_hand::Coordinator;
pub(crate) use failing::{Event, Events};
pub(crate) use folder::{Folder, files_below};
pub(crate) use http::{Answer, get};
pub(crate) use in_process::train_in_process;
pub(crate) use meddling::{Broken, Meddling, Rows};
pub(crate) use mounts::with_own_mounts;
pub(crate) use process::{Ended, Process, children_of, eventually, is_alive, lockstep};
pub(crate) use proxy::{Direction, Proxy};
pub(crate) use run::{Hashes, Run};

/// Says that a test did not run, and why, in the form that `scripts/test` looks for.
pub(crate) fn skipped(test: &str, why: &str) {
    println!("skipped: {test}: {why}");
}
