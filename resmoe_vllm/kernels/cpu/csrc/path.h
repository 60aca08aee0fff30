// The vectors that this processor, or the flags that the library is compiled with, have.
#pragma once

#ifdef __aarch64__
#include "path_neon.h"
#elif defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "path_avx512.h"
#else
#include "path_avx2.h"
#endif
