// Boxes of tensors, and what is stored by the tensor memory accelerator.
#include <algorithm>

#include "../cuda/tensor_map.h"
#include "hopper.h"

namespace fastseq::FASTSEQ_ISA {

const char* make_tensor_map(TensorMap& map, const TiledTensor& t) {
  static thread_local std::string error;
  error = unfit(t);
  if (!error.empty()) return error.c_str();
  map = {};
  map.base = static_cast<unsigned char*>(const_cast<void*>(t.base));
  map.rank = t.rank;
  for (int i = 0; i < 5; ++i) {
    map.size[i] = i < t.rank ? t.size[i] : 1, map.box[i] = i < t.rank ? t.box[i] : 1;
    if (i > 0 && i < t.rank && t.size[i] > 1) map.stride[i - 1] = t.stride[i];
  }
  return nullptr;
}

namespace {

// visit(row in shared memory, row in global memory or null, first column, columns there are) for each row of a box.
template <class Visit>
void for_rows(const TensorMap& map, const int* at, Visit visit) {
  int x[5] = {};
  int rows = 1;
  for (int i = 1; i < 5; ++i) rows *= map.box[i];
  for (int row = 0; row < rows; ++row) {
    unsigned char* global = map.base;
    for (int i = 1, left = row; i < 5; ++i) {
      x[i] = left % map.box[i], left /= map.box[i];
      const int64_t index = (i < map.rank ? at[i] : 0) + int64_t(x[i]);
      if (index < 0 || index >= map.size[i]) global = nullptr;
      if (global) global += index * map.stride[i - 1];
    }
    const int64_t first = std::max<int64_t>(0, -int64_t(at[0]));
    const int64_t last = std::min<int64_t>(kTileColumns, map.size[0] - at[0]);
    visit(row, global && last > first ? global + (at[0] + first) * 2 : nullptr, int(first),
          int(last - first));
  }
}

}  // namespace

size_t box_bytes(const TensorMap& map) {
  size_t bytes = kTileRowBytes;
  for (int i = 1; i < 5; ++i) bytes *= size_t(map.box[i]);
  return bytes;
}

// The box begins at a multiple of 1024 bytes, so that a row's number tells bits 7 to 9 of its address.
void gather_box(const TensorMap& map, const int* at, unsigned char* to) {
  std::memset(to, 0, box_bytes(map));
  for_rows(map, at, [&](int row, const unsigned char* global, int first, int count) {
    for (int i = 0; global && i < count; ++i)
      std::memcpy(to + tile_offset(row, first + i), global + 2 * i, 2);
  });
}

void scatter_box(const TensorMap& map, const int* at, const unsigned char* from) {
  for_rows(map, at, [&](int row, unsigned char* global, int first, int count) {
    for (int i = 0; global && i < count; ++i) {
      std::memcpy(global + 2 * i, from + tile_offset(row, first + i), 2);
    }
  });
}

// ---- stores ----

namespace {

Stores& own_stores() {
  std::vector<Stores>& all = hopper().stores;
  if (all.empty()) all.resize(who->threads);
  return all[who->thread];
}

void read(Store& store) {
  if (!store.bytes.empty()) return;
  store.bytes.resize(store.count);
  read_asynchronously(store.bytes.data(), store.from, store.count);
}

void write(Store& store) {
  if (store.is_written) return;
  read(store);
  store.is_written = true;
  if (!store.sums) return scatter_box(store.map, store.at, store.bytes.data());
  for (size_t i = 0; i < store.count / sizeof(float); ++i) {
    float x;
    std::memcpy(&x, &store.bytes[i * sizeof x], sizeof x);
    store.sums[i] += x;
  }
}

// At once, or when it has to.
void begin(Store store) {
  Stores& stores = own_stores();
  store.group = stores.group;
  if (coin()) read(store);
  if (!store.bytes.empty() && coin()) write(store);
  stores.under_way.push_back(std::move(store));
}

}  // namespace

void store_tile_at(const TensorMap& map, const void* from, const int* at, int rank) {
  check_alignment(from, kTileAlignment, "store_tile");
  check_own_shared(from, box_bytes(map), "store_tile");
  if (rank != map.rank) {
    fail("store_tile is given " + std::to_string(rank) + " coordinates for a tensor of " +
         std::to_string(map.rank) + " dimensions\n" + place(current()));
  }
  Store store = {};
  store.map = map, store.from = static_cast<const unsigned char*>(from), store.count = box_bytes(map);
  std::copy(at, at + rank, store.at);
  begin(std::move(store));
}

void reduce_add(float* to, const float* from, int bytes) {
  check_alignment(to, 16, "reduce_add");
  check_alignment(from, 16, "reduce_add");
  if (bytes < 16 || bytes % 16 != 0) {
    fail("reduce_add is given " + std::to_string(bytes) + " bytes\naccepted is a multiple of 16");
  }
  check_own_shared(from, size_t(bytes), "reduce_add");
  Store store = {};
  store.sums = to, store.from = reinterpret_cast<const unsigned char*>(from), store.count = size_t(bytes);
  begin(std::move(store));
}

void stores_commit() { ++own_stores().group; }

void stores_wait_for(int pending, bool written) {
  Stores& stores = own_stores();
  for (Store& store : stores.under_way) {
    if (store.group + pending >= stores.group) break;
    read(store);
    store.from = nullptr;  // it has been waited for
    if (written) write(store);
  }
  const auto done = [](const Store& s) { return !s.from && s.is_written; };
  auto& all = stores.under_way;
  all.erase(std::remove_if(all.begin(), all.end(), done), all.end());
}

// What has been read is written some time, whoever waits.
void hopper_thread_exits() {
  if (hopper().stores.empty()) return;
  for (Store& store : own_stores().under_way) {
    if (store.from) {
      fail("a thread exited while a store of its was under way\n" + place(current()) +
           ", which commits and waits (stores_wait_read) before that");
    }
    write(store);
  }
}

}  // namespace fastseq::FASTSEQ_ISA
