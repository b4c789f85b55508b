// The load path of the compiled part: a safetensors file whose tensors are named slot.layer goes into an engine, which
// then reads tokens. First byte: the model; second: the weights' type. Inputs that begin with 'G' in the third byte are
// made from a right file with a few bytes changed, so that loading gets to its end now and then.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "checkpoint_bytes.h"

namespace {

using namespace armt;
using fuzz::require;

void read_tokens(const std::shared_ptr<Engine>& engine) {
  Session session(engine);
  const std::vector<int32_t> ids = {0, 1, 2, 3, 4, 5};
  std::vector<float> logits(static_cast<size_t>(engine->config().decoder.vocab_size));
  Call call{.session = &session, .tokens = ids, .logits = LogitsWanted::last, .logits_out = logits.data()};
  run_calls(*engine, {&call, 1});
  session.close_segment({});
}

std::vector<uint8_t> file_from(fuzz::Bytes& in, int64_t model) {
  if (in.byte() != 'G') return {in.rest().begin(), in.rest().end()};
  static std::vector<uint8_t> right[fuzz::kModels];
  if (right[model].empty()) right[model] = fuzz::right_file(fuzz::model(model));
  std::vector<uint8_t> file = right[model];
  const bool cut = in.flag();
  for (int changes = 0; changes < 8 && in.size() >= 3; ++changes) {
    const auto at = in.number<uint16_t>() % file.size();
    file[at] = in.byte();
  }
  if (cut) file.resize(in.number<uint16_t>() % file.size());
  return file;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const int memory = ::memfd_create("fuzz", MFD_CLOEXEC);
  static const std::string path = "/proc/self/fd/" + std::to_string(memory);
  fuzz::Bytes in(data, size);
  const int64_t model = in.below(fuzz::kModels);
  EngineOptions options;
  options.backend.threads = 1;
  options.backend.isa = "baseline";
  options.backend.weight_dtype = in.flag() ? DType::bf16 : DType::f32;
  const std::vector<uint8_t> bytes = file_from(in, model);
  require(::ftruncate(memory, 0) == 0 && ::ftruncate(memory, std::ssize(bytes)) == 0, "resized");
  require(::pwrite(memory, bytes.data(), bytes.size(), 0) == std::ssize(bytes), "written");
  try {
    const SafetensorsFile file(path);
    const auto engine = std::make_shared<Engine>(fuzz::model(model), options);
    for (const StoredTensor& tensor : file.tensors()) fuzz::load_one(*engine, file, tensor);
    engine->finish_loading();
    read_tokens(engine);
  } catch (const armt::Error& error) {
    require(std::strlen(error.what()) < 100'000, "a message is short");
  }
  return 0;
}
