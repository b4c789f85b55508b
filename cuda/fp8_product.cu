// The product of 8-bit rows and weights with what follows it, in one kernel.
//
// A block makes 128 rows by 256 weight rows. One warp copies tiles to shared memory by the bulk copy engine, two
// warpgroups multiply: 64 rows each. A gated product takes 128 rows of gate and the 128 of up that belong to them, so
// that both values of an output are in the same thread. Blocks stay and walk over the tiles of all groups. Each warp
// hands its outputs to the copy engine, row by row, which stores them (or adds them to what is there) while the next
// tile is under way.
#include <cuda_bf16.h>

#include "activation.cuh"
#include "check.h"
#include "fp8.h"
#include "overlap.cuh"
#include "tensor_tiles.cuh"
#include "types.cuh"

namespace armt::cuda {
namespace {

constexpr int kRows = 128, kHalf = 128, kDepth = 128, kStages = 4;
constexpr int kInBytes = kRows * kDepth, kWeightBytes = 2 * kHalf * kDepth;
constexpr int kStageBytes = kInBytes + kWeightBytes;
constexpr int kThreads = 384, kWarps = 8;  // warps that multiply
// Outputs of a warp on their way out: 16 rows of 128, apart so that matrices of 8 x 8 meet no bank twice.
constexpr int kOutRow = kHalf * 2 + 16, kOutBytes = 16 * kOutRow;
constexpr int kOutAt = kStages * kStageBytes, kBarriersAt = kOutAt + kWarps * kOutBytes;
constexpr int kSharedBytes = kBarriersAt + 2 * kStages * static_cast<int>(sizeof(uint64_t));

enum class Mode : uint8_t { plain, add, activate, gated };

struct Fp8Args {
  const DevGroup* groups = nullptr;
  const float* in_scale = nullptr;
  const float* weight_scale = nullptr;
  const __nv_bfloat16* bias = nullptr;
  View out;
  int group_count = 0, row_tiles = 0, col_tiles = 0, steps = 0;
  int layer_rows = 0, first = 0, cols = 0;
  int tile_cols = 0, second = 0;  // outputs of a tile; weight rows from its first half to its second
  ActivationKind kind = ActivationKind::silu;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// d [64, 256] = a [64, 32] b [256, 32]^T (+ d if `keep`)
__device__ inline void multiply(float (&d)[128], uint64_t a, uint64_t b, int keep) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
      "}, %128, %129, p, 1, 1;\n"
      "}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
        "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),
        "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),
        "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), "+f"(d[64]),
        "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), "+f"(d[72]),
        "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]),
        "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]),
        "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), "+f"(d[96]),
        "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), "+f"(d[104]),
        "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), "+f"(d[112]),
        "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), "+f"(d[120]),
        "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
      : "l"(a), "l"(b), "r"(keep));
}

struct Tile {
  DevGroup group;
  int row, col;  // first of the tile, within the group and the outputs
  __device__ Tile(const Fp8Args& args, int index) {
    const int each = args.row_tiles * args.col_tiles;
    group = args.groups[index / each];
    row = index % each % args.row_tiles * kRows;
    col = index % each / args.row_tiles * args.tile_cols;
  }
};

// Copies the tiles of this block's products, one step of the depth after another.
__device__ inline void load_tiles(const CUtensorMap& in, const CUtensorMap& weight, const Fp8Args& args, int tiles,
                                  unsigned char* stages, uint64_t* filled, uint64_t* emptied) {
  int step = 0;
  for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile tile(args, index);
    if (tile.row >= tile.group.rows) continue;
    const int in_row = static_cast<int>(tile.group.scratch) + tile.row;
    const int weight_row = tile.group.stack * args.layer_rows + args.first + tile.col;
    for (int k = 0; k < args.steps; ++k, ++step) {
      const int s = step % kStages;
      wait_for(emptied[s], (step / kStages & 1) ^ 1);
      expect_bytes(filled[s], kStageBytes);
      unsigned char* to = stages + s * kStageBytes;
      copy_tile(to, in, k * kDepth, in_row, filled[s]);
      copy_tile(to + kInBytes, weight, k * kDepth, weight_row, filled[s]);
      copy_tile(to + kInBytes + kWeightBytes / 2, weight, k * kDepth, weight_row + args.second, filled[s]);
    }
  }
}

__device__ inline float2 pair_at(const float* values, int64_t index) {
  return *reinterpret_cast<const float2*>(values + index);
}

__device__ inline float2 widened(uint32_t pair) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}

__device__ inline float fast_tanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// `usual`: the activation that most models have, to the 11 bits that tanh.approx keeps.
template <Mode mode, bool usual>
__device__ inline float active(const Fp8Args& args, float x) {
  if constexpr (mode == Mode::gated && usual) return 0.5f * x * (1.0f + fast_tanh(0.5f * x));
  if constexpr (mode == Mode::activate && usual) {
    return 0.5f * x * (1.0f + fast_tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
  }
  return activated(args.kind, x);
}

// Copies by the bulk engine from shared memory, in the order of the thread's groups.
template <bool add>
__device__ inline void store_bulk(void* to, const void* shared, int bytes) {
  if constexpr (add) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.bf16 [%0], [%1], %2;" ::"l"(to),
                 "r"(shared_address(shared)), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(shared)),
                 "r"(bytes)
                 : "memory");
  }
}
__device__ inline void end_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
__device__ inline void wait_until_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ inline void wait_until_stored() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Four matrices of 8 x 8: two below one another, then the two to their right.
__device__ inline void store_matrices(void* shared, const uint32_t (&word)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared)),
               "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
               : "memory");
}

// The 64 x 256 sums of one warpgroup; this warp's 16 rows begin at `first` of the group.
template <Mode mode, bool usual>
__device__ inline void store_tile(const Fp8Args& args, const Tile& tile, int first, const float (&d)[128],
                                  unsigned char* out) {
  constexpr bool gated = mode == Mode::gated;
  const int lane = threadIdx.x % 32, pair = lane % 4 * 2;
  const int64_t channel = static_cast<int64_t>(tile.group.stack) * args.layer_rows + args.first + tile.col + pair;
  float scale[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = first + lane / 4 + half * 8;
    scale[half] = r < tile.group.rows ? args.in_scale[tile.group.scratch + r] : 0.0f;
  }
  const int my_row = first + lane;
  const bool stores = lane < 16 && my_row < tile.group.rows;
  __nv_bfloat16* to = row_of<__nv_bfloat16>(args.out, tile.group, my_row) + args.first + tile.col;
#pragma unroll
  for (int pass = 0; pass < (gated ? 1 : 2); ++pass) {
    const int width = min(kHalf, args.cols - tile.col - pass * kHalf);
    if (width <= 0) break;
    if (lane < 16) wait_until_read();
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kHalf / 8; j += 2) {
      uint32_t word[4];
#pragma unroll
      for (int next = 0; next < 2; ++next) {
        const int col = (j + next) * 8, at = 4 * (16 * pass + j + next);
        const int64_t here = channel + pass * kHalf + col;
        const bool inside = col + pair < width;
        float2 w = {}, u = {}, bias = {};
        if (inside) w = pair_at(args.weight_scale, here);
        if (gated && inside) u = pair_at(args.weight_scale, here + args.second);
        if (args.bias != nullptr && inside) bias = widened(*reinterpret_cast<const uint32_t*>(args.bias + here));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float s = scale[half];
          float x = fmaf(d[at + 2 * half], s * w.x, bias.x), y = fmaf(d[at + 2 * half + 1], s * w.y, bias.y);
          if constexpr (gated || mode == Mode::activate) {
            x = active<mode, usual>(args, x);
            y = active<mode, usual>(args, y);
          }
          if constexpr (gated) {
            x *= d[64 + at + 2 * half] * (s * u.x);
            y *= d[64 + at + 2 * half + 1] * (s * u.y);
          }
          word[2 * next + half] = pack_pair<__nv_bfloat16>(x, y);
        }
      }
      store_matrices(out + lane % 16 * kOutRow + (j + lane / 16) * 16, word);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
    if (stores) store_bulk<mode == Mode::add>(to + pass * kHalf, out + lane * kOutRow, width * 2);
    if (lane < 16) end_stores();
  }
}

#endif

template <Mode mode, bool usual>
__global__ void __launch_bounds__(kThreads, 1)
    fp8_kernel(const __grid_constant__ CUtensorMap in, const __grid_constant__ CUtensorMap weight, Fp8Args args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char stages[];
  auto* filled = reinterpret_cast<uint64_t*>(stages + kBarriersAt);
  uint64_t* emptied = filled + kStages;
  if (threadIdx.x == 0) {
    if (shared_address(stages) % 1024 != 0) __trap();  // nothing else lies in shared memory
    for (int s = 0; s < kStages; ++s) {
      init_barrier(filled[s], 1);
      init_barrier(emptied[s], kWarps);
    }
    publish_barriers();
  }
  let_next_kernel_start();
  wait_for_kernel_before();
  __syncthreads();
  const int tiles = args.group_count * args.row_tiles * args.col_tiles;
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) load_tiles(in, weight, args, tiles, stages, filled, emptied);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int mine = warpgroup - 1;
    const bool speaks = threadIdx.x % 32 == 0;
    int step = 0;
    for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
      const Tile tile(args, index);
      if (tile.row >= tile.group.rows) continue;
      float d[128];
      for (int k = 0; k < args.steps; ++k, ++step) {
        const int s = step % kStages;
        wait_for(filled[s], step / kStages & 1);
        const unsigned char* from = stages + s * kStageBytes;
        const uint64_t a = tile_descriptor(from + mine * kInBytes / 2), b = tile_descriptor(from + kInBytes);
        fence_products();
#pragma unroll
        for (int part = 0; part < kDepth / 32; ++part) multiply(d, a + 2 * part, b + 2 * part, k > 0 || part > 0);
        commit_products();
        wait_products<1>();
        // All but this step's products are done: the stage before may be filled again.
        if (k > 0 && speaks) arrive(emptied[(step - 1) % kStages]);
      }
      wait_products<0>();
      if (speaks) arrive(emptied[(step - 1) % kStages]);
      const int warp = threadIdx.x / 32 - 4;
      store_tile<mode, usual>(args, tile, tile.row + warp * 16, d, stages + kOutAt + warp * kOutBytes);
    }
    if (threadIdx.x % 32 < 16) wait_until_stored();
  }
#endif
}

template <class Body>
void with_kernel(Mode mode, bool usual, const Body& body) {
  switch (mode) {
    case Mode::plain:
      return body(fp8_kernel<Mode::plain, true>);
    case Mode::add:
      return body(fp8_kernel<Mode::add, true>);
    case Mode::activate:
      return usual ? body(fp8_kernel<Mode::activate, true>) : body(fp8_kernel<Mode::activate, false>);
    case Mode::gated:
      return usual ? body(fp8_kernel<Mode::gated, true>) : body(fp8_kernel<Mode::gated, false>);
  }
}

Mode mode_of(const Fp8Product& product) {
  if (product.epilogue == Epilogue::add) return Mode::add;
  if (product.epilogue == Epilogue::none) return Mode::plain;
  return product.gated ? Mode::gated : Mode::activate;
}

}  // namespace

bool can_multiply_fp8() {
  bool all = true;
  for (const Mode mode : {Mode::plain, Mode::add, Mode::activate, Mode::gated}) {
    for (const bool usual : {false, true}) {
      with_kernel(mode, usual, [&](auto kernel) {
        const bool runs = has_hopper_code(reinterpret_cast<const void*>(kernel));
        all = all && runs;
        if (!runs) return;
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
              "cudaFuncSetAttribute");
      });
    }
  }
  return all;
}

bool fp8_fits(const Fp8Product& product) {
  // Rows of outputs are copied in pieces of 16 bytes.
  const bool whole = product.first % 8 == 0 && product.cols % 8 == 0 && product.layer_rows % 8 == 0;
  return quantises(product.depth) && whole && !(product.gated && product.bias != nullptr);
}

void launch_fp8_product(const Fp8Product& product, const Batch& batch, int processors, cudaStream_t stream) {
  const Mode mode = mode_of(product);
  Fp8Args args;
  args.groups = batch.groups;
  args.in_scale = product.in_scale;
  args.weight_scale = product.weight_scale;
  args.bias = static_cast<const __nv_bfloat16*>(product.bias);
  args.out = product.out;
  args.group_count = batch.group_count;
  args.tile_cols = mode == Mode::gated ? kHalf : 2 * kHalf;
  args.second = mode == Mode::gated ? static_cast<int>(product.cols) : kHalf;
  args.row_tiles = static_cast<int>(ceil_div(batch.max_group_rows, kRows));
  args.col_tiles = static_cast<int>(ceil_div(product.cols, args.tile_cols));
  args.steps = static_cast<int>(ceil_div(product.depth, kDepth));
  args.layer_rows = static_cast<int>(product.layer_rows);
  args.first = static_cast<int>(product.first);
  args.cols = static_cast<int>(product.cols);
  args.kind = product.kind;
  const CUtensorMap in = tiles_of(product.in, product.in_rows, product.depth, 1, kRows);
  const CUtensorMap weight = tiles_of(product.weight, product.weight_rows, product.depth, 1, kHalf);
  const bool usual = product.kind == (product.gated ? ActivationKind::silu : ActivationKind::gelu_tanh);
  with_kernel(mode, usual, [&](auto kernel) {
    launch_overlapped(kernel, dim3(processors), dim3(kThreads), kSharedBytes, stream, in, weight, args);
  });
  check_launch("8-bit product");
}

}  // namespace armt::cuda
