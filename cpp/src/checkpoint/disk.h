// Files that must never be half written, and files that nobody trusts. All faults are StateErrors
// that name the path and the cause.
#pragma once

#include <cstdint>
#include <span>
#include <string>

namespace armt {

// Replaces the file at `path`, mode 0600, by one that holds `bytes`: whatever happens, a reader
// finds the old file or the new one, whole. Writes a temporary file ".armt-state-*.tmp" in the same
// folder, flushes it to the disk and renames it; only a killed process leaves one behind. A path
// that names a symbolic link, a folder or a device is refused.
void replace_file(const std::string& path, std::span<const uint8_t> bytes);

// A regular file opened for reading, not through a symbolic link.
class InputFile {
 public:
  explicit InputFile(const std::string& path);
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  int64_t size() const { return size_; }  // when it was opened
  // The next `bytes` bytes; StateError if the file ends before.
  void read(void* to, int64_t bytes);

 private:
  std::string where_;
  int fd_ = -1;
  int64_t size_ = 0;
};

}  // namespace armt
