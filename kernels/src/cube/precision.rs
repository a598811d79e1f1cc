//! What the operands of products are rounded to, and who multiplies them.

use cubecl::ir::features::MmaConfig;
use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;
use protocol::job::Precision;

/// The nearest number of a precision, as f32: of two at the same distance the even one for bf16, the one away from zero for
/// tf32, as GPUs round. NaN stays what it is.
#[cube]
pub(super) fn rounded(x: f32, #[comptime] precision: Precision) -> f32 {
    let bits = u32::reinterpret(x);
    let is_nan = (bits & 0x7fff_ffff_u32) > 0x7f80_0000_u32;
    match comptime!(precision) {
        Precision::F32 => x,
        Precision::Bf16 => {
            let nearest = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff_0000_u32;
            select(is_nan, x, f32::reinterpret(nearest))
        }
        Precision::Tf32 => select(is_nan, x, f32::reinterpret((bits + 0x1000) & 0xffff_e000_u32)),
    }
}

/// Length of the sums that a tensor core adds up at a time; none if the device has no tensor cores for this precision.
pub(super) fn tensor_depth<R: Runtime>(client: &ComputeClient<R>, precision: Precision) -> Option<usize> {
    let depth = match precision {
        Precision::F32 => return None,
        Precision::Bf16 => 16,
        Precision::Tf32 => 8,
    };
    // An A100 or a later one has both. cubecl says of earlier ones that they have bf16, too.
    let [operand, sum] = [FloatKind::TF32, FloatKind::F32].map(|kind| ElemType::Float(kind).into());
    let tf32 = MmaConfig { a_type: operand, b_type: operand, cd_type: sum, m: 16, n: 16, k: 8 };
    client.properties().features.matmul.cmma.contains(&tf32).then_some(depth)
}
