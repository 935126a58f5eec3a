// Scores -> weights in the forward kernel for sm_90a.
#pragma once

#include <prim_hopper.h>

#include "attention_call.h"

namespace fastseq::FASTSEQ_ISA::attention {

// Weights are 2^(score factor - reference), one multiply-add and one ex2. The reference is the highest score times the
// factor, rounded, so that the weight of the highest is 2^(what rounding took), not 1: between 2^-1/32 and 2^1/32 below
// kHuge. All weights of a row have that in common, it cancels in output, and the sum that is written is divided by it.
// From kHuge on, where it might be anything, the difference comes first, as in weight_of().
constexpr float kHuge = 1 << 20;
FS_DEVICE bool is_huge(float x) { return !(x < kHuge && x > -kHuge); }
// as_new(), or the compiler would make one multiply-add of it and what follows.
FS_DEVICE float reference(float highest, float factor) { return as_new(highest * factor); }
FS_DEVICE float excess(float highest, float factor) {
  const float rounded = reference(highest, factor);
  return is_huge(rounded) ? 1.0f : exp2(fma(highest, factor, -rounded));
}

// Scores of a thread's two rows, as accumulators lie, -> weights relative to that of the highest so far; the sums are of
// the thread's own columns. rescale makes what was summed up before relative to the new highest.
template <int kCount>
FS_DEVICE void softmax(float factor, float (&s)[kCount], float (&highest)[2], float (&sum)[2],
                       float (&rescale)[2]) {
  // Without any visible key so far, all weights are those of -inf beside 0.
  const auto visible = [](float x) { return x == -float(INFINITY) ? 0.0f : x; };
  bool huge = false;
  FS_UNROLL
  for (int h = 0; h < 2; ++h) {
    float most = highest[h];
    FS_UNROLL
    for (int i = 2 * h; i < kCount; i += 4) most = max(most, max(s[i], s[i + 1]));
    most = max(most, shuffle_xor(most, 1));
    most = max(most, shuffle_xor(most, 2));
    const float before = highest[h], now = visible(most);
    const float rounded_before = reference(before, factor), rounded = reference(now, factor);
    const bool was = is_huge(rounded_before), is = is_huge(rounded);
    float exponent = rounded_before - rounded;
    if (was) exponent = fma(before, factor, -rounded);
    if (is) exponent = was ? (before - now) * factor : fma(-now, factor, rounded_before);
    rescale[h] = exp2(exponent);
    highest[h] = most;
    huge |= is;
  }
  if (any_in_warp(huge)) {
    FS_UNROLL
    for (int h = 0; h < 2; ++h) {
      const float now = visible(highest[h]), less = is_huge(now * factor) ? now : 0.0f;
      FS_UNROLL
      for (int i = 2 * h; i < kCount; i += 4) s[i] -= less, s[i + 1] -= less;
    }
  }
  FS_UNROLL
  for (int h = 0; h < 2; ++h) {
    const float rounded = reference(visible(highest[h]), factor);
    const float less = is_huge(rounded) ? 0.0f : rounded;
    float total = 0;
    FS_UNROLL
    for (int i = 2 * h; i < kCount; i += 4) {
      s[i] = exp2(fma(s[i], factor, -less)), s[i + 1] = exp2(fma(s[i + 1], factor, -less));
      total += s[i] + s[i + 1];
    }
    sum[h] = fma(sum[h], rescale[h], total);
  }
}

}  // namespace fastseq::FASTSEQ_ISA::attention
