#pragma once

namespace omni {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1 };

}  // namespace omni
