"""What stands before every function in C: the special functions that are more than a line.

Each is what torch computes on the CPU, branch for branch, so that limits and NaN come out alike. The
digamma function is Cephes', by Stephen L. Moshier, https://www.netlib.org/cephes/, as torch has it.
"""

PRELUDE = r"""
#define _DEFAULT_SOURCE 1
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Where an index leads, and whether outside of what it picks from. */
static inline int64_t from_start_(int64_t at, int64_t size, int64_t *outside) {
  if ((uint64_t)at < (uint64_t)size) return at;
  *outside = 1;
  return 0;
}
static inline int64_t from_end_(int64_t at, int64_t size, int64_t *outside) {
  return from_start_(at < 0 ? at + size : at, size, outside);
}

#define ONE static inline double

ONE square_(double x) { return x * x; }
ONE cube_(double x) { return x * x * x; }
ONE sign_(double x) { return (double)((x > 0) - (x < 0)); }
ONE maximum_(double a, double b) { return (a > b || a != a) ? a : b; }
ONE minimum_(double a, double b) { return (a < b || a != a) ? a : b; }
ONE at_least_(double x, double low) { return x < low ? low : x; }
ONE at_most_(double x, double high) { return x > high ? high : x; }
ONE lerp_(double a, double b, double w) {
  return w < 0.5 ? a + w * (b - a) : b - (b - a) * (1 - w);
}
ONE xlogy_(double x, double y) { return y != y ? NAN : x == 0 ? 0 : x * log(y); }
ONE xlog1py_(double x, double y) { return y != y ? NAN : x == 0 ? 0 : x * log1p(y); }
ONE sigmoid_(double x) { return 1 / (1 + exp(-x)); }
ONE sigmoid_backward_(double g, double y) { return g * (1 - y) * y; }
ONE tanh_backward_(double g, double y) { return g * (1 - y * y); }
ONE log_sigmoid_(double x) { return (x < 0 ? x : x != x ? x : 0) - log1p(exp(-fabs(x))); }
ONE log_sigmoid_backward_(double g, double x) {
  double z = exp(-fabs(x));
  return g * (x < 0 ? 1 - z / (1 + z) : z / (1 + z));
}
ONE binary_cross_entropy_(double x, double y) { return (1 - y) * x - log_sigmoid_(x); }
ONE softplus_(double x, double beta, double threshold) {
  return x * beta > threshold ? x : log1p(exp(x * beta)) / beta;
}
ONE softplus_backward_(double g, double x, double beta, double threshold) {
  if (x * beta > threshold) return g;
  double z = exp(x * beta);
  return g * z / (z + 1);
}
ONE logaddexp_(double a, double b) {
  if (isinf(a) && a == b) return a;
  double top = maximum_(a, b);
  return top + log1p(exp(-fabs(a - b)));
}
ONE lgamma_once_(double x) {
  int sign;
  return lgamma_r(x, &sign);
}
ONE digamma_(double x) {
  static const double A[] = {8.33333333333333333333E-2, -2.10927960927960927961E-2,
      7.57575757575757575758E-3, -4.16666666666666666667E-3, 3.96825396825396825397E-3,
      -8.33333333333333333333E-3, 8.33333333333333333333E-2};
  double reflected = 0, whole, sum = 0, tail = 0;
  if (x == 0) return copysign(INFINITY, -x);
  if (x < 0) {
    if (x == trunc(x)) return NAN;
    reflected = M_PI / tan(M_PI * modf(x, &whole));
    x = 1 - x;
  }
  for (; x < 10; x += 1) sum -= 1 / x;
  if (x == 10) return sum + 2.25175258906672110764 - reflected;
  if (x < 1.0e17) {
    double z = 1 / (x * x);
    for (int k = 0; k < 7; k++) tail = tail * z + A[k];
    tail *= z;
  }
  return sum + log(x) - 0.5 / x - tail - reflected;
}
""".lstrip()
