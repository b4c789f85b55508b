// The decoder's dense layers.
#include "cpu/cpu_backend.h"
#include "cpu/multiply.h"

namespace armt::cpu {

void CpuBackend::project(const PackedMatrix& weights, Finish finish, const float* in, int64_t ld_in, int64_t rows,
                         float* out, int64_t ld_out, int64_t c0, int64_t c1) {
  finish.activation = config_.decoder.activation;
  multiply(pool_, kernels_, weights, finish, in, ld_in, rows, out, ld_out, c0, c1 < 0 ? weights.out_columns() : c1);
}

const float* CpuBackend::linear_bias(Matrix which, int64_t layer) const {
  switch (which) {
    case Matrix::qkv:
      return vector(Vector::qkv_bias, layer);
    case Matrix::attn_out:
      return vector(Vector::attn_out_bias, layer);
    case Matrix::mlp_up:
      return vector(Vector::mlp_up_bias, layer);
    case Matrix::mlp_down:
      return vector(Vector::mlp_down_bias, layer);
    case Matrix::mem_gate:
      return vector(Vector::mem_gate_bias, layer);
    default:
      return nullptr;
  }
}

void CpuBackend::linear(Matrix which, Groups groups, const Rows& in, const Rows& out, Epilogue epilogue, int64_t c0,
                        int64_t c1) {
  for (const Group& group : groups) {
    Finish finish;
    finish.bias = linear_bias(which, group.layer);
    finish.add = epilogue == Epilogue::add;
    finish.activate = epilogue == Epilogue::activate;
    project(matrix(which, group.layer), finish, row_of(in, group.row_begin), in.width, group.row_count,
            row_of(out, group.row_begin), out.width, c0, c1);
  }
}

void CpuBackend::logits(const Rows& hidden, int64_t first, int64_t count, float* out) {
  project(matrix(Matrix::head, 0), {}, row_of(hidden, hidden.origin + first), hidden.width, count, out,
          config_.decoder.vocab_size);
}

}  // namespace armt::cpu
