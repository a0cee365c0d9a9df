// y = x mask, the mask of functional/dropout.py: element i is kept where the upper 24 bits of SplitMix64's finaliser of key + i are at
// least p 2^24. Integer arithmetic modulo 2^64: the same masks as NumPy's. x null: the mask itself. The key is a number, or lies in memory.
extern "C" __global__ void dropout(
    const ACT* x, unsigned long long key, const unsigned long long* placed, unsigned long long least, REAL scale, ACT* y, long long n) {
    if (placed) key = *placed;
    GRID_STRIDE(i, n) {
        unsigned long long z = (key + (unsigned long long)i) * 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        z ^= z >> 31;
        y[i] = (z >> 40) < least ? REAL(0) : x ? x[i] * scale : scale;
    }
}
