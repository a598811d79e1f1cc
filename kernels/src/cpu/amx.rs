//! Whether this process may use AMX, Intel's tile registers.

use std::sync::OnceLock;

/// Whether the processor has AMX for bf16 and Linux lets this process use it. Asks for that once: the registers are large,
/// so Linux wants to be asked.
pub(super) fn is_available() -> bool {
    static IS_AVAILABLE: OnceLock<bool> = OnceLock::new();
    *IS_AVAILABLE.get_or_init(|| is_x86_feature_detected!("avx512bf16") && has_bf16_tiles() && is_permitted())
}

fn has_bf16_tiles() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const BF16: u32 = 1 << 22;
    const TILES: u32 = 1 << 24;
    let features = |edx: u32| edx & (BF16 | TILES) == BF16 | TILES;
    __cpuid(0).eax >= 7 && features(__cpuid_count(7, 0).edx)
}

fn is_permitted() -> bool {
    const ARCH_PRCTL: usize = 158;
    const REQUEST_PERMISSION: usize = 0x1023;
    const TILE_DATA: usize = 18;
    let result: isize;
    // SAFETY: a system call that takes two numbers and writes no memory; Linux before 5.16 refuses it.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") REQUEST_PERMISSION,
            in("rsi") TILE_DATA,
            out("rcx") _,
            out("r11") _,
            options(nostack)
        );
    }
    result == 0
}
