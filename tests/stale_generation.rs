//! A coordinator may give up a generation before a worker has begun it.

mod common;

use common::played::{answer, hear, say, worker_against_this};
use protocol::batch::DataShape;
use protocol::job::JobFile;
use protocol::layout::ModelShape;
use protocol::message::{Form, Goodbye, Member, StateSource, ToCoordinator, ToWorker, Welcome};
use protocol::schedule::Schedule;

const TOKENS: usize = 20;

fn welcome() -> Welcome {
    let settings = [("hidden_size".to_owned(), "16".to_owned())];
    let JobFile { job, run, .. } = JobFile::resolve("char-lstm", None, &settings).unwrap();
    let data = DataShape {
        model: ModelShape::of(&job, TOKENS, TOKENS),
        seq_len: job.seq_len as usize,
        schedule: Schedule { steps_per_epoch: 100, evaluation_batches: 0, total_steps: 100 },
    };
    Welcome {
        run_id: "played".to_owned(),
        coordinator_epoch: 1,
        worker_id: 1,
        on_record: 0,
        park_timeout_seconds: 60,
        job,
        run,
        data,
        sample: None,
    }
}

/// The next generation comes while the thread of the last one still waits, and is over before that thread has ended. Its
/// members must not be waited for: the coordinator does not form another before this worker has stopped.
#[test]
fn a_generation_that_is_over_before_it_began_is_not_waited_for() {
    let (worker, mut stream) = worker_against_this(&["--threads", "1"]);
    answer(&mut stream);
    let port = hear(&mut stream, |message| match message {
        ToCoordinator::Hello(hello) => Some(hello.data_port),
        _ => None,
    });
    let welcome = welcome();
    let member =
        |worker_id, address: String, shards| Member { worker_id, name: "w".to_owned(), address, shards };
    let (own, shards) = (format!("127.0.0.1:{port}"), welcome.job.shards);
    let alone = Form {
        generation: 1,
        members: vec![member(1, own.clone(), 0..shards)],
        step: 0,
        owes_evaluation: false,
        state: StateSource::Initial,
        profile: 0..0,
    };
    // Nobody answers there.
    let nobody = member(2, "127.0.0.1:1".to_owned(), shards / 2..shards);
    let members = vec![member(1, own, 0..shards / 2), nobody];
    let with_nobody = Form { generation: 2, members, state: StateSource::Kept, ..alone.clone() };
    say(&mut stream, &[ToWorker::Welcome(Box::new(welcome)), ToWorker::Form(alone)]);
    hear(&mut stream, |message| (message == ToCoordinator::Connected { generation: 1 }).then_some(()));
    say(&mut stream, &[ToWorker::Form(with_nobody), ToWorker::Abort { generation: 2 }]);
    hear(&mut stream, |message| {
        matches!(message, ToCoordinator::Stopped { generation: 2, .. }).then_some(())
    });
    say(&mut stream, &[ToWorker::Goodbye(Goodbye::Done)]);
    worker.end().expect_exit(0);
}
