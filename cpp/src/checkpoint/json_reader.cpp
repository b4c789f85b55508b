#include "checkpoint/json_reader.h"

#include <limits>

namespace armt {
namespace {

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}

void append_utf8(std::string& out, uint32_t code) {
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xC0 | (code >> 6));
    out += static_cast<char>(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    out += static_cast<char>(0xE0 | (code >> 12));
    out += static_cast<char>(0x80 | ((code >> 6) & 0x3F));
    out += static_cast<char>(0x80 | (code & 0x3F));
  } else {
    out += static_cast<char>(0xF0 | (code >> 18));
    out += static_cast<char>(0x80 | ((code >> 12) & 0x3F));
    out += static_cast<char>(0x80 | ((code >> 6) & 0x3F));
    out += static_cast<char>(0x80 | (code & 0x3F));
  }
}

}  // namespace

void JsonReader::fail(const std::string& message) const {
  throw JsonFault{offset(), message};
}

void JsonReader::skip_space() {
  while (at_ < text_.size()) {
    const char c = text_[at_];
    if (c != ' ' && c != '\t' && c != '\n' && c != '\r') return;
    ++at_;
  }
}

char JsonReader::peek() {
  skip_space();
  if (at_ == text_.size()) fail("the text ends too early");
  return text_[at_];
}

void JsonReader::expect(char wanted) {
  const char found = peek();
  if (found != wanted) {
    fail("found '" + printable(std::string_view(&text_[at_], 1)) + "', expected '" + wanted + "'");
  }
  ++at_;
}

// Whether another item follows; consumes the comma before it or the closing bracket.
bool JsonReader::more(char closing, bool first) {
  if (peek() == closing) {
    ++at_;
    return false;
  }
  if (!first) expect(',');
  return true;
}

void JsonReader::object(size_t longest_key, const std::function<void(std::string&&)>& member) {
  expect('{');
  for (bool first = true; more('}', first); first = false) {
    std::string key = string(longest_key);
    expect(':');
    member(std::move(key));
  }
}

void JsonReader::array(const std::function<void()>& element) {
  expect('[');
  for (bool first = true; more(']', first); first = false) element();
}

std::string JsonReader::string(size_t longest) {
  expect('"');
  std::string out;
  for (;;) {
    if (at_ == text_.size()) fail("a string is not closed");
    if (out.size() > longest) fail("a string is longer than " + std::to_string(longest) + " bytes");
    const unsigned char c = text_[at_];
    if (c == '"') {
      ++at_;
      return out;
    }
    if (c == '\\') {
      escape(out);
    } else if (c < 0x20) {
      fail("a control character stands inside a string");
    } else if (c < 0x80) {
      out += static_cast<char>(c);
      ++at_;
    } else {
      utf8(out);
    }
  }
}

uint32_t JsonReader::hex4() {
  if (text_.size() - at_ < 4) fail("a \\u escape is cut off");
  uint32_t code = 0;
  for (int i = 0; i < 4; ++i, ++at_) {
    const char c = text_[at_];
    code <<= 4;
    if (is_digit(c)) {
      code += c - '0';
    } else if (c >= 'a' && c <= 'f') {
      code += c - 'a' + 10;
    } else if (c >= 'A' && c <= 'F') {
      code += c - 'A' + 10;
    } else {
      fail("a \\u escape needs four hexadecimal digits");
    }
  }
  return code;
}

void JsonReader::escape(std::string& out) {
  if (text_.size() - at_ < 2) fail("an escape is cut off");
  const char kind = text_[at_ + 1];
  at_ += 2;
  switch (kind) {
    case '"':
    case '\\':
    case '/':
      out += kind;
      return;
    case 'b':
      out += '\b';
      return;
    case 'f':
      out += '\f';
      return;
    case 'n':
      out += '\n';
      return;
    case 'r':
      out += '\r';
      return;
    case 't':
      out += '\t';
      return;
    case 'u':
      break;
    default:
      fail("found an unknown escape");
  }
  uint32_t code = hex4();
  if (code >= 0xDC00 && code <= 0xDFFF) fail("found a lone surrogate");
  if (code >= 0xD800 && code <= 0xDBFF) {
    if (text_.substr(at_, 2) != "\\u") fail("found a lone surrogate");
    at_ += 2;
    const uint32_t low = hex4();
    if (low < 0xDC00 || low > 0xDFFF) fail("found a lone surrogate");
    code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
  }
  append_utf8(out, code);
}

// Copies one multi-byte character; refuses overlong forms, surrogates and code points above
// U+10FFFF.
void JsonReader::utf8(std::string& out) {
  const auto byte = [&](size_t i) -> uint32_t {
    return at_ + i < text_.size() ? static_cast<unsigned char>(text_[at_ + i]) : 0;
  };
  const uint32_t lead = byte(0);
  const size_t length = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
  if (lead < 0xC2 || lead > 0xF4) fail("found bytes that are not UTF-8");
  uint32_t code = lead & (0x7F >> length);
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xC0) != 0x80) fail("found bytes that are not UTF-8");
    code = (code << 6) | (byte(i) & 0x3F);
  }
  constexpr uint32_t kLeast[] = {0, 0, 0x80, 0x800, 0x10000};
  if (code < kLeast[length] || code > 0x10FFFF || (code >= 0xD800 && code <= 0xDFFF)) {
    fail("found bytes that are not UTF-8");
  }
  out.append(text_.substr(at_, length));
  at_ += length;
}

int64_t JsonReader::whole_number() {
  if (!is_digit(peek())) fail("expected a whole number that is not negative");
  if (text_[at_] == '0' && at_ + 1 < text_.size() && is_digit(text_[at_ + 1])) {
    fail("a number starts with a needless 0");
  }
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  int64_t value = 0;
  for (; at_ < text_.size() && is_digit(text_[at_]); ++at_) {
    const int64_t digit = text_[at_] - '0';
    if (value > (kMax - digit) / 10) fail("a number is larger than 2^63 - 1");
    value = value * 10 + digit;
  }
  if (at_ < text_.size() && (text_[at_] == '.' || text_[at_] == 'e' || text_[at_] == 'E')) {
    fail("expected a whole number without fraction or exponent");
  }
  return value;
}

void JsonReader::finish() {
  skip_space();
  if (at_ != text_.size()) fail("more text follows the end of the header");
}

std::string printable(std::string_view text) {
  constexpr size_t kLongest = 160;
  if (text.size() > kLongest) {
    const std::string left(text.substr(0, kLongest / 2));
    const std::string right(text.substr(text.size() - kLongest / 4));
    return printable(left) + " ... " + printable(right);
  }
  constexpr char kHex[] = "0123456789abcdef";
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7F) {
      out += c;
    } else {
      out += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
    }
  }
  return out;
}

}  // namespace armt
