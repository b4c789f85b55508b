#include "layers/block.h"

namespace armt {
namespace {

// From the attention's output (scratch.context) to the block's; `x` holds the residual stream.
void finish_block(Backend& backend, const ModelConfig& config, const Scratch& scratch, Groups groups, const Rows& x) {
  // The parallel form normalises the block's input, so before attention is added to it.
  const bool parallel = config.decoder.parallel_residual;
  if (parallel) {
    backend.norm(Vector::norm2, groups, x, scratch.hidden);
  } else {
    backend.linear(Matrix::attn_out, groups, scratch.context, x, Epilogue::add);
    backend.norm(Vector::norm2, groups, x, scratch.hidden);
  }
  backend.linear(Matrix::mlp_up, groups, scratch.hidden, scratch.ff, Epilogue::activate);
  if (parallel) backend.linear(Matrix::attn_out, groups, scratch.context, x, Epilogue::add);
  backend.linear(Matrix::mlp_down, groups, scratch.ff, x, Epilogue::add);
  if (config.has_association()) backend.memory_write(groups, x);
}

Scratch from_zero(Scratch scratch) {
  for (Rows* rows : {&scratch.hidden, &scratch.qkv, &scratch.context, &scratch.ff}) rows->origin = 0;
  return scratch;
}

}  // namespace

void run_blocks(Backend& backend, const ModelConfig& config, const Workspace& workspace, const Scratch& scratch,
                Groups groups) {
  if (groups.empty()) return;
  const Rows& x = workspace.residual;
  if (config.has_association()) backend.memory_read(groups, x);
  backend.norm(Vector::norm1, groups, x, scratch.hidden);
  backend.linear(Matrix::qkv, groups, scratch.hidden, scratch.qkv, Epilogue::none);
  backend.store_kv(groups, scratch.qkv);
  backend.rotate_queries(groups, scratch.qkv);
  backend.attend(groups, scratch.qkv, scratch.context);
  finish_block(backend, config, scratch, groups, x);
}

void run_last_block(Backend& backend, const ModelConfig& config, const Workspace& workspace, const Scratch& scratch,
                    const Group& group, const OutputRows& outputs) {
  const Groups all(&group, 1);
  const Groups needed(&outputs.group, 1);
  if (config.has_association()) backend.memory_read(all, workspace.residual);
  backend.norm(Vector::norm1, all, workspace.residual, scratch.hidden);
  backend.linear(Matrix::qkv, all, scratch.hidden, scratch.qkv, Epilogue::none, config.query_width());
  backend.store_kv(all, scratch.qkv);
  if (outputs.gathered.empty()) return;

  const Scratch front = from_zero(scratch);
  backend.gather(workspace.residual, outputs.gathered, workspace.last);
  backend.norm(Vector::norm1, needed, workspace.last, front.hidden);
  backend.linear(Matrix::qkv, needed, front.hidden, front.qkv, Epilogue::none, 0, config.query_width());
  backend.rotate_queries(needed, front.qkv);
  backend.attend(needed, front.qkv, front.context);
  finish_block(backend, config, front, needed, workspace.last);
}

}  // namespace armt
