// The cells over a float or a double, and the choice among them, made once a step: one kernel runs every cell, since
// the cost of a step lies in its product and its exchange, which are the same for all.
#pragma once

#include <prim.h>

#include <utility>

#include "../cells/dual.h"
#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "../fastseq.h"

namespace fastseq::FASTSEQ_ISA {

constexpr int kMostGates = 4, kMostSaved = 5, kMostGrads = 4;

// Calls body(cell) for the cells of one product, or of two: then LSTM means the projected one.
template <class T, int kProducts, class Body>
FS_DEVICE void with_cell(CellKind kind, Body body) {
  if constexpr (kProducts == 2) {
    if (kind == CellKind::kLstm) {
      body(LSTM<T>{});
    } else {
      body(GRUResetBefore<T>{});
    }
  } else {
    if (kind == CellKind::kLstm) {
      body(LSTM<T>{});
    } else if (kind == CellKind::kGru) {
      body(GRU<T>{});
    } else if (kind == CellKind::kRnnTanh) {
      body(RNNTanh<T>{});
    } else {
      body(RNNRelu<T>{});
    }
  }
}

template <class C, class = void>
constexpr bool kHasStages = false;
template <class C>
constexpr bool kHasStages<C, std::void_t<decltype(C::kCarry)>> = true;

// A whole step, whether the cell says it in one stage or in two.
template <class C, class T>
FS_DEVICE void take_step(const T* x, const T* u, T h, T c, T* saved, T& h_next, T& c_next) {
  if constexpr (kHasStages<C>) {
    T carry[C::kCarry], last = 0;
    C::begin(x, u, h, c, saved, carry, c_next);
    C::end(x, h, carry, last, h_next);
    if constexpr (C::kEndSaves >= 0) saved[C::kEndSaves] = last;
  } else {
    C::step(x, u, h, c, saved, h_next, c_next);
  }
}

// body(std::integral_constant<int, i>) for i in [0, n): where an index must be a constant.
template <class Body, int... i>
FS_DEVICE void for_constants(Body body, std::integer_sequence<int, i...>) {
  (body(std::integral_constant<int, i>{}), ...);
}
template <int n, class Body>
FS_DEVICE void for_constants(Body body) {
  for_constants(body, std::make_integer_sequence<int, n>{});
}

}  // namespace fastseq::FASTSEQ_ISA
