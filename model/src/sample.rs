//! Sampling: a text goes on, token by token, as a trained network finds likely.
//!
//! A sample is a pure function of parameters, prime and options. The logits have the same bits on every CPU, the
//! exponential is `libm`'s and not the platform's, and the random number of a token is keyed by seed and position.

use std::cmp::Ordering;

use protocol::layout::ModelShape;
use protocol::problem::Problem;
use protocol::random::{Purpose, key, philox4x32_10};

use crate::device::{Device, DeviceError, Result, StepInput};

/// How tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampleOptions {
    /// Logits are divided by it: below 1 likely tokens become likelier, above 1 less so.
    pub temperature: f64,
    /// Only so many of the likeliest tokens are chosen from; 1 always takes the likeliest. `None`: all.
    pub top_n: Option<usize>,
    /// Another seed, another sample.
    pub seed: u64,
}

impl SampleOptions {
    /// Checks what a user gave.
    ///
    /// # Errors
    /// A temperature that is not a number above 0, or no token to choose from.
    pub fn check(&self) -> std::result::Result<(), Problem> {
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return Err(Problem::usage(format!(
                "the temperature is {}, it must be a number above 0",
                self.temperature
            ))
            .hint("--greedy always takes the likeliest character"));
        }
        if self.top_n == Some(0) {
            return Err(Problem::usage("top_n is 0: there is no character to choose from"));
        }
        Ok(())
    }
}

/// Chooses a token by its probability, the softmax of `logits / temperature` over the `top_n` largest logits (of
/// equal ones, the lower tokens).
///
/// | argument | shape | notes |
/// |---|---|---|
/// | `logits` | `[V]`, V at least 1 | one that is not a number is never chosen while another one can be |
/// | `uniform` | in [0, 1) | the only source of chance: the token in whose part of the line from 0 to 1 it falls, the parts in the order of the tokens |
///
/// Numerics: f64 throughout, sums in the order of the tokens.
pub fn choose(logits: &[f32], options: &SampleOptions, uniform: f64) -> u32 {
    let mut tokens: Vec<usize> = (0..logits.len()).collect();
    if let Some(top_n) = options.top_n.filter(|&top_n| top_n < tokens.len()) {
        let top_n = top_n.max(1);
        tokens.select_nth_unstable_by(top_n - 1, |&a, &b| likelier_first(logits, a, b));
        tokens.truncate(top_n);
        tokens.sort_unstable();
    }
    let likeliest = tokens.iter().copied().min_by(|&a, &b| likelier_first(logits, a, b));
    let likeliest = likeliest.expect("a network has a class");
    let max = f64::from(logits[likeliest]);
    let weight = |&token: &usize| match f64::from(logits[token]) {
        logit if logit == max => 1.0,
        // A weight of a difference that is not a number is none either.
        logit => libm::exp((logit - max) / options.temperature).max(0.0),
    };
    let weights: Vec<f64> = tokens.iter().map(weight).collect();
    let threshold = uniform * weights.iter().sum::<f64>();
    let mut covered = 0.0;
    for (&token, weight) in tokens.iter().zip(weights) {
        covered += weight;
        if covered > threshold {
            return token as u32;
        }
    }
    likeliest as u32
}

/// Largest logit first, of equal ones the lower token, not-a-numbers last.
fn likelier_first(logits: &[f32], a: usize, b: usize) -> Ordering {
    let by_logit = match (logits[a].is_nan(), logits[b].is_nan()) {
        (false, false) => logits[b].partial_cmp(&logits[a]).expect("neither is not-a-number"),
        (a_is_nan, b_is_nan) => a_is_nan.cmp(&b_is_nan),
    };
    by_logit.then(a.cmp(&b))
}

/// The random number of the token at `position`, a multiple of 2⁻⁵³ in [0, 1).
fn uniform_at(seed: u64, position: u64) -> f64 {
    let counter = [position as u32, (position >> 32) as u32, 0, 0];
    let [low, high, ..] = philox4x32_10(key(seed, Purpose::Sample), counter);
    let bits = u64::from(high) << 32 | u64::from(low);
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// A text under way: an endless iterator over its tokens, the prime not included.
pub struct Sampler<'d, D: Device> {
    device: &'d mut D,
    reader: D::Reader,
    options: SampleOptions,
    /// The network's answer to all tokens so far, `[V]`.
    logits: Vec<f32>,
    /// Tokens sampled so far.
    position: u64,
}

impl<'d, D: Device> Sampler<'d, D> {
    /// Reads the prime with these parameters `[P]`, from the initial state.
    ///
    /// # Errors
    /// The network does not read tokens, the prime is empty or has a token that the network does not know, or the
    /// device failed.
    pub fn new(
        device: &'d mut D,
        shape: &ModelShape,
        parameters: &D::Buffer,
        prime: &[u32],
        options: SampleOptions,
    ) -> Result<Self> {
        let Some(tokens) = shape.input.tokens() else {
            return Err(DeviceError("only a network that reads tokens can be sampled from".to_owned()));
        };
        if let Some(token) = prime.iter().find(|&&token| token as usize >= tokens) {
            return Err(DeviceError(format!("the prime has token {token}, the network has {tokens} tokens")));
        }
        if prime.is_empty() {
            return Err(DeviceError("the prime of a sample is empty".to_owned()));
        }
        let reader = device.reader(parameters)?;
        let mut sampler = Self { device, reader, options, logits: vec![0.0; shape.classes], position: 0 };
        for &token in prime {
            sampler.read(token)?;
        }
        Ok(sampler)
    }

    fn read(&mut self, token: u32) -> Result<()> {
        self.device.read(&mut self.reader, StepInput::Token(token), &mut self.logits)
    }
}

impl<D: Device> Iterator for Sampler<'_, D> {
    type Item = Result<u32>;

    fn next(&mut self) -> Option<Result<u32>> {
        let token = choose(&self.logits, &self.options, uniform_at(self.options.seed, self.position));
        self.position += 1;
        Some(self.read(token).map(|()| token))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: SampleOptions = SampleOptions { temperature: 1.0, top_n: None, seed: 1 };

    /// How often each token is chosen in `draws` draws.
    fn counts(logits: &[f32], options: &SampleOptions, draws: u64) -> Vec<u64> {
        let mut counts = vec![0; logits.len()];
        for position in 0..draws {
            counts[choose(logits, options, uniform_at(options.seed, position)) as usize] += 1;
        }
        counts
    }

    /// Σ (count - expected)² / expected over the tokens that can be chosen; the others must never be.
    fn chi_square(counts: &[u64], probabilities: &[f64]) -> f64 {
        let draws = counts.iter().sum::<u64>() as f64;
        let term = |(&count, &probability): (&u64, &f64)| {
            let expected = draws * probability;
            assert!(expected > 0.0 || count == 0, "{counts:?} of {probabilities:?}");
            if expected > 0.0 { (count as f64 - expected).powi(2) / expected } else { 0.0 }
        };
        counts.iter().zip(probabilities).map(term).sum()
    }

    /// ln of these probabilities, shifted: softmax does not mind.
    fn logits_of(probabilities: &[f64]) -> Vec<f32> {
        probabilities.iter().map(|probability| (probability.ln() + 3.0) as f32).collect()
    }

    #[test]
    fn tokens_come_as_often_as_their_probability_says() {
        let probabilities = [0.5, 0.25, 0.125, 0.1, 0.025];
        let logits = logits_of(&probabilities);
        // 99.9 % of samples of a chi-square distribution of 4 degrees of freedom lie below 18.5.
        for seed in 1..=5 {
            let options = SampleOptions { seed, ..PLAIN };
            let distance = chi_square(&counts(&logits, &options, 20_000), &probabilities);
            assert!(distance < 18.5, "seed {seed}: {distance}");
        }
        let rooted: Vec<f64> = probabilities.iter().map(|probability| probability.sqrt()).collect();
        let sum: f64 = rooted.iter().sum();
        let rooted: Vec<f64> = rooted.iter().map(|probability| probability / sum).collect();
        let hot = counts(&logits, &SampleOptions { temperature: 2.0, ..PLAIN }, 20_000);
        assert!(chi_square(&hot, &rooted) < 18.5, "{hot:?}");
        assert!(chi_square(&hot, &probabilities) > 100.0, "the bound tells one distribution from another");
    }

    #[test]
    fn the_top_tokens_share_the_probability_of_the_rest() {
        let logits = logits_of(&[0.05, 0.4, 0.1, 0.2, 0.25]);
        let top = SampleOptions { top_n: Some(3), ..PLAIN };
        let distance =
            chi_square(&counts(&logits, &top, 20_000), &[0.0, 0.4 / 0.85, 0.0, 0.2 / 0.85, 0.25 / 0.85]);
        assert!(distance < 13.8, "{distance}");
        let all = SampleOptions { top_n: Some(5), ..PLAIN };
        assert_eq!(counts(&logits, &all, 1000), counts(&logits, &PLAIN, 1000));
    }

    #[test]
    fn of_equal_logits_the_lower_tokens_stay() {
        let counts = counts(&[1.0, 2.0, 1.0, 1.0], &SampleOptions { top_n: Some(2), ..PLAIN }, 1000);
        assert!(counts[0] > 0 && counts[1] > 0 && counts[2..] == [0, 0], "{counts:?}");
    }

    #[test]
    fn one_token_or_a_temperature_near_zero_take_the_likeliest() {
        let mut stream = protocol::random::Stream::new(3, Purpose::Digits, [0, 0]);
        for _ in 0..200 {
            let mut logits: Vec<f32> = (0..33).map(|_| 8.0 * stream.unit_f32() - 4.0).collect();
            logits[7] = logits[20]; // Where these are the largest, the lower one is taken.
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let likeliest = logits.iter().position(|&logit| logit == largest).unwrap() as u32;
            for uniform in [0.0, 0.3, 1.0 - f64::EPSILON] {
                let one = SampleOptions { top_n: Some(1), temperature: 5.0, ..PLAIN };
                assert_eq!(choose(&logits, &one, uniform), likeliest);
                let cold = SampleOptions { temperature: 1e-9, ..PLAIN };
                let chosen = choose(&logits, &cold, uniform);
                assert_eq!(logits[chosen as usize], largest);
            }
        }
    }

    #[test]
    fn numbers_that_are_none_are_passed_over() {
        for uniform in [0.0, 0.5, 0.999] {
            assert_eq!(choose(&[f32::NAN, 1.0, f32::NEG_INFINITY], &PLAIN, uniform), 1);
            assert_eq!(choose(&[0.0, f32::INFINITY, 5.0], &PLAIN, uniform), 1);
            assert_eq!(choose(&[f32::NAN; 3], &PLAIN, uniform), 0);
            let unchecked = SampleOptions { temperature: f64::NAN, top_n: Some(0), seed: 1 };
            assert_eq!(choose(&[0.0, 2.0], &unchecked, uniform), 1);
        }
    }

    #[test]
    fn random_numbers_depend_on_seed_and_position() {
        let all: Vec<f64> =
            (0..4).flat_map(|seed| [0, 1, 1 << 32].map(|position| uniform_at(seed, position))).collect();
        assert!(all.iter().all(|uniform| (0.0..1.0).contains(uniform)));
        for (i, a) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|b| a != b));
        }
    }

    #[test]
    fn options_that_mean_nothing_are_refused() {
        for temperature in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let problem = SampleOptions { temperature, ..PLAIN }.check().unwrap_err();
            assert_eq!(
                problem.sentence,
                format!("the temperature is {temperature}, it must be a number above 0")
            );
        }
        assert!(SampleOptions { top_n: Some(0), ..PLAIN }.check().is_err());
        PLAIN.check().unwrap();
    }
}
