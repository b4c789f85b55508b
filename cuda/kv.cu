// The cache of keys and values. A page holds kv_page_rows() rows of one layer of one stream:
// keys [Hkv, page rows, c padded to 8], then values likewise, in the weights' type; padding is zero. kv_at()
// (types.cuh) tells the order within a head's part.
#include <vector>

#include "check.h"
#include "kernels.h"
#include "overlap.cuh"
#include "types.cuh"
#include "workspace.h"

namespace armt::cuda {
namespace {

constexpr int kWarps = 4;

struct KvShape {
  int heads = 0, head_dim = 0, row = 0;  // row: elements of one head's key in a page
  int page_rows = 0;
  int query_width = 0;
  int half = 0;  // rotary_dims / 2
  float eps = 0.0f;
};

// A warp moves one head's key or value of one row.  key: x / rms(x) * w if normed, then the rotation
// (x_i, x_{i+half}) <- (x_i cos - x_{i+half} sin, x_{i+half} cos + x_i sin), i < half.
template <class T>
__global__ void store_kernel(Batch batch, View qkv, KvShape shape, const float* k_norm, const float2* angles) {
  const DevGroup& group = batch.groups[blockIdx.y];
  const int64_t r = blockIdx.x;
  if (r >= group.rows) return;
  const DevCell& cell = cell_of(batch, group, r);
  const DevRow& row = batch.rows[group.row + r];
  const int index = cell.kv_begin + static_cast<int>(group.row + r - cell.row);
  T* page = reinterpret_cast<T*>(const_cast<char*>(cell.cur_pages[index / shape.page_rows]));
  const int in_page = index % shape.page_rows;
  const T* heads = row_of<T>(qkv, group, r) + shape.query_width;
  const int lane = threadIdx.x % 32;
  for (int h = threadIdx.x / 32; h < 2 * shape.heads; h += kWarps) {
    const T* in = heads + static_cast<int64_t>(h) * shape.head_dim;
    T* part = page + static_cast<int64_t>(h) * shape.page_rows * shape.row;
    const auto out = [&](int i) -> T& { return part[kv_at(in_page, i, shape.row, shape.page_rows)]; };
    if (h >= shape.heads) {
      for (int i = lane; i < shape.row; i += 32) out(i) = i < shape.head_dim ? in[i] : from_float<T>(0.0f);
      continue;
    }
    const float* weight = k_norm != nullptr ? k_norm + static_cast<int64_t>(group.stack) * shape.head_dim : nullptr;
    float scale = 1.0f;
    if (weight != nullptr) {
      float squares = 0.0f;
      for (int i = lane; i < shape.head_dim; i += 32) squares += to_float(in[i]) * to_float(in[i]);
      scale = rsqrtf(warp_sum(squares) / static_cast<float>(shape.head_dim) + shape.eps);
    }
    const auto value = [&](int i) { return to_float(in[i]) * (weight != nullptr ? scale * weight[i] : 1.0f); };
    const float2* turns = angles + static_cast<int64_t>(row.angle) * shape.half;
    for (int i = lane; i < shape.row; i += 32) {
      float x = i < shape.head_dim ? value(i) : 0.0f;
      if (i < shape.half) {
        x = x * turns[i].x - value(i + shape.half) * turns[i].y;
      } else if (i < 2 * shape.half) {
        x = x * turns[i - shape.half].x + value(i - shape.half) * turns[i - shape.half].y;
      }
      out(i) = from_float<T>(x);
    }
  }
}

// Whether store_packs() can: heads are whole packs, and a head's packs lie in one warp where they are normed together.
template <class T>
bool stores_packs(const KvShape& shape, bool normed) {
  constexpr int kCount = Pack<T>::kCount;
  const int packs = shape.head_dim / kCount;
  return shape.head_dim % kCount == 0 && shape.row == shape.head_dim && shape.half % kCount == 0 &&
         shape.query_width % kCount == 0 && (!normed || (packs <= 32 && (packs & (packs - 1)) == 0));
}

// The same, 16 bytes of a key and of the value beside it a thread. grid: packs of all rows, groups
template <class T>
__global__ void store_packs(Batch batch, View qkv, KvShape shape, const float* k_norm, const float2* angles) {
  let_next_kernel_start();
  wait_for_kernel_before();
  constexpr int kCount = Pack<T>::kCount;
  const DevGroup& group = batch.groups[blockIdx.y];
  if (group.rows == 0) return;
  const int packs = shape.head_dim / kCount, row_packs = shape.heads * packs;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  // Threads past the end stay for the warp's sums.
  const bool there = index < static_cast<int64_t>(group.rows) * row_packs;
  const int64_t r = there ? index / row_packs : 0;
  const int part = there ? static_cast<int>(index % row_packs) : 0;
  const int h = part / packs, i = part % packs * kCount;
  const int64_t values = static_cast<int64_t>(shape.heads) * shape.head_dim;
  const T* in = row_of<T>(qkv, group, r) + shape.query_width + h * shape.head_dim;
  const Pack<T> key = *reinterpret_cast<const Pack<T>*>(in + i);
  const Pack<T> value = *reinterpret_cast<const Pack<T>*>(in + values + i);
  const bool turned = i < 2 * shape.half, lower = i < shape.half;
  const int other = lower ? i + shape.half : i - shape.half;
  Pack<T> partner = key;
  if (turned) partner = *reinterpret_cast<const Pack<T>*>(in + other);
  const DevRow& row = batch.rows[group.row + r];
  const DevCell& cell = batch.cells[group.cell_begin - batch.cell_begin + row.cell];
  const int place = cell.kv_begin + static_cast<int>(group.row + r - cell.row);
  T* page = reinterpret_cast<T*>(const_cast<char*>(cell.cur_pages[place / shape.page_rows]));
  T* out = page + static_cast<int64_t>(h) * shape.page_rows * shape.row +
           kv_at(place % shape.page_rows, i, shape.row, shape.page_rows);

  const float* weight = k_norm != nullptr ? k_norm + static_cast<int64_t>(group.stack) * shape.head_dim : nullptr;
  float scale = 1.0f;
  if (weight != nullptr) {
    float squares = 0.0f;
#pragma unroll
    for (int k = 0; k < kCount; ++k) squares += to_float(key.v[k]) * to_float(key.v[k]);
    for (int step = packs / 2; step > 0; step /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, step);
    scale = rsqrtf(squares / static_cast<float>(shape.head_dim) + shape.eps);
  }
  if (!there) return;
  *reinterpret_cast<Pack<T>*>(out + static_cast<int64_t>(shape.heads) * shape.page_rows * shape.row) = value;
  const auto normed = [&](T x, int at) { return to_float(x) * (weight != nullptr ? scale * weight[at] : 1.0f); };
  const float2* turns = angles + static_cast<int64_t>(row.angle) * shape.half + (lower ? i : other);
  Pack<T> result;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    float x = normed(key.v[k], i + k);
    if (turned) {
      const float2 turn = turns[k];
      const float y = normed(partner.v[k], other + k) * turn.y;
      x = x * turn.x + (lower ? -y : y);
    }
    result.v[k] = from_float<T>(x);
  }
  *reinterpret_cast<Pack<T>*>(out) = result;
}

// Rows of one page as float32 [rows, Hkv, c], or back.
template <class T, bool out>
__global__ void convert_page(T* page, float* keys, float* values, KvShape shape, int rows) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t count = static_cast<int64_t>(rows) * shape.heads * shape.row;
  if (i >= 2 * count) return;
  float* plain = i < count ? keys : values;
  const int64_t j = i % count;
  const int e = static_cast<int>(j % shape.row);
  const int64_t h = j / shape.row % shape.heads, r = j / shape.row / shape.heads;
  T& there = page[(i < count ? h : h + shape.heads) * shape.page_rows * shape.row +
                  kv_at(static_cast<int>(r), e, shape.row, shape.page_rows)];
  float* here = plain + (r * shape.heads + h) * shape.head_dim + e;
  if constexpr (out) {
    if (e < shape.head_dim) *here = to_float(there);
  } else {
    there = from_float<T>(e < shape.head_dim ? *here : 0.0f);
  }
}

KvShape shape_of(const ModelConfig& config, int64_t row, int64_t page_rows) {
  const DecoderConfig& decoder = config.decoder;
  return {.heads = static_cast<int>(decoder.n_kv_heads),
          .head_dim = static_cast<int>(decoder.head_dim),
          .row = static_cast<int>(row),
          .page_rows = static_cast<int>(page_rows),
          .query_width = static_cast<int>(config.query_width()),
          .half = static_cast<int>(decoder.rotary_dims / 2),
          .eps = static_cast<float>(decoder.norm_eps)};
}

}  // namespace

// One page holds a whole segment, so that keys lie in one piece.
int64_t CudaBackend::kv_page_rows() const {
  return (config_.memory.segment_size + config_.front_rows() + config_.memory.memory_tokens + 63) / 64 * 64;
}

int64_t CudaBackend::kv_page_bytes() const {
  return 2 * config_.decoder.n_kv_heads * kv_page_rows() * kv_row() * element();
}

void CudaBackend::store_kv(Groups groups, const Rows& qkv) {
  const Entry entry(*this);
  const Part part = part_of(groups);
  if (part.batch.max_group_rows == 0) return;
  if (active_.few && part.batch.max_cell_rows == 1) {
    active_.stores = true;
    return;
  }
  const KvShape shape = shape_of(config_, kv_row(), kv_page_rows());
  const float* k_norm = vectors_[static_cast<size_t>(Vector::k_norm)].as<float>();
  const auto group_count = static_cast<unsigned>(part.batch.group_count);
  const auto* angles = active_.workspace->angles.as<float2>();
  dispatch(dtype_, [&](auto type) {
    using T = typename decltype(type)::type;
    if (stores_packs<T>(shape, k_norm != nullptr)) {
      const int64_t packs = int64_t{part.batch.max_group_rows} * shape.heads * (shape.head_dim / Pack<T>::kCount);
      const dim3 grid(static_cast<unsigned>(ceil_div(packs, 256)), group_count);
      launch_overlapped(store_packs<T>, grid, dim3(256), 0, stream(), part.batch, view(qkv), shape, k_norm, angles);
    } else {
      const dim3 grid(part.batch.max_group_rows, group_count);
      store_kernel<T><<<grid, kWarps * 32, 0, stream()>>>(part.batch, view(qkv), shape, k_norm, angles);
    }
  });
  check_launch("store_kv");
}

void CudaBackend::export_kv(const KvCache& cache, float* k, float* v) {
  const Entry entry(*this);
  const KvShape shape = shape_of(config_, kv_row(), kv_page_rows());
  const int64_t width = config_.kv_width();
  if (cache.rows == 0) return;
  DeviceBuffer plain(arena_, 2 * cache.rows * width * 4);
  float* keys = plain.as<float>();
  float* values = keys + cache.rows * width;
  for (int64_t first = 0; first < cache.rows; first += shape.page_rows) {
    const auto rows = static_cast<int>(std::min<int64_t>(shape.page_rows, cache.rows - first));
    void* page = cache.pages[first / shape.page_rows]->block->data;
    dispatch(dtype_, [&](auto type) {
      using T = typename decltype(type)::type;
      const int64_t count = 2 * int64_t{rows} * shape.heads * shape.row;
      convert_page<T, true><<<static_cast<unsigned>(ceil_div(count, 256)), 256, 0, main_.stream>>>(
          static_cast<T*>(page), keys + first * width, values + first * width, shape, rows);
    });
    check_launch("export_kv");
  }
  const auto bytes = static_cast<size_t>(cache.rows * width * 4);
  check(cudaMemcpyAsync(k, keys, bytes, cudaMemcpyDeviceToHost, main_.stream), "cudaMemcpyAsync");
  check(cudaMemcpyAsync(v, values, bytes, cudaMemcpyDeviceToHost, main_.stream), "cudaMemcpyAsync");
  check(cudaStreamSynchronize(main_.stream), "export_kv");
}

void CudaBackend::import_kv(KvCache& cache, const float* k, const float* v) {
  const Entry entry(*this);
  const KvShape shape = shape_of(config_, kv_row(), kv_page_rows());
  const int64_t width = config_.kv_width();
  if (cache.rows == 0) return;
  DeviceBuffer plain(arena_, 2 * cache.rows * width * 4);
  float* keys = plain.as<float>();
  float* values = keys + cache.rows * width;
  const auto bytes = static_cast<size_t>(cache.rows * width * 4);
  check(cudaMemcpyAsync(keys, k, bytes, cudaMemcpyHostToDevice, main_.stream), "cudaMemcpyAsync");
  check(cudaMemcpyAsync(values, v, bytes, cudaMemcpyHostToDevice, main_.stream), "cudaMemcpyAsync");
  for (int64_t first = 0; first < cache.rows; first += shape.page_rows) {
    const auto rows = static_cast<int>(std::min<int64_t>(shape.page_rows, cache.rows - first));
    void* page = cache.pages[first / shape.page_rows]->block->data;
    dispatch(dtype_, [&](auto type) {
      using T = typename decltype(type)::type;
      const int64_t count = 2 * int64_t{rows} * shape.heads * shape.row;
      convert_page<T, false><<<static_cast<unsigned>(ceil_div(count, 256)), 256, 0, main_.stream>>>(
          static_cast<T*>(page), keys + first * width, values + first * width, shape, rows);
    });
    check_launch("import_kv");
  }
  check(cudaStreamSynchronize(main_.stream), "import_kv");
}

}  // namespace armt::cuda
