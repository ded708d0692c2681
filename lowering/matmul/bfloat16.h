// Does this processor's vdpbf16ps do the steps of the bfloat16 order?  Asked once, when first needed.
#pragma once

#include "micro.h"

namespace bicompile::matmul {

#if defined(BICOMPILE_AVX512) && defined(__AVX512BF16__)
// Whether both ways give the same bits on values that would show another order, another rounding or kept denormals.
inline bool instruction_agrees() {
  FloatMode mode(true);
  uint64_t state = 0x9e3779b97f4a7c15;
  auto random = [&] {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return uint32_t(state >> 32);
  };
  // Exponents: all of them, those whose products meet near 1 and cancel, and those around the smallest normal one.
  auto element = [&](int kind) {
    const uint32_t bits = random();
    const uint32_t exponent = kind == 0 ? bits >> 8 & 0xff : kind == 1 ? 124 + (bits >> 8 & 7) : 58 + (bits >> 8 & 7);
    return (bits & 0x8000) | exponent << 7 | (bits & 0x7f);
  };
  for (int round = 0; round < 4096; round++) {
    const int kind = round % 3;
    alignas(64) uint32_t a[16], b[16], acc[16];
    for (int i = 0; i < 16; i++) {
      a[i] = element(kind) | element(kind) << 16;
      b[i] = element(kind) | element(kind) << 16;
      acc[i] = element(kind) << 16 | (random() & 0xffff);
      if (kind == 2) acc[i] = (acc[i] & 0x80ffffff) % 0x02000000 | (acc[i] & 0x80000000);
      if ((acc[i] & 0x7f800000) == 0) acc[i] &= 0x80000000;  // a running sum is never denormal
    }
    const VecF va = load(reinterpret_cast<float*>(a)), vb = load(reinterpret_cast<float*>(b));
    const VecF vc = load(reinterpret_cast<float*>(acc));
    const VecF one = canonical(step_pair<PairBy::kInstruction>(va, vb, vc));
    const VecF two = canonical(step_pair<PairBy::kFused>(va, vb, vc));
    if (_mm512_cmpneq_epi32_mask(_mm512_castps_si512(one.v), _mm512_castps_si512(two.v))) return false;
  }
  return true;
}
inline PairBy pair_by() {
  static const PairBy by = instruction_agrees() ? PairBy::kInstruction : PairBy::kFused;
  return by;
}
#else
inline PairBy pair_by() { return PairBy::kFused; }
#endif

}  // namespace bicompile::matmul
