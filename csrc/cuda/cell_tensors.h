// What the kernels of a step read and write: elements of tensors, those of numbers alone or of both planes of dual
// numbers (plane 0 numbers, plane 1 their tangents), and what of a state crosses to another step.
#pragma once

#include <prim.h>

#include "../cells/dual.h"
#include "recurrent_items.h"

namespace fastseq::FASTSEQ_ISA {

template <class S>
using ScalarOf = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class Args>
constexpr bool kHasTangents =
    std::is_same_v<Args, CellStepDualArgs> || std::is_same_v<Args, CellGradDualArgs>;

// What a kernel computes with.
template <class S, class Args>
using ValueOf = std::conditional_t<kHasTangents<Args>, Dual<ScalarOf<S>>, ScalarOf<S>>;

template <int plane, class Args>
FS_DEVICE const auto& tensors_of(const Args& a) {
  if constexpr (plane == 1) {
    return a.tangents;
  } else {
    return a;
  }
}

using Values = std::integral_constant<int, 0>;
using Tangents = std::integral_constant<int, 1>;

// get(plane) of each plane that V has.
template <class V, class Get>
FS_DEVICE V of_planes(Get get) {
  if constexpr (std::is_floating_point_v<V>) {
    return get(Values());
  } else {
    return V(get(Values()), get(Tangents()));
  }
}
template <class T, class Put>
FS_DEVICE void each_plane(T x, Put put) {
  put(Values(), x);
}
template <class T, class Put>
FS_DEVICE void each_plane(Dual<T> x, Put put) {
  put(Values(), x.value);
  put(Tangents(), x.tangent);
}

template <class Args>
FS_DEVICE int row_step(const Args& a) {
  if constexpr (kHasTangents<Args>) {
    return a.row_step;
  } else {
    return 1;
  }
}

template <class S>
FS_DEVICE ScalarOf<S> read(const void* tensor, int64_t at) {
  return tensor ? ScalarOf<S>(widen(static_cast<const S*>(tensor)[at])) : ScalarOf<S>(0);
}
// What the next product reads, or the next step.
template <class S>
FS_DEVICE void write(void* tensor, int64_t at, ScalarOf<S> value) {
  if (tensor) narrow(value, static_cast<S*>(tensor)[at]);
}
// States between steps, which may be wide.
template <class S>
FS_DEVICE ScalarOf<S> read_state(bool wide, const void* state, int64_t at) {
  if (!wide || !state) return read<S>(state, at);
  return static_cast<const ScalarOf<S>*>(state)[at];
}
template <class S>
FS_DEVICE void write_state(bool wide, void* state, int64_t at, ScalarOf<S> value) {
  if (!wide || !state) return write<S>(state, at, value);
  static_cast<ScalarOf<S>*>(state)[at] = value;
}
// What lies until the backward pass.
template <class S>
FS_DEVICE void leave(void* tensor, int64_t at, ScalarOf<S> value) {
  if (tensor) keep(static_cast<S*>(tensor) + at, value);
}

// Rows of the direction that has most of them.
template <class Args>
FS_DEVICE int64_t most_rows(const Args& a) {
  const int64_t rows = a.direction[0].now.rows, others = a.directions == 2 ? a.direction[1].now.rows : 0;
  return rows > others ? rows : others;
}

// body(direction, row, unit) for the thread's share of them; rows that the direction does not have too.
template <class Args, class Body>
FS_DEVICE void for_units(const Args& a, Body body) {
  const int64_t of_direction = most_rows(a) * a.hidden_size;
  for (int64_t i = int64_t(block_index()) * thread_count() + thread_index(); i < a.directions * of_direction;
       i += int64_t(block_count()) * thread_count()) {
    const int direction = i >= of_direction;
    const int64_t j = i - direction * of_direction;
    body(direction, j / a.hidden_size, j % a.hidden_size);
  }
}

// What of a row's state goes from one of two steps to the other.
struct Crossing {
  bool reset;  // nothing
  bool cut;    // no tangent, and no gradient
};
template <class Args>
FS_DEVICE Crossing crossing(const Args& a, const StepRows& now, const StepRows& other, bool truncated,
                            int64_t row) {
  if (!has_step(a.lengths, other, row)) return {false, false};
  const bool reset = a.resets && a.resets[(other.t > now.t ? other : now).offset + row];
  return {reset, reset || truncated};
}
template <class T>
FS_DEVICE T crossed(T state, const Crossing& to) {
  return to.reset ? T(0) : state;
}
template <class T>
FS_DEVICE Dual<T> crossed(Dual<T> state, const Crossing& to) {
  return {to.reset ? T(0) : state.value, to.cut ? T(0) : state.tangent};
}

}  // namespace fastseq::FASTSEQ_ISA
