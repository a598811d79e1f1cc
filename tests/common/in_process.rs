//! A coordinator and its workers inside the test, the real ones, on devices of the test's own.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use model::device::Backend;
use protocol::handshake::Token;
use protocol::job::JobFile;
use protocol::problem::{Exit, Problem};
use tokio::sync::mpsc::channel;
use tokio::task::{LocalSet, spawn_local};
use worker::collective::Choice;

use super::Run;

/// Longer than any such run takes.
const LIMIT: Duration = Duration::from_secs(120);

/// Trains a run whose words are a preset and `--set KEY=VALUE`, and ends with it. `settings` are more such words.
pub(crate) fn train_in_process<B>(run: &Run, settings: &str, fleet: Vec<B>) -> Result<Exit, Problem>
where
    B: Backend + 'static,
    B::Device: 'static,
{
    let config = config(run, settings, fleet.len());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let training = async {
        let ready = config.ready_file.clone().unwrap();
        let _ = std::fs::remove_file(&ready);
        // Nobody asks these processes to stop, but what they listen to must stay open.
        let (_sender, signals) = channel(1);
        let coordinator = spawn_local(coordinator::run(config, signals));
        let control = loop {
            if let Ok(text) = std::fs::read_to_string(&ready) {
                break text.lines().find_map(|line| line.strip_prefix("control=")).unwrap().to_owned();
            }
            if coordinator.is_finished() {
                return coordinator.await.unwrap();
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        };
        let workers = fleet.into_iter().zip(1..).map(|(backend, number)| {
            let config = worker::Config {
                coordinator: control.clone(),
                name: format!("worker-{number}"),
                token: Token::new(""),
                tls: None,
                advertise: None,
                metrics: None,
                collective: Choice::Auto,
                park_timeout: None,
                build: "test".to_owned(),
            };
            spawn_local(async {
                let (_sender, signals) = channel(1);
                worker::run(config, backend, signals).await
            })
        });
        let workers: Vec<_> = workers.collect();
        let result = coordinator.await.unwrap();
        for worker in workers {
            // What a worker has to say, the coordinator has said.
            let _ = worker.await.unwrap();
        }
        result
    };
    let limited = async { tokio::time::timeout(LIMIT, training).await.expect("the run hangs") };
    LocalSet::new().block_on(&runtime, limited)
}

fn config(run: &Run, settings: &str, workers: usize) -> coordinator::Config {
    let mut words = run.words();
    words.extend(settings.split_whitespace().map(str::to_owned));
    let mut settings = vec![("workers".to_owned(), workers.to_string())];
    for option in words[1..].chunks_exact(2).filter(|option| option[0] == "--set") {
        let (key, value) = option[1].split_once('=').unwrap();
        settings.push((key.to_owned(), value.to_owned()));
    }
    let any_port: SocketAddr = (Ipv4Addr::LOCALHOST, 0).into();
    coordinator::Config {
        preset: words[0].clone(),
        file: JobFile::resolve(&words[0], None, &settings).unwrap(),
        run_dir: PathBuf::from(run.dir()),
        fresh: false,
        init_from: None,
        change_learning_rate: None,
        forecast: None,
        data_dir: None,
        listen: any_port,
        http: any_port,
        token: Token::new(""),
        tls: None,
        ready_file: Some(run.dir().with_extension("ready")),
        linger: Duration::ZERO,
        drain_timeout: Duration::from_secs(25),
        profile_steps: 0,
        json: false,
        build: "test".to_owned(),
    }
}
