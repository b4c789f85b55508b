// State files, format 1 (docs/formats.md): little-endian, every length and sum checked.
//
//   prefix   magic 89 "ARMTS" 0d 0a | u32 0x01020304 | u32 format | u64 bytes of the whole file |
//            u32 blocks | u32 CRC-32C of the 28 bytes before
//   block    u32 type | u32 layer, ~0 for none | u64 payload bytes | u32 CRC-32C of these 16 bytes
//   |
//            payload | u32 CRC-32C of the payload
//   trailer  u64 CRC-64 of everything before
//
// Blocks ascend by (none first, then layer; type); one that would be empty is absent.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "engine/host_state.h"

namespace armt {

inline constexpr uint32_t kStateFormat = 1;

int64_t encoded_bytes(const HostState& state);
// `out` has encoded_bytes() bytes.
void encode(const HostState& state, std::span<uint8_t> out);

// StateError, headed by `where`, for anything but what encode() wrote. Nothing is allocated that
// the remaining bytes do not cover.
HostState decode(std::span<const uint8_t> bytes, const std::string& where = "state");

// Atomic, see replace_file().
void save_file(const std::string& path, std::span<const uint8_t> bytes);
// As decode(), reading block by block: a file costs no more memory than the state in it.
HostState load_file(const std::string& path);

}  // namespace armt
