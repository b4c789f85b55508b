// What a state belongs to: a model's settings and weights as named values that can be written down,
// read back and compared. Device, threads, instruction set and schedule are no part of it: a state
// moves between them.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "armt/config.h"

namespace armt {

struct StateFacts {
  ModelConfig config;
  DType weight_dtype = DType::f32;
  std::string weights;  // Fingerprint::hex
};

using FactValue = std::variant<bool, int64_t, double, std::string>;

struct Fact {
  std::string name;  // "decoder.d_model", "memory.dialect", "weights.dtype", ...
  FactValue value;
};

// All facts in a fixed order; choices are lower-case words.
std::vector<Fact> list_facts(const StateFacts& facts);

// The reverse. What is absent keeps its default, so that a setting added later can be given one
// that means "as before". StateError lists unknown names, wrong types and impossible values.
StateFacts facts_from(std::span<const Fact> facts, const std::string& where);

// StateError that lists every fact in which a state and an engine differ.
void require_same_model(const StateFacts& state, const StateFacts& engine);

}  // namespace armt
