// Rows times panels of a packed matrix, with the epilogue (kernels.h: GemmTask, Finish).
#pragma once

#include "cpu/kernels.h"
#include "cpu/kernels/activation.h"
#include "cpu/kernels/gemm.h"
#include "cpu/simd.h"

namespace armt::cpu::ARMT_ISA_NAME {

// A block of a panel, kBlockK x kPanel floats, stays in L1 while all rows of a task pass.
#if defined(__AVX512F__)
inline constexpr int64_t kBlockK = 128;
#else
inline constexpr int64_t kBlockK = 256;
#endif
inline constexpr int64_t kGemmRows = 16 * kTileRows;
inline constexpr int64_t kMaxPanelsAtOnce = 4;
inline constexpr int64_t kFewAhead = 24;  // steps of k between the fetch of a weight and its use, few rows
inline constexpr int64_t kGemmScratch =
    (kGemmRows * 2 > kTileRows * kMaxPanelsAtOnce ? kGemmRows * 2 : kTileRows * kMaxPanelsAtOnce) * kPanel +
    kBlockK * kPanel;

static inline int64_t panels_per_unit(const GemmTask& task) {
  return task.finish.gated ? 2 : 1;
}

static inline void add_bias(float* sums, int64_t rows, const float* bias, int64_t count) {
  if (bias == nullptr) return;
  for (int v = 0; v < kPanelVectors; ++v) {
    const int64_t left = count - v * kWidth;
    if (left <= 0) return;
    const vf values = left >= kWidth ? load(bias + v * kWidth) : load_part(bias + v * kWidth, left);
    for (int64_t r = 0; r < rows; ++r) {
      float* at = sums + r * kPanel + v * kWidth;
      store(at, load(at) + values);
    }
  }
}

template <bool Add>
static inline void store_row(const float* sums, float* out, int64_t count) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(out + i, Add ? load(out + i) + load(sums + i) : load(sums + i));
  for (; i < count; ++i) out[i] = Add ? out[i] + sums[i] : sums[i];
}

// The sums of one unit, [panels per unit][rows, kPanel], to their output columns.
static inline void finish_unit(const GemmTask& task, int64_t unit, float* sums) {
  const Finish& finish = task.finish;
  const int64_t rows = task.rows, column = unit * kPanel;
  const int64_t count = min_of(kPanel, task.n - column);
  add_bias(sums, rows, finish.bias == nullptr ? nullptr : finish.bias + column, count);
  if (finish.activate) activate(finish.activation, sums, rows * kPanel);
  if (finish.gated) {
    float* up = sums + rows * kPanel;
    add_bias(up, rows, finish.bias == nullptr ? nullptr : finish.bias + task.n + column, count);
    for (int64_t i = 0; i < rows * kPanel; i += kWidth) store(sums + i, load(sums + i) * load(up + i));
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* out = task.out + r * task.ld_out + column;
    if (finish.add) {
      store_row<true>(sums + r * kPanel, out, count);
    } else {
      store_row<false>(sums + r * kPanel, out, count);
    }
  }
}

// A few rows: `P` panels at once, so that enough independent sums hide the latency of the
// multiply-adds while memory streams. sums [P][R, kPanel].
template <int R, int P, class Weight>
static inline void tile_panels(int64_t k, const float* a, int64_t lda, const Weight* b, float* sums) {
  vf acc[R][P * kPanelVectors];
  ARMT_UNROLL for (int r = 0; r < R; ++r) {
    ARMT_UNROLL for (int v = 0; v < P * kPanelVectors; ++v) acc[r][v] = vf{};
  }
  const int64_t stride = k * kPanel;
  for (int64_t i = 0; i < k; ++i) {
    // One row alone is slow enough for the hardware to foresee its loads; more rows ask ahead.
    if constexpr (R > 1) {
      ARMT_UNROLL for (int p = 0; p < P; ++p) __builtin_prefetch(b + p * stride + kFewAhead * kPanel);
    }
    ARMT_UNROLL for (int v = 0; v < P * kPanelVectors; ++v) {
      const vf column = load(b + (v / kPanelVectors) * stride + (v % kPanelVectors) * kWidth);
      ARMT_UNROLL for (int r = 0; r < R; ++r) acc[r][v] = fma(splat(a[r * lda + i]), column, acc[r][v]);
    }
    b += kPanel;
  }
  ARMT_UNROLL for (int v = 0; v < P * kPanelVectors; ++v) {
    ARMT_UNROLL for (int r = 0; r < R; ++r) {
      store(sums + ((v / kPanelVectors) * R + r) * kPanel + (v % kPanelVectors) * kWidth, acc[r][v]);
    }
  }
}

template <int R, int P, class Weight>
static inline void few_rows(const GemmTask& task) {
  const int64_t per_unit = panels_per_unit(task), size = task.k * kPanel;
  const auto* panels = static_cast<const Weight*>(task.panels);
  const int64_t last = task.unit_end * per_unit;
  int64_t panel = task.unit_begin * per_unit;
  while (panel < last) {
    int64_t done = 1;
    if (P % per_unit == 0 && panel + P <= last) {
      tile_panels<R, P>(task.k, task.in, task.ld_in, panels + panel * size, task.scratch);
      done = P;
    } else {
      for (done = 0; done < per_unit; ++done) {
        tile_panels<R, 1>(task.k, task.in, task.ld_in, panels + (panel + done) * size,
                          task.scratch + done * R * kPanel);
      }
    }
    for (int64_t p = 0; p < done; p += per_unit) {
      finish_unit(task, (panel + p) / per_unit, task.scratch + p * R * kPanel);
    }
    panel += done;
  }
}

// One panel for all rows, its first V vectors of columns: sums [rows, kPanel].
template <int V, class Weight>
static inline void panel_rows(const GemmTask& task, const Weight* panel, float* widened, float* sums) {
  for (int64_t k = 0; k < task.k; k += kBlockK) {
    const int64_t depth = min_of(kBlockK, task.k - k);
    const Weight* block = panel + k * kPanel;
    // Blocks and panels follow one another in memory.
    const Ahead next{reinterpret_cast<const char*>(block + depth * kPanel), depth * kPanel * int64_t{sizeof(Weight)}};
    tile_columns<V>(task.rows, depth, task.in + k, task.ld_in, block, kPanel, sums, kPanel, k > 0, next, widened);
  }
}

// The same, without the vectors of the last panel that hold no column.
template <int V, class Weight>
static inline void panel_columns(int64_t count, const GemmTask& task, const Weight* panel, float* widened,
                                 float* sums) {
  if constexpr (V > 1) {
    if (count <= (V - 1) * kWidth) return panel_columns<V - 1>(count, task, panel, widened, sums);
  }
  panel_rows<V>(task, panel, widened, sums);
}

template <class Weight>
static inline void many_rows(const GemmTask& task) {
  const int64_t per_unit = panels_per_unit(task), size = task.k * kPanel;
  float* widened = task.scratch;
  float* sums = task.scratch + kBlockK * kPanel;
  for (int64_t unit = task.unit_begin; unit < task.unit_end; ++unit) {
    const int64_t count = task.n - unit * kPanel;
    for (int64_t p = 0; p < per_unit; ++p) {
      const Weight* panel = static_cast<const Weight*>(task.panels) + (unit * per_unit + p) * size;
      panel_columns<kPanelVectors>(count, task, panel, widened, sums + p * task.rows * kPanel);
    }
    finish_unit(task, unit, sums);
  }
}

template <class Weight>
static inline void gemm_of(const GemmTask& task) {
  switch (task.rows) {
    case 1:
      return few_rows<1, 4, Weight>(task);
    case 2:
      return few_rows<2, 2, Weight>(task);
    case 3:
      return few_rows<3, 2, Weight>(task);
    case 4:
      return few_rows<4, 1, Weight>(task);
    case 5:
      return few_rows<5, 1, Weight>(task);
    default:
      return many_rows<Weight>(task);
  }
}

static void gemm(const GemmTask& task) {
  if (task.bf16) {
    gemm_of<uint16_t>(task);
  } else {
    gemm_of<float>(task);
  }
}

}  // namespace armt::cpu::ARMT_ISA_NAME
