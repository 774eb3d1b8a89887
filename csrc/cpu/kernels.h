// The CPU room's door: the kernels of every compiled instruction set, and which of them this machine uses.
#pragma once

#include "../args.h"
#include "plan.h"

namespace frnn {

enum class CellKind;  // csrc/cells/cells.h

constexpr int kMaxThreads = 256;

struct CpuKernels {
  int vector_bytes;
  void (*forward_float)(CellKind, const ForwardArgs<float>&);
  void (*forward_double)(CellKind, const ForwardArgs<double>&);
  void (*backward_float)(CellKind, const BackwardArgs<float>&);
  void (*backward_double)(CellKind, const BackwardArgs<double>&);
  void (*tangent_float)(CellKind, const TangentArgs<float>&);
  void (*tangent_double)(CellKind, const TangentArgs<double>&);
  void (*dual_backward_float)(CellKind, const DualBackwardArgs<float>&);
  void (*dual_backward_double)(CellKind, const DualBackwardArgs<double>&);
  void (*sum_over_rows_float)(const SumOverRows<float>&);
  void (*sum_over_rows_double)(const SumOverRows<double>&);
  void (*multiply_float)(const RowsTimesMatrix<float>&);
  void (*multiply_double)(const RowsTimesMatrix<double>&);
  CpuProblem (*problem_float)(CellKind, const Shape&, int threads, bool backward);
  CpuProblem (*problem_double)(CellKind, const Shape&, int threads, bool backward);

  void forward(CellKind kind, const ForwardArgs<float>& args) const { forward_float(kind, args); }
  void forward(CellKind kind, const ForwardArgs<double>& args) const { forward_double(kind, args); }
  void backward(CellKind kind, const BackwardArgs<float>& args) const { backward_float(kind, args); }
  void backward(CellKind kind, const BackwardArgs<double>& args) const { backward_double(kind, args); }
  void tangent(CellKind kind, const TangentArgs<float>& args) const { tangent_float(kind, args); }
  void tangent(CellKind kind, const TangentArgs<double>& args) const { tangent_double(kind, args); }
  void dual_backward(CellKind kind, const DualBackwardArgs<float>& args) const {
    dual_backward_float(kind, args);
  }
  void dual_backward(CellKind kind, const DualBackwardArgs<double>& args) const {
    dual_backward_double(kind, args);
  }
  void sum_over_rows(const SumOverRows<float>& args) const { sum_over_rows_float(args); }
  void sum_over_rows(const SumOverRows<double>& args) const { sum_over_rows_double(args); }
  void multiply(const RowsTimesMatrix<float>& args) const { multiply_float(args); }
  void multiply(const RowsTimesMatrix<double>& args) const { multiply_double(args); }
};

// Layers whose operands are multiplied as they are stored, in bfloat16.
struct Bfloat16Kernels {
  void (*forward)(CellKind, const ForwardArgs<BFloat16>&);
  CpuProblem (*problem)(CellKind, const Shape&, int threads, bool backward);
};

// Float layers whose operands are multiplied as sums of `parts` bfloat16: three are float's accuracy, two are faster.
struct SplitKernels {
  bool (*pays)(CellKind, const Shape&);
  void (*forward)(CellKind, const ForwardArgs<float>&, int parts);
  void (*tangent)(CellKind, const TangentArgs<float>&, int parts);
  CpuProblem (*problem)(CellKind, const Shape&, int threads);
};

// The same of backward scans, without a projection.
struct SplitBackwardKernels {
  bool (*pays)(CellKind, const Shape&);
  void (*backward)(CellKind, const BackwardArgs<float>&, int parts);
  CpuProblem (*problem)(CellKind, const Shape&, int threads);
};

// Backward scans of layers in bfloat16, whose operands are multiplied as they are stored; without a projection.
struct Bfloat16BackwardKernels {
  bool (*pays)(CellKind, const Shape&);
  void (*backward)(CellKind, const BackwardArgs<BFloat16>&);
  CpuProblem (*problem)(CellKind, const Shape&, int threads);
};

// Matrix products of float in the same way as layers.
struct MatrixKernels {
  bool (*pays)(int64_t M, int64_t N, int64_t K);  // of a result [M, N], each of it a sum of K
  void (*sum_over_rows)(const SumOverRows<float>&, int parts);
  void (*multiply)(const RowsTimesMatrix<float>&, int parts);
};

struct InstructionSet {
  const char* name;
  const CpuKernels* kernels;
  const Bfloat16Kernels* bfloat16;  // null: bfloat16 is widened to float
  const SplitKernels* split;        // null: float is multiplied as it is
  const SplitBackwardKernels* split_backward;
  const Bfloat16BackwardKernels* bfloat16_backward;  // null: the scan is of float
  const MatrixKernels* products;                     // null: as split
  bool (*supported)();
};

// Best first; the last runs anywhere.
extern const InstructionSet kInstructionSets[];
extern const int kInstructionSetCount;

const InstructionSet& instruction_set();          // in use
void use_instruction_set(const InstructionSet&);  // for tests and benchmarks; holds for the whole process

}  // namespace frnn
