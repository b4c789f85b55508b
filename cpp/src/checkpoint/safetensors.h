// Read-only, memory-mapped safetensors files.
//
//   [header bytes N: uint64, little-endian][header: N bytes of JSON, starts with '{'][data]
//   header: {"name": {"dtype": "F32", "shape": [..], "data_offsets": [begin, end]}, ..,
//   "__metadata__": {"k": "v"}}
//
// The tensors cover the data from its first to its last byte without overlap. Everything is checked
// in the constructor, before anything is allocated that grows with a number claimed in the file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace armt {

enum class StoredType : uint8_t { f64, f32, f16, bf16, i64, i32, i16, i8, u64, u32, u16, u8, boolean };

int64_t size_of(StoredType type);
const char* name_of(StoredType type);  // "float32", "bfloat16", "bool", ...

struct StoredTensor {
  std::string name;
  StoredType type = StoredType::f32;
  std::vector<int64_t> shape;  // row-major
  int64_t begin = 0, end = 0;  // bytes of the data section
};

// One mapped file. Pages are read from disk when they are touched; if another program truncates the
// file while it is mapped, touching the lost part ends the process (SIGBUS): replace checkpoint
// files by renaming, never in place.
class SafetensorsFile {
 public:
  // Throws CheckpointError that lists every fault of the header.
  explicit SafetensorsFile(std::string path);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const std::string& path() const { return path_; }
  std::span<const StoredTensor> tensors() const { return tensors_; }  // in header order
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  // Throws CheckpointError if there is none of that name.
  const StoredTensor& at(std::string_view name) const;
  // Not aligned to the element size in general: the format allows any header length.
  std::span<const std::byte> bytes(const StoredTensor& tensor) const;

 private:
  void read_header();
  void unmap() noexcept;

  std::string path_;
  const std::byte* map_ = nullptr;
  int64_t file_bytes_ = 0;
  int64_t data_begin_ = 0;
  std::vector<StoredTensor> tensors_;
  std::vector<int32_t> by_name_;  // indices into tensors_, sorted by name
  std::map<std::string, std::string> metadata_;
};

}  // namespace armt
