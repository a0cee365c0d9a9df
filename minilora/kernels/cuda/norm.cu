// Layer norm and RMS norm, a block for each row of n features. See functional/norm.py for the equations.

// y = gamma xhat + beta, xhat = (x - mean) rstd; beta null: RMS norm, without beta and without the mean.
extern "C" __global__ void norm_forward(const ACT* x, const REAL* gamma, const REAL* beta, REAL eps, int n, ACT* y, ACT* xhat, REAL* rstd) {
    extern __shared__ REAL shared[];
    const long long row = (long long)blockIdx.x * n;
    REAL mean = 0;
    if (beta) {
        REAL sum = 0;
        for (int j = threadIdx.x; j < n; j += blockDim.x) sum += x[row + j];
        mean = block_sum(sum, shared) / n;
    }
    REAL squares = 0;
    for (int j = threadIdx.x; j < n; j += blockDim.x) {
        REAL c = x[row + j] - mean;
        squares += c * c;
    }
    REAL scale = 1 / sqrt(block_sum(squares, shared) / n + eps);
    for (int j = threadIdx.x; j < n; j += blockDim.x) {
        REAL h = (x[row + j] - mean) * scale;
        xhat[row + j] = h;
        y[row + j] = gamma[j] * h + (beta ? beta[j] : REAL(0));
    }
    if (threadIdx.x == 0) rstd[blockIdx.x] = scale;
}

// dx = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat)), dxhat = gamma dy; `centred` 0: RMS norm, without the first mean.
extern "C" __global__ void norm_backward(
    const ACT* dy, const ACT* xhat, const REAL* rstd, const REAL* gamma, int centred, int n, ACT* dx) {
    extern __shared__ REAL shared[];
    const long long row = (long long)blockIdx.x * n;
    REAL sum = 0, along = 0;
    for (int j = threadIdx.x; j < n; j += blockDim.x) {
        REAL d = gamma[j] * dy[row + j];
        sum += d;
        along += d * xhat[row + j];
    }
    REAL mean = centred ? block_sum(sum, shared) / n : REAL(0);
    along = block_sum(along, shared) / n;
    for (int j = threadIdx.x; j < n; j += blockDim.x)
        dx[row + j] = rstd[blockIdx.x] * (gamma[j] * dy[row + j] - mean - xhat[row + j] * along);
}
