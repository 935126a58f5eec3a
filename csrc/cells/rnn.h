// RNN step (Elman 1990).
//
//   h' = tanh(x + u)    or    h' = relu(x + u)
//
// x = W x_t + b_ih, u = U h + b_hh. The backward pass needs h' alone.
#pragma once

#include "cell.h"

namespace fastseq::FASTSEQ_ISA {

template <class V, bool kRelu>
struct RNN {
  static constexpr int kGates = 1, kFirstGates = 1, kSaved = 0, kGrads = 1;
  static constexpr bool kCellState = false, kDirect = false, kGradOfOutput = true;
  static constexpr int kInputGrad[] = {0}, kRecurrentGrad[] = {0};

  template <class X>
  FS_HD static void step(const X* x, const V* u, V, V, V*, V& h_next, V&) {
    if constexpr (kRelu) {
      h_next = relu(x[0] + u[0]);
    } else {
      h_next = tanh(x[0] + u[0]);
    }
  }

  template <class Clip = Unclipped>
  FS_HD static void step_grad(const V*, V, V h_next, V, V, V dh, V, V* d, V&, V&, Clip = {}) {
    if constexpr (kRelu) {
      d[0] = relu_grad(h_next, dh);
    } else {
      d[0] = dh * (1 - h_next * h_next);
    }
  }
};

template <class V>
using RNNTanh = RNN<V, false>;
template <class V>
using RNNRelu = RNN<V, true>;

}  // namespace fastseq::FASTSEQ_ISA
