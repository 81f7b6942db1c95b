/* CSV: records found, and their fields made into columns. The reference is kernels/rows/scan_csv.py.
 *
 * scan_csv     finds the fields of whole records in a block, as Python's csv module would, and tells
 *              apart what is broken: the wrong number of fields, a quote that never closes
 * cut_csv      finds a record's end near a byte, to cut a file into ranges
 * to_*         turn one column of the fields found into Arrow's buffers; a field that is not
 *              written plainly is left to the caller (counted and marked), never guessed
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* strtod_l */
#endif
#include <locale.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#if defined(__APPLE__)
#include <xlocale.h>
#endif

#define QUOTE '"'

/* How a field is written: plain = its bytes are the value; doubled = between quotes, with doubled
 * ones inside; raw = the whole field, quotes and escapes and all. */
enum { PLAIN = 0, DOUBLED = 1, RAW = 2 };

/* Why a record is broken; the names are REASONS in scan_csv.py. */
enum { WIDTH = 0, UNCLOSED = 1, UNCLOSED_OR_LARGE = 2, CLOSED_LATE = 3, NOT_UTF8 = 4 };

/* What scan_csv reads and leaves in `state`. */
enum { CONSUMED, LINE, ROWS, BLANK, BROKEN, NEEDS_HEADER, LONG_LINE, NUM_STATE };

typedef struct {
    const uint8_t *data;
    int64_t size;
    int32_t delimiter, escape;      /* escape: -1 where quotes are doubled */
    int64_t quote_from, quote_at;   /* the next quote at or after quote_from, as last searched */
} Block;

static int64_t next_quote(Block *b, int64_t p) {
    if (p < b->quote_from || p > b->quote_at) {
        const uint8_t *q = p < b->size ? memchr(b->data + p, QUOTE, (size_t)(b->size - p)) : NULL;
        b->quote_from = p;
        b->quote_at = q ? q - b->data : b->size;
    }
    return b->quote_at;
}

static int is_end(uint8_t c) { return c == '\n' || c == '\r'; }

/* The first delimiter or line end at or after p; 16 bytes at a time where the CPU can. */
static inline int64_t field_end(const uint8_t *data, int64_t size, int64_t p, uint8_t delimiter) {
#if defined(__SSE2__)
    const __m128i d = _mm_set1_epi8((char)delimiter), lf = _mm_set1_epi8('\n'), cr = _mm_set1_epi8('\r');
    while (p + 16 <= size) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)(data + p));
        __m128i hits = _mm_or_si128(_mm_cmpeq_epi8(bytes, d), _mm_or_si128(_mm_cmpeq_epi8(bytes, lf), _mm_cmpeq_epi8(bytes, cr)));
        int mask = _mm_movemask_epi8(hits);
        if (mask) return p + __builtin_ctz((unsigned)mask);
        p += 16;
    }
#endif
    while (p < size && data[p] != delimiter && !is_end(data[p])) p++;
    return p;
}

/* Bytes of the line end at p: 0 if it may go on in the next block. */
static int64_t end_bytes(const uint8_t *data, int64_t size, int64_t p, int is_last) {
    if (data[p] == '\n') return 1;
    if (p + 1 < size) return data[p + 1] == '\n' ? 2 : 1;
    return is_last ? 1 : 0;
}

/* Line ends in [p, end): LF, CR LF, or CR alone. */
static int64_t count_lines(const uint8_t *data, int64_t p, int64_t end) {
    int64_t lines = 0;
    if (memchr(data + p, '\r', (size_t)(end - p)) == NULL) {
        for (; p < end; p++) lines += data[p] == '\n';
        return lines;
    }
    for (; p + 1 < end; p++) lines += (data[p] == '\n') | ((data[p] == '\r') & (data[p + 1] != '\n'));
    if (p < end) lines += is_end(data[p]);
    return lines;
}

/* Where the line that holds p ends, behind its end; -1 if that is not in the block. */
static int64_t line_end(const uint8_t *data, int64_t size, int64_t p, int is_last) {
    while (p < size && !is_end(data[p])) p++;
    if (p == size) return is_last ? size : -1;
    int64_t end = end_bytes(data, size, p, is_last);
    return end ? p + end : -1;
}

static int is_utf8(const uint8_t *p, const uint8_t *end) {
    while (p < end) {
        while (end - p >= 8) {
            uint64_t word;
            memcpy(&word, p, 8);
            if (word & 0x8080808080808080u) break;
            p += 8;
        }
        if (p == end) break;
        uint8_t c = *p;
        if (c < 0x80) { p++; continue; }
        int more = c >= 0xC2 && c <= 0xDF ? 1 : (c & 0xF0) == 0xE0 ? 2 : c >= 0xF0 && c <= 0xF4 ? 3 : 0;
        if (!more || end - p <= more) return 0;
        uint8_t d = p[1];
        if ((c == 0xE0 && d < 0xA0) || (c == 0xED && d > 0x9F) || (c == 0xF0 && d < 0x90) || (c == 0xF4 && d > 0x8F))
            return 0;
        for (int i = 1; i <= more; i++)
            if ((p[i] & 0xC0) != 0x80) return 0;
        p += more + 1;
    }
    return 1;
}

/* One record as scan_record leaves it. */
typedef struct {
    int64_t end;        /* behind its line end; -1: not in the block; -2: a quote is open to the end */
    int64_t content;    /* where its line end begins */
    int64_t fields;
    int has_quotes, is_strict, is_blank;
} Record;

/* Find the fields of the record at p; those beyond `width` are only counted. */
static Record scan_record(Block *b, int64_t p, int64_t width, int is_last, int32_t *starts, int32_t *lengths,
                          uint8_t *kinds) {
    const uint8_t *data = b->data;
    const int64_t size = b->size;
    const uint8_t delimiter = (uint8_t)b->delimiter;
    Record r = {-1, -1, 0, 0, 1, 1};
    for (;;) {
        int64_t first = p, from = p, to;
        uint8_t kind = PLAIN;
        if (b->escape >= 0) { /* the rarer dialect, byte by byte */
            int quoted = 0;
            if (p < size && data[p] == QUOTE) { quoted = 1; p++; kind = RAW; r.has_quotes = 1; }
            for (; p < size; p++) {
                if (data[p] == b->escape) {
                    kind = RAW;
                    r.has_quotes = 1; /* an escaped line end counts as one */
                    if (++p == size) { r.end = -2; return r; }
                } else if (quoted) {
                    if (data[p] == QUOTE) quoted = 0;
                } else if (data[p] == delimiter || is_end(data[p])) {
                    break;
                }
            }
            if (p == size && quoted) { r.end = -2; return r; }
            to = p;
        } else if (p < size && data[p] == QUOTE) {
            r.has_quotes = 1;
            kind = PLAIN;
            p++;
            from = p;
            for (;;) {
                int64_t q = next_quote(b, p);
                if (q == size) { r.end = -2; return r; }
                if (q + 1 == size && !is_last) { r.end = -1; return r; }
                if (q + 1 < size && data[q + 1] == QUOTE) { kind = DOUBLED; p = q + 2; continue; }
                to = q;
                p = q + 1;
                break;
            }
            if (p < size && data[p] != delimiter && !is_end(data[p])) { /* text behind the closing quote */
                r.is_strict = 0;
                kind = RAW;
                from = first;
                p = field_end(data, size, p, delimiter);
                to = p;
            }
        } else {
            p = field_end(data, size, p, delimiter);
            to = p;
        }
        if (r.fields < width) {
            starts[r.fields] = (int32_t)from;
            lengths[r.fields] = (int32_t)(to - from);
            kinds[r.fields] = kind;
        }
        r.fields++;
        if (to > from && !(kind == RAW && to - from == 2 && data[from] == QUOTE)) r.is_blank = 0;
        if (p == size) {
            if (!is_last) return r;
            r.content = r.end = size;
            return r;
        }
        if (data[p] == delimiter) { p++; continue; }
        int64_t end = end_bytes(data, size, p, is_last);
        if (!end) return r;
        r.content = p;
        r.end = p + end;
        return r;
    }
}

/* Find records from `data` on, until the block, `max_rows` or `max_broken` ends them.
 *
 * starts, lengths, kinds: [max_rows, width]; lines: [max_rows]; broken: [max_broken, 4] of (first
 * byte, end, line, reason). A line that is broken and goes beyond the block sets LONG_LINE: the
 * caller skips to its end. */
void scan_csv(const uint8_t *data, int64_t size, int32_t is_last, int32_t delimiter, int32_t escape, int64_t width,
              int64_t max_record, int64_t max_rows, int64_t max_broken, int32_t *starts, int32_t *lengths,
              uint8_t *kinds, int64_t *lines, int64_t *broken, int64_t *state) {
    Block b = {data, size, delimiter, escape, 1, 0};
    int64_t sure = size; /* without a last character that may go on in the next block */
    while (!is_last && sure > 0 && size - sure < 4 && data[sure - 1] >= 0x80) sure--;
    const int is_clean = is_utf8(data, data + sure);
    int64_t p = 0, line = state[LINE], rows = 0, blank = 0, bad = 0;
    state[LONG_LINE] = 0;
    while (p < size && rows < max_rows && bad < max_broken) {
        Record r = scan_record(&b, p, width, is_last, starts + rows * width, lengths + rows * width,
                               kinds + rows * width);
        int64_t available = (r.end >= 0 ? r.end : size) - p;
        int64_t newlines = r.end >= 0 && r.has_quotes ? count_lines(data, p, r.content) : 0;
        if (newlines && data[r.content - 1] == '\r' && r.end - r.content == 1 && data[r.content] == '\n')
            newlines--; /* an escaped CR, whose LF ends the record */
        int64_t reason = -1;
        if (available > max_record) reason = UNCLOSED_OR_LARGE;
        else if (r.end == -2 && is_last) reason = UNCLOSED;
        else if (r.end < 0) break; /* the rest comes with the next block */
        else if (newlines && !r.is_strict && escape < 0 &&
                 (r.fields != width || (!is_clean && !is_utf8(data + p, data + r.content))))
            reason = CLOSED_LATE;
        if (reason >= 0) { /* this line alone; the next one is tried anew */
            int64_t end = line_end(data, size, p, is_last);
            int64_t *entry = broken + 4 * bad++;
            entry[0] = p, entry[1] = end < 0 ? size : end, entry[2] = line, entry[3] = reason;
            line++;
            if (end < 0) { state[LONG_LINE] = 1; p = size; break; }
            p = end;
            continue;
        }
        if (r.is_blank) blank++;
        else if (state[NEEDS_HEADER]) state[NEEDS_HEADER] = 0;
        else if (r.fields != width || (!is_clean && !is_utf8(data + p, data + r.content))) {
            int64_t *entry = broken + 4 * bad++;
            entry[0] = p, entry[1] = r.content, entry[2] = line, entry[3] = r.fields != width ? WIDTH : NOT_UTF8;
        } else lines[rows++] = line;
        line += 1 + newlines;
        p = r.end;
    }
    state[CONSUMED] = p, state[LINE] = line, state[ROWS] = rows, state[BLANK] = blank, state[BROKEN] = bad;
}

/* Find where the first record that ends at or after `target` ends; `data` begins with a record.
 *
 * result: that byte, -1 if there is none within `max_record` bytes; and the line ends before it. */
void cut_csv(const uint8_t *data, int64_t size, int32_t delimiter, int64_t target, int64_t max_record,
             int64_t *result) {
    Block b = {data, size, delimiter, -1, 1, 0};
    int64_t p = 0;
    result[0] = -1;
    for (;;) {
        int64_t q = next_quote(&b, p); /* that opens a field; others are text */
        while (q < size && q > 0 && data[q - 1] != delimiter && !is_end(data[q - 1])) q = next_quote(&b, q + 1);
        int64_t end = target > 0 ? target - 1 : 0;
        if (end < p) end = p;
        while (end < q && !is_end(data[end])) end++;
        if (end < q) {
            int64_t bytes = end_bytes(data, size, end, 0);
            if (end - target > max_record || !bytes) return;
            result[0] = end + bytes;
            result[1] = count_lines(data, 0, result[0]);
            return;
        }
        if (q == size || q - target > max_record) return;
        p = q + 1;
        for (;;) {
            int64_t close = next_quote(&b, p);
            if (close == size && size - q <= max_record) return; /* it may be closed further on */
            if (close - q > max_record) { /* never closed: its line is broken */
                p = line_end(data, size, q, 0);
                if (p < 0) return;
                break;
            }
            p = close + 1;
            if (p == size || data[p] != QUOTE) break;
            p++;
        }
    }
}

static int is_null(const uint8_t *p, int64_t n) {
    switch (n) {
    case 0: return 1;
    case 2: return memcmp(p, "NA", 2) == 0;
    case 3: return memcmp(p, "N/A", 3) == 0 || memcmp(p, "NaN", 3) == 0 || memcmp(p, "nan", 3) == 0;
    case 4: return memcmp(p, "null", 4) == 0 || memcmp(p, "NULL", 4) == 0 || memcmp(p, "None", 4) == 0 ||
                   memcmp(p, "#N/A", 4) == 0;
    default: return 0;
    }
}

static int is_digit(uint8_t c) { return (uint8_t)(c - '0') < 10; }

static int parse_int64(const uint8_t *p, int64_t n, int64_t *out) {
    int negative = n > 0 && p[0] == '-';
    p += negative, n -= negative;
    if (n < 1 || n > 19 || (p[0] == '0' && (n > 1 || negative))) return 0;
    uint64_t value = 0;
    for (int64_t i = 0; i < n; i++) {
        if (!is_digit(p[i])) return 0;
        value = value * 10 + (p[i] - '0');
    }
    if (value > (uint64_t)INT64_MAX + (uint64_t)negative) return 0;
    *out = negative ? (int64_t)(0 - value) : (int64_t)value;
    return 1;
}

static const double TENS[] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11,
                              1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};

/* The C locale's strtod, whatever the program set. */
static int slow_double(const uint8_t *p, int64_t n, double *out) {
    static locale_t plain;
    char text[64];
    if (n >= (int64_t)sizeof text) return 0;
    if (!plain) {
        plain = newlocale(LC_ALL_MASK, "C", (locale_t)0);
        if (!plain) return 0;
    }
    memcpy(text, p, (size_t)n);
    text[n] = 0;
    char *end;
    *out = strtod_l(text, &end, plain);
    return end == text + n && *out - *out == 0; /* neither infinite */
}

static int parse_double(const uint8_t *p, int64_t n, double *out) {
    const uint8_t *whole = p;
    const uint8_t *end = p + n;
    int negative = n > 0 && *p == '-';
    p += negative;
    if (p == end || !is_digit(*p) || (*p == '0' && p + 1 < end && is_digit(p[1]))) return 0;
    uint64_t digits = 0;
    int num_digits = 0, exponent = 0, has_point = 0;
    for (; p < end && is_digit(*p); p++) digits = digits * 10 + (uint64_t)(*p - '0'), num_digits++;
    if (num_digits > 15) return 0; /* a long whole number may be a key */
    if (p < end && *p == '.') {
        has_point = 1;
        const uint8_t *point = ++p;
        for (; p < end && is_digit(*p); p++) {
            digits = digits * 10 + (uint64_t)(*p - '0');
            num_digits += digits != 0;
        }
        exponent = (int)(point - p);
        if (p == point) return 0;
    }
    if (p < end) {
        if (*p != 'e' && *p != 'E') return 0;
        p++;
        int minus = p < end && *p == '-', value = 0;
        if (p < end && (*p == '-' || *p == '+')) p++;
        if (p == end || end - p > 3) return 0;
        for (; p < end; p++) {
            if (!is_digit(*p)) return 0;
            value = value * 10 + (*p - '0');
        }
        exponent += minus ? -value : value;
    } else if (!has_point && negative && digits == 0) return 0; /* -0 is no plain number */
    if (num_digits > 19) return slow_double(whole, n, out);
    if (digits <= (1ull << 53) && exponent >= -22 && exponent <= 22) {
        /* Both are exact, so the one rounding is the right one (Clinger 1990). */
        double value = exponent < 0 ? (double)digits / TENS[-exponent] : (double)digits * TENS[exponent];
        *out = negative ? -value : value;
        return 1;
    }
#if defined(__x86_64__) && defined(__SIZEOF_FLOAT80__)
    if (exponent >= -22 && exponent <= 22) {
        /* 64 bits hold the digits and the power exactly. Their quotient is off by less than one of
         * its last bits, which decides only next to the middle between two doubles. */
        long double value = exponent < 0 ? (long double)digits / (long double)TENS[-exponent]
                                         : (long double)digits * (long double)TENS[exponent];
        uint64_t bits;
        memcpy(&bits, &value, 8);
        int64_t rest = (int64_t)(bits & 0x7FF);
        if (rest < 0x3FE || rest > 0x402) {
            *out = negative ? -(double)value : (double)value;
            return 1;
        }
    }
#endif
    return slow_double(whole, n, out);
}

static int two(const uint8_t *p) { return is_digit(p[0]) && is_digit(p[1]) ? (p[0] - '0') * 10 + p[1] - '0' : 100; }

/* Days from 1970-01-01 (Hinnant, "chrono-compatible low-level date algorithms"). */
static int parse_date(const uint8_t *p, int64_t n, int64_t *days) {
    static const int8_t LENGTH[] = {31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31};
    if (n != 10 || p[4] != '-' || p[7] != '-' || two(p) > 99 || two(p + 2) > 99) return 0;
    int64_t y = two(p) * 100 + two(p + 2);
    int m = two(p + 5), d = two(p + 8);
    int is_leap = (y % 4 == 0 && y % 100 != 0) || y % 400 == 0;
    if (y < 1 || m < 1 || m > 12 || d < 1 || d > LENGTH[m - 1] + (m == 2 && is_leap)) return 0;
    y -= m <= 2;
    int64_t era = y / 400, year = y - era * 400; /* y >= 0 */
    int64_t day = (153 * (m + (m > 2 ? -3 : 9)) + 2) / 5 + d - 1;
    *days = era * 146097 + year * 365 + year / 4 - year / 100 + day - 719468;
    return 1;
}

static int parse_timestamp(const uint8_t *p, int64_t n, int64_t *us) {
    int64_t days;
    if (n < 10 || !parse_date(p, 10, &days)) return 0;
    *us = days * 86400000000;
    if (n == 10) return 1;
    if (n < 19 || (p[10] != ' ' && p[10] != 'T') || p[13] != ':' || p[16] != ':') return 0;
    int hour = two(p + 11), minute = two(p + 14), second = two(p + 17);
    if (hour > 23 || minute > 59 || second > 59) return 0;
    int64_t part = 0;
    if (n > 19) {
        if (p[19] != '.' || n == 20 || n > 26) return 0;
        int64_t scale = 1000000;
        for (int64_t i = 20; i < n; i++) {
            if (!is_digit(p[i])) return 0;
            part = part * 10 + (p[i] - '0');
            scale /= 10;
        }
        part *= scale;
    }
    *us += (hour * 3600 + minute * 60 + second) * INT64_C(1000000) + part;
    return 1;
}

/* Each fills `out`, sets a bit of `valid` for each value there is, marks in `unsure` (a byte a row)
 * the fields that are not plainly of the type, and returns how many these are; nulls[0] counts nulls. */
#define CONVERTER(name, store, parse)                                                                            \
    int64_t name(const uint8_t *data, const int32_t *starts, const int32_t *lengths, const uint8_t *kinds,       \
                 int64_t rows, int64_t width, int64_t column, store *out, uint8_t *valid, uint8_t *unsure,       \
                 int64_t *nulls) {                                                                               \
        int64_t missing = 0, doubtful = 0;                                                                       \
        for (int64_t i = 0, at = column; i < rows; i++, at += width) {                                           \
            const uint8_t *p = data + starts[at];                                                                \
            int64_t n = lengths[at];                                                                             \
            (void)out;                                                                                           \
            if (kinds[at] == PLAIN && (parse)) {                                                                 \
                valid[i >> 3] |= (uint8_t)(1u << (i & 7));                                                       \
            } else if (kinds[at] == PLAIN && is_null(p, n)) {                                                    \
                missing++;                                                                                       \
            } else {                                                                                             \
                unsure[i] = 1;                                                                                   \
                doubtful++;                                                                                      \
            }                                                                                                    \
        }                                                                                                        \
        nulls[0] = missing;                                                                                      \
        return doubtful;                                                                                         \
    }

static int store_date(const uint8_t *p, int64_t n, int32_t *out) {
    int64_t days;
    if (!parse_date(p, n, &days)) return 0;
    *out = (int32_t)days;
    return 1;
}

static int store_bool(const uint8_t *p, int64_t n, uint8_t *out, int64_t i) {
    if (n == 4 && (!memcmp(p, "true", 4) || !memcmp(p, "True", 4) || !memcmp(p, "TRUE", 4))) {
        out[i >> 3] |= (uint8_t)(1u << (i & 7));
        return 1;
    }
    return n == 5 && (!memcmp(p, "false", 5) || !memcmp(p, "False", 5) || !memcmp(p, "FALSE", 5));
}

CONVERTER(to_int64, int64_t, parse_int64(p, n, out + i))
CONVERTER(to_float64, double, parse_double(p, n, out + i))
CONVERTER(to_date32, int32_t, store_date(p, n, out + i))
CONVERTER(to_timestamp_us, int64_t, parse_timestamp(p, n, out + i))
CONVERTER(to_bool, uint8_t, store_bool(p, n, out, i))
CONVERTER(to_null, uint8_t, 0)

static int64_t copy_raw(const uint8_t *p, int64_t n, int32_t escape, uint8_t *out) {
    int64_t m = 0;
    int quoted = n > 0 && p[0] == QUOTE;
    for (int64_t i = quoted; i < n; i++) {
        if (escape >= 0 && p[i] == escape) {
            if (i + 1 < n) out[m++] = p[++i];
        } else if (quoted && p[i] == QUOTE) {
            if (escape < 0 && i + 1 < n && p[i + 1] == QUOTE) out[m++] = p[i++];
            else quoted = 0;
        } else out[m++] = p[i];
    }
    return m;
}

/* Write the values of a text column one behind the other; offsets: [rows + 1]. Returns their bytes. */
int64_t to_text(const uint8_t *data, const int32_t *starts, const int32_t *lengths, const uint8_t *kinds,
                int64_t rows, int64_t width, int64_t column, int32_t escape, int32_t *offsets, uint8_t *out) {
    int64_t m = 0;
    offsets[0] = 0;
    for (int64_t i = 0, at = column; i < rows; i++, at += width) {
        const uint8_t *p = data + starts[at];
        int64_t n = lengths[at];
        if (kinds[at] == PLAIN) {
            memcpy(out + m, p, (size_t)n);
            m += n;
        } else if (kinds[at] == DOUBLED) {
            for (int64_t j = 0; j < n; j++) {
                out[m++] = p[j];
                j += p[j] == QUOTE;
            }
        } else m += copy_raw(p, n, escape, out + m);
        offsets[i + 1] = (int32_t)m;
    }
    return m;
}
