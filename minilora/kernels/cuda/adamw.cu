// One step of AdamW over the whole flat buffer. See functional/adamw.py; rate and decay are those of this step, c1 and c2 the bias
// corrections (1 without), rest1 = 1 - b1 and rest2 = 1 - b2, which are subtracted in double. `rates` and `decays` are factors for each element, or null. decoupled 0: the decay goes into the gradient.
extern "C" __global__ void adamw(
    REAL* w, const REAL* g, REAL* m, REAL* v, const REAL* rates, const REAL* decays, REAL rate, REAL decay, REAL b1, REAL b2, REAL rest1, REAL rest2, REAL c1,
    REAL root_c2, REAL eps, int decoupled, long long n) {
    GRID_STRIDE(i, n) {
        const REAL lr = rates ? rate * rates[i] : rate, wd = decays ? decay * decays[i] : decay;
        REAL weight = w[i], gradient = g[i];
        if (decoupled) weight *= 1 - lr * wd;
        else gradient += wd * weight;
        m[i] = b1 * m[i] + rest1 * gradient;
        v[i] = b2 * v[i] + rest2 * gradient * gradient;
        w[i] = weight - lr / c1 * m[i] / (sqrt(v[i]) / root_c2 + eps);
    }
}
