//! The f64 oracle against finite differences, against PyTorch and TensorFlow, and against loops unrolled by hand.

mod combinations;
mod examples;
mod fixture;
mod frameworks;
mod gradients;
mod largest;
mod numbers;
mod sequences;
