//! A sample is a pure function of parameters, prime and options.

mod common;

use common::{Setup, Sizes, on};
use kernels::Simd;
use model::cpu::CpuBackend;
use model::device::Backend;
use model::sample::{SampleOptions, Sampler};
use protocol::cell::Cell;
use protocol::job::Task;

const OPTIONS: SampleOptions = SampleOptions { temperature: 0.7, top_n: None, seed: 1 };

fn setup(task: Task) -> Setup {
    let sizes = Sizes {
        cell: Cell::Lstm,
        task,
        num_layers: 2,
        hidden_size: 33,
        seq_len: 4,
        batch_size: 2,
        shards: 1,
    };
    Setup::new(sizes, &[("init", "pytorch")])
}

/// So many tokens of a network with large random weights, which finds some tokens much likelier than others.
fn sample(simd: Simd, prime: &[u32], options: SampleOptions, length: usize) -> Vec<u32> {
    let setup = setup(Task::Chars);
    let mut device = CpuBackend::new(simd, 1).open(&setup.layout, &setup.job, &setup.data, false).unwrap();
    let parameters: Vec<f32> = setup.start(false).parameters.iter().map(|weight| 8.0 * weight).collect();
    let parameters = on(&device, &parameters);
    let shape = setup.layout.shape;
    Sampler::new(&mut device, &shape, &parameters, prime, options)
        .unwrap()
        .take(length)
        .collect::<Result<_, _>>()
        .unwrap()
}

#[test]
fn the_same_arguments_give_the_same_sample_and_others_another() {
    let want = sample(Simd::detect(), &[3, 1], OPTIONS, 200);
    for simd in Simd::available() {
        assert_eq!(sample(simd, &[3, 1], OPTIONS, 200), want, "{simd}");
    }
    assert_eq!(sample(Simd::detect(), &[3, 1], OPTIONS, 50), want[..50], "the length only cuts it");
    for (prime, options) in [
        (&[3, 1][..], SampleOptions { seed: 2, ..OPTIONS }),
        (&[3, 1], SampleOptions { temperature: 5.0, ..OPTIONS }),
        (&[3, 1], SampleOptions { top_n: Some(2), ..OPTIONS }),
        (&[1], OPTIONS),
    ] {
        assert_ne!(sample(Simd::detect(), prime, options, 200), want, "{prime:?} {options:?}");
    }
}

#[test]
fn the_likeliest_tokens_need_no_seed() {
    let greedy = |seed| SampleOptions { top_n: Some(1), seed, ..OPTIONS };
    let want = sample(Simd::detect(), &[0], greedy(1), 100);
    assert_eq!(sample(Simd::detect(), &[0], greedy(2), 100), want);
    let cold = SampleOptions { temperature: 1e-9, ..OPTIONS };
    assert_eq!(sample(Simd::detect(), &[0], cold, 100), want);
}

#[test]
fn what_cannot_be_sampled_is_refused() {
    let refusal = |task, prime: &[u32]| {
        let setup = setup(task);
        let mut device =
            CpuBackend::new(Simd::detect(), 1).open(&setup.layout, &setup.job, &setup.data, false).unwrap();
        let parameters = on(&device, &setup.start(false).parameters);
        let sampler = Sampler::new(&mut device, &setup.layout.shape, &parameters, prime, OPTIONS);
        sampler.err().map(|error| error.to_string())
    };
    assert_eq!(refusal(Task::Chars, &[12]), None);
    for (task, prime, sentence) in [
        (Task::Chars, &[12, 13][..], "the prime has token 13, the network has 13 tokens"),
        (Task::Chars, &[], "the prime of a sample is empty"),
        (Task::Rows, &[1], "only a network that reads tokens can be sampled from"),
    ] {
        assert_eq!(refusal(task, prime).as_deref(), Some(sentence));
    }
}
