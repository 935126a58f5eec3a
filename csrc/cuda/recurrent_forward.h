// The forward pass of a recurrent layer's time loop, as one persistent kernel.
//
//   s = 0 .. T-1:   u = U h_{t-1} + b_hh            the engine's product
//                   h_t, c_t = cell(x_t, u, h_{t-1}, c_{t-1})
//   with two products: the first gates, then U_n (r * h) (reset-before GRU) or W_hr of the cell's output (projection)
//
// Who holds what: a group of blocks has one batch tile of one direction; a block has some hidden units, all their
// gates and so all rows of U that make them, for all steps. Sums, h and c of its own units are in shared memory in
// float (double), h as storage rounds it. Where the operand is, and how it comes there: step_engine.h.
#pragma once

#include "recurrent_pass.h"

namespace fastseq::FASTSEQ_ISA {

template <class Traits>
class ForwardPass : LoopPass<Traits> {
  using Base = LoopPass<Traits>;
  using Base::args_, Base::engine_, Base::gates_, Base::last_round_, Base::loop_, Base::now_, Base::outputs_;
  using Base::kProducts, Base::kRows, Base::active, Base::packed, Base::projects, Base::tensors, Base::width;
  using Base::slots_, Base::units_;
  using typename Base::Scalar, typename Base::Storage;

  struct Inputs {
    Storage x[kMostGates];
  };
  struct Results {
    Scalar h, saved[kMostSaved];
  };

 public:
  FS_DEVICE explicit ForwardPass(const LoopKernelArgs& args) : Base(args) {}

  FS_DEVICE void run() {
    const int64_t steps = loop_.shape.steps;
    start();
    now_ = rows_of(args_, time(0));
    load(0);
    engine_.start();
    engine_.multiply_initial(static_cast<const Storage*>(tensors().h0), width());
    const auto store_round = [&](int begin) { store(begin); };
    for (int64_t s = 0;; ++s) {
      const int parity = int(s % 2);
      if constexpr (kProducts == 2) {
        Base::for_rounds(units_, [&](int begin) { begin_step(begin, parity); });
        engine_.template transfer<1>(parity, [] {});
        Base::for_rounds(outputs_, [&](int begin) { end_step(begin, parity); }, store_round);
      } else {
        Base::for_rounds(units_, [&](int begin) { whole_step(begin, parity); }, store_round);
      }
      const StepRows next = rows_of(args_, time(s + 1));
      const auto between = [&] {
        store(last_round_);
        now_ = next;
        load(0);
      };
      if (s + 1 == steps) {
        store(last_round_);
        break;
      }
      engine_.template transfer<0>(1 - parity, between);
    }
    finish();
  }

 private:
  FS_DEVICE int64_t time(int64_t s) const { return Base::time(s, false); }

  // h of a unit (projected, if it is) and c; z of a reset-before GRU between its two products takes c's place.
  FS_DEVICE Scalar& h_at(const Item& item) const { return Base::state(0, item); }
  FS_DEVICE Scalar& c_at(const Item& item) const { return Base::state(1, item); }

  FS_DEVICE void start() {
    Base::load_state(0, outputs_, tensors().h0, width());
    Base::load_state(1, units_, tensors().c0, loop_.hidden_size);
    const auto* const bias = static_cast<const Storage*>(tensors().bias_hh);
    Scalar* const to = engine_.template shared<Scalar>(args_.layout.bias_at);
    for (int i = thread_index(); i < gates_ * args_.layout.units; i += thread_count()) {
      const int gate = i / args_.layout.units,
                unit = engine_.rank * args_.layout.units + i % args_.layout.units;
      const bool there = bias && unit < loop_.hidden_size;
      to[i] = there ? Scalar(widen(bias[gate * loop_.hidden_size + unit])) : Scalar(0);
    }
  }

  FS_DEVICE void finish() {
    Base::store_state(outputs_, tensors().h_n, width(), [&](const Item& item) { return h_at(item); });
    Base::store_state(units_, tensors().c_n, loop_.hidden_size, [&](const Item& item) { return c_at(item); });
  }

  FS_DEVICE void load(int begin) {
    units_.for_each(begin, [&](int a, const Item& item) {
      if (!active(item)) return;
      const Storage* const from = Base::gates_row(item);
      FS_UNROLL
      for (int g = 0; g < kMostGates; ++g) {
        if (g < gates_) inputs_[a].x[g] = load_once(from + g * loop_.hidden_size);
      }
    });
  }

  // c of this step, where only states are kept.
  FS_DEVICE Storage* state_row(const Item& item) const {
    auto* const states = static_cast<Storage*>(tensors().saved);
    return states + (now_.offset + item.row) * loop_.hidden_size + item.unit;
  }

  // Gates [first, first + count) of the recurrent product, which makes them the first ones of product p.
  template <int kFirst, int kCount>
  FS_DEVICE void recurrent_gates(int p, int parity, const Item& item, Scalar* u) const {
    const Scalar* const bias = engine_.template shared<Scalar>(args_.layout.bias_at);
    Scalar sums[kCount];
    engine_.sum(p, parity, item.u, args_.layout.units, item.n, sums);
    FS_UNROLL
    for (int g = 0; g < kCount; ++g)
      u[kFirst + g] = sums[g] + bias[(kFirst + g) * args_.layout.units + item.u];
  }

  // Whether none of the row's states reaches the step after this one.
  FS_DEVICE bool resets(const Item& item) const {
    if (!loop_.resets) return false;
    const StepRows later = Base::reverse() ? now_ : rows_of(args_, now_.t + 1);
    return later.t > 0 && item.row < later.rows && loop_.resets[later.offset + item.row];
  }

  FS_DEVICE void whole_step(int begin, int parity) {
    if (begin > 0) load(begin);
    with_cell<Scalar, 1>(loop_.cell, [&](auto cell) {
      using C = decltype(cell);
      units_.for_each(begin, [&](int a, const Item& item) {
        Scalar h = h_at(item);
        if (active(item)) {
          Scalar x[kMostGates], u[C::kGates], saved[C::kSaved + 1], c_next = 0, h_next = 0;
          recurrent_gates<0, C::kGates>(0, parity, item, u);
          widen_all(inputs_[a].x, x);
          take_step<C>(x, u, h, c_at(item), saved, h_next, c_next);
          if constexpr (C::kCellState) saved[C::kSaved] = c_next;
          h = results_[a].h = rounded<Storage>(h_next);
          FS_UNROLL
          for (int i = 0; i < C::kSaved + C::kCellState; ++i) results_[a].saved[i] = saved[i];
          if (resets(item)) h = c_next = 0;
          if constexpr (C::kCellState) c_at(item) = c_next;
          h_at(item) = h;
        }
        engine_.put(0, 1 - parity, 0, item.u, item.n, h);
      });
    });
  }

  // Up to the operand of the second product: r * h, or the cell's output before its projection.
  FS_DEVICE void begin_step(int begin, int parity) {
    if (begin > 0) load(begin);
    with_cell<Scalar, 2>(loop_.cell, [&](auto cell) {
      using C = decltype(cell);
      units_.for_each(begin, [&](int a, const Item& item) {
        Scalar operand = 0;
        if (active(item)) {
          Scalar x[kMostGates], u[C::kGates], saved[C::kSaved + 1];
          recurrent_gates<0, C::kFirstGates>(0, parity, item, u);
          widen_all(inputs_[a].x, x);
          if constexpr (C::kCellState) {
            Scalar c_next = 0;
            take_step<C>(x, u, Scalar(0), c_at(item), saved, operand, c_next);
            saved[C::kSaved] = c_next;
            c_at(item) = resets(item) ? Scalar(0) : c_next;
          } else {
            C::first(x, u, h_at(item), saved, operand);
            c_at(item) = saved[C::Z];
          }
          if (C::kCellState && loop_.saves_states) {
            keep(state_row(item), saved[C::kSaved]);
          } else if (tensors().saved) {
            Storage* const to = Base::saved_row(now_, item);
            FS_UNROLL
            for (int i = 0; i < (C::kCellState ? C::kSaved + 1 : C::kFirstGates); ++i) {
              keep(to + i * loop_.hidden_size, saved[i]);
            }
          }
        }
        engine_.put(1, parity, 0, item.u, item.n, operand);
      });
    });
  }

  FS_DEVICE void end_step(int begin, int parity) {
    if (projects()) {
      outputs_.for_each(begin, [&](int a, const Item& item) {
        if (active(item)) {
          results_[a].h = rounded<Storage>(engine_.sum(1, parity, item.u, item.n));
          h_at(item) = resets(item) ? Scalar(0) : results_[a].h;
        }
        engine_.put(0, 1 - parity, 0, item.u, item.n, h_at(item));
      });
      return;
    }
    if (begin > 0 || Base::has_rounds(units_)) load(begin);
    using C = GRUResetBefore<Scalar>;
    units_.for_each(begin, [&](int a, const Item& item) {
      Scalar h = h_at(item);
      if (active(item)) {
        Scalar x[kMostGates], u[C::kGates], saved[C::kSaved], h_next = 0, unused = 0;
        recurrent_gates<C::kFirstGates, C::kGates - C::kFirstGates>(1, parity, item, u);
        saved[C::Z] = c_at(item);
        widen_all(inputs_[a].x, x);
        C::step(x, u, h, Scalar(0), saved, h_next, unused);
        h = results_[a].h = rounded<Storage>(h_next);
        results_[a].saved[C::N] = saved[C::N];
        if (resets(item)) h = 0;
        h_at(item) = h;
      }
      engine_.put(0, 1 - parity, 0, item.u, item.n, h);
    });
  }

  // What a round of the step made: the output, and what is saved and not stored yet.
  FS_DEVICE void store(int begin) const {
    outputs_.for_each(begin, [&](int a, const Item& item) {
      if (!active(item)) return;
      Storage* const output = row_at<Storage>(loop_.output, packed(), now_, item.row);
      keep(output + engine_.direction * width() + item.unit, results_[a].h);
      if (!tensors().saved || projects()) return;
      if (loop_.saves_states) {
        keep(state_row(item), results_[a].saved[kMostSaved - 1]);
        return;
      }
      Storage* const to = Base::saved_row(now_, item);
      FS_UNROLL
      for (int i = 0; i < kMostSaved; ++i) {
        const bool due = kProducts == 2 ? i == GRUResetBefore<Scalar>::N : i < slots_;
        if (due) keep(to + i * loop_.hidden_size, results_[a].saved[i]);
      }
    });
  }

  static_assert(LSTM<float>::kSaved == kMostSaved - 1, "store() relies on it");

  Inputs inputs_[kAhead];
  Results results_[kAhead];
};

}  // namespace fastseq::FASTSEQ_ISA
