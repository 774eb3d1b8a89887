// The input's side of the gates: matrix products over as many steps at a time as the plan allows memory for.
#include <algorithm>

#include "scans.h"

namespace frnn {

InputGates::InputGates(const Problem& p, const Tensor& x, int64_t chunk_steps)
    : p_(p), x_(x), chunk_(chunk_steps) {
  const Shape& s = p.shape;
  for (int64_t d = 0; d < s.D && chunk_ > 0; ++d) {
    rows_[d] = p.allocate({std::min(s.N, chunk_ * s.B), p.cell.gates * s.H}, p.accumulate);
    transposed_[d] = p.weights[d].w_ih.t();
  }
}

void InputGates::advance(int64_t order) {
  if (chunk_ == 0 || order % chunk_ != 0) return;
  const Shape& s = p_.shape;
  const int64_t last = std::min(order + chunk_, s.T) - 1;
  for (int64_t d = 0; d < s.D; ++d) {
    const int64_t early = d == 0 ? order : s.T - 1 - last, late = d == 0 ? last : s.T - 1 - order;
    first_[d] = s.offsets[early];
    const int64_t count = s.offsets[late + 1] - first_[d];
    if (count > 0) product(rows_[d].narrow(0, 0, count), x_.narrow(0, first_[d], count), transposed_[d]);
  }
}

}  // namespace frnn
