/* Enlarge an RGB image bilinearly and cut it into patches, in one pass.

   The pixels equal those of OpenCV's resize (INTER_LINEAR) to the bit: the same weights of 1/2048, the same
   rounding. Each source row is stretched to the new width once, channel by channel, in 16 bits. Two adjacent
   stretched rows are blended into each new row, 32 pixels of one channel at a time, which is one line of a
   patch, written directly to its place. So intermediate results stay in the processor's cache. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

enum { CHANNELS = 3, ONE = 2048, GROUP = 4, BLOCK = 16, LINE = 32 };

#define AVX2 __attribute__((target("avx2")))

/* Source of GROUP adjacent pixels of a new row. */
typedef struct {
    int32_t start;               /* offset in a source row of the 16 bytes that contain them */
    uint8_t bytes[CHANNELS][16]; /* indices of these bytes, per pixel: left, none, right, none */
    int16_t weights[2 * GROUP];  /* per pixel: left, right */
} group_t;

/* Return the source pixel at or before a new pixel (-1 if none); set its weight and that of the next. */
static int left_of(int index, int size, int new_size, int16_t weights[2])
{
    double scale = 1. / ((double)new_size / size);
    float position = (float)((index + 0.5) * scale - 0.5);
    int left = (int)floorf(position);
    float share = position - left;
    weights[0] = (int16_t)lrintf((1.f - share) * ONE);
    weights[1] = (int16_t)lrintf(share * ONE);
    return left;
}

static int within(int index, int size) { return index < 0 ? 0 : index < size ? index : size - 1; }

static void plan_row(int width, int new_width, group_t *groups)
{
    for (int x = 0; x < new_width; x++) {
        group_t *group = groups + x / GROUP;
        int16_t *weights = group->weights + 2 * (x % GROUP);
        int left = left_of(x, width, new_width, weights);
        if (left < 0 || left >= width - 1) {
            weights[0] = ONE;
            weights[1] = 0;
        }
        int pixels[2] = {within(left, width), within(left + 1, width)};
        if (x % GROUP == 0)
            group->start = within(CHANNELS * pixels[0], CHANNELS * width - 15);
        for (int channel = 0; channel < CHANNELS; channel++)
            for (int side = 0; side < 2; side++) {
                uint8_t *byte = group->bytes[channel] + 4 * (x % GROUP) + 2 * side;
                byte[0] = (uint8_t)(CHANNELS * pixels[side] + channel - group->start);
                byte[1] = 0x80;
            }
    }
}

AVX2 static inline __m256i both(const void *low, const void *high)
{
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(low)),
                                   _mm_loadu_si128(high), 1);
}

/* Return the pixels of two groups in 1/128 of a level, 32 bits per pixel. */
AVX2 static inline __m256i stretch(__m256i source, __m256i bytes, __m256i weights)
{
    return _mm256_srai_epi32(_mm256_madd_epi16(_mm256_shuffle_epi8(source, bytes), weights), 4);
}

/* Stretch a source row to CHANNELS rows of new_width, in 1/128 of a level. */
AVX2 static void stretch_row(const uint8_t *row, const group_t *groups, int new_width, int16_t *stretched)
{
    for (int x = 0; x < new_width; x += BLOCK) {
        /* Packing alternates between 128-bit halves of its operands, so groups 0 and 2, 1 and 3 are paired. */
        const group_t *g = groups + x / GROUP;
        __m256i even = both(row + g[0].start, row + g[2].start);
        __m256i odd = both(row + g[1].start, row + g[3].start);
        __m256i even_weights = both(g[0].weights, g[2].weights);
        __m256i odd_weights = both(g[1].weights, g[3].weights);
        for (int channel = 0; channel < CHANNELS; channel++) {
            __m256i pixels = _mm256_packs_epi32(
                stretch(even, both(g[0].bytes[channel], g[2].bytes[channel]), even_weights),
                stretch(odd, both(g[1].bytes[channel], g[3].bytes[channel]), odd_weights));
            _mm256_storeu_si256((__m256i *)(stretched + channel * new_width + x), pixels);
        }
    }
}

/* Return BLOCK pixels interpolated between two stretched rows, 16 bits per pixel. */
AVX2 static inline __m256i blend(const int16_t *above, const int16_t *below, __m256i upper, __m256i lower)
{
    __m256i sum = _mm256_add_epi16(_mm256_mulhi_epi16(_mm256_loadu_si256((const __m256i *)above), upper),
                                   _mm256_mulhi_epi16(_mm256_loadu_si256((const __m256i *)below), lower));
    return _mm256_srai_epi16(_mm256_add_epi16(sum, _mm256_set1_epi16(2)), 2);
}

/* Write one line of each patch in a row of patches; `patches` points to that line in the first patch. */
AVX2 static void write_row(const int16_t *above, const int16_t *below, const int16_t weights[2], int columns,
                           int patch, uint8_t *patches)
{
    __m256i upper = _mm256_set1_epi16(weights[0]), lower = _mm256_set1_epi16(weights[1]);
    for (int column = 0; column < columns; column++)
        for (int channel = 0; channel < CHANNELS; channel++)
            for (int x = 0; x < patch; x += LINE) {
                int from = (channel * columns + column) * patch + x;
                __m256i pixels = _mm256_packus_epi16(
                    blend(above + from, below + from, upper, lower),
                    blend(above + from + BLOCK, below + from + BLOCK, upper, lower));
                uint8_t *to = patches + (column * CHANNELS + channel) * patch * patch + x;
                _mm256_storeu_si256((__m256i *)to, _mm256_permute4x64_epi64(pixels, 0xd8));
            }
}

/* Return whether the processor and the sizes are supported. */
int solo_can_enlarge(int height, int width, int rows, int columns, int patch)
{
    return __builtin_cpu_supports("avx2") && patch % LINE == 0 && CHANNELS * width >= 16 &&
           height <= rows * patch && width <= columns * patch;
}

/* pixels: height x width x CHANNELS; patches: rows x columns x CHANNELS x patch x patch.
   Return 0, or -1 if out of memory. */
int solo_enlarge(const uint8_t *pixels, int height, int width, int rows, int columns, int patch,
                 uint8_t *patches)
{
    int new_height = rows * patch, new_width = columns * patch, size = CHANNELS * new_width;
    group_t *groups = malloc(new_width / GROUP * sizeof *groups);
    int16_t *stretched = malloc(2 * size * sizeof *stretched);
    if (groups && stretched) {
        int held[2] = {-1, -1}; /* source row in each half of `stretched`: even rows, odd rows */
        plan_row(width, new_width, groups);
        for (int y = 0; y < new_height; y++) {
            int16_t weights[2], *rows_of_y[2];
            int above = left_of(y, height, new_height, weights);
            for (int side = 0; side < 2; side++) {
                int source = within(above + side, height), half = source % 2;
                rows_of_y[side] = stretched + half * size;
                if (held[half] != source)
                    stretch_row(pixels + (size_t)source * width * CHANNELS, groups, new_width, rows_of_y[side]);
                held[half] = source;
            }
            size_t patch_row = (size_t)(y / patch) * size * patch;
            write_row(rows_of_y[0], rows_of_y[1], weights, columns, patch,
                      patches + patch_row + y % patch * patch);
        }
    }
    int result = groups && stretched ? 0 : -1;
    free(groups);
    free(stretched);
    return result;
}
