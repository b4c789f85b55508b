#include "lt.h"

#include <cublasLt.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "armt/error.h"
#include "check.h"

namespace armt::cuda {
namespace {

// The few entries that are used, by their own names.
struct Library {
  decltype(&cublasLtCreate) create;
  decltype(&cublasLtDestroy) destroy;
  decltype(&cublasLtMatmul) matmul;
  decltype(&cublasLtMatmulDescCreate) desc_create;
  decltype(&cublasLtMatmulDescDestroy) desc_destroy;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set;
  decltype(&cublasLtMatrixLayoutCreate) layout_create;
  decltype(&cublasLtMatrixLayoutDestroy) layout_destroy;
  decltype(&cublasLtMatrixLayoutSetAttribute) layout_set;
  decltype(&cublasLtMatmulPreferenceCreate) preference_create;
  decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic;
};

void* open_library() {
  constexpr const char* kName = "libcublasLt.so.13";
  std::vector<std::string> places;
  if (const char* named = std::getenv("ARMT_CUBLASLT")) places.push_back(named);
  places.push_back(kName);  // found through this module's run path, or the system's
  if (const char* home = std::getenv("CUDA_HOME")) places.push_back(std::string(home) + "/lib64/" + kName);
  for (const char* folder : {"/usr/local/cuda/lib64/", "/usr/local/cuda-13/lib64/"}) {
    places.push_back(std::string(folder) + kName);
  }
  std::string reasons;
  for (const std::string& place : places) {
    if (void* library = dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
    reasons += std::string(reasons.empty() ? "" : "; ") + dlerror();
  }
  throw DeviceError("device: cuBLASLt 13 was not found (" + reasons +
                    "); install nvidia-cublas>=13,<14, or name the file in ARMT_CUBLASLT");
}

template <class Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) throw DeviceError(std::string("device: cuBLASLt has no ") + name + "; expected version 13");
}

Library load_library() {
  void* library = open_library();
  Library found;
  find(library, "cublasLtCreate", found.create);
  find(library, "cublasLtDestroy", found.destroy);
  find(library, "cublasLtMatmul", found.matmul);
  find(library, "cublasLtMatmulDescCreate", found.desc_create);
  find(library, "cublasLtMatmulDescDestroy", found.desc_destroy);
  find(library, "cublasLtMatmulDescSetAttribute", found.desc_set);
  find(library, "cublasLtMatrixLayoutCreate", found.layout_create);
  find(library, "cublasLtMatrixLayoutDestroy", found.layout_destroy);
  find(library, "cublasLtMatrixLayoutSetAttribute", found.layout_set);
  find(library, "cublasLtMatmulPreferenceCreate", found.preference_create);
  find(library, "cublasLtMatmulPreferenceDestroy", found.preference_destroy);
  find(library, "cublasLtMatmulPreferenceSetAttribute", found.preference_set);
  find(library, "cublasLtMatmulAlgoGetHeuristic", found.heuristic);
  return found;
}

const Library& lt() {
  static const Library library = load_library();
  return library;
}

void check_lt(cublasStatus_t status, const char* call) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw DeviceError(std::string("cuBLASLt: ") + call + " failed with status " + std::to_string(status));
}

cudaDataType_t data_type(DType type) {
  switch (type) {
    case DType::bf16:
      return CUDA_R_16BF;
    case DType::f16:
      return CUDA_R_16F;
    default:
      return CUDA_R_32F;
  }
}

// Largest power of two, up to 256, that divides the addresses of all batches.
uint32_t alignment(const void* data, int64_t stride, int64_t element) {
  const auto bits = reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(stride * element) | 256;
  return static_cast<uint32_t>(bits & (~bits + 1));
}

cublasLtEpilogue_t epilogue_of(const Product& p) {
  const bool bias = p.bias != nullptr;
  switch (p.fused) {
    case Fused::gelu:
      return bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
    case Fused::relu:
      return bias ? CUBLASLT_EPILOGUE_RELU_BIAS : CUBLASLT_EPILOGUE_RELU;
    default:
      return bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
  }
}

}  // namespace

// The library sees columns first: out^T [cols, rows] = weight [depth, cols]^T in^T [depth, rows].
struct Lt::Plan {
  cublasLtMatmulDesc_t desc = nullptr;
  cublasLtMatrixLayout_t weight = nullptr, in = nullptr, out = nullptr;
  cublasLtMatmulAlgo_t algo{};
  bool found = false;

  ~Plan() {
    if (desc != nullptr) lt().desc_destroy(desc);
    for (cublasLtMatrixLayout_t layout : {weight, in, out}) {
      if (layout != nullptr) lt().layout_destroy(layout);
    }
  }

  template <class Value>
  void set(cublasLtMatmulDescAttributes_t which, const Value& value) {
    check_lt(lt().desc_set(desc, which, &value, sizeof(value)), "cublasLtMatmulDescSetAttribute");
  }
};

Lt::Lt() {
  cublasLtHandle_t handle = nullptr;
  check_lt(lt().create(&handle), "cublasLtCreate");
  handle_ = handle;
}

Lt::~Lt() {
  plans_.clear();
  lt().destroy(static_cast<cublasLtHandle_t>(handle_));
}

namespace {

cublasLtMatrixLayout_t make_layout(DType type, int64_t rows, int64_t cols, int64_t ld, int64_t batch, int64_t stride) {
  cublasLtMatrixLayout_t layout = nullptr;
  check_lt(lt().layout_create(&layout, data_type(type), rows, cols, ld), "cublasLtMatrixLayoutCreate");
  const auto count = static_cast<int32_t>(batch);
  check_lt(lt().layout_set(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof(count)), "batch count");
  check_lt(lt().layout_set(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof(stride)),
           "batch stride");
  return layout;
}

struct Preference {
  cublasLtMatmulPreference_t handle = nullptr;
  Preference() { check_lt(lt().preference_create(&handle), "cublasLtMatmulPreferenceCreate"); }
  ~Preference() { lt().preference_destroy(handle); }
  template <class Value>
  void set(cublasLtMatmulPreferenceAttributes_t which, const Value& value) {
    check_lt(lt().preference_set(handle, which, &value, sizeof(value)), "cublasLtMatmulPreferenceSetAttribute");
  }
};

}  // namespace

Lt::Plan& Lt::plan_for(const Product& p, const ProductSpace& space) {
  const int64_t element = size_of(p.type), out_element = size_of(p.out_type);
  const uint32_t align_weight = alignment(p.weight, p.weight_stride, element);
  const uint32_t align_in = alignment(p.in, p.in_stride, element);
  const uint32_t align_out = alignment(p.out, p.out_stride, out_element);
  const int flags = static_cast<int>(p.type) | static_cast<int>(p.out_type) << 2 | (p.add ? 16 : 0) |
                    (p.bias != nullptr ? 32 : 0) | static_cast<int>(p.fused) << 6 | (p.by_depth ? 256 : 0);
  const int64_t alignments = align_weight | int64_t{align_in} << 16 | int64_t{align_out} << 32;
  const Key key{p.rows,          p.cols,      p.depth,      p.batch,    p.ld_in, p.ld_out,
                p.weight_stride, p.in_stride, p.out_stride, alignments, flags};
  std::unique_ptr<Plan>& slot = plans_[key];
  if (slot) return *slot;

  auto plan = std::make_unique<Plan>();
  check_lt(lt().desc_create(&plan->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescCreate");
  plan->set(CUBLASLT_MATMUL_DESC_TRANSA, p.by_depth ? CUBLAS_OP_N : CUBLAS_OP_T);
  plan->set(CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N);
  plan->set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue_of(p));
  if (p.bias != nullptr) {
    plan->set(CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE, p.bias_stride);
    plan->set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias);
  }
  const int64_t ld_weight = p.by_depth ? p.cols : p.depth, other = p.by_depth ? p.depth : p.cols;
  plan->weight = make_layout(p.type, ld_weight, other, ld_weight, p.batch, p.weight_stride);
  plan->in = make_layout(p.type, p.depth, p.rows, p.ld_in, p.batch, p.in_stride);
  plan->out = make_layout(p.out_type, p.cols, p.rows, p.ld_out, p.batch, p.out_stride);

  Preference preference;
  preference.set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<size_t>(space.bytes));
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, align_weight);
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, align_in);
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, align_out);
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, align_out);
  // Partial sums stay in float32.
  preference.set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                 static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_INPLACE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  cublasLtMatmulHeuristicResult_t result{};
  int count = 0;
  const cublasStatus_t status = lt().heuristic(static_cast<cublasLtHandle_t>(handle_), plan->desc, plan->weight,
                                               plan->in, plan->out, plan->out, preference.handle, 1, &result, &count);
  plan->found = status == CUBLAS_STATUS_SUCCESS && count > 0 && result.state == CUBLAS_STATUS_SUCCESS;
  plan->algo = result.algo;
  slot = std::move(plan);
  return *slot;
}

void Lt::multiply(const Product& p, const ProductSpace& space) {
  if (p.rows == 0 || p.cols == 0) return;
  // ARMT_PLAIN_PRODUCTS: all by our own kernel (for tools that do not see what the library's kernels store).
  static const bool plain = std::getenv("ARMT_PLAIN_PRODUCTS") != nullptr;
  if (plain) {
    simple_multiply(p, space.stream);
    return;
  }
  Plan& plan = plan_for(p, space);
  if (!plan.found) {
    simple_multiply(p, space.stream);
    return;
  }
  if (p.bias != nullptr) plan.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias);
  const float one = 1.0f, beta = p.add ? 1.0f : 0.0f;
  check_lt(lt().matmul(static_cast<cublasLtHandle_t>(handle_), plan.desc, &one, p.weight, plan.weight, p.in, plan.in,
                       &beta, p.out, plan.out, p.out, plan.out, &plan.algo, space.data,
                       static_cast<size_t>(space.bytes), space.stream),
           "cublasLtMatmul");
}

}  // namespace armt::cuda
