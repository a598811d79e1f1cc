//! What the coordinator shows over HTTP: a status page, metrics, health, and where the workers' metrics are.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use protocol::message::WorkerId;
use serde::Serialize;
use tokio::net::TcpListener;

use crate::metrics::Metrics;

/// What `/status.json` says.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Status {
    pub(crate) run_id: String,
    pub(crate) preset: String,
    /// `gathering`, `training` or `ending`.
    pub(crate) phase: &'static str,
    pub(crate) step: u64,
    pub(crate) total_steps: u64,
    /// The pass under way, from 1.
    pub(crate) epoch: u64,
    pub(crate) steps_per_epoch: u64,
    pub(crate) train_loss: Option<f64>,
    pub(crate) val_loss: Option<f64>,
    pub(crate) val_accuracy: Option<f64>,
    pub(crate) samples_per_second: Option<f64>,
    pub(crate) checkpoint_step: Option<u64>,
    pub(crate) generation: u64,
    pub(crate) shards: u32,
    pub(crate) workers: BTreeMap<WorkerId, WorkerStatus>,
}

/// One worker in `/status.json`.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct WorkerStatus {
    pub(crate) name: String,
    pub(crate) device: String,
    pub(crate) threads: u32,
    pub(crate) address: String,
    pub(crate) metrics: Option<String>,
    /// First and one past the last shard; none on standby.
    pub(crate) shards: Option<(u32, u32)>,
}

/// What the pages read.
#[derive(Clone)]
pub(crate) struct Pages {
    pub(crate) metrics: Metrics,
    pub(crate) status: Arc<Mutex<Status>>,
    /// The picture of the losses, once it is written.
    pub(crate) loss_plot: PathBuf,
}

impl Pages {
    fn status(&self) -> Status {
        self.status.lock().expect("no holder of this lock can panic").clone()
    }
}

/// Serves all pages for ever.
pub(crate) async fn serve(listener: TcpListener, pages: Pages) {
    let routes = Router::new()
        .route("/", get(page))
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/status.json", get(status))
        .route("/loss.svg", get(loss_plot))
        .route("/sd", get(service_discovery))
        .with_state(pages);
    if let Err(error) = axum::serve(listener, routes).await {
        tracing::warn!("the status pages ended: {error}");
    }
}

async fn metrics(State(pages): State<Pages>) -> Response {
    ([("content-type", prometheus::TEXT_FORMAT)], pages.metrics.text()).into_response()
}

async fn ready(State(pages): State<Pages>) -> Response {
    match pages.status().phase {
        "training" => "training\n".into_response(),
        phase => (StatusCode::SERVICE_UNAVAILABLE, format!("{phase}\n")).into_response(),
    }
}

async fn status(State(pages): State<Pages>) -> Response {
    json(&pages.status())
}

/// Prometheus HTTP service discovery of the workers' own metrics.
async fn service_discovery(State(pages): State<Pages>) -> Response {
    let status = pages.status();
    let groups: Vec<_> = status
        .workers
        .values()
        .filter_map(|worker| {
            let target = worker.metrics.as_ref()?;
            Some(serde_json::json!({ "targets": [target], "labels": { "worker": worker.name } }))
        })
        .collect();
    json(&groups)
}

/// The picture of the losses as it lies in the run directory.
async fn loss_plot(State(pages): State<Pages>) -> Response {
    match tokio::task::spawn_blocking(move || std::fs::read(pages.loss_plot)).await {
        Ok(Ok(svg)) => {
            ([("content-type", "image/svg+xml"), ("cache-control", "no-cache")], svg).into_response()
        }
        _ => (StatusCode::NOT_FOUND, "there is none before the first epoch's end\n").into_response(),
    }
}

fn json(value: &impl Serialize) -> Response {
    let text = serde_json::to_string(value).expect("plain values can be written as JSON");
    ([("content-type", "application/json")], text).into_response()
}

async fn page() -> Html<&'static str> {
    Html(include_str!("status.html"))
}
