// What the two prim_hopper.h, of the GPU and of its host twin, have in common: how tiles and the operands of products
// lie in shared memory. Plain C++; prim_hopper.h includes it after shared_address().
//
// A tile is [rows][64] elements of 16 bits, as load_tile() leaves it: rows of 128 bytes, one below the other, at a
// multiple of 1024 bytes, with the 128-byte swizzle: the 16-byte chunk c of row r lies at chunk c ^ r % 8 of the row.
// In other words, bits 4 to 6 of the address are XORed with bits 7 to 9. A matrix with more than 64 columns is several
// tiles of the same rows, one after the other.
//
// An operand of wgmma() is 64 x 16 (A) or 16 x N (B), and is told by a descriptor. From the PTX ISA, "Asynchronous
// warpgroup level matrix shared memory layout" (canonical layouts, strides, matrix descriptor):
//   bits 0-13    start address >> 4                (addresses have 18 bits)
//   bits 16-29   leading dimension byte offset >> 4
//   bits 32-45   stride dimension byte offset >> 4
//   bits 49-51   base offset: 0 where the pattern begins at a multiple of 1024 bytes
//   bits 62-63   1: the 128-byte swizzle
// With that swizzle, element (mn, k), where mn counts rows of A or columns of B, is at
//   Major::k     start + mn % 8 * 128 + mn / 8 * stride + k * 2                the leading offset is not looked at
//   Major::mn    start + mn % 64 * 2 + mn / 64 * leading + k % 8 * 128 + k / 8 * stride
// and of that sum bits 4 to 6 are XORed with bits 7 to 9. So in tiles
//   Major::k     mn goes down the rows and k along them (K in Q K^T): stride is 8 rows, 1024 bytes; the next 16 k
//                are 32 bytes further on, and after four of those in the next tile
//   Major::mn    k goes down the rows and mn along them (V in P V): stride is 8 rows, 1024 bytes; leading is a tile,
//                its rows * 128 bytes; the next 16 k are 16 rows, 2048 bytes, further on
#pragma once

#include <cstdint>

#include "portable.h"

namespace fastseq::FASTSEQ_ISA {

constexpr int kWarpgroup = 128;  // threads, whose first is a multiple of it
constexpr int kTileAlignment = 1024;
constexpr int kTileColumns = 64, kTileRowBytes = 128;

// Where element (row, column) of a tile lies, in bytes from its beginning.
FS_DEVICE constexpr int tile_offset(int row, int column) {
  return row * kTileRowBytes | (column >> 3 ^ (row & 7)) << 4 | (column & 7) << 1;
}

enum class Major { k, mn };

// The operand that begins at `first`, with these byte offsets; multiples of 16 below 2^18.
FS_DEVICE uint64_t operand(const void* first, int leading, int stride) {
  return uint64_t(1) << 62 | uint64_t(stride >> 4) << 32 | uint64_t(leading >> 4) << 16 |
         (shared_address(first) & 0x3ffff) >> 4;
}
// That of the first 16 k of tiles of `rows` rows, and of 16 k from 16 * step on: one addition, where step is known to
// the compiler.
template <Major kMajor>
FS_DEVICE uint64_t operand_of_tiles(const void* tiles, int rows) {
  return operand(tiles, kMajor == Major::k ? 16 : rows * kTileRowBytes, 1024);
}
template <Major kMajor>
FS_DEVICE uint64_t at_step(uint64_t operand, int rows, int step) {
  const int offset = kMajor == Major::k ? (step >> 2) * rows * kTileRowBytes + (step & 3) * 32 : step * 2048;
  return (operand & ~uint64_t(0xffffffff)) |
         uint32_t(uint32_t(operand) + (offset >> 4));  // within the 14 bits
}

// Which lane holds what of d[64 x N] (PTX ISA, "Register fragments"): lane l of warp w of the warpgroup
//   d[i]   row 16 w + l / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (l % 4) + i % 2
// and of a[64 x 16], two elements of 16 bits in a word, the lower one first
//   a[i]   row 16 w + l / 4 + 8 (i % 2), columns 2 (l % 4) + 8 (i / 2) and the next
// so that a thread's d[8 s ... 8 s + 7], rounded, are its a[0 ... 3] of columns 16 s to 16 s + 15.
FS_DEVICE int row_of_accumulator(int thread, int i) {
  return (thread & 96) / 2 + (thread & 28) / 4 + i / 2 % 2 * 8;
}
FS_DEVICE int column_of_accumulator(int thread, int i) { return i / 4 * 8 + (thread & 3) * 2 + i % 2; }

// What is asked of the second-level cache: to keep what will be read again, to drop what will not.
enum class Keep { normal, first_to_go, last_to_go };

}  // namespace fastseq::FASTSEQ_ISA
