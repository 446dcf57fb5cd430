// How an instance translation unit lists its kernels.
#pragma once
#include "../dispatch.h"

namespace npt {

template <class C>
Kernel describe(const void* function, Family family, Epilogue epilogue) {
  return Kernel{function, family, epilogue, C::kType, C::kMnMajor, C::kBM, C::kBN, C::kCluster, C::kStages, C::kThreads,
                C::kSmemBytes};
}
template <class C>
Kernel describe_decode(const void* function, Epilogue epilogue) {
  return Kernel{function,  Family::kDecode, epilogue, C::kType,   C::kMnMajor, C::kTokens,
                C::kRows, 1,               C::kStages, C::kThreads, C::kSmemBytes};
}

}  // namespace npt
