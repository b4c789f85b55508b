// Rotation of queries. It happens while attend() loads them, so that they cross memory once; the angles of each row are
// computed when the row enters the model (rows.cu), those of keys are applied by store_kv().
#include "cuda_backend.h"

namespace armt::cuda {

void CudaBackend::rotate_queries(Groups, const Rows&) {}

}  // namespace armt::cuda
