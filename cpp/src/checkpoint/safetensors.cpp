#include "checkpoint/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <numeric>
#include <optional>
#include <utility>

#include "armt/error.h"
#include "checkpoint/json_reader.h"

namespace armt {
namespace {

static_assert(std::endian::native == std::endian::little, "the data of a file is used in place");

constexpr int64_t kLengthBytes = 8;
constexpr int64_t kMaxHeader = 100'000'000;
constexpr size_t kMaxTensors = 250'000;
constexpr size_t kMaxRank = 32;
constexpr size_t kMaxName = 4096;
constexpr size_t kMaxListed = 20;
constexpr const char* kDamaged = "; the file is damaged or incomplete: copy or convert it again";

struct TypeEntry {
  const char* in_file;
  const char* name;
  int64_t bytes;
};
// In the order of StoredType.
constexpr std::array<TypeEntry, 13> kTypes = {{{"F64", "float64", 8},
                                               {"F32", "float32", 4},
                                               {"F16", "float16", 2},
                                               {"BF16", "bfloat16", 2},
                                               {"I64", "int64", 8},
                                               {"I32", "int32", 4},
                                               {"I16", "int16", 2},
                                               {"I8", "int8", 1},
                                               {"U64", "uint64", 8},
                                               {"U32", "uint32", 4},
                                               {"U16", "uint16", 2},
                                               {"U8", "uint8", 1},
                                               {"BOOL", "bool", 1}}};

std::optional<StoredType> type_from(std::string_view in_file) {
  for (size_t i = 0; i < kTypes.size(); ++i) {
    if (in_file == kTypes[i].in_file) return static_cast<StoredType>(i);
  }
  return std::nullopt;
}

[[noreturn]] void fail(const std::string& path, const std::string& message) {
  throw CheckpointError(printable(path) + ": " + message);
}

// The first faults in words, the others as a number.
class Faults {
 public:
  void add(std::string_view tensor, const std::string& message) {
    if (++count_ <= kMaxListed) lines_ += "\n  - " + printable(tensor) + ": " + message;
  }
  size_t count() const { return count_; }
  void raise_if_any(const std::string& path) const {
    if (count_ == 0) return;
    std::string text =
        std::to_string(count_) + (count_ == 1 ? " fault" : " faults") + " in the header" + kDamaged + lines_;
    if (count_ > kMaxListed) text += "\n  - and " + std::to_string(count_ - kMaxListed) + " more";
    fail(path, text);
  }

 private:
  size_t count_ = 0;
  std::string lines_;
};

class FileDescriptor {
 public:
  // O_NONBLOCK: opening a named pipe would wait for a writer otherwise.
  explicit FileDescriptor(const std::string& path)
      : fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY)) {
    if (fd_ < 0) fail(path, std::string("cannot be opened: ") + std::strerror(errno));
  }
  ~FileDescriptor() { ::close(fd_); }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

int64_t regular_file_size(const FileDescriptor& file, const std::string& path) {
  struct stat status{};
  if (::fstat(file.get(), &status) != 0) fail(path, std::string("cannot be examined: ") + std::strerror(errno));
  if (S_ISDIR(status.st_mode)) fail(path, "found a folder, expected a safetensors file");
  if (!S_ISREG(status.st_mode)) fail(path, "found a pipe, socket or device, expected a regular file");
  return status.st_size;
}

// Reads the header's members; faults in a tensor's values are collected, faults of the JSON itself
// are thrown.
class HeaderReader {
 public:
  HeaderReader(std::string_view text, Faults& faults) : json_(text), faults_(faults) {}

  void read(std::vector<StoredTensor>& tensors, std::map<std::string, std::string>& metadata) {
    bool has_metadata = false;
    json_.object(kMaxName, [&](std::string&& key) {
      if (key == "__metadata__") {
        if (std::exchange(has_metadata, true)) faults_.add(key, "stands in the header twice");
        read_metadata(metadata);
        return;
      }
      if (tensors.size() == kMaxTensors) {
        throw JsonFault{json_.offset(), "more than " + std::to_string(kMaxTensors) + " tensors"};
      }
      tensors.push_back(read_tensor(std::move(key)));
    });
    json_.finish();
  }

 private:
  void read_metadata(std::map<std::string, std::string>& metadata) {
    json_.object(kMaxName, [&](std::string&& key) {
      std::string value = json_.string(kMaxHeader);
      if (!metadata.emplace(key, std::move(value)).second) {
        faults_.add("__metadata__", "the key " + printable(key) + " stands there twice");
      }
    });
  }

  StoredTensor read_tensor(std::string&& name) {
    StoredTensor tensor{.name = std::move(name)};
    const size_t faults_before = faults_.count();
    int dtypes = 0, shapes = 0, offsets = 0;
    json_.object(kMaxName, [&](std::string&& key) {
      if (key == "dtype") {
        ++dtypes;
        read_type(tensor);
      } else if (key == "shape") {
        ++shapes;
        read_shape(tensor);
      } else if (key == "data_offsets") {
        ++offsets;
        read_offsets(tensor);
      } else {
        throw JsonFault{json_.offset(), printable(tensor.name) + ": found the key '" + printable(key) +
                                            "', expected dtype, shape and data_offsets"};
      }
    });
    if (dtypes != 1 || shapes != 1 || offsets != 1) {
      faults_.add(tensor.name, "expected dtype, shape and data_offsets once each");
    }
    if (faults_.count() != faults_before) {  // reported: as an empty tensor it raises no second fault
      tensor.shape = {0};
      tensor.begin = tensor.end = 0;
    }
    return tensor;
  }

  void read_type(StoredTensor& tensor) {
    const std::string word = json_.string(kMaxName);
    if (const auto type = type_from(word)) {
      tensor.type = *type;
    } else {
      faults_.add(tensor.name,
                  "found dtype " + printable(word) + ", expected F64, F32, F16, BF16, BOOL or an integer type");
    }
  }

  void read_shape(StoredTensor& tensor) {
    tensor.shape.clear();
    json_.array([&] {
      if (tensor.shape.size() == kMaxRank) {
        throw JsonFault{json_.offset(),
                        printable(tensor.name) + ": more than " + std::to_string(kMaxRank) + " dimensions"};
      }
      tensor.shape.push_back(json_.whole_number());
    });
  }

  void read_offsets(StoredTensor& tensor) {
    std::array<int64_t, 2> pair{};
    size_t count = 0;
    json_.array([&] {
      const int64_t value = json_.whole_number();
      if (count < pair.size()) pair[count] = value;
      ++count;
    });
    if (count != pair.size()) faults_.add(tensor.name, "data_offsets: expected two numbers");
    tensor.begin = pair[0];
    tensor.end = pair[1];
  }

  JsonReader json_;
  Faults& faults_;
};

std::string shape_text(const StoredTensor& tensor) {
  std::string text = "[";
  for (const int64_t size : tensor.shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

// Bytes of a tensor of this shape, or nothing if the product of its sizes (zeros left out) does not
// fit 63 bits.
std::optional<int64_t> bytes_of(const StoredTensor& tensor) {
  int64_t bytes = size_of(tensor.type);
  bool empty = false;
  for (const int64_t size : tensor.shape) {
    empty = empty || size == 0;
    if (size != 0 && __builtin_mul_overflow(bytes, size, &bytes)) return std::nullopt;
  }
  return empty ? 0 : bytes;
}

void check_extents(const std::vector<StoredTensor>& tensors, int64_t data_bytes, Faults& faults) {
  for (const StoredTensor& tensor : tensors) {
    const std::string offsets =
        "data_offsets [" + std::to_string(tensor.begin) + ", " + std::to_string(tensor.end) + "]";
    if (tensor.begin > tensor.end) {
      faults.add(tensor.name, offsets + ": the end lies before the beginning");
    } else if (tensor.end > data_bytes) {
      faults.add(tensor.name, offsets + " reach past the end of the data (" + std::to_string(data_bytes) + " bytes)");
    } else if (const auto bytes = bytes_of(tensor); !bytes) {
      faults.add(tensor.name, "the shape " + shape_text(tensor) + " overflows 63 bits");
    } else if (*bytes != tensor.end - tensor.begin) {
      faults.add(tensor.name, "found " + std::to_string(tensor.end - tensor.begin) + " bytes, expected " +
                                  std::to_string(*bytes) + " for " + name_of(tensor.type) + " " + shape_text(tensor));
    }
  }
}

// Tensors one after another must fill the data exactly.
void check_cover(const std::vector<StoredTensor>& tensors, int64_t data_bytes, Faults& faults) {
  std::vector<const StoredTensor*> order;
  order.reserve(tensors.size());
  for (const StoredTensor& tensor : tensors) order.push_back(&tensor);
  std::sort(order.begin(), order.end(), [](const StoredTensor* a, const StoredTensor* b) {
    return std::pair(a->begin, a->end) < std::pair(b->begin, b->end);
  });
  int64_t covered = 0;
  for (const StoredTensor* tensor : order) {
    if (tensor->begin < covered) {
      faults.add(tensor->name,
                 "overlaps the tensor before it by " + std::to_string(covered - tensor->begin) + " bytes");
    } else if (tensor->begin > covered) {
      faults.add(tensor->name, std::to_string(tensor->begin - covered) + " bytes before it belong to no tensor");
    }
    covered = std::max(covered, tensor->end);
  }
  if (covered < data_bytes) {
    faults.add("end of the data", std::to_string(data_bytes - covered) + " bytes belong to no tensor");
  }
}

std::vector<int32_t> sorted_by_name(const std::vector<StoredTensor>& tensors, Faults& faults) {
  std::vector<int32_t> order(tensors.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return tensors[a].name < tensors[b].name; });
  for (size_t i = 1; i < order.size(); ++i) {
    const std::string& name = tensors[order[i]].name;
    if (name == tensors[order[i - 1]].name) faults.add(name, "stands in the header twice");
  }
  return order;
}

}  // namespace

int64_t size_of(StoredType type) {
  return kTypes[static_cast<size_t>(type)].bytes;
}
const char* name_of(StoredType type) {
  return kTypes[static_cast<size_t>(type)].name;
}

SafetensorsFile::SafetensorsFile(std::string path) : path_(std::move(path)) {
  const FileDescriptor file(path_);
  file_bytes_ = regular_file_size(file, path_);
  if (file_bytes_ < kLengthBytes) {
    fail(path_, "found " + std::to_string(file_bytes_) + " bytes, expected a safetensors file" + kDamaged);
  }
  void* map = ::mmap(nullptr, static_cast<size_t>(file_bytes_), PROT_READ, MAP_PRIVATE, file.get(), 0);
  if (map == MAP_FAILED) fail(path_, std::string("cannot be mapped into memory: ") + std::strerror(errno));
  map_ = static_cast<const std::byte*>(map);
  try {
    read_header();
  } catch (...) {
    unmap();
    throw;
  }
}

SafetensorsFile::~SafetensorsFile() {
  unmap();
}

void SafetensorsFile::unmap() noexcept {
  if (map_ != nullptr) ::munmap(const_cast<std::byte*>(map_), static_cast<size_t>(file_bytes_));
  map_ = nullptr;
}

void SafetensorsFile::read_header() {
  uint64_t claimed = 0;
  std::memcpy(&claimed, map_, kLengthBytes);
  const int64_t room = file_bytes_ - kLengthBytes;
  if (claimed > static_cast<uint64_t>(kMaxHeader)) {
    fail(path_, "the header claims " + std::to_string(claimed) + " bytes, expected at most " +
                    std::to_string(kMaxHeader) + "; this is not a safetensors file, or it is damaged");
  }
  const auto header_bytes = static_cast<int64_t>(claimed);
  if (header_bytes > room) {
    fail(path_, "the header claims " + std::to_string(header_bytes) + " bytes, but only " + std::to_string(room) +
                    " follow" + kDamaged);
  }
  const std::string_view text(reinterpret_cast<const char*>(map_) + kLengthBytes, static_cast<size_t>(header_bytes));
  if (text.empty() || text.front() != '{') {
    fail(path_, "the header does not begin with '{'; this is not a safetensors file, or it is damaged");
  }
  data_begin_ = kLengthBytes + header_bytes;
  const int64_t data_bytes = file_bytes_ - data_begin_;
  Faults faults;
  try {
    HeaderReader(text, faults).read(tensors_, metadata_);
  } catch (const JsonFault& fault) {
    fail(path_, "header, byte " + std::to_string(fault.offset) + ": " + fault.message + kDamaged);
  }
  by_name_ = sorted_by_name(tensors_, faults);
  check_extents(tensors_, data_bytes, faults);
  faults.raise_if_any(path_);
  check_cover(tensors_, data_bytes, faults);
  faults.raise_if_any(path_);
}

const StoredTensor& SafetensorsFile::at(std::string_view name) const {
  const auto found = std::lower_bound(by_name_.begin(), by_name_.end(), name,
                                      [&](int32_t i, std::string_view wanted) { return tensors_[i].name < wanted; });
  if (found == by_name_.end() || tensors_[*found].name != name) {
    fail(path_, "there is no tensor named " + printable(name));
  }
  return tensors_[*found];
}

std::span<const std::byte> SafetensorsFile::bytes(const StoredTensor& tensor) const {
  return {map_ + data_begin_ + tensor.begin, static_cast<size_t>(tensor.end - tensor.begin)};
}

}  // namespace armt
