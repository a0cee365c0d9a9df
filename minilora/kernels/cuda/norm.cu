// Layer norm and RMS norm, a block for each row of n features. See functional/norm.py for the equations.
// A thread takes packs of PACK features; where a row does not begin at a multiple of 16 bytes, a pack is one feature.

template <int N> __device__ Vector<ACT, N> part(const ACT* x, int i) { return ((const Vector<ACT, N>*)x)[i]; }
template <int N> __device__ Vector<REAL, N> part_of_parameter(const REAL* p, int i) { return ((const Vector<REAL, N>*)p)[i]; }

template <int N>
__device__ void forward(const ACT* x, const REAL* gamma, const REAL* beta, REAL eps, int n, ACT* y, ACT* xhat, REAL* rstd, REAL* shared) {
    REAL mean = 0, squares = 0;
    if (beta) {
        REAL sum = 0;
        for (int i = threadIdx.x; i < n / N; i += blockDim.x) {
            const Vector<ACT, N> a = part<N>(x, i);
            for (int l = 0; l < N; l++) sum += a.at[l];
        }
        mean = block_sum(sum, shared) / n;
    }
    for (int i = threadIdx.x; i < n / N; i += blockDim.x) {
        const Vector<ACT, N> a = part<N>(x, i);
        for (int l = 0; l < N; l++) squares += (a.at[l] - mean) * (a.at[l] - mean);
    }
    const REAL scale = 1 / sqrt(block_sum(squares, shared) / n + eps);
    for (int i = threadIdx.x; i < n / N; i += blockDim.x) {
        const Vector<ACT, N> a = part<N>(x, i);
        const Vector<REAL, N> g = part_of_parameter<N>(gamma, i), b = beta ? part_of_parameter<N>(beta, i) : Vector<REAL, N>{};
        Vector<ACT, N> hat, result;
        for (int l = 0; l < N; l++) {
            const REAL h = (a.at[l] - mean) * scale;
            hat.at[l] = h;
            result.at[l] = g.at[l] * h + b.at[l];
        }
        ((Vector<ACT, N>*)xhat)[i] = hat;
        ((Vector<ACT, N>*)y)[i] = result;
    }
    if (threadIdx.x == 0) *rstd = scale;
}

template <int N>
__device__ void backward(const ACT* dy, const ACT* xhat, REAL rstd, const REAL* gamma, int centred, int n, ACT* dx, REAL* shared) {
    REAL sum = 0, along = 0;
    for (int i = threadIdx.x; i < n / N; i += blockDim.x) {
        const Vector<ACT, N> d = part<N>(dy, i), h = part<N>(xhat, i);
        const Vector<REAL, N> g = part_of_parameter<N>(gamma, i);
        for (int l = 0; l < N; l++) {
            const REAL dxhat = g.at[l] * d.at[l];
            sum += dxhat;
            along += dxhat * h.at[l];
        }
    }
    const REAL mean = centred ? block_sum(sum, shared) / n : REAL(0);
    along = block_sum(along, shared) / n;
    for (int i = threadIdx.x; i < n / N; i += blockDim.x) {
        const Vector<ACT, N> d = part<N>(dy, i), h = part<N>(xhat, i);
        const Vector<REAL, N> g = part_of_parameter<N>(gamma, i);
        Vector<ACT, N> result;
        for (int l = 0; l < N; l++) result.at[l] = rstd * (g.at[l] * d.at[l] - mean - h.at[l] * along);
        ((Vector<ACT, N>*)dx)[i] = result;
    }
}

// y = gamma xhat + beta, xhat = (x - mean) rstd; beta null: RMS norm, without beta and without the mean.
extern "C" __global__ void norm_forward(const ACT* x, const REAL* gamma, const REAL* beta, REAL eps, int n, ACT* y, ACT* xhat, REAL* rstd) {
    extern __shared__ REAL shared[];
    const bool packed = n % PACK == 0 && aligned(x) && aligned(gamma) && aligned(beta) && aligned(y) && aligned(xhat);
    const long long row = (long long)blockIdx.x * n;
    if (packed) forward<PACK>(x + row, gamma, beta, eps, n, y + row, xhat + row, rstd + blockIdx.x, shared);
    else forward<1>(x + row, gamma, beta, eps, n, y + row, xhat + row, rstd + blockIdx.x, shared);
}

// dx = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat)), dxhat = gamma dy; `centred` 0: RMS norm, without the first mean.
extern "C" __global__ void norm_backward(
    const ACT* dy, const ACT* xhat, const REAL* rstd, const REAL* gamma, int centred, int n, ACT* dx) {
    extern __shared__ REAL shared[];
    const bool packed = n % PACK == 0 && aligned(dy) && aligned(xhat) && aligned(gamma) && aligned(dx);
    const long long row = (long long)blockIdx.x * n;
    if (packed) backward<PACK>(dy + row, xhat + row, rstd[blockIdx.x], gamma, centred, n, dx + row, shared);
    else backward<1>(dy + row, xhat + row, rstd[blockIdx.x], gamma, centred, n, dx + row, shared);
}
