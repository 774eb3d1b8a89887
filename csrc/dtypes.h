// The numbers that kernels store. Host code names them without CUDA's headers; kernels compute in Accumulate<T>.
#pragma once

#include <stdint.h>

namespace frnn {

struct Half {  // IEEE binary16
  uint16_t bits;
};
struct BFloat16 {  // the upper half of a float
  uint16_t bits;
};
struct Exact {  // a float where no product may round it; those of plain float may be in TF32
  float value;
};

template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::type;

}  // namespace frnn
