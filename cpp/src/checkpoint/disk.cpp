#include "checkpoint/disk.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <random>
#include <utility>

#include "armt/error.h"
#include "checkpoint/json_reader.h"

namespace armt {
namespace {

constexpr size_t kMostAtOnce = size_t{1} << 30;  // bytes that one read or write is asked for

[[noreturn]] void fail(const std::string& path, const std::string& message) {
  throw StateError(printable(path) + ": " + message);
}

[[noreturn]] void fail_errno(const std::string& path, const std::string& action) {
  const int error = errno;
  fail(path, "cannot be " + action + ": " + std::strerror(error));
}

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }
  int give_up() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

std::string kind_of(mode_t mode) {
  if (S_ISLNK(mode)) return "a symbolic link";
  if (S_ISDIR(mode)) return "a folder";
  if (S_ISFIFO(mode)) return "a named pipe";
  if (S_ISSOCK(mode)) return "a socket";
  return "a device";
}

struct Place {
  std::string folder, name;
};

Place split(const std::string& path) {
  if (path.empty()) fail(path, "the path is empty, expected the name of a state file");
  const size_t slash = path.rfind('/');
  Place place;
  place.folder = slash == std::string::npos ? "." : path.substr(0, std::max<size_t>(slash, 1));
  place.name = slash == std::string::npos ? path : path.substr(slash + 1);
  if (place.name.empty() || place.name == "." || place.name == "..") {
    fail(path, "found a folder, expected the name of a state file");
  }
  return place;
}

void refuse_odd_target(int folder, const std::string& name, const std::string& path) {
  struct stat status{};
  if (::fstatat(folder, name.c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0) {
    if (errno != ENOENT) fail_errno(path, "examined");
  } else if (!S_ISREG(status.st_mode)) {
    fail(path, "found " + kind_of(status.st_mode) + " there, expected no file or a regular one; nothing was written");
  }
}

// A new file in `folder`, removed again unless it is renamed.
class TemporaryFile {
 public:
  TemporaryFile(int folder, const std::string& path) : folder_(folder), path_(path) {
    constexpr int kFlags = O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC;
    int fd = -1;
    for (int attempt = 0; fd < 0 && attempt < 100; ++attempt) {
      name_ = random_name();
      fd = ::openat(folder, name_.c_str(), kFlags, 0600);
      if (fd < 0 && errno != EEXIST && errno != EINTR) break;
    }
    if (fd < 0) fail_errno(path_, "written (no temporary file in its folder)");
    file_ = fd;
  }
  ~TemporaryFile() {
    if (file_ >= 0) ::close(file_);
    if (!name_.empty()) ::unlinkat(folder_, name_.c_str(), 0);
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;

  void write(std::span<const uint8_t> bytes) {
    // The umask may have taken more away from the mode than it should.
    if (::fchmod(file_, 0600) != 0) fail_errno(path_, "written");
    while (!bytes.empty()) {
      const ssize_t done = ::write(file_, bytes.data(), std::min(bytes.size(), kMostAtOnce));
      if (done < 0 && errno == EINTR) continue;
      if (done < 0) fail_errno(path_, "written");
      bytes = bytes.subspan(static_cast<size_t>(done));
    }
    if (::fsync(file_) != 0) fail_errno(path_, "flushed to the disk");
    // Some file systems report a failed write only here.
    if (::close(std::exchange(file_, -1)) != 0) fail_errno(path_, "written");
  }

  void rename_to(const std::string& name) {
    if (::renameat(folder_, name_.c_str(), folder_, name.c_str()) != 0) {
      fail_errno(path_, "replaced");
    }
    name_.clear();
  }

 private:
  static std::string random_name() {
    std::random_device device;
    char text[64];
    std::snprintf(text, sizeof text, ".armt-state-%08x%08x.tmp", device(), device());
    return text;
  }

  int folder_;
  std::string path_, name_;
  int file_ = -1;
};

}  // namespace

void replace_file(const std::string& path, std::span<const uint8_t> bytes) {
  const Place place = split(path);
  const Descriptor folder(::open(place.folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOCTTY));
  if (folder.get() < 0) fail_errno(path, "written (its folder)");
  refuse_odd_target(folder.get(), place.name, path);
  TemporaryFile file(folder.get(), path);
  file.write(bytes);
  file.rename_to(place.name);
  // Some file systems have no flush of folders; the rename is in their hands.
  if (::fsync(folder.get()) != 0 && errno != EINVAL && errno != ENOTSUP) {
    fail_errno(path, "flushed to the disk (its folder); the new file is in place");
  }
}

InputFile::InputFile(const std::string& path) : where_(path) {
  split(path);
  // O_NONBLOCK: opening a named pipe would wait for a writer otherwise.
  Descriptor file(::open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC | O_NOCTTY));
  if (file.get() < 0) {
    const int error = errno;
    struct stat link{};
    if (::lstat(path.c_str(), &link) == 0 && !S_ISREG(link.st_mode)) {
      fail(path, "found " + kind_of(link.st_mode) + ", expected a state file");
    }
    errno = error;
    fail_errno(path, "opened");
  }
  struct stat status{};
  if (::fstat(file.get(), &status) != 0) fail_errno(path, "examined");
  if (!S_ISREG(status.st_mode)) {
    fail(path, "found " + kind_of(status.st_mode) + ", expected a state file");
  }
  size_ = status.st_size;
  fd_ = file.give_up();
}

InputFile::~InputFile() {
  ::close(fd_);
}

void InputFile::read(void* to, int64_t bytes) {
  auto* at = static_cast<uint8_t*>(to);
  auto left = static_cast<size_t>(bytes);
  while (left > 0) {
    const ssize_t done = ::read(fd_, at, std::min(left, kMostAtOnce));
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) fail_errno(where_, "read");
    if (done == 0) fail(where_, "became shorter while it was read; the file is incomplete");
    at += done;
    left -= static_cast<size_t>(done);
  }
}

}  // namespace armt
