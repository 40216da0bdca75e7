#include "vec_avx512.h"
#include "rows_kernel.h"
#include "decoder_kernel.h"

namespace omni {
const RowKernels kAvx512 = {"avx512", &forward, &backward, &fused, &exp2_array, kDecoder,
    kProduct<std::uint16_t>, kProduct<float>};
}
