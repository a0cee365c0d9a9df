// y = f(x) and its slope f'(x) in one pass, where `slope` is not null; dx = dy f'(x) is then one product. See ../activations.py.

extern "C" __global__ void gelu(const ACT* x, ACT* y, ACT* slope, long long n) {
    const REAL r = REAL(0.70710678118654752440), c = REAL(0.39894228040143267794);  // 1 / sqrt 2, 1 / sqrt(2 pi)
    GRID_STRIDE(i, n) {
        REAL a = x[i], phi = REAL(0.5) * erfc(-a * r);  // Phi(a)
        y[i] = a * phi;
        if (slope) slope[i] = phi + a * c * exp(REAL(-0.5) * a * a);
    }
}

extern "C" __global__ void gelu_tanh(const ACT* x, ACT* y, ACT* slope, long long n) {
    const REAL c = REAL(0.79788456080286535588), k = REAL(0.044715);  // sqrt(2 / pi)
    GRID_STRIDE(i, n) {
        REAL a = x[i], t = tanh(c * (a + k * a * a * a));
        y[i] = REAL(0.5) * a * (1 + t);
        if (slope) slope[i] = REAL(0.5) * (1 + t) + REAL(0.5) * a * (1 - t * t) * c * (1 + 3 * k * a * a);
    }
}

extern "C" __global__ void silu(const ACT* x, ACT* y, ACT* slope, long long n) {
    GRID_STRIDE(i, n) {
        REAL a = x[i], s = 1 / (1 + exp(-a));
        y[i] = a * s;
        if (slope) slope[i] = s * (1 + a * (1 - s));
    }
}

// y = silu(g) u; kept: by_u = silu(g) = dy/du, and by_g = u silu'(g) = dy/dg, where it is not null. See ../gate.py.
extern "C" __global__ void swiglu(const ACT* g, const ACT* u, ACT* y, ACT* by_u, ACT* by_g, long long n) {
    GRID_STRIDE(i, n) {
        REAL a = g[i], s = 1 / (1 + exp(-a)), f = a * s;
        y[i] = f * u[i];
        if (by_g) {
            by_u[i] = f;
            by_g[i] = u[i] * s * (1 + a * (1 - s));
        }
    }
}
