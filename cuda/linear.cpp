// The decoder's dense layers.
#include <algorithm>
#include <cstring>

#include "check.h"
#include "gated.h"
#include "gemv.h"
#include "kernels.h"
#include "slots.h"
#include "workspace.h"

namespace armt::cuda {

Vector bias_of(Matrix which) {
  switch (which) {
    case Matrix::qkv:
      return Vector::qkv_bias;
    case Matrix::attn_out:
      return Vector::attn_out_bias;
    case Matrix::mlp_up:
      return Vector::mlp_up_bias;
    case Matrix::mlp_down:
      return Vector::mlp_down_bias;
    default:
      return Vector::count;
  }
}

void CudaBackend::products(std::vector<Span> spans, const Operands& operands, Product base) {
  std::erase_if(spans, [](const Span& span) { return span.rows == 0; });
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.stack < b.stack; });
  base.cols = operands.cols;
  base.depth = operands.depth;
  const int64_t weight_bytes = operands.weight_stride * size_of(base.type);
  const int64_t bias_bytes = operands.bias_stride * size_of(base.out_type);
  for (size_t first = 0, end = 0; first < spans.size(); first = end) {
    const Span& a = spans[first];
    Span step;
    end = first + 1;
    if (end < spans.size()) {
      step = {.stack = spans[end].stack - a.stack,
              .in_row = spans[end].in_row - a.in_row,
              .out_row = spans[end].out_row - a.out_row,
              .rows = 0};
    }
    const auto continues = [&](const Span& before, const Span& next) {
      return step.stack > 0 && step.in_row > 0 && step.out_row > 0 && next.rows == a.rows &&
             next.stack - before.stack == step.stack && next.in_row - before.in_row == step.in_row &&
             next.out_row - before.out_row == step.out_row;
    };
    while (end < spans.size() && continues(spans[end - 1], spans[end])) ++end;

    Product product = base;
    product.rows = a.rows;
    product.batch = static_cast<int64_t>(end - first);
    product.weight = operands.weight + a.stack * weight_bytes;
    product.in = static_cast<const char*>(base.in) + a.in_row * base.ld_in * size_of(base.type);
    product.out = static_cast<char*>(base.out) + a.out_row * base.ld_out * size_of(base.out_type);
    if (operands.bias != nullptr) product.bias = operands.bias + a.stack * bias_bytes;
    if (product.batch > 1) {
      product.weight_stride = step.stack * operands.weight_stride;
      product.bias_stride = step.stack * operands.bias_stride;
      product.in_stride = step.in_row * base.ld_in;
      product.out_stride = step.out_row * base.ld_out;
    }
    lt_->multiply(product, lane().space());
  }
}

void CudaBackend::linear(Matrix which, Groups groups, const Rows& in, const Rows& out, Epilogue epilogue, int64_t c0,
                         int64_t c1) {
  const Entry entry(*this);
  const Part part = part_of(groups);
  const DecoderConfig& decoder = config_.decoder;
  const int64_t all = matrix_rows(which);
  if (c1 < 0) c1 = all;
  const bool activate = epilogue == Epilogue::activate;
  const bool gated = activate && decoder.gated_mlp;

  if (active_.few && few_linear(which, part.groups.front(), in, out, epilogue, c0, c1)) return;

  if (fp8_linear(which, part, in, out, epilogue, c0, c1)) return;

  if (gated && fuses_gate_ && gate_fits(part.batch.max_group_rows, in.width, decoder.d_ff) &&
      vectors_[static_cast<size_t>(Vector::mlp_up_bias)].data() == nullptr) {
    const GatedProduct product = {.in = in.data,
                                  .weight = matrices_[static_cast<size_t>(which)].data(),
                                  .out = out.data,
                                  .in_rows = active_.scratch->hidden.bytes() / (in.width * element()),
                                  .weight_rows = decoder.n_layers * all,
                                  .depth = in.width,
                                  .d_ff = decoder.d_ff,
                                  .kind = decoder.activation};
    launch_gated_product(product, part.batch, processors_, stream());
    return;
  }

  Operands operands;
  operands.depth = in.width;
  operands.cols = c1 - c0;
  operands.weight_stride = all * in.width;
  operands.weight = matrices_[static_cast<size_t>(which)].data() + c0 * in.width * element();
  const Vector bias = bias_of(which);
  if (bias != Vector::count && vectors_[static_cast<size_t>(bias)].data() != nullptr) {
    operands.bias = vectors_[static_cast<size_t>(bias)].data() + c0 * element();
    operands.bias_stride = all;
  }
  Product base;
  base.type = base.out_type = dtype_;
  base.in = in.data;
  base.ld_in = in.width;
  base.out = gated ? active_.scratch->gated.data() : static_cast<char*>(out.data) + c0 * element();
  base.ld_out = gated ? all : out.width;
  base.add = epilogue == Epilogue::add;
  // The library's own activations round like its 16-bit result; float32 goes through our kernel.
  const bool can_fuse = activate && !gated && dtype_ != DType::f32;
  if (can_fuse && decoder.activation == ActivationKind::gelu_tanh) base.fused = Fused::gelu;
  if (can_fuse && decoder.activation == ActivationKind::relu) base.fused = Fused::relu;

  std::vector<Span> spans;
  for (const DevGroup& group : part.groups) {
    spans.push_back({.stack = group.stack,
                     .in_row = row_index(group, in),
                     .out_row = gated ? group.scratch : row_index(group, out),
                     .rows = group.rows});
  }
  products(std::move(spans), operands, base);
  if (gated) {
    const View up{base.out, all, true};
    launch_gate(dtype_, decoder.activation, part.batch, up, view(out), stream());
  } else if (activate && base.fused == Fused::none) {
    launch_activate(dtype_, decoder.activation, part.batch, view(out), stream());
  }
}

bool CudaBackend::few_linear(Matrix which, const DevGroup& group, const Rows& in, const Rows& out, Epilogue epilogue,
                             int64_t c0, int64_t c1) {
  const int64_t all = matrix_rows(which), depth = in.width;
  FewProduct product;
  product.activate = epilogue == Epilogue::activate;
  product.gated = product.activate && config_.decoder.gated_mlp;
  product.add = epilogue == Epilogue::add;
  product.kind = config_.decoder.activation;
  product.weight = matrices_[static_cast<size_t>(which)].data() + (group.stack * all + c0) * depth * element();
  const Vector bias = bias_of(which);
  if (bias != Vector::count && vectors_[static_cast<size_t>(bias)].data() != nullptr) {
    product.bias = vectors_[static_cast<size_t>(bias)].data() + (group.stack * all + c0) * element();
  }
  const Rows& from = active_.norm_in.data != nullptr ? active_.norm_in : in;
  product.in = static_cast<const char*>(from.data) + row_index(group, from) * from.width * element();
  product.out = static_cast<char*>(out.data) + (row_index(group, out) * out.width + c0) * element();
  product.rows = group.rows;
  product.cols = (c1 - c0) / (product.gated ? 2 : 1);
  product.depth = depth;
  product.ld_in = from.width;
  product.ld_out = out.width;
  if (active_.norm_in.data != nullptr) {
    const auto vector = [&](Vector norm) {
      const float* values = vectors_[static_cast<size_t>(norm)].as<float>();
      return values != nullptr ? values + group.stack * depth : nullptr;
    };
    product.norm_weight = vector(active_.norm);
    product.norm_bias = vector(norm_bias(active_.norm));
    product.norm_eps = static_cast<float>(config_.decoder.norm_eps);
    product.rms = config_.decoder.norm == NormKind::rms;
  }
  if (!few_fits(product)) return false;
  launch_few_product(dtype_, product, processors_, stream());
  active_.norm_in = {};
  return true;
}

}  // namespace armt::cuda
