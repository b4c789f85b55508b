// The JSON reader: it reads what its caller expects, so the first bytes of an input say what that is.
#include <functional>

#include "checkpoint/json_reader.h"
#include "common.h"

namespace {

using armt::JsonReader;

// Written back with the escapes that every text needs, and no other.
std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", static_cast<unsigned>(c));
      out += escaped;
    } else {
      out += c;
    }
  }
  return out + "\"";
}

void read_string(JsonReader& reader, size_t longest) {
  const std::string text = reader.string(longest);
  fuzz::require(text.size() <= longest + 3, "a string is no longer than allowed, up to one character");
  const std::string again = quoted(text);
  JsonReader second(again);
  fuzz::require(second.string(text.size()) == text, "a string survives being written and read");
  second.finish();
  armt::printable(text);
}

void read_number(JsonReader& reader) {
  const int64_t value = reader.whole_number();
  fuzz::require(value >= 0, "a whole number is not negative");
  const std::string text = std::to_string(value);
  JsonReader second(text);
  fuzz::require(second.whole_number() == value, "a number survives being written and read");
}

// Two bits a level choose what is expected there.
void read_value(JsonReader& reader, uint32_t shape, int depth) {
  switch (depth == 4 ? 2 + shape % 2 : shape % 4) {
    case 0:
      return reader.object(64, [&](std::string&& key) {
        fuzz::require(key.size() <= 67, "a key is no longer than allowed");
        read_value(reader, shape >> 2, depth + 1);
      });
    case 1:
      return reader.array([&] { read_value(reader, shape >> 2, depth + 1); });
    case 2:
      return read_string(reader, 64);
    default:
      return read_number(reader);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Bytes in(data, size);
  const auto shape = in.number<uint16_t>();
  const std::string_view text(reinterpret_cast<const char*>(in.rest().data()), in.size());
  JsonReader reader(text);
  try {
    read_value(reader, shape, 0);
    reader.finish();
  } catch (const armt::JsonFault& fault) {
    fuzz::require(fault.offset >= 0 && fault.offset <= static_cast<int64_t>(text.size()), "a fault lies in the text");
    fuzz::require(!fault.message.empty(), "a fault has a message");
  }
  return 0;
}
