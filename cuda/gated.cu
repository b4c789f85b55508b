// The gated MLP's first product and its activation in one kernel, for Hopper GPUs and bfloat16:
//   out = act(x W_gate^T) * (x W_up^T)
// A block makes 128 rows by 128 columns of the output. One warp copies tiles to shared memory by the bulk copy engine,
// two warpgroups multiply: 64 rows by 256 columns each, gate and up side by side, so that both values of an output are
// in the same thread. Blocks stay and walk over the tiles of all groups.
#include <cuda_runtime.h>

#include "activation.cuh"
#include "check.h"
#include "gated.h"
#include "tensor_tiles.cuh"
#include "types.cuh"

namespace armt::cuda {
namespace {

constexpr int kRows = 128, kCols = 128, kDepth = 64, kStages = 4;
constexpr int kInBytes = kRows * kDepth * 2, kWeightBytes = 2 * kCols * kDepth * 2;
constexpr int kStageBytes = kInBytes + kWeightBytes;
constexpr int kSharedBytes = kStages * kStageBytes + 1024;  // stages begin at a multiple of 1024
constexpr int kThreads = 384;

struct GatedArgs {
  const DevGroup* groups = nullptr;
  int group_count = 0, row_tiles = 0, col_tiles = 0, steps = 0;
  int d_ff = 0;
  __nv_bfloat16* out = nullptr;
  ActivationKind kind = ActivationKind::silu;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// d [64, 256] = a [64, 16] b [256, 16]^T (+ d unless `fresh`)
__device__ inline void multiply(float (&d)[128], uint64_t a, uint64_t b, int keep) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "
      "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
      "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, "
      "%66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "
      "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, "
      "%98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, "
      "%126, %127"
      "}, %128, %129, p, 1, 1, 0, 0;\n"
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
  int row, col;  // first of the tile, within the group and the output
  __device__ Tile(const GatedArgs& args, int index) {
    const int each = args.row_tiles * args.col_tiles;
    group = args.groups[index / each];
    row = index % each % args.row_tiles * kRows;
    col = index % each / args.row_tiles * kCols;
  }
};

#endif

__global__ void __launch_bounds__(kThreads, 1)
    gated_kernel(const __grid_constant__ CUtensorMap in, const __grid_constant__ CUtensorMap weight, GatedArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char memory[];
  __shared__ uint64_t filled[kStages], emptied[kStages];
  unsigned char* stages = memory + (1024 - shared_address(memory) % 1024) % 1024;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      init_barrier(filled[s], 1);
      init_barrier(emptied[s], 2);
    }
    publish_barriers();
  }
  __syncthreads();
  const int tiles = args.group_count * args.row_tiles * args.col_tiles;
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      int step = 0;
      for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
        const Tile tile(args, index);
        if (tile.row >= tile.group.rows) continue;
        const int in_row = static_cast<int>(tile.group.scratch) + tile.row;
        const int gate_row = tile.group.stack * 2 * args.d_ff + tile.col;
        for (int k = 0; k < args.steps; ++k, ++step) {
          const int s = step % kStages;
          wait_for(emptied[s], (step / kStages & 1) ^ 1);
          expect_bytes(filled[s], kStageBytes);
          unsigned char* to = stages + s * kStageBytes;
          copy_tile(to, in, k * kDepth, in_row, filled[s]);
          copy_tile(to + kInBytes, weight, k * kDepth, gate_row, filled[s]);
          copy_tile(to + kInBytes + kWeightBytes / 2, weight, k * kDepth, gate_row + args.d_ff, filled[s]);
        }
      }
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  const int mine = warpgroup - 1, thread = threadIdx.x % 128;
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
      for (int part = 0; part < kDepth / 16; ++part) multiply(d, a + 2 * part, b + 2 * part, k > 0 || part > 0);
      commit_products();
      wait_products<1>();
      // All but this step's products are done: the stage before may be filled again.
      if (k > 0 && thread == 0) arrive(emptied[(step - 1) % kStages]);
    }
    wait_products<0>();
    if (thread == 0) arrive(emptied[(step - 1) % kStages]);
    const int lane = thread % 32, first = tile.row + mine * 64 + thread / 32 * 16 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = first + half * 8;
      if (r >= tile.group.rows) continue;
      __nv_bfloat16* to = args.out + (tile.group.scratch + r) * args.d_ff + tile.col + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j) {
        const float x = activated(args.kind, d[4 * j + 2 * half]) * d[64 + 4 * j + 2 * half];
        const float y = activated(args.kind, d[4 * j + 2 * half + 1]) * d[64 + 4 * j + 2 * half + 1];
        *reinterpret_cast<uint32_t*>(to + j * 8) = pack_pair<__nv_bfloat16>(x, y);
      }
    }
  }
#endif
}

}  // namespace

bool can_fuse_gate() {
  if (!has_hopper_code(reinterpret_cast<const void*>(gated_kernel))) return false;
  check(cudaFuncSetAttribute(gated_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
        "cudaFuncSetAttribute");
  return true;
}

bool gate_fits(int64_t rows, int64_t depth, int64_t d_ff) {
  return rows >= kRows && depth % kDepth == 0 && d_ff % kCols == 0;
}

void launch_gated_product(const GatedProduct& product, const Batch& batch, int processors, cudaStream_t stream) {
  GatedArgs args;
  args.groups = batch.groups;
  args.group_count = batch.group_count;
  args.row_tiles = static_cast<int>(ceil_div(batch.max_group_rows, kRows));
  args.col_tiles = static_cast<int>(product.d_ff / kCols);
  args.steps = static_cast<int>(product.depth / kDepth);
  args.d_ff = static_cast<int>(product.d_ff);
  args.out = static_cast<__nv_bfloat16*>(product.out);
  args.kind = product.kind;
  const CUtensorMap in = tiles_of(product.in, product.in_rows, product.depth, 2, kRows);
  const CUtensorMap weight = tiles_of(product.weight, product.weight_rows, product.depth, 2, kCols);
  gated_kernel<<<processors, kThreads, kSharedBytes, stream>>>(in, weight, args);
  check_launch("gated product");
}

}  // namespace armt::cuda
