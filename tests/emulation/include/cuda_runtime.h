// The part of CUDA that csrc/cuda uses, for a host compiler: kernels run in the emulation of tests/emulation/runtime.
// First on the include path, it takes the place of the toolkit's header. See tests/emulation/README.md.
#pragma once

#include "emulation/device.h"
#include "emulation/host.h"
#include "emulation/types.h"
