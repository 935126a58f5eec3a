// One kernel for each primitive that computes something, so that tests can compare it with numpy and torch.
// Addresses of arrays are the caller's; each returns what launch() returns.
#pragma once

#include <cstdint>
#include <string>

namespace fastseq::FASTSEQ_ISA {

// One warp, operands as its lanes hold them: a [32][4] and b [32][2] words, d [32][4], read and written.
// type: "bfloat16", "float16", "tf32".
const char* run_mma(const std::string& type, const uint32_t* a, const uint32_t* b, float* d);

// The same of doubles: a [32][4], b [32][2], d [32][4].
const char* run_mma_double(const double* a, const double* b, double* d);

// rows [32][4] words, brought to shared memory by copy_async; r [32][4].
const char* run_load_matrices(const uint32_t* rows, uint32_t* r, bool transposed);

// from, to [32][16] bytes: of row l the first l % 17, and zeros.
const char* run_copy_or_zero(const unsigned char* from, unsigned char* to);

// any_in_warp() and any_in_block() of 96 threads, of which in each round one, or none, says yes; result [rounds][96] of
// bits, the warp's 1, the block's 2.
const char* run_any(int rounds, uint8_t* result);

// value, result [32] of 4 or 8 bytes.
const char* run_shuffle_xor(int bytes, int mask, const void* value, void* result);

// Number by number. function: "widen_bfloat16", "widen_float16" (16 bits to float), "narrow_bfloat16",
// "narrow_float16" (float to 16 bits), "round_to_tf32", "exp2", "sigmoid", "tanh", "relu" (float to float).
const char* run_numbers(const std::string& function, int64_t count, const void* from, void* to);

// `count` times one collective in each warp of each block: "sync_warp", "shuffle_xor", "load_matrices",
// "mma_bfloat16", "mma_float16", "mma_tf32", "sync_block", "cluster". For timing.
const char* run_collective(const std::string& name, int count, int64_t blocks, int threads, bool together);

// A kernel of at most 256 threads that does nothing, in any shape.
const char* run_nothing(int64_t blocks, int threads, size_t shared_bytes, int cluster, bool together);

}  // namespace fastseq::FASTSEQ_ISA
