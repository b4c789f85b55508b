// The safetensors reader. An input is a whole file, or (first byte odd) the text of a header to which the length and
// zeros as data are added.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "checkpoint/safetensors.h"
#include "common.h"

namespace {

using armt::SafetensorsFile;
using armt::StoredTensor;
using fuzz::require;

// One file in memory, rewritten for every input.
class MemoryFile {
 public:
  MemoryFile() : fd_(::memfd_create("fuzz", MFD_CLOEXEC)), path_("/proc/self/fd/" + std::to_string(fd_)) {
    require(fd_ >= 0, "a memory file can be made");
  }
  const std::string& put(std::span<const uint8_t> bytes) {
    require(::ftruncate(fd_, 0) == 0 && ::ftruncate(fd_, std::ssize(bytes)) == 0, "the memory file can be resized");
    require(::pwrite(fd_, bytes.data(), bytes.size(), 0) == std::ssize(bytes), "the memory file can be written");
    return path_;
  }

 private:
  int fd_;
  std::string path_;
};

std::vector<uint8_t> as_file(fuzz::Bytes& in) {
  if (!in.flag()) return {in.rest().begin(), in.rest().end()};
  const auto data_bytes = in.number<uint16_t>() % 4096;
  std::vector<uint8_t> file(8);
  const uint64_t length = in.size();
  std::memcpy(file.data(), &length, 8);
  file.insert(file.end(), in.rest().begin(), in.rest().end());
  file.resize(file.size() + data_bytes);
  return file;
}

void check_tensor(const SafetensorsFile& file, const StoredTensor& tensor, int64_t& covered) {
  const std::span<const std::byte> bytes = file.bytes(tensor);
  int64_t expected = armt::size_of(tensor.type);
  bool empty = false;
  for (const int64_t size : tensor.shape) empty = empty || size == 0;
  for (const int64_t size : tensor.shape) expected *= empty ? 1 : size;
  require(std::ssize(bytes) == (empty ? 0 : expected), "a tensor's bytes fit its shape");
  unsigned sum = 0;
  for (const std::byte byte : bytes) sum += static_cast<unsigned>(byte);  // under ASan: they are there
  volatile unsigned keep = sum;
  (void)keep;
  covered += std::ssize(bytes);
  require(&file.at(tensor.name) == &tensor, "a tensor is found by its name");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static MemoryFile memory;
  fuzz::Bytes in(data, size);
  const std::vector<uint8_t> bytes = as_file(in);
  try {
    const SafetensorsFile file(memory.put(bytes));
    int64_t covered = 0;
    for (const StoredTensor& tensor : file.tensors()) check_tensor(file, tensor, covered);
    uint64_t header = 0;
    std::memcpy(&header, bytes.data(), 8);
    require(covered == std::ssize(bytes) - 8 - static_cast<int64_t>(header), "the tensors cover the data exactly");
    try {
      file.at("no such tensor \xff");
      require(false, "an absent tensor is an error");
    } catch (const armt::CheckpointError&) {
    }
  } catch (const armt::CheckpointError& error) {
    require(std::strlen(error.what()) < 100'000, "a message is short");
  }
  return 0;
}
