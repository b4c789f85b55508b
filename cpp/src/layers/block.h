// One decoder layer with its memory, written as calls on the backend.
#pragma once

#include <span>
#include <vector>

#include "backend.h"

namespace armt {

// The rows of the last layer whose output anybody needs. Keys and values come from all rows of the wave; queries, the
// output projection and the MLP run for these alone, which gives the same numbers.
struct OutputRows {
  Group group;                        // rows counted from 0 in Workspace::last
  std::span<const int64_t> gathered;  // absolute row in Workspace::residual of each
};

// read, attention, MLP, write for groups of any layers; residual rows in place.
void run_blocks(Backend& backend, const ModelConfig& config, const Workspace& workspace, const Scratch& scratch,
                Groups groups);

// The last layer of one wave; leaves the outputs in Workspace::last.
void run_last_block(Backend& backend, const ModelConfig& config, const Workspace& workspace, const Scratch& scratch,
                    const Group& group, const OutputRows& outputs);

}  // namespace armt
