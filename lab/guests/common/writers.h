/*
 * writers: what the guests do with their working set, which both of them do alike.
 *
 * Nothing here needs an operating system, so that it runs in a process of Linux, in the
 * microguest, and in a test on the host.  ../README.md describes the working set and
 * the order of the stores; protocol.py is the host's side of the same definitions.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef LAB_WRITERS_H
#define LAB_WRITERS_H

#include "kinds.h" /* ../kinds.py writes it when a guest is compiled */
#include "layout.h"
#include "mix.h"

#include <stdbool.h>
#include <stdint.h>

enum {
    /* Words of a working-set page.  All others hold filler(). */
    WORD_MAGIC = 0,
    WORD_INDEX = 1,
    WORD_HEAD = 2,
    WORD_BODY = 256,
    WORD_TAIL = 511,
};

static const uint64_t PAGE_MAGIC = UINT64_C(0x4547415042414c56); /* "VLABPAGE" */

/* Whether this guest does a kind of workload. */
static inline bool kind_is_done(uint64_t kind)
{
    return kind < KIND_COUNT && !(KINDS_LACKING >> kind & 1);
}

enum {
    /* The scattered kind writes to one page out of so many. */
    SCATTER = 64,
    /* Of the hotcold kind one page in so many is hot, and one operation in so many goes to
     * the others; which pages are hot changes after so many operations of a writer. */
    HOT_SHARE = 10,
    COLD_EVERY = 10,
    HOT_PERIOD = 1 << 20,
    /* The readmostly kind writes in one operation out of so many, and reads in the others. */
    WRITE_EVERY = 10,
    /* Pages that the allocate kind gives back and takes anew at a time: 1 MiB. */
    PIECE_PAGES = 256,
};

/* What an operation does with its page. */
enum action {
    ACTION_WRITE, /* check it and write the next version to it */
    ACTION_READ,  /* check it */
    ACTION_TAKE,  /* find it zeroed by the kernel, and make it a page of the working set */
};

/* How writers are run. */
enum {
    /* Operations between two looks at the command to pause: some 0.3 ms. */
    BATCH = 1024,
    /* A paced writer works and sleeps in turn, this often at most: a guest's timer is good for
     * that, and a millisecond is what the host's samples resolve. */
    PACES_PER_S = 1000,
    /* What it is late by beyond this is lost, and is not made up for. */
    LATE_NS = 10000000,
    TICK_MS = 100,
};

/* Where thread `thread`'s SplitMix64 sequence starts. */
static inline uint64_t stream_start(uint64_t seed, uint64_t thread)
{
    return mix64(seed ^ (GAMMA * (thread + 1)));
}

/* First page of thread `thread` out of `threads` that share `wss_pages`; the range ends
 * where the next thread's begins. */
static inline uint64_t first_page(uint64_t wss_pages, uint64_t threads, uint64_t thread)
{
    return wss_pages * thread / threads;
}

/* The bucket of a duration in ticks of the time stamp counter. */
static inline uint64_t latency_bucket(uint64_t ticks)
{
    uint64_t shift, bucket;

    if (ticks < LATENCY_SUBS) {
        return ticks;
    }
    shift = (uint64_t)(63 - __builtin_clzll(ticks)) - LATENCY_BITS;
    bucket = (shift << LATENCY_BITS) + (ticks >> shift);
    return bucket < LATENCY_BUCKETS ? bucket : LATENCY_BUCKETS - 1;
}

/* What an untouched word of the working set holds: never zero (GAMMA is odd), and
 * different for every word of the working set. */
static inline uint64_t filler(uint64_t index, uint64_t word)
{
    return GAMMA * (index * PAGE_WORDS + word);
}

/* Bits of a number up to `count`, which is not zero. */
static inline unsigned bits_of(uint64_t count)
{
    return 64 - (unsigned)__builtin_clzll(count);
}

/*
 * A rank from 0 to count-1 with probabilities in the proportion 1 : 1/2 : 1/3 ..., from a
 * random number and more that follow from it; `bits` is bits_of(count).
 *
 * An octave of ranks (counted from 1) from 2^j to 2^(j+1)-1 is as good as the next one if each
 * rank in it has the weight 2^-j.  So take an octave and a rank of it, either uniformly, and
 * accept the rank with the probability 2^j/rank that is missing.  Two of three are accepted,
 * it needs no table, which would itself be memory that is touched, and is exact in integers.
 */
static inline uint64_t zipf_rank(uint64_t random, uint64_t count, unsigned bits)
{
    for (;; random = mix64(random + GAMMA)) {
        uint64_t first = UINT64_C(1) << scale(random, bits);
        uint64_t more = mix64(random);
        uint64_t rank = first + ((more >> 32) & (first - 1));

        if (rank <= count && (more & UINT32_MAX) * rank < first << 32) {
            return rank - 1;
        }
    }
}

/* A permutation of 0..count-1, so that frequent pages are anywhere and not side by side: one of
 * all numbers of `bits` bits, applied until the result is in range. */
static inline uint64_t spread(uint64_t rank, uint64_t count, unsigned bits)
{
    uint64_t mask = (UINT64_C(1) << bits) - 1;
    unsigned half = bits / 2 + 1;

    do {
        rank = ((rank + GAMMA) * MIX_1) & mask;
        rank ^= rank >> half;
        rank = (rank * MIX_2) & mask;
        rank ^= rank >> half;
    } while (rank >= count);
    return rank;
}

/* One thread's share of the working set and its place in the sequence of operations. */
struct writer {
    volatile uint64_t *pages;   /* first page of the share */
    volatile uint64_t *table;   /* version of each page of the share, kept apart from the page */
    volatile uint64_t *ops;     /* this thread's counter in the progress page */
    volatile uint64_t *latency; /* this thread's LATENCY_BUCKETS counts, or NULL */
    volatile uint64_t *slow;    /* its SLOW_ENTRIES slow operations, or NULL */
    uint64_t slow_ticks;        /* what is slow */
    uint64_t magic;             /* PAGE_MAGIC ^ nonce */
    uint64_t first;             /* index of the first page */
    uint64_t count;             /* pages in the share */
    uint64_t stream;            /* SplitMix64 state after `done` steps */
    uint64_t next;              /* next page, sequential and allocate kinds */
    uint64_t done;              /* operations completed */
    uint64_t thread;
    enum kind kind;
};

static inline void writer_init(struct writer *w, enum kind kind, uint64_t seed, uint64_t thread,
                        uint64_t threads, uint64_t wss_pages)
{
    *w = (struct writer){.kind = kind};
    w->thread = thread;
    w->first = first_page(wss_pages, threads, thread);
    w->count = first_page(wss_pages, threads, thread + 1) - w->first;
    w->stream = stream_start(seed, thread);
    w->slow_ticks = UINT64_MAX;
}

static __attribute__((cold)) void page_is_bad(struct writer *w, uint64_t page);

/*
 * One operation: check page `page` of the share, then write the next version to it.  The
 * action is a constant wherever this is inlined.
 *
 * The stores are volatile, so the compiler keeps them in this order, and x86 shows
 * them to everyone in program order: head, body, tail, table, counter.  Stop the vCPU
 * anywhere and at most this one operation of the thread is half done: some number of
 * the five stores, from the left, have happened.  Reading leaves only the last of them, and
 * a page that is taken gets its magic and its index before the others.
 */
static inline __attribute__((always_inline)) void one_operation(struct writer *w, uint64_t page,
                                                                enum action action)
{
    volatile uint64_t *words = w->pages + page * PAGE_WORDS;
    uint64_t version = w->table[page];
    bool is_new = action == ACTION_TAKE;

    if (__builtin_expect((words[WORD_MAGIC] ^ (is_new ? 0 : w->magic)) |
                         (words[WORD_INDEX] ^ (is_new ? 0 : w->first + page)) |
                         (words[WORD_HEAD] ^ version) | (words[WORD_BODY] ^ version) |
                         (words[WORD_TAIL] ^ version), 0)) {
        page_is_bad(w, page);
    }
    version = ++w->done;
    if (is_new) {
        words[WORD_MAGIC] = w->magic;
        words[WORD_INDEX] = w->first + page;
    }
    if (action != ACTION_READ) {
        words[WORD_HEAD] = version;
        words[WORD_BODY] = version;
        words[WORD_TAIL] = version;
        w->table[page] = version;
    }
    *w->ops = version;
}

/* Note an operation that took long, once it is over and timed. */
static __attribute__((cold)) void note_slow(const struct writer *w, uint64_t page, uint64_t start,
                                            uint64_t ticks)
{
    uint64_t entry = 1 + w->slow[0] % (SLOW_ENTRIES - 1);
    volatile uint64_t *words = w->slow + SLOW_WORDS * entry;

    words[SLOW_START_TICKS] = start;
    words[SLOW_TICKS] = ticks;
    words[SLOW_PAGE] = w->first + page;
    words[SLOW_OP] = w->done;
    w->slow[0]++;
}

/* One operation, and how long it took if that is wanted. */
static inline __attribute__((always_inline)) void operate(struct writer *w, uint64_t page,
                                                          enum action action)
{
    uint64_t start, ticks;

    if (!w->latency) {
        one_operation(w, page, action);
        return;
    }
    start = __builtin_ia32_rdtsc();
    one_operation(w, page, action);
    ticks = __builtin_ia32_rdtsc() - start;
    w->latency[latency_bucket(ticks)]++;
    if (__builtin_expect(ticks >= w->slow_ticks, 0)) {
        note_slow(w, page, start, ticks);
    }
}

/* `n` operations without a system call, a division or a shared lock. */
static inline void run_random(struct writer *shared, uint64_t n)
{
    struct writer w = *shared; /* in registers */

    while (n--) {
        w.stream += GAMMA;
        operate(&w, scale(mix64(w.stream), w.count), ACTION_WRITE);
    }
    shared->stream = w.stream;
    shared->done = w.done;
}

static inline void run_scattered(struct writer *shared, uint64_t n)
{
    struct writer w = *shared;
    uint64_t places = (w.count + SCATTER - 1) / SCATTER;

    while (n--) {
        w.stream += GAMMA;
        operate(&w, scale(mix64(w.stream), places) * SCATTER, ACTION_WRITE);
    }
    shared->stream = w.stream;
    shared->done = w.done;
}

static inline void run_sequential(struct writer *shared, uint64_t n)
{
    struct writer w = *shared;

    while (n--) {
        operate(&w, w.next, ACTION_WRITE);
        w.next = w.next + 1 == w.count ? 0 : w.next + 1;
    }
    shared->next = w.next;
    shared->done = w.done;
}

static inline void run_zipf(struct writer *shared, uint64_t n)
{
    struct writer w = *shared;
    unsigned bits = bits_of(w.count);

    while (n--) {
        w.stream += GAMMA;
        operate(&w, spread(zipf_rank(mix64(w.stream), w.count, bits), w.count, bits),
                ACTION_WRITE);
    }
    shared->stream = w.stream;
    shared->done = w.done;
}

static inline void run_hotcold(struct writer *shared, uint64_t n)
{
    struct writer w = *shared;
    uint64_t hot = (w.count + HOT_SHARE - 1) / HOT_SHARE;

    while (n) {
        uint64_t first = w.done / HOT_PERIOD * hot % w.count; /* hot page */
        uint64_t left = HOT_PERIOD - w.done % HOT_PERIOD;

        left = left < n ? left : n;
        n -= left;
        while (left--) {
            uint64_t random, page;

            w.stream += GAMMA;
            random = mix64(w.stream);
            /* What is left of the random number once it has said hot or cold says where. */
            if (scale(random, COLD_EVERY) || hot == w.count) {
                page = first + scale(random * COLD_EVERY, hot);
            } else {
                page = first + hot + scale(random * COLD_EVERY, w.count - hot);
            }
            operate(&w, page < w.count ? page : page - w.count, ACTION_WRITE);
        }
    }
    shared->stream = w.stream;
    shared->done = w.done;
}

static inline void run_readmostly(struct writer *shared, uint64_t n)
{
    struct writer w = *shared;

    while (n--) {
        uint64_t random, page;

        w.stream += GAMMA;
        random = mix64(w.stream);
        page = scale(random * WRITE_EVERY, w.count);
        if (scale(random, WRITE_EVERY)) {
            operate(&w, page, ACTION_READ);
        } else {
            operate(&w, page, ACTION_WRITE);
        }
    }
    shared->stream = w.stream;
    shared->done = w.done;
}

static inline void run_operations(struct writer *w, uint64_t n)
{
    switch (w->kind) {
    case KIND_RANDOM:
        run_random(w, n);
        break;
    case KIND_SCATTERED:
        run_scattered(w, n);
        break;
    case KIND_ZIPF:
        run_zipf(w, n);
        break;
    case KIND_HOTCOLD:
        run_hotcold(w, n);
        break;
    case KIND_READMOSTLY:
        run_readmostly(w, n);
        break;
    default:
        run_sequential(w, n);
    }
}

/* Make a page one of the working set.  The allocate kind leaves the other words as the kernel
 * zeroed them, because that is what it finds in all later ones. */
static inline void populate(uint64_t *page, enum kind kind, uint64_t magic, uint64_t index)
{
    uint64_t value = filler(index, 0);

    for (unsigned word = 0; word < PAGE_WORDS && kind != KIND_ALLOCATE; word++, value += GAMMA) {
        page[word] = value;
    }
    page[WORD_MAGIC] = magic;
    page[WORD_INDEX] = index;
    page[WORD_HEAD] = 0;
    page[WORD_BODY] = 0;
    page[WORD_TAIL] = 0;
}

static inline bool page_is_intact(const struct writer *w, uint64_t page)
{
    volatile uint64_t *words = w->pages + page * PAGE_WORDS;
    uint64_t version = w->table[page];
    uint64_t value = filler(w->first + page, 0);
    /* Of a piece that the allocate kind has begun with, what it has not come to yet. */
    uint64_t begun = (w->next + PIECE_PAGES - 1) / PIECE_PAGES * PIECE_PAGES;
    bool given_back = w->kind == KIND_ALLOCATE && page >= w->next && page < begun;
    uint64_t wrong = 0;

    for (unsigned word = 0; word < PAGE_WORDS; word++, value += GAMMA) {
        uint64_t expected = w->kind == KIND_ALLOCATE ? 0 : value;

        switch (word) {
        case WORD_MAGIC:
            expected = given_back ? 0 : w->magic;
            break;
        case WORD_INDEX:
            expected = given_back ? 0 : w->first + page;
            break;
        case WORD_HEAD:
        case WORD_BODY:
        case WORD_TAIL:
            expected = version;
            break;
        }
        wrong |= words[word] ^ expected;
    }
    return wrong == 0;
}

#endif
