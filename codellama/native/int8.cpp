// Products with 8-bit weights, one scale for each output: w = q * scale.
//
// Layout of a packed matrix: blocks of LANES outputs; in a block, pieces of four inputs by LANES outputs, a lane's four
// bytes together. So a block is one stream in memory, and a register of it meets four activations that all lanes share.
//
// Activations become signed bytes, in groups of 32 with a scale each.

#include "vectors.h"

namespace {

constexpr int64_t PIECE = 4 * LANES;  // bytes for 4 inputs of a block
constexpr int64_t AHEAD = 2048;

struct Term {  // of 32 activations: the scale, and where a sum of products begins
  float scale;
  int32_t start;
};

// dpbusd wants one unsigned side: weights are stored with 128 added, and a sum begins at -128 * (sum of xq). AVX2 has no
// such instruction; there the activations give their signs to the weights, and 2 * 128 * 127 fits the 16 bits between.
#if WIDE
constexpr int FLIP = 0x80;
inline Ints add_signed(Ints sum, Ints w, Ints x) { return _mm512_dpbusd_epi32(sum, w, x); }
#else
constexpr int FLIP = 0;
inline Ints add_signed(Ints sum, Ints w, Ints x) {
  const Ints pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w, x));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

template <int ROWS>
void multiply(const uint8_t* block, const float* scales, const int8_t* codes, const Term* terms, void* out, bool bf16,
              int64_t n, int64_t k, int64_t first) {
  constexpr bool ASK = ROWS >= LEAST_ASKING;
  Floats sums[ROWS];
  for (int r = 0; r < ROWS; r++) sums[r] = zeros();
  for (int64_t part = 0; part < k / 32; part++, codes += ROWS * 32, terms += ROWS) {
    // With few rows a second sum keeps one product from waiting for the other. Integers add up alike.
    Ints dots[ROWS], more[ROWS];
    Ints* const others = ROWS <= MOST_ROWS / 4 ? more : dots;
    for (int r = 0; r < ROWS; r++) dots[r] = all_ints(terms[r].start), more[r] = no_ints();
    for (int piece = 0; piece < 8; piece += 2, block += 2 * PIECE) {
      if (ASK) ask_for(block + AHEAD);
      if (ASK && PIECE == 64) ask_for(block + AHEAD + 64);
      const Ints even = load_ints(block), odd = load_ints(block + PIECE);
      for (int r = 0; r < ROWS; r++) {
        const Four* fours = reinterpret_cast<const Four*>(codes + r * 32 + piece * 4);
        dots[r] = add_signed(dots[r], even, all_ints(fours[0]));
        others[r] = add_signed(others[r], odd, all_ints(fours[1]));
      }
    }
    for (int r = 0; r < ROWS; r++) {
      if (others == more) dots[r] = plus(dots[r], more[r]);
      sums[r] = times_add(to_floats(dots[r]), all(terms[r].scale), sums[r]);
    }
  }
  const int64_t count = smaller(n - first, LANES);
  float own[LANES] = {};
  memcpy(own, scales + first, size_t(count * 4));
  for (int r = 0; r < ROWS; r++) store_some(out, r * n + first, bf16, times(sums[r], load(own)), count);
}

typedef void (*Multiply)(const uint8_t*, const float*, const int8_t*, const Term*, void*, bool, int64_t, int64_t,
                         int64_t);
constexpr Multiply MULTIPLY[] = {
    nullptr, multiply<1>, multiply<2>, multiply<3>, multiply<4>,
#if WIDE
    multiply<5>, multiply<6>, multiply<7>, multiply<8>,
#endif
};

}  // namespace

EXPORT int64_t packed_int8_bytes(int64_t n, int64_t k) { return (n + LANES - 1) / LANES * LANES * k; }

EXPORT void pack_int8(const uint8_t* codes, uint8_t* packed, int64_t n, int64_t k, int threads) {
  over_parts((n + LANES - 1) / LANES, threads, [&](int64_t start, int64_t stop) {
    memset(packed + start * LANES * k, 0, size_t((stop - start) * LANES * k));
    for (int64_t row = start * LANES; row < smaller(stop * LANES, n); row++) {
      uint8_t* to = packed + row / LANES * LANES * k + row % LANES * 4;
      for (int64_t at = 0; at < k; at += 4, to += PIECE) {
        uint32_t four;
        memcpy(&four, codes + row * k + at, 4);
        four ^= FLIP * 0x01010101u;
        memcpy(to, &four, 4);
      }
    }
  });
}

EXPORT void int8_linear(const void* x, int bf16, const uint8_t* packed, const float* scales, void* out, int64_t rows,
                        int64_t n, int64_t k, int threads) {
  const int64_t parts = k / 32;
  Scratch code_memory(rows * k), term_memory(rows * parts * int64_t(sizeof(Term)));
  int8_t* codes = static_cast<int8_t*>(code_memory.data);
  Term* terms = static_cast<Term*>(term_memory.data);
  for_groups(rows, parts, [&](int64_t from, int64_t to) {
    const Rounded rounded = round_group(x, from * 32, bf16, codes + to * 32);
    terms[to] = {rounded.scale, -FLIP * rounded.code_sum};
  });
  over_parts((n + LANES - 1) / LANES, threads, [&](int64_t start, int64_t stop) {
    for (int64_t block = start; block < stop; block++)
      for (int64_t row = 0; row < rows; row += MOST_ROWS) {
        char* to = static_cast<char*>(out) + row * n * (bf16 ? 2 : 4);
        MULTIPLY[smaller(rows - row, MOST_ROWS)](packed + block * LANES * k, scales, codes + row * k, terms + row * parts,
                                                 to, bf16, n, k, block * LANES);
      }
  });
}

EXPORT void unpack_int8(const uint8_t* packed, const float* scales, void* out, int bf16, int64_t k, int64_t first,
                        int64_t last, int threads) {
  const int64_t from = first / LANES, to = (last + LANES - 1) / LANES;
  over_parts(to - from, threads, [&](int64_t start, int64_t stop) {
    for (int64_t block = from + start; block < from + stop; block++)
      for (int64_t part = 0; part < k / 32; part++)
        for (int half = 0; half < LANES / 8; half++) {
          const uint8_t* piece = packed + block * LANES * k + part * 8 * PIECE + half * 32;
          __m256i eight[8];
          for (int i = 0; i < 8; i++, piece += PIECE)
            eight[i] = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(piece)),
                                        _mm256_set1_epi8(char(FLIP)));
          transpose(eight);
          for (int lane = 0; lane < 8; lane++) {
            const int64_t row = block * LANES + half * 8 + lane;
            if (row < first || row >= last) continue;
            int8_t codes[32];
            memcpy(codes, &eight[lane], 32);
            const int64_t at = (row - first) * k + part * 32;
            Floats weights[32 / LANES];
            for (int i = 0; i < 32 / LANES; i++)
              weights[i] = times(to_floats(widen_signed(codes + i * LANES)), all(scales[row]));
            store_weights(out, at, bf16, weights);
          }
        }
  });
}
