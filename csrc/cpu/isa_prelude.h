// What the kernels need of the standard library and of the project's code that is compiled once for all machines:
// included before a file turns an instruction set on.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <new>
#include <utility>

#include "../args.h"
#include "kept_panels.h"
#include "kernels.h"
#include "plan.h"
#include "scratch.h"
#include "team.h"
