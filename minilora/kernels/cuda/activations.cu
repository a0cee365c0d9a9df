// y = f(x) and its derivative f'(x) in one pass, where `dy_dx` is not null; dx = dy f'(x) is then one product. See pointwise.py.

// A thread takes a pack (common.cuh). f(a, value, derivative) gives both.

template <class F> __device__ void with_derivative(const ACT* x, ACT* y, ACT* dy_dx, long long n, F f) {
    const long long packs = aligned(x) && aligned(y) && aligned(dy_dx) ? n / PACK : 0;
    REAL value, derivative;
    GRID_STRIDE(i, packs) {
        const Pack a = load_pack(x, i);
        Pack b, c;
#pragma unroll
        for (int l = 0; l < PACK; l++) {
            f(REAL(a.at[l]), value, derivative);
            b.at[l] = value;
            c.at[l] = derivative;
        }
        store_pack(y, i, b);
        if (dy_dx) store_pack(dy_dx, i, c);
    }
    GRID_STRIDE(i, n - packs * PACK) {
        f(REAL(x[packs * PACK + i]), value, derivative);
        y[packs * PACK + i] = value;
        if (dy_dx) dy_dx[packs * PACK + i] = derivative;
    }
}

extern "C" __global__ void gelu(const ACT* x, ACT* y, ACT* dy_dx, long long n) {
    with_derivative(x, y, dy_dx, n, [](REAL a, REAL& value, REAL& derivative) {
        const REAL r = REAL(0.70710678118654752440), c = REAL(0.39894228040143267794);  // 1 / sqrt 2, 1 / sqrt(2 pi)
        const REAL phi = REAL(0.5) * erfc(-a * r);  // Phi(a)
        value = a * phi;
        derivative = phi + a * c * exp(REAL(-0.5) * a * a);
    });
}

extern "C" __global__ void gelu_tanh(const ACT* x, ACT* y, ACT* dy_dx, long long n) {
    with_derivative(x, y, dy_dx, n, [](REAL a, REAL& value, REAL& derivative) {
        const REAL c = REAL(0.79788456080286535588), k = REAL(0.044715);  // sqrt(2 / pi)
        const REAL t = tanh(c * (a + k * a * a * a));
        value = REAL(0.5) * a * (1 + t);
        derivative = REAL(0.5) * (1 + t) + REAL(0.5) * a * (1 - t * t) * c * (1 + 3 * k * a * a);
    });
}

extern "C" __global__ void silu(const ACT* x, ACT* y, ACT* dy_dx, long long n) {
    with_derivative(x, y, dy_dx, n, [](REAL a, REAL& value, REAL& derivative) {
        const REAL s = 1 / (1 + exp(-a));
        value = a * s;
        derivative = s * (1 + a * (1 - s));
    });
}

// y = silu(g) u; kept: by_u = silu(g) = dy/du, and by_g = u silu'(g) = dy/dg, where it is not null. See pointwise.py.
extern "C" __global__ void swiglu(const ACT* g, const ACT* u, ACT* y, ACT* by_u, ACT* by_g, long long n) {
    const bool all = aligned(g) && aligned(u) && aligned(y) && aligned(by_u) && aligned(by_g);
    const long long packs = all ? n / PACK : 0, rest = packs * PACK;
    GRID_STRIDE(i, packs) {
        const Pack a = load_pack(g, i), b = load_pack(u, i);
        Pack value, of_u, of_g;
#pragma unroll
        for (int l = 0; l < PACK; l++) {
            const REAL x = a.at[l], s = 1 / (1 + exp(-x)), f = x * s;
            value.at[l] = f * b.at[l];
            of_u.at[l] = f;
            of_g.at[l] = b.at[l] * s * (1 + x * (1 - s));
        }
        store_pack(y, i, value);
        if (by_g) {
            store_pack(by_u, i, of_u);
            store_pack(by_g, i, of_g);
        }
    }
    GRID_STRIDE(i, n - rest) {
        const REAL x = g[rest + i], s = 1 / (1 + exp(-x)), f = x * s;
        y[rest + i] = f * u[rest + i];
        if (by_g) {
            by_u[rest + i] = f;
            by_g[rest + i] = u[rest + i] * s * (1 + x * (1 - s));
        }
    }
}
