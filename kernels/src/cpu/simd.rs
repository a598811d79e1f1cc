//! Which vector instructions a kernel runs with, and the macro that compiles one body for each of them.
//!
//! A kernel is written once, as plain Rust over slices. `simd_kernel!` compiles that text three times: for
//! AVX-512 (which AMX implies), for AVX2 with FMA, and for the build target's baseline. The text uses only `+ - * /`, `sqrt`,
//! `mul_add`, comparisons and bit casts, each of which is exactly rounded at every width, and the compiler never
//! reassociates floats, so the three compilations return identical bits (the payload of a NaN excepted).

use std::fmt;
use std::str::FromStr;

/// A vector instruction set that this process has been seen to support.
///
/// The field is private and every constructor checks the CPU: holding a `Simd` is the proof that the instructions
/// of its level may be executed. That proof is what the `unsafe` blocks of the kernels rest on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Simd {
    level: SimdLevel,
}

/// The names of the levels, whether this CPU has them or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SimdLevel {
    /// AVX-512 as below, and AMX for products of bf16, which Linux lets this process use.
    Amx,
    /// AVX-512 F, BW, DQ and VL: 16 f32 per instruction, 32 registers.
    Avx512,
    /// AVX2 with FMA: 8 f32 per instruction, 16 registers.
    Avx2,
    /// What the build target guarantees. On baseline x86-64 each `mul_add` is a library call: correct, and slow.
    Portable,
}

/// A level that was asked for and cannot be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SimdError {
    /// The text names no level.
    Unknown(String),
    /// The level exists and this CPU lacks it.
    Unavailable(SimdLevel),
}

impl Simd {
    /// The level every CPU has.
    pub const PORTABLE: Simd = Simd { level: SimdLevel::Portable };

    /// The widest level of this CPU.
    pub fn detect() -> Simd {
        Simd::available()[0]
    }

    /// Every level of this CPU, widest first; the last is always [`Simd::PORTABLE`].
    pub fn available() -> Vec<Simd> {
        SimdLevel::ALL.into_iter().filter_map(|level| Simd::new(level).ok()).collect()
    }

    /// `level`, if this CPU has it.
    pub fn new(level: SimdLevel) -> Result<Simd, SimdError> {
        if level.is_available() { Ok(Simd { level }) } else { Err(SimdError::Unavailable(level)) }
    }

    /// The level by name, to `match` on.
    pub fn level(self) -> SimdLevel {
        self.level
    }
}

impl SimdLevel {
    /// Widest first.
    pub const ALL: [SimdLevel; 4] = [SimdLevel::Amx, SimdLevel::Avx512, SimdLevel::Avx2, SimdLevel::Portable];

    /// Whether this CPU (and its operating system) can execute the level.
    pub fn is_available(self) -> bool {
        match self {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            SimdLevel::Amx => SimdLevel::Avx512.is_available() && super::amx::is_available(),
            #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
            SimdLevel::Amx => false,
            #[cfg(target_arch = "x86_64")]
            SimdLevel::Avx512 => {
                SimdLevel::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            SimdLevel::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(not(target_arch = "x86_64"))]
            SimdLevel::Avx512 | SimdLevel::Avx2 => false,
            SimdLevel::Portable => true,
        }
    }
}

impl FromStr for Simd {
    type Err = SimdError;

    fn from_str(text: &str) -> Result<Simd, SimdError> {
        let level = SimdLevel::ALL.into_iter().find(|level| level.to_string() == text);
        Simd::new(level.ok_or_else(|| SimdError::Unknown(text.to_owned()))?)
    }
}

impl fmt::Display for SimdLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SimdLevel::Amx => "amx",
            SimdLevel::Avx512 => "avx512",
            SimdLevel::Avx2 => "avx2",
            SimdLevel::Portable => "portable",
        })
    }
}

impl fmt::Display for Simd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.level.fmt(f)
    }
}

impl fmt::Display for SimdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SimdError::Unknown(text) => {
                write!(f, "unknown simd level `{text}`, expected one of amx, avx512, avx2, portable")
            }
            SimdError::Unavailable(level) => {
                let names: Vec<String> = Simd::available().iter().map(Simd::to_string).collect();
                write!(f, "this CPU has no {level}, it has {}", names.join(", "))
            }
        }
    }
}

impl std::error::Error for SimdError {}

/// Compiles `fn name<const ..>(simd: Simd, args..) { body }` once per level and chooses by `simd` at run time.
///
/// The body must be inlinable into a function with more target features: what it calls is `#[inline(always)]`.
macro_rules! simd_kernel {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident $(<$(const $constant:ident: $of:ty),+>)?
        ($simd:ident: Simd $(, $arg:ident: $ty:ty)* $(,)?) $(-> $ret:ty)? $body:block
    ) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name $(<$(const $constant: $of),+>)?
        ($simd: $crate::cpu::simd::Simd $(, $arg: $ty)*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body $(<$(const $constant: $of),+>)? ($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            fn avx512 $(<$(const $constant: $of),+>)? ($($arg: $ty),*) $(-> $ret)? {
                body $(::<$($constant),+>)? ($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            fn avx2 $(<$(const $constant: $of),+>)? ($($arg: $ty),*) $(-> $ret)? {
                body $(::<$($constant),+>)? ($($arg),*)
            }

            match $simd.level() {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `Simd::new` checked avx512f, bw, dq, vl, avx2 and fma before it built these levels.
                $crate::cpu::simd::SimdLevel::Amx | $crate::cpu::simd::SimdLevel::Avx512 => unsafe {
                    avx512 $(::<$($constant),+>)? ($($arg),*)
                },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `Simd::new` checked avx2 and fma before it built this level.
                $crate::cpu::simd::SimdLevel::Avx2 => unsafe { avx2 $(::<$($constant),+>)? ($($arg),*) },
                _ => body $(::<$($constant),+>)? ($($arg),*),
            }
        }
    };
}
pub(crate) use simd_kernel;

/// Calls `function::<A, B, ..>(args)` with conditions that are known at run time turned into constants:
/// `with_constants!(function[condition_a, condition_b](args))`.
///
/// One compilation per combination: what a condition switches off costs the others nothing.
macro_rules! with_constants {
    ($function:ident[$($condition:expr),+] $args:tt) => {
        $crate::cpu::simd::with_constants!($function::<>[$($condition),+] $args)
    };
    ($function:ident::<$($known:literal),*>[] $args:tt) => {
        $function::<$($known),*> $args
    };
    ($function:ident::<$($known:literal),*>[$first:expr $(, $rest:expr)*] $args:tt) => {
        if $first {
            $crate::cpu::simd::with_constants!($function::<$($known,)* true>[$($rest),*] $args)
        } else {
            $crate::cpu::simd::with_constants!($function::<$($known,)* false>[$($rest),*] $args)
        }
    };
}
pub(crate) use with_constants;

/// Units that the pointwise kernels and the sums take at a time, at every level: one AVX-512 register of f32.
pub(crate) const LANES: usize = 16;

/// Maps `unit` over rows of equal length, `LANES` units at a time: `inout[..][j] = unit(input[..][j], inout[..][j])`.
///
/// The last block is padded with zeros and only its real units are stored, so that a width of 150 costs ten vector
/// blocks and not nine plus six scalar units. `unit` must be `#[inline(always)]`, or it is not vectorised at the
/// caller's level.
#[inline(always)]
pub(crate) fn map_units<const IN: usize, const OUT: usize>(
    input: [&[f32]; IN],
    inout: [&mut [f32]; OUT],
    unit: impl Fn([f32; IN], [f32; OUT]) -> [f32; OUT],
) {
    let len = inout[0].len();
    for row in &input {
        assert!(row.len() == len, "map_units: rows differ in length: {} and {len}", row.len());
    }
    for row in &inout {
        assert!(row.len() == len, "map_units: rows differ in length: {} and {len}", row.len());
    }
    let mut start = 0;
    while start + LANES <= len {
        // Local copies: the compiler then knows that no store below aliases a load, and needs no run-time checks.
        let mut x = [[0.0f32; LANES]; IN];
        let mut y = [[0.0f32; LANES]; OUT];
        for n in 0..IN {
            x[n].copy_from_slice(&input[n][start..start + LANES]);
        }
        for n in 0..OUT {
            y[n].copy_from_slice(&inout[n][start..start + LANES]);
        }
        let result = unit_block(&x, &y, &unit);
        for n in 0..OUT {
            inout[n][start..start + LANES].copy_from_slice(&result[n]);
        }
        start += LANES;
    }
    if start < len {
        let count = len - start;
        let mut x = [[0.0f32; LANES]; IN];
        let mut y = [[0.0f32; LANES]; OUT];
        for n in 0..IN {
            x[n][..count].copy_from_slice(&input[n][start..]);
        }
        for n in 0..OUT {
            y[n][..count].copy_from_slice(&inout[n][start..]);
        }
        let result = unit_block(&x, &y, &unit);
        for n in 0..OUT {
            inout[n][start..].copy_from_slice(&result[n][..count]);
        }
    }
}

#[inline(always)]
fn unit_block<const IN: usize, const OUT: usize>(
    x: &[[f32; LANES]; IN],
    y: &[[f32; LANES]; OUT],
    unit: &impl Fn([f32; IN], [f32; OUT]) -> [f32; OUT],
) -> [[f32; LANES]; OUT] {
    let mut result = [[0.0; LANES]; OUT];
    for lane in 0..LANES {
        let mut input = [0.0; IN];
        for n in 0..IN {
            input[n] = x[n][lane];
        }
        let mut inout = [0.0; OUT];
        for n in 0..OUT {
            inout[n] = y[n][lane];
        }
        let values = unit(input, inout);
        for n in 0..OUT {
            result[n][lane] = values[n];
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_errors_name_the_alternatives() {
        for simd in Simd::available() {
            assert_eq!(simd.to_string().parse(), Ok(simd));
        }
        let error = "sse9".parse::<Simd>().unwrap_err().to_string();
        assert_eq!(error, "unknown simd level `sse9`, expected one of amx, avx512, avx2, portable");
        assert!(SimdError::Unavailable(SimdLevel::Avx512).to_string().contains("portable"));
    }

    #[test]
    fn portable_is_always_the_last_level() {
        assert_eq!(Simd::available().last(), Some(&Simd::PORTABLE));
        assert!(Simd::detect().level().is_available());
    }

    #[test]
    fn map_units_reaches_every_unit_of_an_odd_row_once() {
        fn add(x: [f32; 1], y: [f32; 2]) -> [f32; 2] {
            [y[0] + x[0], y[1] - x[0]]
        }
        for len in [0, 1, 15, 16, 17, 33, 150] {
            let x: Vec<f32> = (0..len).map(|j| j as f32).collect();
            let (mut up, mut down) = (vec![1.0; len], vec![1.0; len]);
            map_units([&x], [&mut up, &mut down], add);
            for j in 0..len {
                assert_eq!((up[j], down[j]), (1.0 + j as f32, 1.0 - j as f32));
            }
        }
    }
}
