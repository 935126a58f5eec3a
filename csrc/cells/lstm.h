// LSTM step (Hochreiter & Schmidhuber 1997, with forget gate).
//
//   i = sigmoid(x_i + u_i)   f = sigmoid(x_f + u_f)   g = tanh(x_g + u_g)   o = sigmoid(x_o + u_o)
//   c' = f * c + i * g
//   h' = o * tanh(c')
//
// x = W x_t + b_ih, u = U h + b_hh, in torch's order i, f, g, o.
#pragma once

#include "cell.h"

namespace fastseq::FASTSEQ_ISA {

template <class V>
struct LSTM {
  static constexpr int kGates = 4, kFirstGates = 4, kSaved = 4, kGrads = 4;
  static constexpr bool kCellState = true, kDirect = false, kGradOfOutput = false;
  static constexpr int kInputGrad[] = {0, 1, 2, 3}, kRecurrentGrad[] = {0, 1, 2, 3};
  enum { I, F, G, O };
  static constexpr int kCarry = 2, kEndSaves = -1;  // o and c' are carried

  template <class X>
  FS_HD static void begin(const X* x, const V* u, V, V c, V* gate, V* carry, V& c_next) {
    gate[I]  = sigmoid(x[I] + u[I]);
    gate[F]  = sigmoid(x[F] + u[F]);
    gate[G]  = tanh(x[G] + u[G]);
    gate[O]  = sigmoid(x[O] + u[O]);
    c_next   = gate[F] * c + gate[I] * gate[G];
    carry[0] = gate[O];
    carry[1] = c_next;
  }
  template <class X>
  FS_HD static void end(const X*, V, const V* carry, V&, V& h_next) {
    h_next = output(carry[0], carry[1]);
  }

  // h' before the projection, if there is one.
  FS_HD static V output(V o, V c_next) { return o * tanh(c_next); }

  template <class Clip = Unclipped>
  FS_HD static void step_grad(const V* gate, V, V, V c, V c_next, V dh, V dc, V* d, V&, V& dc_prev,
                              Clip clip = {}) {
    const V tanh_c   = tanh(c_next);
    const V dc_total = clip(dc + dh * gate[O] * (1 - tanh_c * tanh_c));
    d[I]             = dc_total * gate[G] * gate[I] * (1 - gate[I]);
    d[F]             = dc_total * c * gate[F] * (1 - gate[F]);
    d[G]             = dc_total * gate[I] * (1 - gate[G] * gate[G]);
    d[O]             = dh * tanh_c * gate[O] * (1 - gate[O]);
    dc_prev          = dc_total * gate[F];
  }
};

}  // namespace fastseq::FASTSEQ_ISA
