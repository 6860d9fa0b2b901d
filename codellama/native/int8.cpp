// Products with 8-bit weights, one scale for each output: w = q * scale. The matrix is read as it is stored, [N, K].
//
// Activations become signed bytes, in groups of 32 with a scale each. Lanes run along K; each holds four inputs.

#include "vectors.h"

namespace {

constexpr int64_t STEP = 4 * LANES;  // inputs that one register of codes holds
constexpr int64_t AHEAD = 1024;

// What a product with w needs of w alone. dpbusd wants one unsigned side: activations are stored with 128 added, and
// here is what has to be taken off again. AVX2 has no such instruction; there one side gives its signs to the other.
#if WIDE
constexpr char FLIP = char(0x80);
inline Ints prepare(Ints w) { return minus(no_ints(), _mm512_dpbusd_epi32(no_ints(), _mm512_set1_epi8(FLIP), w)); }
inline Ints multiply(Ints prepared, Ints w, Ints x) { return _mm512_dpbusd_epi32(prepared, x, w); }
inline Ints load_codes(const int8_t* from, int64_t count) {
  if (count >= STEP) return load_ints(from);
  return _mm512_maskz_loadu_epi8((uint64_t(1) << count) - 1, from);
}
#else
constexpr char FLIP = 0;
inline Ints prepare(Ints w) { return _mm256_abs_epi8(w); }
inline Ints multiply(Ints prepared, Ints w, Ints x) {  // 2 * 128 * 127 fits 16 bits
  return _mm256_madd_epi16(_mm256_maddubs_epi16(prepared, _mm256_sign_epi8(x, w)), _mm256_set1_epi16(1));
}
inline Ints load_codes(const int8_t* from, int64_t) { return load_ints(from); }
#endif

// COLUMNS outputs at a time, so that what is loaded of the activations serves several.
template <int ROWS, int COLUMNS>
void multiply_rows(const int8_t* codes, const float* scales, const int8_t* x, const float* xs, void* out, bool bf16,
                   int64_t n, int64_t k, int64_t first) {
  Floats sums[ROWS][COLUMNS];
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < COLUMNS; c++) sums[r][c] = zeros();
  for (int64_t at = 0; at < k; at += STEP, x += ROWS * STEP, xs += ROWS * LANES) {
    Ints w[COLUMNS], prepared[COLUMNS];
    for (int c = 0; c < COLUMNS; c++) {
      const int8_t* from = codes + (first + c) * k + at;
      ask_for(from + AHEAD);
      w[c] = load_codes(from, k - at);
      prepared[c] = prepare(w[c]);
    }
    for (int r = 0; r < ROWS; r++) {
      const Ints bytes = load_ints(x + r * STEP);
      const Floats scale = load(xs + r * LANES);
      for (int c = 0; c < COLUMNS; c++)
        sums[r][c] = times_add(to_floats(multiply(prepared[c], w[c], bytes)), scale, sums[r][c]);
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < COLUMNS; c++) store_one(out, r * n + first + c, bf16, total(sums[r][c]) * scales[first + c]);
}

template <int ROWS>
void multiply_all(const int8_t* codes, const float* scales, const int8_t* x, const float* xs, void* out, bool bf16,
                  int64_t n, int64_t k, int64_t start, int64_t stop) {
  constexpr int COLUMNS = ROWS <= 4 && WIDE ? 4 : 2;
  for (; start + COLUMNS <= stop; start += COLUMNS)
    multiply_rows<ROWS, COLUMNS>(codes, scales, x, xs, out, bf16, n, k, start);
  for (; start < stop; start++) multiply_rows<ROWS, 1>(codes, scales, x, xs, out, bf16, n, k, start);
}

typedef void (*Multiply)(const int8_t*, const float*, const int8_t*, const float*, void*, bool, int64_t, int64_t, int64_t,
                         int64_t);
constexpr Multiply MULTIPLY[] = {
    nullptr, multiply_all<1>, multiply_all<2>, multiply_all<3>, multiply_all<4>,
#if WIDE
    multiply_all<5>, multiply_all<6>, multiply_all<7>, multiply_all<8>,
#endif
};

}  // namespace

EXPORT void int8_linear(const void* x, int bf16, const int8_t* codes, const float* scales, void* out, int64_t rows,
                        int64_t n, int64_t k, int threads) {
  const int64_t steps = (k + STEP - 1) / STEP, width = steps * STEP;
  Scratch byte_memory(rows * width), scale_memory(rows * steps * LANES * 4);
  int8_t* bytes = static_cast<int8_t*>(byte_memory.data);
  float* xs = static_cast<float*>(scale_memory.data);
  // Rows that are multiplied together stand together: a register of each row, then the next one of each.
  for (int64_t row = 0; row < rows; row++)
    for (int64_t group = 0; group < width / 32; group++) {
      const int64_t head = row / MOST_ROWS * MOST_ROWS, beside = smaller(rows - head, MOST_ROWS);
      const int64_t step = head * steps + group * 32 / STEP * beside + row - head, within = group * 32 % STEP;
      int8_t* to = bytes + step * STEP + within;
      float scale = 0.0f;
      if (group * 32 < k) scale = round_group(x, row * k + group * 32, bf16, to).scale;
      else memset(to, 0, 32);
      for (int i = 0; i < 32; i++) to[i] ^= FLIP;
      for (int lane = 0; lane < 8; lane++) xs[step * LANES + within / 4 + lane] = scale;
    }
  over_parts(n, threads, [&](int64_t start, int64_t stop) {
    // A few outputs at a time for all rows, so that the second eight rows find the codes near.
    for (; start < stop; start += 8)
      for (int64_t row = 0; row < rows; row += MOST_ROWS) {
        char* to = static_cast<char*>(out) + row * n * (bf16 ? 2 : 4);
        MULTIPLY[smaller(rows - row, MOST_ROWS)](codes, scales, bytes + row * width, xs + row * steps * LANES, to, bf16, n,
                                                 k, start, smaller(start + 8, stop));
      }
  });
}

EXPORT void unpack_int8(const int8_t* codes, const float* scales, void* out, int bf16, int64_t n, int64_t k,
                        int threads) {
  over_parts(n, threads, [&](int64_t start, int64_t stop) {
    for (int64_t row = start; row < stop; row++) {
      const Floats scale = all(scales[row]);
      for (int64_t at = row * k; at < (row + 1) * k; at += LANES)
        store_as(out, at, bf16, times(to_floats(widen_signed(codes + at)), scale));
    }
  });
}
