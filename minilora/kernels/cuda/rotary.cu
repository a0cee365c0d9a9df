// Each pair of features of each head turned by the angle of its row: (a cos - b sin, b cos + a sin). See functional/rotary.py.
// x (rows, heads 2 half); sign -1 turns back. Pair i of a head is its features i and i + half.
extern "C" __global__ void rotary(
    const ACT* x, const REAL* cosine, const REAL* sine, REAL sign, int heads, int half, ACT* y, long long n) {
    GRID_STRIDE(i, n) {  // of rows * heads * half pairs
        const long long row = i / (heads * half), head = i / half;  // head counts on from one row to the next
        const int pair = i % half;
        const long long first = head * 2 * half + pair, second = first + half;
        const REAL c = cosine[row * half + pair], s = sign * sine[row * half + pair];
        const REAL a = x[first], b = x[second];
        y[first] = a * c - b * s;
        y[second] = b * c + a * s;
    }
}
