//! Nothing: the measurement is in `benches/gemm_peers.rs`.
