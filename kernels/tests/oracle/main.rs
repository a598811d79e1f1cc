//! The f64 oracle against finite differences, against PyTorch and TensorFlow, and against loops unrolled by hand.

mod combinations;
mod compare;
mod examples;
mod fixture;
mod frameworks;
mod gradients;
mod sequences;
