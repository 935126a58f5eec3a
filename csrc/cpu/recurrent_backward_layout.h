// The memory of the backward pass: what it keeps beside the tensors, and where it lies.
#pragma once

#include "recurrent_common.h"
#include "weight_gradient.h"

namespace fastseq::FASTSEQ_ISA {

template <class S, class O, int kPlanes>
struct BackwardLayout : RecurrentPass<S, O, kPlanes> {
  using Scalar = typename Operand<O>::Scalar;
  using Element = typename Operand<O>::Element;
  static constexpr int kWidth = Vec<Scalar>::kWidth;
  static constexpr int64_t kPanelColumns = kPanelVectors * kWidth;
  using Base = RecurrentPass<S, O, kPlanes>;
  using Base::args, Base::plan, Base::cell, Base::steps, Base::plane;
  using Base::most_rows, Base::slots, Base::team_size, Base::two_products, Base::width;

  // What has a plane's index is of numbers, and of tangents where there are any; rows of planes follow one another.
  struct DirectionState {
    // U of the first gates (all, in most cells) and of the others
    Panels<O> recurrent_first[kPlanes], recurrent_rest[kPlanes];
    Panels<O> input[kPlanes], projection[kPlanes];  // W_ih, W_hr
    Scalar* dh;                                     // [B, planes, R, padded]
    Scalar* dc;                                     // [B, planes, H, padded]
    Scalar* dm;                 // [B, planes, H, padded]: gradient of the unprojected output
    double* bias_sum[kPlanes];  // [grads, H padded]; many rows go into each
    // where the sums cannot live in the gradients themselves
    Scalar *weight_ih_sum[kPlanes], *weight_hh_sum[kPlanes], *weight_hr_sum[kPlanes];
    Scalar* input_sum[kPlanes];  // [rows, I]: dx of the direction that runs beside another
    // Of a chunk; rows are those of its steps in the order of time.
    O* d;                                       // [row][planes][grads][H, padded]
    O* d_output;                                // [row][planes][R, padded]: gradient of the projected output
    O* operand;                                 // [row][planes][H, padded]: r * h, or the unprojected output
    RowsOf<S, kPlanes> h_rows, c_rows, x_rows;  // of h_{t-1}, c_{t-1} and x
    // Packed for dW: rows of numbers, and those of RowsOf for its tangent, d'^T h + d^T h'.
    Panels<O> h_right[kPlanes], x_right[kPlanes], operand_right[kPlanes];
  };

  Blocks units, outputs;  // of H and of R
  int64_t chunk_rows, depth, hidden_stride, width_stride, d_stride;
  DirectionState direction[2];
  Element* left;  // [thread]: a block of d^T, where kPackLeft
  int64_t left_size;

  BackwardLayout(const RecurrentArgs& args, const RecurrentPlan& plan) : Base(args, plan) {
    this->allocate([this](Arena& arena) { lay_out(arena); });
    for (int p = 0; p < kPlanes; ++p) {
      for (int d = 0; d < args.directions; ++d) {
        const RecurrentDirection& t = plane(p).direction[d];
        const size_t gate_rows = size_t(cell.gates * args.hidden_size);
        advise_large_pages(t.grad_weight_ih, gate_rows * size_t(args.input_size) * sizeof(S));
        advise_large_pages(t.grad_weight_hh, gate_rows * size_t(width()) * sizeof(S));
      }
      advise_large_pages(plane(p).grad_input.data, size_t(steps.all_rows() * args.input_size) * sizeof(S));
    }
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
    const int64_t operand_rows = (args.known ? 1 : kPlanes) * most_rows();  // of the product of each step
    const int panel = panel_vectors(operand_rows);
    const auto cut = [&](int64_t n) {
      return Blocks{n, kWidth * unit_vectors<Scalar>(n, 1, plan.unit_parts, operand_rows, panel)};
    };
    units = cut(hidden), outputs = cut(width());
    chunk_rows = least(rows, most(plan.chunk_rows, batch));
    depth = least(chunk_rows, kChunkDepth / kPlanes);
    hidden_stride = round_up(hidden, kWidth);
    width_stride = round_up(width(), kWidth);
    d_stride = cell.grads * hidden_stride + kWidth;
    this->take_shared();
    for (int i = 0; i < args.directions; ++i) {
      DirectionState& s = direction[i];
      const RecurrentDirection &first = args.direction[i], &last = plane(kPlanes - 1).direction[i];
      // The first step's product is the gradient of h0.
      const bool product = args.shape.steps > 1 || first.grad_h0 || last.grad_h0;
      const bool of_input = args.grad_input.data || plane(kPlanes - 1).grad_input.data;
      for (int p = 0; p < kPlanes; ++p) {
        const RecurrentDirection& t = plane(p).direction[i];
        // Of tangents only what is there.
        const auto take = [&](Panels<O>& panels, const void* weight, Blocks blocks, int64_t depth,
                              int64_t segments, int widest = kPanelVectors) {
          panels = {nullptr, nullptr, blocks, 1, depth, segments, widest};
          panels.take(arena, false, weight);
        };
        const auto there = [&](const void* weight) -> const void* { return p == 0 ? &s : weight; };
        take(s.recurrent_first[p], there(t.weight_hh), {product ? width() : 0, outputs.width}, hidden,
             cell.first_gates, panel);
        take(s.recurrent_rest[p], there(t.weight_hh), units, hidden, cell.gates - cell.first_gates, panel);
        take(s.input[p], there(t.weight_ih), {of_input ? inputs : 0, kPanelColumns}, hidden, cell.gates);
        take(s.projection[p], there(t.weight_hr), {args.proj_size ? hidden : 0, units.width}, width(), 1,
             panel);
        s.bias_sum[p] = arena.take<double>(cell.grads * hidden_stride);
        s.weight_ih_sum[p] = sum_of(t.grad_weight_ih, gate_rows * inputs, arena);
        s.weight_hh_sum[p] = sum_of(t.grad_weight_hh, gate_rows * width(), arena);
        s.weight_hr_sum[p] = sum_of(t.grad_weight_hr, width() * hidden, arena);
        const bool beside = i > 0 && plan.direction_parts > 1 && plane(p).grad_input.data;
        s.input_sum[p] = beside ? arena.take<Scalar>(rows * inputs) : nullptr;
        for (RowsOf<S, kPlanes>* of : {&s.h_rows, &s.c_rows, &s.x_rows}) {
          of->rows[p] = arena.take<const S*>((p + 1) * chunk_rows);
        }
        // Where the input has no tangent, that of the gradient needs its numbers only.
        const bool x_alone = p == 0 && kPlanes == 2 && last.grad_weight_ih && !plane(kPlanes - 1).input.data;
        const bool operand_used = (two_products() && t.grad_weight_hh) || t.grad_weight_hr;
        take(s.h_right[p], this, {t.grad_weight_hh ? width() : 0, kPanelColumns}, (p + 1) * depth, 1);
        take(s.x_right[p], this, {t.grad_weight_ih || x_alone ? inputs : 0, kPanelColumns}, (p + 1) * depth,
             1);
        take(s.operand_right[p], this, {operand_used ? hidden : 0, kPanelColumns}, (p + 1) * depth, 1);
      }
      s.dh = arena.take<Scalar>(kPlanes * batch * width_stride);
      s.dc = arena.take<Scalar>(cell.cell_state ? kPlanes * batch * hidden_stride : 0);
      s.dm = arena.take<Scalar>(args.proj_size ? kPlanes * batch * hidden_stride : 0);
      const int64_t rows_of_planes = kPlanes * chunk_rows;
      s.d = arena.take<O>(rows_of_planes * d_stride + kPackSlack);
      s.d_output = arena.take<O>(args.proj_size ? rows_of_planes * width_stride + kPackSlack : 0);
      s.operand = args.proj_size || two_products() ? arena.take<O>(rows_of_planes * hidden_stride) : nullptr;
    }
    left_size = kPackLeft<O> ? pairs<O>(kPlanes * depth) * kBlockRows + kPackSlack : 0;
    left = arena.take<Element>(team_size() * left_size);
  }
};

}  // namespace fastseq::FASTSEQ_ISA
