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

#include "recurrent_items.h"

namespace fastseq::FASTSEQ_ISA {

template <class Traits>
class ForwardPass {
  using M = typename Traits::M;
  using Storage = typename M::Storage;
  using Scalar = typename M::Scalar;
  using Engine = StepEngine<Traits>;
  static constexpr int kProducts = Traits::kProducts, kRows = Engine::kRows;

  struct Inputs {
    Scalar x[kMostGates];
  };
  struct Results {
    Scalar h, saved[kMostSaved];
  };

 public:
  FS_DEVICE explicit ForwardPass(const LoopKernelArgs& args)
      : args_(args),
        loop_(args.loop),
        engine_(args),
        units_(args.layout.units, int(loop_.hidden_size), engine_.rank, engine_.first_row, loop_.shape.batch),
        outputs_(projects() ? args.layout.projected_units : args.layout.units, width(), engine_.rank,
                 engine_.first_row, loop_.shape.batch),
        gates_(args.layout.gates),
        slots_(args.layout.saved) {}

  FS_DEVICE void run() {
    const int64_t steps = loop_.shape.steps;
    start();
    now_ = rows_of(args_, time(0));
    load(0);
    engine_.start();
    engine_.multiply_initial(static_cast<const Storage*>(tensors().h0), width());
    for (int64_t s = 0;; ++s) {
      const int parity = int(s % 2);
      if constexpr (kProducts == 2) {
        for_rounds<false>(units_, [&](int begin) { begin_step(begin, parity); });
        engine_.template transfer<1>(parity, [] {});
        for_rounds(outputs_, [&](int begin) { end_step(begin, parity); });
      } else {
        for_rounds(units_, [&](int begin) { whole_step(begin, parity); });
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
  FS_DEVICE bool projects() const { return kProducts == 2 && loop_.proj_size > 0; }
  FS_DEVICE int width() const { return int(loop_.proj_size ? loop_.proj_size : loop_.hidden_size); }
  FS_DEVICE const LoopDirection& tensors() const { return engine_.tensors(); }
  FS_DEVICE int64_t time(int64_t s) const { return engine_.direction == 0 ? s : loop_.shape.steps - 1 - s; }
  FS_DEVICE bool packed() const { return loop_.shape.batch_sizes != nullptr; }
  FS_DEVICE bool active(const Item& item) const { return item.inside && item.row < now_.rows; }

  // h of a unit (projected, if it is) and c; z of a reset-before GRU between its two products takes c's place.
  FS_DEVICE Scalar& h_at(const Item& item) const {
    return engine_.template shared<Scalar>(args_.layout.state_at)[state_index(item)];
  }
  FS_DEVICE Scalar& c_at(const Item& item) const {
    return engine_.template shared<Scalar>(args_.layout.state_at)[state_size() + state_index(item)];
  }
  FS_DEVICE int state_units() const {
    return args_.layout.units > args_.layout.projected_units ? args_.layout.units
                                                             : args_.layout.projected_units;
  }
  FS_DEVICE int state_size() const { return state_units() * kRows; }
  FS_DEVICE int state_index(const Item& item) const { return item.n * state_units() + item.u; }

  template <class Body>
  FS_DEVICE void for_all(const Items<kRows>& items, Body body) const {
    for (int i = thread_index(); i < items.count(); i += thread_count()) body(items.at(i));
  }

  FS_DEVICE void start() {
    const auto* const h0 = static_cast<const Storage*>(tensors().h0);
    const auto* const c0 = static_cast<const Storage*>(tensors().c0);
    for_all(outputs_, [&](const Item& item) {
      h_at(item) = h0 && item.inside ? Scalar(widen(h0[item.row * width() + item.unit])) : Scalar(0);
    });
    for_all(units_, [&](const Item& item) {
      c_at(item) =
          c0 && item.inside ? Scalar(widen(c0[item.row * loop_.hidden_size + item.unit])) : Scalar(0);
    });
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
    auto* const h_n = static_cast<Storage*>(tensors().h_n);
    auto* const c_n = static_cast<Storage*>(tensors().c_n);
    for_all(outputs_, [&](const Item& item) {
      if (h_n && item.inside) keep(h_n + item.row * width() + item.unit, h_at(item));
    });
    if (!c_n) return;
    for_all(units_, [&](const Item& item) {
      if (item.inside) keep(c_n + item.row * loop_.hidden_size + item.unit, c_at(item));
    });
  }

  // The items in rounds of kAhead a thread. What a round leaves to store is stored before the next round, but for
  // the last one, whose turn comes when the other blocks have been told.
  template <bool kStores = true, class Body>
  FS_DEVICE void for_rounds(const Items<kRows>& items, Body body) {
    const int round = kAhead * thread_count();
    FS_NO_UNROLL
    for (int begin = 0; begin < items.count(); begin += round) {
      body(begin);
      if (!kStores) continue;
      last_round_ = begin;
      if (begin + round < items.count()) store(begin);
    }
  }

  FS_DEVICE void load(int begin) {
    const auto* const pre = static_cast<const Storage*>(loop_.pre);
    const int64_t hidden = loop_.hidden_size;
    units_.for_each(begin, [&](int a, const Item& item) {
      if (!active(item)) return;
      const int64_t row = (now_.offset + item.row) * loop_.directions + engine_.direction;
      const Storage* const from = pre + row * gates_ * hidden + item.unit;
      FS_UNROLL
      for (int g = 0; g < kMostGates; ++g) {
        if (g < gates_) inputs_[a].x[g] = Scalar(widen(load_once(from + g * hidden)));
      }
    });
  }

  // Gates [first, first + count) of the recurrent product, which makes them the first ones of product p.
  template <int kFirst, int kCount>
  FS_DEVICE void recurrent_gates(int p, int parity, const Item& item, Scalar* u) const {
    const Scalar* const bias = engine_.template shared<Scalar>(args_.layout.bias_at);
    FS_UNROLL
    for (int g = 0; g < kCount; ++g) {
      const int m = g * args_.layout.units + item.u;
      u[kFirst + g] = engine_.sum(p, parity, m, item.n) + bias[kFirst * args_.layout.units + m];
    }
  }

  FS_DEVICE void whole_step(int begin, int parity) {
    if (begin > 0) load(begin);
    with_cell<Scalar, 1>(loop_.cell, [&](auto cell) {
      using C = decltype(cell);
      units_.for_each(begin, [&](int a, const Item& item) {
        Scalar h = h_at(item);
        if (active(item)) {
          Scalar u[C::kGates], saved[C::kSaved + 1], c_next = 0, h_next = 0;
          recurrent_gates<0, C::kGates>(0, parity, item, u);
          take_step<C>(inputs_[a].x, u, h, c_at(item), saved, h_next, c_next);
          if constexpr (C::kCellState) {
            c_at(item) = c_next;
            saved[C::kSaved] = c_next;
          }
          h_at(item) = h = results_[a].h = rounded<Storage>(h_next);
          FS_UNROLL
          for (int i = 0; i < C::kSaved + C::kCellState; ++i) results_[a].saved[i] = saved[i];
        }
        engine_.put(0, 1 - parity, 0, item.u, item.n, h);
      });
    });
  }

  // Up to the operand of the second product: r * h, or the cell's output before its projection.
  FS_DEVICE void begin_step(int begin, int parity) {
    if (begin > 0) load(begin);
    auto* const saved_to = static_cast<Storage*>(tensors().saved);
    with_cell<Scalar, 2>(loop_.cell, [&](auto cell) {
      using C = decltype(cell);
      units_.for_each(begin, [&](int a, const Item& item) {
        Scalar operand = 0;
        if (active(item)) {
          Scalar u[C::kGates], saved[C::kSaved + 1];
          recurrent_gates<0, C::kFirstGates>(0, parity, item, u);
          if constexpr (C::kCellState) {
            Scalar c_next = 0;
            take_step<C>(inputs_[a].x, u, Scalar(0), c_at(item), saved, operand, c_next);
            c_at(item) = saved[C::kSaved] = c_next;
          } else {
            C::first(inputs_[a].x, u, h_at(item), saved, operand);
            c_at(item) = saved[C::Z];
          }
          if (saved_to) {
            Storage* const to = saved_row(saved_to, item);
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
        if (active(item))
          h_at(item) = results_[a].h = rounded<Storage>(engine_.sum(1, parity, item.u, item.n));
        engine_.put(0, 1 - parity, 0, item.u, item.n, h_at(item));
      });
      return;
    }
    if (begin > 0 || units_.count() > kAhead * thread_count()) load(begin);
    using C = GRUResetBefore<Scalar>;
    units_.for_each(begin, [&](int a, const Item& item) {
      Scalar h = h_at(item);
      if (active(item)) {
        Scalar u[C::kGates], saved[C::kSaved], h_next = 0, unused = 0;
        recurrent_gates<C::kFirstGates, C::kGates - C::kFirstGates>(1, parity, item, u);
        saved[C::Z] = c_at(item);
        C::step(inputs_[a].x, u, h, Scalar(0), saved, h_next, unused);
        h_at(item) = h = results_[a].h = rounded<Storage>(h_next);
        results_[a].saved[C::N] = saved[C::N];
      }
      engine_.put(0, 1 - parity, 0, item.u, item.n, h);
    });
  }

  FS_DEVICE Storage* saved_row(Storage* saved, const Item& item) const {
    return saved + (now_.offset + item.row) * slots_ * loop_.hidden_size + item.unit;
  }

  // What a round of the step made: the output, and what is saved and not stored yet.
  FS_DEVICE void store(int begin) const {
    auto* const saved = static_cast<Storage*>(tensors().saved);
    outputs_.for_each(begin, [&](int a, const Item& item) {
      if (!active(item)) return;
      Storage* const output = row_at<Storage>(loop_.output, packed(), now_, item.row);
      keep(output + engine_.direction * width() + item.unit, results_[a].h);
      if (!saved || projects()) return;
      Storage* const to = saved_row(saved, item);
      FS_UNROLL
      for (int i = 0; i < kMostSaved; ++i) {
        const bool due = kProducts == 2 ? i == GRUResetBefore<Scalar>::N : i < slots_;
        if (due) keep(to + i * loop_.hidden_size, results_[a].saved[i]);
      }
    });
  }

  const LoopKernelArgs& args_;
  const RecurrentLoopArgs& loop_;
  Engine engine_;
  const Items<kRows> units_;    // hidden units
  const Items<kRows> outputs_;  // units of h: the same, or those of the projection
  const int gates_, slots_;
  StepRows now_;
  int last_round_ = 0;
  Inputs inputs_[kAhead];
  Results results_[kAhead];
};

}  // namespace fastseq::FASTSEQ_ISA
