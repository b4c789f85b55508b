#include "inject.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdlib>
#include <new>

namespace faults {
namespace {

std::atomic<bool> armed{false}, met{false};
std::atomic<int64_t> left{0};
What kind = What::allocation;

bool fails(bool file) {
  if (!armed.load(std::memory_order_acquire) || kind == What::stuttering) return false;
  if (file != (kind == What::file || kind == What::full)) return false;
  const int64_t before = left.fetch_sub(1);
  if (before > 0 || (before < 0 && kind != What::allocations)) return false;
  met.store(true);
  if (file) errno = kind == What::full ? ENOSPC : EIO;
  return true;
}

bool stutters() {
  return armed.load() && kind == What::stuttering;
}

// Every third operation is interrupted.
bool interrupted() {
  static std::atomic<int64_t> count{0};
  if (!stutters() || count.fetch_add(1) % 3 != 0) return false;
  met.store(true);
  errno = EINTR;
  return true;
}

size_t piece(size_t count) {
  return stutters() && count > 1 ? 1 : count;
}

}  // namespace

void arm(What what, int64_t number) {
  kind = what;
  left.store(number);
  met.store(false);
  armed.store(true, std::memory_order_release);
}

bool disarm() {
  armed.store(false, std::memory_order_release);
  return met.load();
}

}  // namespace faults

using faults::fails;

extern "C" {
void* __real_malloc(size_t size);
int __real_open(const char* path, int flags, ...);
int __real_openat(int folder, const char* path, int flags, ...);
int __real_fstat(int file, struct stat* status);
int __real_fstatat(int folder, const char* path, struct stat* status, int flags);
ssize_t __real_read(int file, void* to, size_t count);
ssize_t __real_write(int file, const void* from, size_t count);
int __real_fsync(int file);
int __real_fchmod(int file, mode_t mode);
int __real_renameat(int from, const char* old_path, int to, const char* new_path);
void* __real_mmap(void* at, size_t size, int protection, int flags, int file, off_t offset);

void* __wrap_malloc(size_t size) {
  return fails(false) ? nullptr : __real_malloc(size);
}
int __wrap_open(const char* path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  const mode_t mode = (flags & O_CREAT) != 0 ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  return fails(true) ? -1 : __real_open(path, flags, mode);
}
int __wrap_openat(int folder, const char* path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  const mode_t mode = (flags & O_CREAT) != 0 ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  return fails(true) ? -1 : __real_openat(folder, path, flags, mode);
}
int __wrap_fstat(int file, struct stat* status) {
  return fails(true) ? -1 : __real_fstat(file, status);
}
int __wrap_fstatat(int folder, const char* path, struct stat* status, int flags) {
  return fails(true) ? -1 : __real_fstatat(folder, path, status, flags);
}
ssize_t __wrap_read(int file, void* to, size_t count) {
  if (fails(true) || faults::interrupted()) return -1;
  return __real_read(file, to, faults::piece(count));
}
ssize_t __wrap_write(int file, const void* from, size_t count) {
  if (fails(true) || faults::interrupted()) return -1;
  return __real_write(file, from, faults::piece(count));
}
int __wrap_fsync(int file) {
  return fails(true) ? -1 : __real_fsync(file);
}
int __wrap_fchmod(int file, mode_t mode) {
  return fails(true) ? -1 : __real_fchmod(file, mode);
}
int __wrap_renameat(int from, const char* old_path, int to, const char* new_path) {
  return fails(true) ? -1 : __real_renameat(from, old_path, to, new_path);
}
void* __wrap_mmap(void* at, size_t size, int protection, int flags, int file, off_t offset) {
  return fails(true) ? MAP_FAILED : __real_mmap(at, size, protection, flags, file, offset);
}
}

void* operator new(size_t size) {
  void* const block = fails(false) ? nullptr : __real_malloc(size > 0 ? size : 1);
  if (block == nullptr) throw std::bad_alloc();
  return block;
}
void* operator new[](size_t size) {
  return operator new(size);
}
void operator delete(void* block) noexcept {
  std::free(block);
}
void operator delete[](void* block) noexcept {
  std::free(block);
}
void operator delete(void* block, size_t) noexcept {
  std::free(block);
}
void operator delete[](void* block, size_t) noexcept {
  std::free(block);
}
