// Small waves (decoding) through all layers: launching their kernels one by one would take longer than running them, so
// the launches are recorded once (a CUDA graph) and replayed. All that changes from call to call lies in the table.
#include "check.h"
#include "gemv.h"
#include "workspace.h"

namespace armt::cuda {
namespace {

constexpr int32_t kKeyStep = 256;  // keys are counted in steps, so that a recording serves many lengths
constexpr size_t kMostReplays = 64;

}  // namespace

CudaBackend::ReplayKey CudaBackend::replay_key(const CudaWorkspace& ws, Groups layers) const {
  ReplayKey key;
  for (const DeviceBuffer* buffer : {&wave_table_.memory, &ws.residual_rows, &ws.row_meta, &ws.angles, &ws.main.hidden,
                                     &ws.main.qkv, &ws.main.context, &ws.main.ff, &ws.main.gated, &ws.main.read_query,
                                     &ws.main.read_phi, &ws.main.read_matrix, &ws.main.partial, &ws.main.counters}) {
    key.push_back(reinterpret_cast<int64_t>(buffer->data()));
  }
  key.push_back(layers.front().row_begin);
  for (int32_t rows : wave_table_.cell_rows) key.push_back(rows);
  for (int32_t keys : wave_table_.cell_keys) key.push_back(keys);
  for (const Group& group : layers) {
    for (const Cell& cell : group.cells) key.push_back(cell.state->memory.written());
  }
  return key;
}

cudaGraphExec_t CudaBackend::record(const std::function<void()>& enqueue) {
  check(cudaStreamBeginCapture(main_.stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  cudaGraph_t graph = nullptr;
  try {
    enqueue();
  } catch (...) {
    cudaStreamEndCapture(main_.stream, &graph);
    if (graph != nullptr) cudaGraphDestroy(graph);
    cudaGetLastError();
    throw;
  }
  check(cudaStreamEndCapture(main_.stream, &graph), "cudaStreamEndCapture");
  cudaGraphExec_t exec = nullptr;
  const cudaError_t code = cudaGraphInstantiate(&exec, graph, 0);
  cudaGraphDestroy(graph);
  check(code, "cudaGraphInstantiate");
  return exec;
}

void CudaBackend::forget_replays() noexcept {
  for (auto& [key, replay] : replays_) {
    if (replay.graph != nullptr) cudaGraphExecDestroy(replay.graph);
  }
  replays_.clear();
}

void CudaBackend::run_wave(Workspace& workspace, Groups layers,
                           const std::function<void(Groups, const Scratch&)>& body) {
  const Entry entry(*this);
  auto& ws = static_cast<CudaWorkspace&>(workspace);
  struct Reset {
    Active& active;
    ~Reset() { active = {}; }
  } reset{active_};
  finish_entry(ws);
  ws.busy.clear();
  build_table(wave_table_, layers, std::vector<int64_t>(layers.size(), 0), ws.row_meta.as<DevRow>(), main_.stream);
  for (int32_t& keys : wave_table_.cell_keys) keys = (keys + kKeyStep - 1) / kKeyStep * kKeyStep;
  active_ = {.workspace = &ws, .scratch = &ws.main, .lane = &main_, .whole = &wave_table_};
  if (decode_wave(ws, layers)) return;
  const int64_t width = config_.decoder.d_model;
  active_.few = dtype_ != DType::f32 &&
                few_fits({.rows = layers.front().row_count, .cols = width, .depth = width, .ld_in = width});
  const auto enqueue = [&] {
    for (size_t l = 0; l < layers.size(); ++l) body(layers.subspan(l, 1), ws.main.rows);
  };
  if (replays_.size() >= kMostReplays) forget_replays();
  Replay& replay = replays_[replay_key(ws, layers)];
  if (!replay.warm) {
    enqueue();
    replay.warm = true;
    return;
  }
  if (replay.graph == nullptr) replay.graph = record(enqueue);
  check(cudaGraphLaunch(replay.graph, main_.stream), "cudaGraphLaunch");
}

}  // namespace armt::cuda
