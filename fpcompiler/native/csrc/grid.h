// Rounding to the values of a format. Included once per instruction set, after vectors.h.

// A format as what rounding needs.
struct Grid {
    int mantissa_bits;
    int magnitude_bits;
    int32_t least;  // the smallest exponent, as fp32 bits
    int32_t magic;  // added to the bits of 2**e: those of 1.5 * 2**(e + 23 - mantissa_bits)
    float max;

    explicit Grid(const FpcFormat& format, int bias = 0)
        : mantissa_bits(format.mantissa_bits),
          magnitude_bits(format.magnitude_bits),
          least((format.min_exponent + bias + 127) << 23),
          magic(((23 - format.mantissa_bits) << 23) | 0x400000),
          max(bias ? 2 * format.max : format.max) {}
};

// Adding and subtracting 1.5 * 2**(e + 23 - m) rounds to the grid; the low bits of the sum count
// steps. See fpcompiler/numerics/rounding.py.
struct Rounded {
    I exponent;
    F big;
    F sum;

    // Values must not be negative; their bits are then in the order of the values.
    Rounded(F value, const Grid& grid) {
        F held = (F)smaller((I)value, (I)splat(grid.max));
        exponent = larger((I)held & kExponentMask, splat(grid.least));
        big = (F)(exponent + grid.magic);
        sum = held + big;
    }

    F value() const { return sum - big; }

    I code(const Grid& grid) const {
        return ((I)sum - (I)big) + ((exponent - grid.least) >> (23 - grid.mantissa_bits));
    }
};

static inline I signed_code(F value, const Grid& grid) {
    I code = Rounded((F)magnitude(value), grid).code(grid);
    I sign = (I)((U)value >> 31);
    return code | (sign << grid.magnitude_bits);
}
