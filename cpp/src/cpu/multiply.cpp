// Products with packed weights, split over threads by rows and by columns.
#include "cpu/multiply.h"

#include <algorithm>

#include "cpu/buffer.h"

namespace armt::cpu {
namespace {

// A product cut into row blocks of nearly equal height times runs of units.
struct Split {
  int64_t row_blocks = 1, unit_runs = 1;
  int64_t tasks() const { return row_blocks * unit_runs; }
};

constexpr int64_t kFewRows = 8;                // bound by reading the weights: long runs
constexpr int64_t kTasksPerThread = 4;         // so that a thread that is held up delays the others little
constexpr double kTaskWork = 60e3;             // multiply-adds below which a further task costs more than it saves
constexpr int64_t kWholeTile = 6;              // rows that keep a kernel busy
constexpr int64_t kSmallWeights = 512 * 1024;  // elements that every thread may read: they stay in cache

// Runs of units for each of `blocks` row blocks: enough for `wanted` tasks, and a little more where
// that gives every thread the same number.
int64_t runs_for(int64_t wanted, int64_t blocks, int64_t units, int64_t threads) {
  const int64_t least = std::clamp<int64_t>((wanted + blocks - 1) / blocks, 1, units);
  for (int64_t runs = least; runs < std::min(least + threads, units + 1); ++runs) {
    if (blocks * runs % threads == 0) return runs;
  }
  return least;
}

Split split(const Kernels& kernels, int64_t rows, int64_t units, int64_t unit_columns, int64_t k, int64_t threads) {
  Split cut;
  cut.row_blocks = (rows + kernels.gemm_rows - 1) / kernels.gemm_rows;
  const int64_t weights = units * unit_columns * k;
  const int64_t most = threads * (rows <= kFewRows ? 1 : kTasksPerThread);
  const double work = static_cast<double>(rows) * static_cast<double>(weights);
  const int64_t wanted = std::min(static_cast<int64_t>(work / kTaskWork), most);
  if (threads == 1 || wanted <= 1) return cut;
  if (units % threads != 0 && weights <= kSmallWeights && rows >= threads * kWholeTile && cut.row_blocks < threads) {
    cut.row_blocks = threads;  // few units would leave threads without one
  } else {
    cut.unit_runs = runs_for(wanted, cut.row_blocks, units, threads);
  }
  return cut;
}

}  // namespace

void multiply(ThreadPool& pool, const Kernels& kernels, const PackedMatrix& weights, Finish finish, const float* in,
              int64_t ld_in, int64_t rows, float* out, int64_t ld_out, int64_t c0, int64_t c1) {
  if (rows <= 0 || c0 >= c1) return;
  finish.gated = weights.gated;
  const int64_t first = c0 / weights.panel, units = (c1 + weights.panel - 1) / weights.panel - first;
  const int64_t unit_columns = weights.panel * (weights.gated ? 2 : 1);
  const Split cut = split(kernels, rows, units, unit_columns, weights.k, pool.threads());
  pool.parallel_for(cut.tasks(), [&](int64_t index) {
    const int64_t block = index / cut.unit_runs, run = index % cut.unit_runs;
    const int64_t begin = rows * block / cut.row_blocks, end = rows * (block + 1) / cut.row_blocks;
    GemmTask task;
    task.in = in + begin * ld_in;
    task.ld_in = ld_in;
    task.rows = end - begin;
    task.k = weights.k;
    task.panels = weights.data.data();
    task.bf16 = weights.bf16;
    task.unit_begin = first + units * run / cut.unit_runs;
    task.unit_end = first + units * (run + 1) / cut.unit_runs;
    task.out = out + begin * ld_out;
    task.ld_out = ld_out;
    task.n = weights.out_columns();
    task.scratch = thread_scratch(Slot::gemm, kernels.gemm_scratch);
    task.finish = finish;
    kernels.gemm(task);
  });
}

}  // namespace armt::cpu
