// The contract between Python and the kernels: plain structs of addresses, sizes and strides.
//
// Python allocates every tensor named here, checks its shape, dtype and device, and keeps it alive for
// the duration of the call. The engines never see torch; they read and write through these pointers only.
//
// Conventions
//   T steps, B batch, I input_size, H hidden_size, R recurrent width (proj_size if there is one, else H),
//   G gates of the cell, D directions (1 or 2).
//   Strides count elements, not bytes, and may be zero or negative unless a line says otherwise.
//   "or null" pointers may be 0; everything else must be valid unless its extent is empty.
//   Unless a line says otherwise tensors are dense in the order given, and outputs alias nothing.
#pragma once

#include <cstdint>

namespace fastseq {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
constexpr int kDTypes = 4;

// Gate order is torch's: LSTM i, f, g, o; GRU r, z, n. kGruResetBefore resets before the recurrent product.
enum class CellKind : int { kRnnTanh = 0, kRnnRelu = 1, kLstm = 2, kGru = 3, kGruResetBefore = 4 };
constexpr int kCells = 5;

// The table of cells: what Python and the plans need to know of each. The engines check it against
// csrc/cells.
struct CellFacts {
  const char* name;
  int gates;        // G
  int products;     // of a step: 2 if one gate's operand needs the others first
  int saved;        // values kept of each unit and step, the cell state included
  bool cell_state;  // c beside h
};
constexpr CellFacts kCellFacts[kCells] = {{"RNN_TANH", 1, 1, 0, false},
                                          {"RNN_RELU", 1, 1, 0, false},
                                          {"LSTM", 4, 1, 5, true},
                                          {"GRU", 3, 1, 4, false},
                                          {"GRU_RESET_BEFORE", 3, 2, 3, false}};
constexpr const CellFacts& facts_of(CellKind cell) { return kCellFacts[static_cast<int>(cell)]; }

// What the sequence looks like. A padded sequence has `batch` rows at every step. A packed sequence
// (batch_sizes not null) has batch_sizes[t] rows at step t, never increasing, all rows of a step before
// those of the next, so that row b of step t is row sum(batch_sizes[:t]) + b; only stride [1] is used.
struct SequenceShape {
  int64_t steps;               // T >= 0
  int64_t batch;               // B >= 0; of a packed sequence batch_sizes[0]
  const int64_t* batch_sizes;  // [T] or null
};

// A [T, B, features] tensor: strides of step, row and feature.
template <class Pointer>
struct SequenceTensor {
  Pointer data;
  int64_t stride[3];
};

// One direction of a layer. The gradient members are read and written by the backward pass only.
struct RecurrentDirection {
  const void* weight_ih;  // [G*H, I]
  const void* weight_hh;  // [G*H, R]
  const void* bias_ih;    // [G*H] or null
  const void* bias_hh;    // [G*H] or null
  const void* weight_hr;  // [R, H] or null: the projection of an LSTM
  const void* h0;         // [B, R] or null: zeros
  const void* c0;         // [B, H] or null: zeros; LSTM only
  void* h_n;              // [B, R] or null: the state after each row's last step
  void* c_n;              // [B, H]; LSTM only
  // What the backward pass needs beside the output, [rows, saved slots, H], rows as in the sequence;
  // null in inference. LSTM: i, f, g, o, c. GRU: r, z, n, U_n h + b_n. Reset-before GRU: r, z, n. RNN:
  // nothing. Where args.saves_states, c alone: [rows, H]; null for cells without c.
  void* saved;

  const void* grad_h_n;  // [B, R] or null: zeros
  const void* grad_c_n;  // [B, H] or null: zeros; LSTM only
  void* grad_weight_ih;  // each like its tensor, or null: not wanted
  void* grad_weight_hh;
  void* grad_bias_ih;
  void* grad_bias_hh;
  void* grad_weight_hr;
  void* grad_h0;
  void* grad_c0;
  // [rows, R], in the dtype of sums (float, or double beside float64): the whole gradient of h at every step, before it
  // is bounded. Null: not wanted; read where args.known.
  void* grad_hidden;
};

// The tensors of a layer; or their tangents, each of the shape and dtype of its tensor.
struct RecurrentTensors {
  RecurrentDirection direction[2];

  SequenceTensor<const void*> input;  // [T, B, I]
  // [T, B, D*R], feature stride 1; direction d owns the columns [d*R, (d+1)*R). The backward pass reads it.
  SequenceTensor<void*> output;
  SequenceTensor<const void*> grad_output;  // [T, B, D*R] or null: zeros
  SequenceTensor<void*> grad_input;         // [T, B, I], feature stride 1, or null: not wanted
};

struct RecurrentArgs : RecurrentTensors {
  CellKind cell;
  DType dtype;  // of every tensor in here
  int threads;  // at most so many
  // Direction, batch and unit parts of the plan, and rows of a chunk, as far as the shape allows; 0: not forced.
  int forced_plan[4];
  SequenceShape shape;
  int64_t input_size;   // I >= 0
  int64_t hidden_size;  // H >= 1
  int64_t proj_size;    // 0: no projection
  int directions;       // D; direction 1 runs from the last step to the first
  bool reversed;        // so does the only direction there is
  bool one_step;        // a cell's call: T = 1, one direction, no projection
  bool saves_states;    // the forward pass keeps c of every step, and no gates
  // [T, B], of a packed sequence [rows], or null: where not zero, no state and no gradient of one crosses
  // between steps t - 1 and t of the row. Before step 0 that is h0, which direction 0 does not use there.
  const uint8_t* resets;
  // Of the backward pass. At every step the gradients of h_t and c_t are bounded to [-grad_clip, grad_clip]
  // before they go on; less than 0: they are not. NaN stays NaN.
  double grad_clip;
  // No gradient of a state crosses between t - 1 and t where t is a multiple of it; 0: all cross.
  int64_t truncate;
  // The tangents of all these, or null: not wanted. What the passes read counts as zero where it is null, but for
  // output and saved; h_n, c_n, output and, where args have them, saved are written too.
  const RecurrentTensors* tangents;
  // With tangents: only these are made, the numbers' output and saved are read, not written, and so is, by the backward
  // pass, grad_hidden. c_n of the numbers is scratch; of the gradients those of tangents alone are wanted.
  bool known;
};

// ---- attention ----
//
//   t = scale <q_i, k_j>,  softcap tanh(t / softcap) of it if there is one
//   s = t + mask - slope |i + offset - j|                      of a visible key j; -inf of any other
//   weights = exp(s - lse),  lse = log(sum_j exp(s_j) + exp(sink))
//   output_i = sum_j dropped(weights_ij) v_j
//
// Key j is visible to query i if i + offset - left <= j <= i + offset + right, j is below the sequence's length, and
// the mask does not forbid it. Query heads h share the key and value head h / (Hq / Hkv).
//
//   B batch, Hq heads, Hkv kv_heads, Sq queries, Sk keys, D head_size, Dv value_size.

// [B, heads, rows, features], feature stride 1. Of packed sequences [rows, heads, features], stride[0] unused.
struct HeadTensor {
  void* data;
  int64_t stride[3];  // of batch, head and row
};

// [B, Hq, Sq], row stride 1, in the dtype of sums: float, or double beside float64. Packed: [Hq, rows].
struct HeadRows {
  void* data;
  int64_t stride[2];  // of batch and head
};

// Each stride may be 0 (broadcast).
enum class MaskKind : int { kNone = 0, kBool = 1, kSame = 2, kFloat32 = 3 };  // bool: true is visible
struct AttentionMask {
  const void* data;  // [B, Hq, Sq, Sk]
  MaskKind kind;     // kSame: the dtype of query
  int64_t stride[4];
};

struct AttentionArgs {
  DType dtype;         // of query, key, value, output, weights and the gradients of these
  int threads;         // CPU: at most so many
  int forced_plan[2];  // CPU: head parts and row parts; 0: not forced
  int64_t batch, heads, kv_heads;
  int64_t queries, keys;  // Sq, Sk; of packed sequences the sums
  int64_t head_size, value_size;
  int64_t left, right;               // the window; -1: unlimited
  bool bottom_right;                 // offset = the sequence's keys - its queries, else 0
  uint64_t seed;                     // of dropout, where there is no seed_address
  double scale, softcap, dropout_p;  // softcap 0: none
  const int64_t* cu_seqlens_q;       // [B + 1] or null: first row of each packed sequence, and their number
  const int64_t* cu_seqlens_k;
  const int64_t* key_lengths;  // [B] or null
  HeadTensor query, key, value, output;
  HeadRows lse;  // natural logarithm; or null: not wanted; -inf of rows without a visible key, or the sink
  // The weight of a score s is exp(s - highest) inverse_sum, with highest in units of the engine's own. Written by the
  // forward pass, or null if nobody wants them and no weights are shown; read by the backward pass.
  HeadRows highest, inverse_sum;
  AttentionMask mask;
  HeadRows alibi;      // [B, Hq] slopes or null; strides of batch and head
  const void* sinks;   // [Hq] or null
  HeadTensor weights;  // [B, Hq, Sq, Sk] or null: not wanted; stride of heads 0: their mean over the heads
  // [B, Hq, Sq, Dv] or null: what rounding to 16 bits took from output. Written by the forward pass; with it the
  // backward pass has output as it was.
  HeadTensor remainder;

  // The backward pass only.
  HeadTensor grad_output;                       // [B, Hq, Sq, Dv]
  HeadRows grad_lse;                            // or null: zeros; less the row sums of weights * grad_weights
  HeadTensor grad_weights;                      // [B, Hq, Sq, Sk] or null: zeros
  HeadTensor grad_query, grad_key, grad_value;  // or null: not wanted
  // In the dtype of sums, zero-filled; or, of a mask that is broadcast nowhere, in the mask's dtype, and not filled:
  // then every element is written. Or null: not wanted.
  void* grad_mask;
  int64_t grad_mask_stride[4];  // 0 where the mask is broadcast
  void* grad_sinks;             // [B, Hq] or null: not wanted

  // CUDA only. All tensors, lengths too, are on the device; lengths are not looked at before the kernels run, which
  // take what is out of bounds for the nearest that is not.
  bool tf32;                    // float32 may be rounded to tf32 in products
  bool one_pass;                // grad_query may be summed up in any order
  const int64_t* seed_address;  // on the device, or null
  int device;
  void* stream;
  void* workspace;  // of the size that the plan says, 256-byte aligned
};

// The tangent of each of a call's tensors. Of arguments and incoming gradients null is zeros; of results, and of
// gradients, not wanted.
struct AttentionTangents {
  HeadTensor query, key, value;
  AttentionMask mask;  // of the kind of the mask
  const void* sinks;   // [Hq]
  HeadTensor
      output;  // [B, Hq, Sq, Dv]; written by the forward pass, read by the backward pass, like the next two
  HeadTensor remainder;
  HeadRows lse;

  // The backward pass only.
  HeadTensor grad_output;
  HeadRows grad_lse;
  HeadTensor grad_query, grad_key, grad_value;
  void* grad_mask;  // in the dtype of sums, zero-filled, with the strides of primal.grad_mask_stride
  void* grad_sinks;
};

// Attention over dual numbers: a call as above, and its tangents.
struct AttentionDualArgs : AttentionTangents {
  AttentionArgs primal;
};

// ---- the time loop alone, as the CUDA engine runs it ----
//
// Matrix products over all steps at once (W x before the loop, weight gradients and dx after it) are the
// caller's; the loop is what lies between: U h of each step, the cell, and their gradients.
//
// Rows are those of the sequence, all steps one after another: row t * B + b, or sum(batch_sizes[:t]) + b.
// All tensors are on the device and dense where no stride is given; `shape.batch_sizes` alone is on the host.

struct LoopDirection {
  const void* weight_hh;  // [G*H, R]
  const void* bias_hh;    // [G*H] or null; forward pass only
  const void* weight_hr;  // [R, H] or null: the projection of an LSTM
  const void* h0;         // [B, R] or null: zeros
  const void* c0;         // [B, H] or null: zeros; LSTM only
  void* h_n;              // [B, R] or null: not wanted; forward pass only, like c_n
  void* c_n;              // [B, H]; LSTM only
  void* saved;            // [rows, saved slots, H] as in RecurrentDirection; null in inference

  const void* grad_h_n;  // [B, R] or null: zeros
  const void* grad_c_n;  // [B, H] or null: zeros; LSTM only
  void* grad_h0;         // [B, R] or null: not wanted
  void* grad_c0;         // [B, H] or null: not wanted; LSTM only
  // The factors of weight gradients that `grad_pre` is not; each null: not wanted.
  void* previous;        // [rows, R]  h_{t-1} of each row
  void* grad_candidate;  // [rows, H]  gradient of U_n h + b_n; GRU only
  void* grad_hidden;     // [rows, R]  gradient of h_t; projected LSTM only
};

struct RecurrentLoopArgs {
  CellKind cell;
  DType dtype;  // of every tensor in here
  bool tf32;    // float32 may be rounded to tf32 in products
  SequenceShape shape;
  int64_t hidden_size;  // H >= 1
  int64_t proj_size;    // 0: no projection
  int directions;       // D; direction 1 runs from the last step to the first
  bool reversed;        // so does the only direction there is
  bool saves_states;    // the forward pass keeps c of every step, and no gates
  // [B] or null; of a padded sequence. Row b has the steps t < lengths[b]. Of others nothing is read, nor written.
  const int64_t* lengths;
  // [T, B], packed [rows], or null; zero where `lengths` says that there is no step. As in RecurrentArgs, but that h0
  // and c0 come as they are to be used.
  const uint8_t* resets;
  double grad_clip;       // as there, but infinite where nothing is bounded
  float grad_clip_float;  // the same, which converted in a kernel would be held in a register over all steps
  // Like resets, of the backward pass: no gradient of a state crosses. All resets are among them; or null.
  const uint8_t* cuts;
  LoopDirection direction[2];

  // [rows, D, G, H]: W x + b_ih, read by the forward pass; its gradient, written by the backward pass.
  void* pre;
  // [T, B, D*R], feature stride 1; rows of a packed sequence are stride[1] apart. The backward pass reads it.
  SequenceTensor<void*> output;
  SequenceTensor<const void*> grad_output;  // [T, B, D*R] or null: zeros

  int device;
  void* stream;
  void* workspace;  // of the size that the plan says, 256-byte aligned
};

// ---- one step of all directions, with its matrix products made by the caller ----
//
// A step of a cell with one product is whole. With two, `first` makes the operand of the second product, and `rest`
// what follows it. That is a reset-before GRU, and a projected LSTM: there the rest of the forward pass takes h from
// the projection, the first part of the backward pass makes dh, its operand, and what lies between is whole; units of
// rest and first are those of the projection.
//
// What the products read and write is [B, ...] of each direction, states as well, with the step's rows first. The
// directions may be at different times, and of a packed sequence have different numbers of rows.

enum class StepPart : int { kWhole = 0, kFirst = 1, kRest = 2 };

// One step of the sequence, as the rows lie.
struct StepRows {
  int64_t t, offset;  // row of the step's row 0
  int64_t rows;       // of the step; 0 outside the sequence
};

struct CellStepDirection {
  StepRows now, next;   // next: the step that the states go to
  bool truncated;       // no tangent of a state goes there
  const void* product;  // [B, gates of the part, H]  U h, or null: zero, or made here from weight_hh
  const void* bias_hh;  // [G*H] or null
  const void* h;        // [B, H] or null: zeros
  const void* c;  // [B, H] or null: zeros; LSTM, and z of a reset-before GRU between its parts; see `wide`
  void* h_next;   // [B, H], may be h; where a second product follows, its operand instead
  void* c_next;   // [B, H], may be c
  void* saved;    // [rows, slots, H] as in RecurrentDirection, or null: not wanted
};

// The tensors of a step; or their tangents.
struct CellStepTensors {
  CellStepDirection direction[2];
  const void* pre;  // [rows, D, G, H]  W x + b_ih
  SequenceTensor<void*>
      output;  // [T, B, D*H], feature stride 1, or null: not wanted, or h_next is an operand
};

struct CellStepArgs : CellStepTensors {
  CellKind cell;
  DType dtype;
  StepPart part;
  bool packed;
  bool
      wide;  // c and c_next are float, or double of float64: over many steps, what is rounded each time drifts
  bool saves_states;  // these as in RecurrentLoopArgs
  const int64_t* lengths;
  const uint8_t* resets;
  int64_t hidden_size;
  int directions;
  const void* weight_hh;  // [G*H, H] or null; a whole step of one direction and at most kMostFusedRows rows
  int device;
  void* stream;
};
constexpr int kMostFusedRows = 8;

// A step over dual numbers. Of `tangents` only addresses and strides are read; null is zeros, or not wanted.
struct CellStepDualArgs : CellStepArgs {
  CellStepTensors tangents;
  // Elements between rows of product, h and h_next, of both planes, are so many rows' worth: a product of dual numbers
  // may have rows of numbers and of tangents in turn.
  int row_step;
  // Where U has a tangent, of each direction: [B, gates of the part, H]  U' h, which belongs to the tangent of product,
  // and [B, H] where h_next is left once more, for a third product to read; else null.
  const void* product_of_weight_tangent[2];
  void* h_next_again[2];
};

// The gradients of a step.
struct CellGradDirection {
  StepRows now, before;  // before: the step that the states came from
  bool truncated;        // no gradient of a state goes there
  const void* saved;     // [rows, slots, H]
  const void* h0;        // [B, H] or null: zeros; of rows without a step before, like c0
  const void* c0;        // [B, H] or null: zeros; LSTM
  const void* grad;      // [B, H] or null: zeros; dh is this, the product, and the gradient of the output
  const void* product;  // [B, H] or null: zeros; what a product made of the step after, or of the part before
  const void* grad_c;   // [B, H] or null: zeros; LSTM
  // [B, G, H] gradient of U h + b, which the caller multiplies by U; [B, H] dh of a projected LSTM's first part. Rows
  // that only the other direction has in this step become zero, and where no gradient crosses what U multiplies.
  void* grad_product;
  // [B, H] the part of dh that does not pass through U, may be grad; a rest adds to it. Null where dh is another
  // part's. Rows that only the other direction has keep all of dh in it.
  void* direct;
  void* grad_c_previous;  // [B, H], may be grad_c; LSTM
  void* previous;         // these three as in LoopDirection, each null: not wanted
  void* grad_candidate;
  void* grad_hidden;
  void* operand;  // [rows, H] of the second product, again, or null: not wanted
};

// The tensors of a step's gradients; or their tangents.
struct CellGradTensors {
  CellGradDirection direction[2];
  void* grad_pre;                           // [rows, D, G, H]
  SequenceTensor<const void*> output;       // [T, B, D*H], feature stride 1
  SequenceTensor<const void*> grad_output;  // [T, B, D*H] or null: zeros
};

struct CellGradArgs : CellGradTensors {
  CellKind cell;
  DType dtype;
  StepPart part;
  bool packed;
  bool wide;               // grad, grad_c, direct and grad_c_previous are float, or double of float64
  const int64_t* lengths;  // these as in RecurrentLoopArgs
  const uint8_t* resets;
  double grad_clip;  // of `grad` and what is added to it, where there is one, and of grad_c
  int64_t hidden_size;
  int directions;
  int device;
  void* stream;
};

// The same over dual numbers: see CellStepDualArgs. row_step is that of product and grad_product.
struct CellGradDualArgs : CellGradArgs {
  CellGradTensors tangents;
  int row_step;
  const void* product_of_weight_tangent[2];  // [B, H]
  void* grad_product_again[2];               // like grad_product
};

}  // namespace fastseq
