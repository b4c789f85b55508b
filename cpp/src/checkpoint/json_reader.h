// A strict JSON reader that is driven by what its caller expects, so it never recurses and never
// builds a tree: nesting deeper than the caller asks for is a fault at the first bracket.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

namespace armt {

// Text with a fault: the byte offset says where.
struct JsonFault {
  int64_t offset = 0;
  std::string message;
};

// Throws JsonFault. Accepts RFC 8259 JSON only: valid UTF-8, no lone surrogates, no comments.
class JsonReader {
 public:
  explicit JsonReader(std::string_view text) : text_(text) {}

  // { "key": <value> , ... }; `member` is called with each key and must read its value.
  void object(size_t longest_key, const std::function<void(std::string&&)>& member);
  // [ <value> , ... ]; `element` must read one value.
  void array(const std::function<void()>& element);
  // A string of at most `longest` bytes after decoding.
  std::string string(size_t longest);
  // A whole number 0 .. 2^63 - 1 in plain digits.
  int64_t whole_number();
  // Only white space may follow.
  void finish();

  int64_t offset() const { return static_cast<int64_t>(at_); }

 private:
  [[noreturn]] void fail(const std::string& message) const;
  void skip_space();
  char peek();
  void expect(char wanted);
  bool more(char closing, bool first);
  void escape(std::string& out);
  uint32_t hex4();
  void utf8(std::string& out);

  std::string_view text_;
  size_t at_ = 0;
};

// For messages: control characters escaped, long text cut in the middle.
std::string printable(std::string_view text);

}  // namespace armt
