// The list of cells: the one place where a cell's name meets its type.
#pragma once

#include "gru.h"
#include "lstm.h"
#include "rnn.h"

namespace frnn {

enum class CellKind { rnn_tanh, rnn_relu, gru, lstm };

struct CellName {
  const char* name;
  CellKind kind;
};

// The names under which Python and the operator schemas know the cells.
constexpr CellName kCellNames[] = {
    {"rnn_tanh", CellKind::rnn_tanh},
    {"rnn_relu", CellKind::rnn_relu},
    {"gru", CellKind::gru},
    {"lstm", CellKind::lstm},
};

inline namespace FRNN_ISA {

// Calls f with a value of the cell's type, so that a template can be chosen at run time.
template <class F>
inline auto with_cell(CellKind kind, F&& f) {
  switch (kind) {
    case CellKind::rnn_tanh:
      return f(RnnTanh{});
    case CellKind::rnn_relu:
      return f(RnnRelu{});
    case CellKind::gru:
      return f(Gru{});
    case CellKind::lstm:
      break;
  }
  return f(Lstm{});
}

}  // namespace FRNN_ISA
}  // namespace frnn
