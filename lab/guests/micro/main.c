/*
 * main: the microguest, from its first instruction in ring 3.
 *
 * It is a working set and the writers that change it, one on each processor, and nothing else: no
 * kernel, no interrupts, no ports.  What the host wants to know is in RAM, where it reads it.
 * ../README.md describes the pages that it finds there; README.md beside this file why the guest
 * is made as it is.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "writers.h"
#include "memory.h"
#include "processor.h"

/* The host's parameters, in the ROM; build.py writes them there. */
struct parameters {
    uint64_t magic;
    uint64_t kind;
    uint64_t wss_mib;
    uint64_t threads;
    uint64_t seed;
    uint64_t rate; /* operations a second of all writers; 0 is as many as they can do */
    uint64_t ram_mib;
    uint64_t flags;
    uint64_t entropy;
};

enum {
    FLAG_TIME_WRITES = 1 << 0,
    FLAG_HUGE_PAGES = 1 << 1, /* map the working set by pages of 2 MiB */
    FLAG_WARM_UP = 1 << 2,    /* the translation caches are software, and grow */
};

/* Why a guest does not run; build.py has the words. */
enum refusal { REFUSED_PARAMETERS = 1, REFUSED_MEMORY = 2, REFUSED_CLOCK = 3, REFUSED_VCPU = 4 };

/* What an operation takes that a processor does undisturbed is a hundredth of this. */
enum { SLOW_NS = 4000 };

static const uint64_t PARAMETERS_MAGIC = UINT64_C(0x3152434d4c42414c); /* "LABLMCR1" */

#define PARAMETERS ((const volatile struct parameters *)PARAMETERS_ADDRESS)
#define PROGRESS ((volatile uint64_t *)PROGRESS_ADDRESS)
#define LATENCY ((volatile uint64_t *)LATENCY_ADDRESS)

#define MIB (UINT64_C(1) << 20)
#define GIB (UINT64_C(1) << 30)
#define HUGE_BYTES (2 * MIB)
/* Where the working set is mapped: far from what is mapped to itself. */
#define WINDOW_ADDRESS (UINT64_C(1) << 40)
/* A PC has no RAM from here, or from 3 GiB if it has more than fits below here, to 4 GiB. */
#define HOLE_ADDRESS UINT64_C(0xe0000000)

static struct parameters p;
static struct writer writers[MAX_THREADS];
static struct clock timer;
static uint64_t next_free = FREE_ADDRESS;
static uint64_t set_address; /* of the working set's first page */

/* How paced writers work: so many operations, and as long from the start of these until the start
 * of the next.  Not paced while `pace_ops` is zero. */
static volatile uint64_t pace_ops;
static uint64_t pace_ticks;

/* All writers stand still between two operations while this is set. */
static volatile uint64_t pause_wanted;
static volatile uint64_t paused;
static volatile uint64_t started;

void *memset(void *to, int byte, __SIZE_TYPE__ n)
{
    void *start = to;

    __asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(byte) : "memory");
    return start;
}

void *memcpy(void *to, const void *from, __SIZE_TYPE__ n)
{
    void *start = to;

    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
    return start;
}

static _Noreturn void refuse(enum refusal why)
{
    PROGRESS[PROGRESS_ANSWER] = why;
    PROGRESS[PROGRESS_STATE] = STATE_REFUSED;
    for (;;) {
        relax();
    }
}

/* -------------------------------------------------------------------- memory */

/* Where RAM continues after `address`, which is its end below 4 GiB or not. */
static uint64_t low_end(void)
{
    uint64_t ram = p.ram_mib * MIB;

    return ram < HOLE_ADDRESS ? ram : 3 * GIB;
}

static uint64_t high_end(void)
{
    uint64_t ram = p.ram_mib * MIB;

    return ram < HOLE_ADDRESS ? 4 * GIB : 4 * GIB + ram - 3 * GIB;
}

/* Physical memory, aligned to its size if that is a power of two.  What is written by address and
 * not through the window is asked for before the working set, and so lies below 4 GiB. */
static uint64_t take(uint64_t bytes, uint64_t align)
{
    uint64_t address = (next_free + align - 1) & -align;

    if (address < 4 * GIB && address + bytes > low_end()) {
        address = 4 * GIB;
    }
    if (address >= 4 * GIB && address + bytes > high_end()) {
        refuse(REFUSED_MEMORY);
    }
    next_free = address + bytes;
    return address;
}

/* Zeroed memory below 4 GiB, where an address is its own physical one. */
static void *take_low(uint64_t bytes)
{
    uint64_t address = take(bytes, PAGE_BYTES);

    if (address >= 4 * GIB) {
        refuse(REFUSED_MEMORY);
    }
    return memset((void *)address, 0, bytes);
}

/* Map the rest of the low 4 GiB to itself: RAM, and the registers of the timer and the APIC. */
static void map_low(void)
{
    for (unsigned gib = 1; gib < 4; gib++) {
        uint64_t *table = take_low(PAGE_BYTES);

        for (unsigned i = 0; i < 512; i++) {
            table[i] = (gib * GIB + i * HUGE_BYTES) | LARGE_PAGE;
        }
        level3[gib] = (uint64_t)table | TABLE_ENTRY;
    }
}

/*
 * Give the working set physical memory and map it to the window.
 *
 * The tables are complete before they are entered into the one above, and what was not present is
 * not in any translation cache, so nothing has to be flushed, which ring 3 could not do.
 */
static uint64_t *map_working_set(uint64_t bytes)
{
    bool huge = p.flags & FLAG_HUGE_PAGES;
    uint64_t pieces = (bytes + HUGE_BYTES - 1) / HUGE_BYTES;
    uint64_t *window = take_low(PAGE_BYTES);
    uint64_t *directories = take_low((pieces + 511) / 512 * PAGE_BYTES);
    uint64_t *tables = huge ? NULL : take_low(pieces * PAGE_BYTES);

    for (uint64_t piece = 0; piece < pieces; piece++) {
        uint64_t address = take(HUGE_BYTES, HUGE_BYTES);

        if (piece == 0) {
            set_address = address;
        }
        if (huge) {
            directories[piece] = address | LARGE_PAGE;
            continue;
        }
        for (unsigned i = 0; i < 512; i++) {
            tables[512 * piece + i] = (address + i * PAGE_BYTES) | SMALL_PAGE;
        }
        directories[piece] = (uint64_t)(tables + 512 * piece) | TABLE_ENTRY;
    }
    for (uint64_t i = 0; i < (pieces + 511) / 512; i++) {
        window[i] = (uint64_t)(directories + 512 * i) | TABLE_ENTRY;
    }
    level4[WINDOW_ADDRESS >> 39] = (uint64_t)window | TABLE_ENTRY;
    return (uint64_t *)WINDOW_ADDRESS;
}

/* ------------------------------------------------------------------- writers */

/* Count a page that is not what its writer left there, and mend what the operation does not write
 * anyway, so that one fault is counted once. */
static void page_is_bad(struct writer *w, uint64_t page)
{
    volatile uint64_t *words = w->pages + page * PAGE_WORDS;

    __atomic_fetch_add(&PROGRESS[PROGRESS_ERRORS], 1, __ATOMIC_RELAXED);
    words[WORD_MAGIC] = w->magic;
    words[WORD_INDEX] = w->first + page;
}

static uint64_t total_operations(void)
{
    uint64_t sum = 0;

    for (uint64_t i = 0; i < p.threads; i++) {
        sum += PROGRESS[PROGRESS_OPS + PROGRESS_OPS_STRIDE * i];
    }
    return sum;
}

static void tick(void)
{
    uint64_t ticks = read_ticks();

    PROGRESS[PROGRESS_CHECKS] = p.kind == KIND_IDLE ? 0 : total_operations();
    PROGRESS[PROGRESS_TICK_NS] = clock_ns(&timer, ticks);
    if (PROGRESS[PROGRESS_LATENCY_GPA]) {
        LATENCY[LATENCY_NS] = clock_ns(&timer, ticks);
        LATENCY[LATENCY_TICKS] = ticks;
    }
}

/* Compare every word of the working set while no writer writes. */
static uint64_t count_bad_pages(void)
{
    uint64_t bad = 0;

    pause_wanted = 1;
    while (paused < p.threads - 1) {
        relax();
    }
    for (uint64_t i = 0; i < p.threads && p.kind != KIND_IDLE; i++) {
        for (uint64_t page = 0; page < writers[i].count; page++) {
            bad += !page_is_intact(&writers[i], page);
        }
    }
    pause_wanted = 0;
    while (paused) {
        relax();
    }
    return bad;
}

/* What the first writer does for the host and for all others. */
static void serve(void)
{
    static uint64_t next_tick;
    uint64_t ticks = read_ticks();
    uint64_t request = PROGRESS[PROGRESS_REQUEST];

    /* The counter may jump, in either direction, where a guest is restored. */
    if (ticks - next_tick < UINT64_C(1) << 63 || next_tick - ticks > timer.hz) {
        tick();
        next_tick = ticks + timer.hz * TICK_MS / 1000;
    }
    if (request != PROGRESS[PROGRESS_ANSWERED]) {
        PROGRESS[PROGRESS_ANSWER] = count_bad_pages();
        PROGRESS[PROGRESS_ANSWERED] = request;
    }
}

static void stand_still(void)
{
    __atomic_fetch_add(&paused, 1, __ATOMIC_SEQ_CST);
    while (pause_wanted) {
        relax();
    }
    __atomic_fetch_sub(&paused, 1, __ATOMIC_SEQ_CST);
}

/* Wait until it is time for a paced writer's next operations, and say when those after them are
 * due. */
static uint64_t wait_for_turn(uint64_t due)
{
    uint64_t late = timer.hz / (1000000000 / LATE_NS);
    uint64_t ticks = read_ticks();

    /* Too late, the first time, or the counter has jumped back. */
    if (ticks - due < UINT64_C(1) << 63 ? ticks - due > late : due - ticks > pace_ticks) {
        return ticks + pace_ticks;
    }
    while (due - read_ticks() < UINT64_C(1) << 63) {
        relax();
    }
    return due + pace_ticks;
}

static _Noreturn void write_for_ever(struct writer *w)
{
    uint64_t due = 0;

    for (;;) {
        uint64_t ops = pace_ops;

        if (w->thread == 0) {
            serve();
        } else if (pause_wanted) {
            stand_still();
        }
        if (ops) {
            due = wait_for_turn(due);
        }
        if (w->kind == KIND_IDLE) {
            *w->ops = ++w->done;
        } else {
            run_operations(w, ops ? ops : BATCH);
        }
    }
}

/* Pace the writers from now on; `rate` is not zero. */
static void set_pace(uint64_t rate, uint64_t threads)
{
    uint64_t ops = rate / threads / PACES_PER_S;

    ops = ops ? ops : 1;
    pace_ticks = scale_ratio(timer.hz, ops * threads, rate);
    pace_ops = ops;
}

/* Room for the durations of operations, which is taken before the working set is. */
static void set_up_latency(void)
{
    memset((void *)LATENCY, 0, PAGE_BYTES);
    LATENCY[LATENCY_COUNT] = LATENCY_BUCKETS;
    LATENCY[LATENCY_SLOW_TICKS] = timer.hz / (1000000000 / SLOW_NS);
    for (uint64_t i = 0; i < p.threads; i++) {
        volatile uint64_t *gpas = &LATENCY[LATENCY_GPAS + LATENCY_GPAS_STRIDE * i];
        struct writer *w = &writers[i];

        w->latency = take_low(LATENCY_BUCKETS * sizeof(uint64_t));
        w->slow = take_low(SLOW_ENTRIES * SLOW_WORDS * sizeof(uint64_t));
        w->slow_ticks = LATENCY[LATENCY_SLOW_TICKS];
        for (uint64_t page = 0; page < LATENCY_PAGES; page++) {
            gpas[page] = (uint64_t)(w->latency + page * PAGE_WORDS);
        }
        gpas[LATENCY_SLOW_GPA] = (uint64_t)w->slow;
    }
    LATENCY[LATENCY_START_TICKS] = timer.start;
    LATENCY[LATENCY_MAGIC] = LATENCY_PAGE_MAGIC;
    PROGRESS[PROGRESS_LATENCY_GPA] = LATENCY_ADDRESS;
}

/*
 * Let the writers run until the machine's address translation caches are as large and as full as
 * they are going to be; ../README.md says why TCG needs that.
 */
static void warm_up(uint64_t wss_pages)
{
    /* Skewed kinds need more operations to get to as many pages. */
    uint64_t visits = p.kind == KIND_ZIPF || p.kind == KIND_HOTCOLD ? 16 : 2;

    for (uint64_t entries = 256; entries < 2 * wss_pages; entries *= 2) {
        uint64_t before[MAX_THREADS];

        for (uint64_t i = 0; i < p.threads; i++) {
            before[i] = *writers[i].ops;
        }
        for (uint64_t i = 0; i < p.threads; i++) {
            uint64_t fill = visits * (entries < writers[i].count ? entries : writers[i].count);

            while (*writers[i].ops - before[i] < fill) {
                if (i == 0) {
                    run_operations(&writers[0], BATCH);
                } else {
                    relax();
                }
            }
        }
        flush_translations();
    }
}

/* ---------------------------------------------------------------------- start */

static void begin_progress(uint64_t nonce)
{
    memset((void *)PROGRESS, 0, PAGE_BYTES);
    PROGRESS[PROGRESS_LAYOUT] = 1;
    PROGRESS[PROGRESS_NONCE] = nonce;
    PROGRESS[PROGRESS_THREADS] = p.threads;
    PROGRESS[PROGRESS_WSS_PAGES] = p.wss_mib << 8;
    PROGRESS[PROGRESS_KIND] = p.kind;
    PROGRESS[PROGRESS_SEED] = p.seed;
    PROGRESS[PROGRESS_STATE] = STATE_POPULATING;
    PROGRESS[PROGRESS_MAGIC] = PROGRESS_PAGE_MAGIC;
}

static void set_up_writers(uint64_t nonce)
{
    uint64_t wss_pages = p.wss_mib << 8;
    uint64_t *table = take_low(wss_pages * sizeof(*table));
    uint64_t *set;

    PROGRESS[PROGRESS_TABLE_GPA] = (uint64_t)table;
    for (uint64_t i = 0; i < p.threads; i++) {
        struct writer *w = &writers[i];

        writer_init(w, p.kind, p.seed, i, p.threads, wss_pages);
        w->table = table + w->first;
        w->ops = &PROGRESS[PROGRESS_OPS + PROGRESS_OPS_STRIDE * i];
        w->magic = PAGE_MAGIC ^ nonce;
    }
    if (p.flags & FLAG_TIME_WRITES) {
        set_up_latency();
    }
    set = map_working_set(wss_pages * PAGE_BYTES);
    LATENCY[LATENCY_SET_GPA] = set_address;
    for (uint64_t index = 0; index < wss_pages; index++) {
        populate(set + index * PAGE_WORDS, p.kind, PAGE_MAGIC ^ nonce, index);
    }
    for (uint64_t i = 0; i < p.threads; i++) {
        writers[i].pages = set + writers[i].first * PAGE_WORDS;
    }
}

/* Start the other processors one after the other, since all begin at the same place. */
static void start_others(void)
{
    for (uint64_t i = 1; i < p.threads; i++) {
        uint64_t since = read_ticks();

        starting = i;
        for (unsigned tries = 0; started < i; tries++) {
            if (tries == 100) {
                refuse(REFUSED_VCPU);
            }
            start_processor(i, ROM_ADDRESS, timer.hz / 1000);
            while (started < i && read_ticks() - since < (tries + 1) * (timer.hz / 10)) {
                relax();
            }
        }
    }
}

static _Noreturn void start(void)
{
    uint64_t nonce;

    memset(bss_start, 0, (uint64_t)(bss_end - bss_start));
    p = *PARAMETERS;
    nonce = mix64(mix64(p.entropy) ^ read_ticks());
    begin_progress(nonce ? nonce : 1);
    if (p.magic != PARAMETERS_MAGIC || !kind_is_done(p.kind) || p.threads < 1 ||
        p.threads > MAX_THREADS || p.wss_mib << 8 < p.threads || p.ram_mib < 8) {
        refuse(REFUSED_PARAMETERS);
    }
    map_low();
    if (!clock_start(&timer)) {
        refuse(REFUSED_CLOCK);
    }
    set_up_writers(PROGRESS[PROGRESS_NONCE]);
    start_others();
    if (p.flags & FLAG_WARM_UP && p.kind != KIND_IDLE) {
        warm_up(p.wss_mib << 8);
    }
    if (p.kind == KIND_IDLE) {
        set_pace(1000, 1);
    } else if (p.rate) {
        set_pace(p.rate, p.threads);
    }
    tick();
    PROGRESS[PROGRESS_STATE] = STATE_RUNNING;
    write_for_ever(&writers[0]);
}

_Noreturn void vcpu_main(uint64_t index)
{
    if (index == 0) {
        start();
    }
    started = index;
    write_for_ever(&writers[index]);
}
