// Products with 16-bit weights as they are stored, [N, K]: bfloat16 with bfloat16 activations, float16 with float32 ones.

#include "vectors.h"

namespace {

constexpr int64_t AHEAD = 1024;  // bytes

#if WIDE && defined(__AVX512BF16__)
// Two products of bfloat16 a lane, added in float32.
struct Bf16 {
  typedef uint16_t Activation;
  static constexpr int64_t STEP = 32;
  typedef __m512bh Part;
  static Part activations(const uint16_t* from) { return (__m512bh)load_ints(from); }
  static Part weights(const uint16_t* from) { return (__m512bh)load_ints(from); }
  static Floats multiply(Part w, Part x, Floats sum) { return _mm512_dpbf16_ps(sum, w, x); }
};
#else
struct Bf16 {
  typedef float Activation;
  static constexpr int64_t STEP = LANES;
  typedef Floats Part;
  static Part activations(const float* from) { return load(from); }
  static Part weights(const uint16_t* from) { return load_bf16(from); }
  static Floats multiply(Part w, Part x, Floats sum) { return times_add(w, x, sum); }
};
#endif

struct Fp16 {
  typedef float Activation;
  static constexpr int64_t STEP = LANES;
  typedef Floats Part;
  static Part activations(const float* from) { return load(from); }
  static Part weights(const uint16_t* from) { return load_fp16(from); }
  static Floats multiply(Part w, Part x, Floats sum) { return times_add(w, x, sum); }
};

template <typename Kind, int ROWS, int COLUMNS>
void multiply_rows(const uint16_t* weights, const typename Kind::Activation* x, void* out, bool bf16, int64_t n,
                   int64_t k, int64_t first) {
  Floats sums[ROWS][COLUMNS];
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < COLUMNS; c++) sums[r][c] = zeros();
  for (int64_t at = 0; at < k; at += Kind::STEP) {
    typename Kind::Part w[COLUMNS];
    for (int c = 0; c < COLUMNS; c++) {
      const uint16_t* from = weights + (first + c) * k + at;
      ask_for(from + AHEAD / 2);
      w[c] = Kind::weights(from);
    }
    for (int r = 0; r < ROWS; r++) {
      const typename Kind::Part part = Kind::activations(x + r * k + at);
      for (int c = 0; c < COLUMNS; c++) sums[r][c] = Kind::multiply(w[c], part, sums[r][c]);
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < COLUMNS; c++) store_one(out, r * n + first + c, bf16, total(sums[r][c]));
}

template <typename Kind, int ROWS>
void multiply_all(const uint16_t* weights, const typename Kind::Activation* x, void* out, bool bf16, int64_t n, int64_t k,
                  int64_t start, int64_t stop) {
  constexpr int COLUMNS = ROWS <= 4 && WIDE ? 4 : 2;
  for (; start + COLUMNS <= stop; start += COLUMNS)
    multiply_rows<Kind, ROWS, COLUMNS>(weights, x, out, bf16, n, k, start);
  for (; start < stop; start++) multiply_rows<Kind, ROWS, 1>(weights, x, out, bf16, n, k, start);
}

template <typename Kind>
void multiply_some(const uint16_t* weights, const typename Kind::Activation* x, void* out, bool bf16, int64_t rows,
                   int64_t n, int64_t k, int64_t start, int64_t stop) {
  switch (rows) {
    case 1: return multiply_all<Kind, 1>(weights, x, out, bf16, n, k, start, stop);
    case 2: return multiply_all<Kind, 2>(weights, x, out, bf16, n, k, start, stop);
    case 3: return multiply_all<Kind, 3>(weights, x, out, bf16, n, k, start, stop);
    case 4: return multiply_all<Kind, 4>(weights, x, out, bf16, n, k, start, stop);
#if WIDE
    case 5: return multiply_all<Kind, 5>(weights, x, out, bf16, n, k, start, stop);
    case 6: return multiply_all<Kind, 6>(weights, x, out, bf16, n, k, start, stop);
    case 7: return multiply_all<Kind, 7>(weights, x, out, bf16, n, k, start, stop);
    case 8: return multiply_all<Kind, 8>(weights, x, out, bf16, n, k, start, stop);
#endif
  }
}

template <typename Kind>
void linear(const typename Kind::Activation* x, const uint16_t* weights, void* out, bool bf16, int64_t rows, int64_t n,
            int64_t k, int threads) {
  over_parts(n, threads, [&](int64_t start, int64_t stop) {
    for (; start < stop; start += 8)
      for (int64_t row = 0; row < rows; row += MOST_ROWS) {
        char* to = static_cast<char*>(out) + row * n * (bf16 ? 2 : 4);
        multiply_some<Kind>(weights, x + row * k, to, bf16, smaller(rows - row, MOST_ROWS), n, k, start,
                            smaller(start + 8, stop));
      }
  });
}

}  // namespace

EXPORT void bf16_linear(const uint16_t* x, const uint16_t* weights, uint16_t* out, int64_t rows, int64_t n, int64_t k,
                        int threads) {
#if WIDE && defined(__AVX512BF16__)
  linear<Bf16>(x, weights, out, true, rows, n, k, threads);
#else
  Scratch wide(rows * k * 4);
  float* floats = static_cast<float*>(wide.data);
  for (int64_t i = 0; i < rows * k; i += LANES) store(floats + i, load_bf16(x + i));
  linear<Bf16>(floats, weights, out, true, rows, n, k, threads);
#endif
}

EXPORT void fp16_linear(const float* x, const uint16_t* weights, float* out, int64_t rows, int64_t n, int64_t k,
                        int threads) {
  linear<Fp16>(x, weights, out, false, rows, n, k, threads);
}
