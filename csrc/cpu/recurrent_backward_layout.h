// The memory of the backward pass: what it keeps beside the tensors, and where it lies.
#pragma once

#include "recurrent_common.h"
#include "weight_gradient.h"

namespace fastseq::FASTSEQ_ISA {

template <class S, class O>
struct BackwardLayout : RecurrentPass<S, O> {
  using Scalar = typename Operand<O>::Scalar;
  using Element = typename Operand<O>::Element;
  static constexpr int kWidth = Vec<Scalar>::kWidth;
  static constexpr int64_t kPanelColumns = kPanelVectors * kWidth;
  using Base = RecurrentPass<S, O>;
  using Base::args, Base::plan, Base::cell, Base::steps;
  using Base::most_rows, Base::slots, Base::team_size, Base::two_products, Base::width;

  struct DirectionState {
    Panels<O> recurrent_first, recurrent_rest;  // U of the first gates (all, in most cells) and of the others
    Panels<O> input, projection;                // W_ih, W_hr
    Scalar* dh;                                 // [B, R, padded]
    Scalar* dc;                                 // [B, H, padded]
    Scalar* dm;                                 // [B, H, padded]: gradient of the unprojected output
    double* bias_sum;                           // [grads, H padded]; many rows go into each
    Scalar *weight_ih_sum, *weight_hh_sum,
        *weight_hr_sum;  // where the sums cannot live in the gradients themselves
    Scalar* input_sum;   // [rows, I]: dx of the direction that runs beside another
    // Of a chunk; rows are those of its steps in the order of time.
    O* d;                                       // [row][grads][H, padded]
    O* d_output;                                // [row][R, padded]: gradient of the projected output
    O* operand;                                 // [row][H, padded]: r * h, or the unprojected output
    const S **h_rows, **c_rows, **x_rows;       // rows of h_{t-1}, c_{t-1} and x
    Panels<O> h_right, x_right, operand_right;  // packed for dW
  };

  Blocks units, outputs;  // of H and of R
  int64_t chunk_rows, depth, hidden_stride, width_stride, d_stride;
  DirectionState direction[2];
  Element* left;  // [thread]: a block of d^T, where kPackLeft
  int64_t left_size;

  BackwardLayout(const RecurrentArgs& args, const RecurrentPlan& plan) : Base(args, plan) {
    this->allocate([this](Arena& arena) { lay_out(arena); });
    for (int d = 0; d < args.directions; ++d) {
      const RecurrentDirection& t = args.direction[d];
      const size_t gate_rows = size_t(cell.gates * args.hidden_size);
      advise_large_pages(t.grad_weight_ih, gate_rows * size_t(args.input_size) * sizeof(S));
      advise_large_pages(t.grad_weight_hh, gate_rows * size_t(width()) * sizeof(S));
    }
    advise_large_pages(args.grad_input.data, size_t(steps.all_rows() * args.input_size) * sizeof(S));
  }

 private:
  // Sums of 16-bit gradients are kept apart in float; others grow where they will stay.
  static Scalar* sum_of(void* gradient, int64_t count, Arena& arena) {
    if (!gradient) return nullptr;
    if constexpr (sizeof(S) == sizeof(Scalar)) return static_cast<Scalar*>(gradient);
    return arena.take<Scalar>(count);
  }

  void lay_out(Arena& arena) {
    const int64_t hidden = args.hidden_size, batch = args.shape.batch, inputs = args.input_size;
    const int64_t rows = rows_of(args.shape), gate_rows = cell.gates * hidden;
    const int panel = panel_vectors(most_rows());
    const auto cut = [&](int64_t n) {
      return Blocks{n, kWidth * unit_vectors<Scalar>(n, 1, plan.unit_parts, most_rows(), panel)};
    };
    units = cut(hidden), outputs = cut(width());
    chunk_rows = least(rows, most(plan.chunk_rows, batch));
    depth = least(chunk_rows, kChunkDepth);
    hidden_stride = round_up(hidden, kWidth);
    width_stride = round_up(width(), kWidth);
    d_stride = cell.grads * hidden_stride + kWidth;
    this->take_shared();
    for (int i = 0; i < args.directions; ++i) {
      const RecurrentDirection& t = args.direction[i];
      DirectionState& s = direction[i];
      // The first step's product is the gradient of h0.
      const bool product = args.shape.steps > 1 || t.grad_h0;
      s.recurrent_first = {nullptr,          nullptr, {product ? width() : 0, outputs.width}, 1, hidden,
                           cell.first_gates, panel};
      s.recurrent_first.take(arena, false);
      s.recurrent_rest = {nullptr, nullptr, units, 1, hidden, cell.gates - cell.first_gates, panel};
      s.recurrent_rest.take(arena, false);
      s.input = {nullptr, nullptr, {args.grad_input.data ? inputs : 0, kPanelColumns}, 1, hidden, cell.gates};
      s.input.take(arena, false);
      s.projection = {nullptr, nullptr, {args.proj_size ? hidden : 0, units.width}, 1, width(), 1, panel};
      s.projection.take(arena, false);
      s.dh = arena.take<Scalar>(batch * width_stride);
      s.dc = arena.take<Scalar>(cell.cell_state ? batch * hidden_stride : 0);
      s.dm = arena.take<Scalar>(args.proj_size ? batch * hidden_stride : 0);
      s.bias_sum = arena.take<double>(cell.grads * hidden_stride);
      s.weight_ih_sum = sum_of(t.grad_weight_ih, gate_rows * inputs, arena);
      s.weight_hh_sum = sum_of(t.grad_weight_hh, gate_rows * width(), arena);
      s.weight_hr_sum = sum_of(t.grad_weight_hr, width() * hidden, arena);
      const bool beside = i > 0 && plan.direction_parts > 1 && args.grad_input.data;
      s.input_sum = beside ? arena.take<Scalar>(rows * inputs) : nullptr;
      s.d = arena.take<O>(chunk_rows * d_stride + kPackSlack);
      s.d_output = arena.take<O>(args.proj_size ? chunk_rows * width_stride + kPackSlack : 0);
      s.operand = args.proj_size || two_products() ? arena.take<O>(chunk_rows * hidden_stride) : nullptr;
      s.h_rows = arena.take<const S*>(chunk_rows);
      s.c_rows = arena.take<const S*>(chunk_rows);
      s.x_rows = arena.take<const S*>(chunk_rows);
      s.h_right = {nullptr, nullptr, {t.grad_weight_hh ? width() : 0, kPanelColumns}, 1, depth, 1};
      s.h_right.take(arena, false);
      s.x_right = {nullptr, nullptr, {t.grad_weight_ih ? inputs : 0, kPanelColumns}, 1, depth, 1};
      s.x_right.take(arena, false);
      const bool operand_used = (two_products() && t.grad_weight_hh) || t.grad_weight_hr;
      s.operand_right = {nullptr, nullptr, {operand_used ? hidden : 0, kPanelColumns}, 1, depth, 1};
      s.operand_right.take(arena, false);
    }
    left_size = kPackLeft<O> ? pairs<O>(depth) * kBlockRows + kPackSlack : 0;
    left = arena.take<Element>(team_size() * left_size);
  }
};

}  // namespace fastseq::FASTSEQ_ISA
