// The FMA peak of one thread: chains of multiply-adds in registers, as many as hide their latency. For
// bfloat16 the multiply-adds of pairs, where the products use them.
#include <chrono>

#include "recurrent_common.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

// Runs rounds x kChains multiply-adds; the sum keeps them from being optimised away.
template <class O, int kChains>
Vec<typename Operand<O>::Scalar> run_chains(int64_t rounds, typename Operand<O>::Element a, const O* source) {
  using M = Multiplier<O>;
  using V = typename M::V;
  const auto b = M::load_panel(source);
  V acc[kChains];
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) acc[i] = V(i);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) acc[i] = M::multiply_add(a, b, acc[i]);
  }
  V sum(0);
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) sum = sum + acc[i];
  return sum;
}

template <class O>
double measure(double seconds) {
  using V = Vec<typename Operand<O>::Scalar>;
  using Clock = std::chrono::steady_clock;
  constexpr int kChains = kVectorRegisters == 32 ? 24 : 12;
  constexpr int64_t kRounds = 20000;
  alignas(64) O source[V::kWidth * Operand<O>::kPair] = {};
  volatile typename Operand<O>::Element a{};
  volatile typename Operand<O>::Scalar sink;
  const auto start = Clock::now();
  double best = 0;
  for (auto end = start; std::chrono::duration<double>(end - start).count() < seconds;) {
    const auto begin = Clock::now();
    sink = run_chains<O, kChains>(kRounds, a, source).v[0];
    end = Clock::now();
    const double rate = 2.0 * kRounds * kChains * V::kWidth * Operand<O>::kPair /
                        std::chrono::duration<double>(end - begin).count();
    if (rate > best) best = rate;
  }
  (void)sink;
  return best;
}

}  // namespace

double fma_peak(DType dtype, double seconds) {
  double rate = 0;
  with_types(dtype, [&](auto, auto operand) { rate = measure<decltype(operand)>(seconds); });
  return rate;
}

}  // namespace fastseq::FASTSEQ_ISA
