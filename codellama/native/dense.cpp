// Products of a few rows of bfloat16 with bfloat16 weights as they are stored, [N, K]; sums are float32.
//
// Each output has one sum, over the inputs in their order, whatever the number of rows: a row's bits depend on it alone.

#include "vectors.h"

namespace {

constexpr int64_t AHEAD = 512;  // weights of a row that are asked for before they are needed

#if WIDE && defined(__AVX512BF16__)
// Two products of bfloat16 a lane, added in float32.
typedef uint16_t Activation;
constexpr int64_t STEP = 32;
typedef __m512bh Part;
static inline Part activations(const uint16_t* from) { return (__m512bh)load_ints(from); }
static inline Part read_weights(const uint16_t* from) { return (__m512bh)load_ints(from); }
static inline Floats multiply(Part w, Part x, Floats sum) { return _mm512_dpbf16_ps(sum, w, x); }
#else
typedef float Activation;
constexpr int64_t STEP = LANES;
typedef Floats Part;
static inline Part activations(const float* from) { return load(from); }
static inline Part read_weights(const uint16_t* from) { return load_bf16(from); }
static inline Floats multiply(Part w, Part x, Floats sum) { return times_add(w, x, sum); }
#endif

// ROWS rows of activations by COLUMNS rows of weights. What is asked for near the end of a row of weights is the beginning
// of the same row of the next block, since rows are read side by side.
template <int ROWS, int COLUMNS>
void multiply_block(const uint16_t* weights, const Activation* x, void* out, int64_t n, int64_t k, int64_t first) {
  Floats sums[ROWS][COLUMNS];
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < COLUMNS; c++) sums[r][c] = zeros();
  for (int64_t at = 0; at < k; at += STEP) {
    Part w[COLUMNS];
    const int64_t ahead = at + AHEAD < k ? AHEAD : AHEAD + (COLUMNS - 1) * k;
    for (int c = 0; c < COLUMNS; c++) {
      const uint16_t* from = weights + (first + c) * k + at;
      ask_for(from + ahead);
      w[c] = read_weights(from);
    }
    for (int r = 0; r < ROWS; r++) {
      const Part part = activations(x + r * k + at);
      for (int c = 0; c < COLUMNS; c++) sums[r][c] = multiply(w[c], part, sums[r][c]);
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < COLUMNS; c++) store_some(out, r * n + first + c, true, all(total(sums[r][c])), 1);
}

// As many rows of weights at once as registers allow: many keep the memory busy where there is one row of activations.
template <int ROWS>
void multiply_some(const uint16_t* weights, const Activation* x, void* out, int64_t n, int64_t k, int64_t start,
                   int64_t stop) {
  constexpr int COLUMNS = !WIDE ? 2 : ROWS == 1 ? 8 : ROWS <= 4 ? 4 : 2;
  for (; start + COLUMNS <= stop; start += COLUMNS) multiply_block<ROWS, COLUMNS>(weights, x, out, n, k, start);
  for (; start < stop; start++) multiply_block<ROWS, 1>(weights, x, out, n, k, start);
}

void multiply_rows(const uint16_t* weights, const Activation* x, void* out, int64_t rows, int64_t n, int64_t k,
                   int64_t start, int64_t stop) {
  switch (rows) {
    case 1: return multiply_some<1>(weights, x, out, n, k, start, stop);
    case 2: return multiply_some<2>(weights, x, out, n, k, start, stop);
    case 3: return multiply_some<3>(weights, x, out, n, k, start, stop);
    case 4: return multiply_some<4>(weights, x, out, n, k, start, stop);
#if WIDE
    case 5: return multiply_some<5>(weights, x, out, n, k, start, stop);
    case 6: return multiply_some<6>(weights, x, out, n, k, start, stop);
    case 7: return multiply_some<7>(weights, x, out, n, k, start, stop);
    case 8: return multiply_some<8>(weights, x, out, n, k, start, stop);
#endif
  }
}

}  // namespace

EXPORT void bf16_linear(const uint16_t* x, const uint16_t* weights, uint16_t* out, int64_t rows, int64_t n, int64_t k,
                        int threads) {
#if WIDE && defined(__AVX512BF16__)
  const Activation* from = x;
#else
  Scratch wide(rows * k * 4);
  float* from = static_cast<float*>(wide.data);
  for (int64_t i = 0; i < rows * k; i += LANES) store(from + i, load_bf16(x + i));
#endif
  over_parts(n, threads, [&](int64_t start, int64_t stop) {
    for (int64_t row = 0; row < rows; row += MOST_ROWS)
      multiply_rows(weights, from + row * k, out + row * n, smaller(rows - row, MOST_ROWS), n, k, start, stop);
  });
}
