/* Enlarges an RGB image bilinearly and cuts it into patches, in one pass.

   The pixels are those of OpenCV's resize (INTER_LINEAR), bit for bit: the same weights of 1/2048, the same
   rounding. Each row of the source is stretched to the new width once, one colour after the other, in 16 bits;
   two neighbours make each new row, 32 pixels of one colour at a time. So many are a line of a patch, and go
   where they belong: what lies between never leaves the processor's cache. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

enum { COLOURS = 3, ONE = 2048, GROUP = 4, BLOCK = 16, LINE = 32 };

#define AVX2 __attribute__((target("avx2")))

/* Where GROUP neighbouring pixels of a new row come from. */
typedef struct {
    int32_t start;              /* of the 16 bytes of a source row that hold all of them */
    uint8_t bytes[COLOURS][16]; /* which of these: for each pixel left, none, right, none */
    int16_t weights[2 * GROUP]; /* for each pixel left, right */
} group_t;

/* The source pixel at or before a new one, -1 if none, and the weights of it and of the next. */
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
            group->start = within(COLOURS * pixels[0], COLOURS * width - 15);
        for (int colour = 0; colour < COLOURS; colour++)
            for (int side = 0; side < 2; side++) {
                uint8_t *byte = group->bytes[colour] + 4 * (x % GROUP) + 2 * side;
                byte[0] = (uint8_t)(COLOURS * pixels[side] + colour - group->start);
                byte[1] = 0x80;
            }
    }
}

AVX2 static inline __m256i both(const void *low, const void *high)
{
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(low)),
                                   _mm_loadu_si128(high), 1);
}

/* Two groups in 1/128 of a level, 32 bits a pixel. */
AVX2 static inline __m256i stretch(__m256i source, __m256i bytes, __m256i weights)
{
    return _mm256_srai_epi32(_mm256_madd_epi16(_mm256_shuffle_epi8(source, bytes), weights), 4);
}

/* A source row as COLOURS rows of new_width, in 1/128 of a level. */
AVX2 static void stretch_row(const uint8_t *row, const group_t *groups, int new_width, int16_t *stretched)
{
    for (int x = 0; x < new_width; x += BLOCK) {
        /* Packing takes half of the one and half of the other in turn: hence 0 with 2, and 1 with 3. */
        const group_t *g = groups + x / GROUP;
        __m256i even = both(row + g[0].start, row + g[2].start);
        __m256i odd = both(row + g[1].start, row + g[3].start);
        __m256i even_weights = both(g[0].weights, g[2].weights);
        __m256i odd_weights = both(g[1].weights, g[3].weights);
        for (int colour = 0; colour < COLOURS; colour++) {
            __m256i pixels = _mm256_packs_epi32(
                stretch(even, both(g[0].bytes[colour], g[2].bytes[colour]), even_weights),
                stretch(odd, both(g[1].bytes[colour], g[3].bytes[colour]), odd_weights));
            _mm256_storeu_si256((__m256i *)(stretched + colour * new_width + x), pixels);
        }
    }
}

/* BLOCK pixels between two stretched rows, 16 bits a pixel. */
AVX2 static inline __m256i blend(const int16_t *above, const int16_t *below, __m256i upper, __m256i lower)
{
    __m256i sum = _mm256_add_epi16(_mm256_mulhi_epi16(_mm256_loadu_si256((const __m256i *)above), upper),
                                   _mm256_mulhi_epi16(_mm256_loadu_si256((const __m256i *)below), lower));
    return _mm256_srai_epi16(_mm256_add_epi16(sum, _mm256_set1_epi16(2)), 2);
}

/* One line of each patch of a row of patches; `patches` is where that line begins in the first of them. */
AVX2 static void write_row(const int16_t *above, const int16_t *below, const int16_t weights[2], int columns,
                           int patch, uint8_t *patches)
{
    __m256i upper = _mm256_set1_epi16(weights[0]), lower = _mm256_set1_epi16(weights[1]);
    for (int column = 0; column < columns; column++)
        for (int colour = 0; colour < COLOURS; colour++)
            for (int x = 0; x < patch; x += LINE) {
                int from = (colour * columns + column) * patch + x;
                __m256i pixels = _mm256_packus_epi16(
                    blend(above + from, below + from, upper, lower),
                    blend(above + from + BLOCK, below + from + BLOCK, upper, lower));
                uint8_t *to = patches + (column * COLOURS + colour) * patch * patch + x;
                _mm256_storeu_si256((__m256i *)to, _mm256_permute4x64_epi64(pixels, 0xd8));
            }
}

/* Whether this processor, and this function, can. */
int solo_can_enlarge(int height, int width, int rows, int columns, int patch)
{
    return __builtin_cpu_supports("avx2") && patch % LINE == 0 && COLOURS * width >= 16 &&
           height <= rows * patch && width <= columns * patch;
}

/* pixels: height x width x COLOURS; patches: rows x columns x COLOURS x patch x patch.
   Returns 0, or -1 without memory. */
int solo_enlarge(const uint8_t *pixels, int height, int width, int rows, int columns, int patch,
                 uint8_t *patches)
{
    int new_height = rows * patch, new_width = columns * patch, size = COLOURS * new_width;
    group_t *groups = malloc(new_width / GROUP * sizeof *groups);
    int16_t *stretched = malloc(2 * size * sizeof *stretched);
    if (groups && stretched) {
        int held[2] = {-1, -1}; /* which source row each half of `stretched` is: even rows, odd rows */
        plan_row(width, new_width, groups);
        for (int y = 0; y < new_height; y++) {
            int16_t weights[2], *rows_of_y[2];
            int above = left_of(y, height, new_height, weights);
            for (int side = 0; side < 2; side++) {
                int source = within(above + side, height), half = source % 2;
                rows_of_y[side] = stretched + half * size;
                if (held[half] != source)
                    stretch_row(pixels + (size_t)source * width * COLOURS, groups, new_width, rows_of_y[side]);
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
