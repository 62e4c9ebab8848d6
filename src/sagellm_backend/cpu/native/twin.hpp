// Every kernel once more as a plain loop in double precision: what tests compare the fast ones with.
#pragma once

#include "kernels.hpp"

namespace sage::twin {

// out[r][j] = sum over k of x[r][k] · w[j][k], with x as `prepare` left it for w's format.
void gemm(const Packed& w, const Activations& x, int rows, float* out);

void rms_norm(const float* x, const float* weight, int n, float eps, float* out);
void activate(Activation kind, float* gate, const float* up, int n);
void softcap(float* x, int n, float cap);
void rope(float* head, const float* cos_sin, int dim, bool interleaved);

// One query over `positions` of a sequence whose keys and values lie in blocks.
void attention(KvFormat format, const AttentionTile& tile, int lane, float* out);

}  // namespace sage::twin
