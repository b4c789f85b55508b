// Warpgroup matrix instructions of attention (sm_90a): [64, 16] x [16, 64], sums in float32 registers, the right
// operand in shared memory in slabs of 64 columns (SlabPlace).
#pragma once

#include <type_traits>

#include "attention_tiles.cuh"
#include "hopper.cuh"

namespace armt::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Before and after products: keeps the compiler from moving what makes or uses their sums in between.
template <int n>
__device__ inline void pin(float (&sums)[n][4]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    asm volatile("" : "+f"(sums[i][0]), "+f"(sums[i][1]), "+f"(sums[i][2]), "+f"(sums[i][3])::"memory");
  }
}
// Between writes to shared memory and products that read them; a barrier follows.
__device__ inline void publish_to_products() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Part of a slab of 16-bit elements, 128-byte swizzle, groups of eight rows 1024 bytes apart, that begins `elements`
// behind the slab's address: the lower half of its descriptor; the upper half is the same for all.
__device__ inline uint32_t slab_part(uint32_t slab, int elements) {
  return (64u << 16 | slab >> 4) + static_cast<uint32_t>(elements * 2 / 16);
}
#define ARMT_UPPER "0x40000040"

#define ARMT_SUMS                                                                                              \
  "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]),     \
      "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), \
      "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), \
      "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), \
      "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])
#define ARMT_PRODUCT(TYPE)                                                                                           \
  "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                                                        \
  " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31}, "

// d = a b' (+ d if `keep`): 64 rows a and 64 rows b in shared memory, 16 of their columns.
#define ARMT_MULTIPLY(TYPE)                                                                                         \
  asm volatile("{\n.reg .pred p;\n.reg .b64 a, b;\nmov.b64 a, {%32, " ARMT_UPPER "};\nmov.b64 b, {%33, " ARMT_UPPER \
               "};\nsetp.ne.b32 p, %34, 0;\n" ARMT_PRODUCT(TYPE) "a, b, p, 1, 1, 0, 0;\n}\n"                        \
               : ARMT_SUMS                                                                                          \
               : "r"(a), "r"(b), "r"(keep))
template <class T>
__device__ inline void multiply_rows(float (*d)[4], uint32_t a, uint32_t b, int keep) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    ARMT_MULTIPLY("bf16");
  } else {
    ARMT_MULTIPLY("f16");
  }
}
#undef ARMT_MULTIPLY

// d += a b: a in registers, b 16 rows of 64 columns in shared memory.
#define ARMT_MULTIPLY(TYPE)                                                          \
  asm volatile("{\n.reg .b64 b;\nmov.b64 b, {%36, " ARMT_UPPER                       \
               "};\n" ARMT_PRODUCT(TYPE) "{%32, %33, %34, %35}, b, 1, 1, 1, 1;\n}\n" \
               : ARMT_SUMS                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b))
template <class T>
__device__ inline void multiply_add_columns(float (*d)[4], const uint32_t (&a)[4], uint32_t b) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    ARMT_MULTIPLY("bf16");
  } else {
    ARMT_MULTIPLY("f16");
  }
}
#undef ARMT_MULTIPLY
#undef ARMT_UPPER
#undef ARMT_PRODUCT
#undef ARMT_SUMS

#endif

}  // namespace armt::cuda
