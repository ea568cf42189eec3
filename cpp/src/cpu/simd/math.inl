// exp, logistic products and the normal distribution, in f32. Every level runs the same operations in the
// same order with the same roundings, so results do not depend on the instruction set. Largest error over
// every 127th of all f32 values, in units in the last place of the exact result: exp and sigmoid 3.3,
// gelu 5.2, silu, swish and gelu_tanh 3.9 for |x| < 10 (gelu_tanh 6.2) and 6.6 beyond; below |x| * 2^-126
// these three are 0.

/// A number in two factors, `scale` a power of two. Multiplying by one after the other rounds a product below
/// 2^-126 once, and keeps the bits of a large one times a number that alone would be denormal.
struct Scaled {
  Vec value, scale;

  MOECORE_INLINE Vec product() const { return value * scale; }
};

/// e^x in two factors. NaN, infinities, overflow and denormal results as in the exact function.
MOECORE_INLINE Scaled scaled_exp(Vec x) {
  // Outside these bounds the factors say 0 or infinity; at the lower one both powers below are 0. NaN passes.
  x = min(set(130.0f), max(set(-176.1f), x));
  // x = n * ln 2 + r, |r| <= ln 2 / 2. Adding 1.5 * 2^23 rounds to a whole number in the low mantissa bits.
  const Vec magic = set(12582912.0f);
  const Vec shifted = fma(x, set(0x1.715476p+0f), magic), n = shifted - magic;
  Vec r = fma(n, set(-0x1.62e430p-1f), x);
  r = fma(n, set(0x1.05c610p-29f), r);
  // e^r = 1 + r + r^2 q(r), minimax with relative error 3.1e-9.
  Vec q = set(0.0013814486131f);
  q = fma(q, r, set(0.00836878055309f));
  q = fma(q, r, set(0.0416683938952f));
  q = fma(q, r, set(0.166665201068f));
  q = fma(q, r, set(0.499999934136f));
  const Vec p = fma(r * r, q, r) + set(1.0f);
  // 2^n as two powers: each a normal number, or 0 for n < -252.
  const Ints whole = as_ints(shifted) - as_ints(magic), half = shift_right<1>(whole), bias = set_int(127);
  return {p * as_floats(shift_left<23>(half + bias)), as_floats(shift_left<23>(whole - half + bias))};
}

MOECORE_INLINE Vec exp(Vec x) {
  return scaled_exp(x).product();
}

/// 1 / (1 + e^-x), to the last bits also where it is tiny.
MOECORE_INLINE Vec sigmoid(Vec x) {
  const Vec e = exp(set(-0.0f) - abs(x));
  return select(x < set(0.0f), e, set(1.0f)) / (set(1.0f) + e);
}

/// 1 / (1 + e^-(y + y_lo)), 0 where that is below 2^-126; y_lo is what rounding y left over. The exponential
/// is not the one above: one power of two suffices where a tiny one only joins a 1, and a term less where the
/// sum rounds anyway.
MOECORE_INLINE Vec logistic(Vec y, Vec y_lo) {
  // At these bounds the exponential is 2^-86 and 2^127.7. NaN ends up at the first.
  const Vec x = min(max(set(-0.0f) - y, set(-60.0f)), set(88.5f));
  const Vec magic = set(12582912.0f);
  const Vec shifted = fma(x, set(0x1.715476p+0f), magic), n = shifted - magic;
  const Vec r = fma(n, set(-0x1.62e430p-1f), x) - y_lo;
  // Minimax with relative error 9.2e-8.
  Vec p = set(0.00829027221f);
  p = fma(p, r, set(0.0418981612f));
  p = fma(p, r, set(0.166676387f));
  p = fma(p, r, set(0.499991477f));
  p = fma(p, r, set(0.999999702f));
  p = fma(p, r, set(1.0f));
  const Vec d = set(1.0f) + as_floats(as_ints(p) + shift_left<23>(as_ints(shifted)));
  return select(d > set(0x1p126f), set(0.0f), set(1.0f) / d);
}

/// e^-(t + t_lo), where t_lo is what rounding t left over.
MOECORE_INLINE Scaled exp_minus(Vec t, Vec t_lo) {
  const Scaled e = scaled_exp(set(-0.0f) - t);
  return {fma(e.value, set(-0.0f) - t_lo, e.value), e.scale};
}

/// x / (1 + e^-x).
MOECORE_INLINE Vec silu(Vec x) {
  return x * logistic(x, set(0.0f));
}

/// x / (1 + e^(-alpha x)).
MOECORE_INLINE Vec swish(Vec x, Vec alpha) {
  const Vec y = alpha * x;
  // Beyond 110 the logistic is 0 or 1, and the remainder of an overflowed product would be infinite.
  const Vec y_lo = select(abs(y) < set(110.0f), fma(alpha, x, set(-0.0f) - y), set(0.0f));
  return x * logistic(y, y_lo);
}

/// x / 2 * (1 + erf(x / sqrt 2)) = x * Phi(x).
MOECORE_INLINE Vec gelu(Vec x) {
  // q = Phi(-t) = e^(-t^2 / 2) * R(t), 0 for t > 18.8 and below any f32 for t > 14.5. NaN passes.
  const Vec t = min(set(20.0f), abs(x));
  const Vec square = t * t, square_lo = fma(t, t, set(-0.0f) - square);
  const Scaled e = exp_minus(set(0.5f) * square, set(0.5f) * square_lo);
  // R(t) * (t + 4) in s = (t - 4) / (t + 4), minimax with relative error 8.6e-9.
  const Vec t4 = t + set(4.0f), s = (t - set(4.0f)) / t4;
  Vec p = set(-0.000131967562031f);
  p = fma(p, s, set(0.0001793636191f));
  p = fma(p, s, set(0.00156992668645f));
  p = fma(p, s, set(-0.00351255910153f));
  p = fma(p, s, set(-0.00752527428465f));
  p = fma(p, s, set(0.0604038318745f));
  p = fma(p, s, set(-0.186523440931f));
  p = fma(p, s, set(0.387136901077f));
  p = fma(p, s, set(-0.607896588291f));
  p = fma(p, s, set(0.755285135384f));
  const Vec q = e.value * p / t4, one = set(1.0f);
  const Mask negative = x < set(0.0f);
  return x * select(negative, q, one - q * e.scale) * select(negative, e.scale, one);
}

/// x / 2 * (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) = x / (1 + e^-y), y = 2 sqrt(2 / pi) (x + 0.044715
/// x^3).
MOECORE_INLINE Vec gelu_tanh(Vec x) {
  // y = t * (c0 + c1 t^2) with what each step lost; at t = 20 the exponential is 0. NaN passes.
  const Vec t = min(set(20.0f), abs(x)), minus_0 = set(-0.0f);
  const Vec c0 = set(0x1.988454p+0f), c0_lo = set(-0x1.857936p-25f);
  const Vec c1 = set(0x1.2444f2p-4f), c1_lo = set(0x1.49b16ap-29f);
  const Vec square = t * t, square_lo = fma(t, t, minus_0 - square);
  const Vec cubic = c1 * square;
  const Vec cubic_lo = fma(c1, square_lo, fma(c1_lo, square, fma(c1, square, minus_0 - cubic)));
  const Vec large = max(c0, cubic), small = min(c0, cubic), p = large + small;
  const Vec p_lo = (small - (p - large)) + (c0_lo + cubic_lo);
  const Vec y = t * p, y_lo = fma(t, p_lo, fma(t, p, minus_0 - y));
  const Mask negative = x < set(0.0f);
  return x * logistic(select(negative, minus_0 - y, y), select(negative, minus_0 - y_lo, y_lo));
}
