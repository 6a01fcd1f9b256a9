/*
 * redis: asks a Redis server on a TCP port of this host for work, and writes down every request.
 *
 *     redis KEY=VALUE...
 *
 * The keys are in `parse_options`.  One thread and one request at a time on each connection:
 *
 *   closed loop   a connection sends its next request when its reply has come; what the server
 *                 can do is the rate.
 *   open loop     (rate > 0) requests are due at even distances, whatever the server does.  Any
 *                 free connection takes the oldest that is due; when none is free, requests wait
 *                 here, and their waiting counts, because it begins when they are due.
 *
 * Every request has a record in the file `records`, which others may map and read meanwhile: one
 * is added when the request is due and completed when its reply has been read.  So what was never
 * answered is in the file, too.  The file's layout is `struct header` and `struct record`, and
 * lab/loads/redis.py reads it.
 *
 * What it prints:
 *
 *     ready NS       every connection has answered a PING, and the keys are filled if asked for
 *     end REASON     `stopped` by SIGTERM or by the end of stdin, `seconds` are over, `full` file
 *     error TEXT     it could not go on; exit status 1
 *
 * Times are CLOCK_MONOTONIC, in ns.  The clock is read once for each reply, after it has been
 * read; in a closed loop that is when the next request is due and, some 0.2 us before it is, sent.
 * A reply that comes while this thread is busy with those of other connections waits for it: that
 * is in its latency.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum {
    HEADER_BYTES = 4096,
    LINE_BYTES = 256,
    HEAD_BYTES = 128,
    READ_BYTES = 65536,
    EVENTS = 256,
    MAX_CLIENTS = 10000,
    MAX_VALUE_BYTES = 64 << 20,
    /* With no free connection the file is brought up to date this often. */
    WAITING_NS = 1000000,
    /* Values begin anywhere in so much more than their length of noise. */
    POOL_SPARE = 65536,
};

#define NS_PER_S INT64_C(1000000000)
#define MAGIC UINT64_C(0x3173696465724c)
#define LONGEST_BULK (INT64_C(512) << 20)

enum operation { OP_PING, OP_FILL, OP_SET, OP_GET };
enum status { OUTSTANDING = 0, OK = 1, REFUSED = 2 };

struct record {
    int64_t due_ns;
    int64_t sent_ns;                /* 0: not sent yet */
    _Atomic int64_t done_ns;        /* 0: no reply yet; stored last */
    uint64_t number;                /* what a sequence wrote, else 0 */
    uint16_t client;
    uint8_t operation;
    uint8_t status;
    uint32_t unused;
};

struct header {
    uint64_t magic;
    uint64_t record_bytes;
    uint64_t capacity;
    _Atomic uint64_t issued;        /* records there are; stored last */
    _Atomic uint64_t completed;
    _Atomic uint64_t refused;
    int64_t start_ns;
    _Atomic int64_t end_ns;         /* 0 while it runs */
    int64_t cpu_ns;                 /* of this process, from start to end */
    char first_error[LINE_BYTES];
};

_Static_assert(sizeof(struct record) == 40, "lab/loads/redis.py knows this layout");
_Static_assert(sizeof(struct header) <= HEADER_BYTES, "the records begin after it");

struct options {
    uint64_t port, clients, keys, value_bytes, seed, max_requests;
    uint64_t get_percent;           /* 0: only SET, 100: only GET */
    uint64_t sequence;              /* 0: no; else the first number that is written: only SET */
    uint64_t fill;                  /* 1: SET every key once before */
    double rate, seconds, ready_s;
    const char *records;
};

struct connection {
    int fd;
    bool wants_write;
    bool is_busy;
    enum operation operation;
    uint64_t slot;                  /* its record */
    uint64_t number;                /* the last one that a sequence wrote */

    /* What is still to be sent: head, value, and the end of line. */
    char head[HEAD_BYTES];
    size_t head_bytes;
    const char *value;
    size_t value_bytes;
    size_t sent_bytes;

    /* The reply: a line, and after `$n` as many bytes as that and the end of line. */
    char line[LINE_BYTES];
    size_t line_bytes;              /* may be more than is kept */
    bool line_ended_r;
    bool in_bulk;
    int64_t bulk_left;
};

static struct options options;
static struct header *header;
static struct record *records;
static struct connection *connections;
static uint32_t *free_connections, n_free;
static char *pool;
static uint64_t random_state;
static int epoll_fd, due_timer_fd, end_timer_fd;
static uint64_t n_ready, next_sent, fill_next, filled;
static bool is_running;
static int64_t start_cpu_ns;

static int64_t clock_ns(clockid_t which)
{
    struct timespec now;

    clock_gettime(which, &now);
    return now.tv_sec * NS_PER_S + now.tv_nsec;
}

static int64_t now_ns(void)
{
    return clock_ns(CLOCK_MONOTONIC);
}

/* Random numbers: splitmix64. */
static uint64_t random_u64(void)
{
    uint64_t z = (random_state += UINT64_C(0x9e3779b97f4a7c15));

    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* limit: 2^32 at most. */
static uint64_t random_below(uint64_t limit)
{
    return ((random_u64() >> 32) * limit) >> 32;
}

static int64_t due_ns(uint64_t index)
{
    return header->start_ns + (int64_t)((long double)index * NS_PER_S / (long double)options.rate);
}

/* A record for a request that is due; there must be room. */
static uint64_t add_record(int64_t due)
{
    uint64_t slot = header->issued;

    records[slot].due_ns = due;
    records[slot].operation =
        options.get_percent && random_below(100) < options.get_percent ? OP_GET : OP_SET;
    atomic_store_explicit(&header->issued, slot + 1, memory_order_release);
    return slot;
}

static bool is_full(void)
{
    return header->issued == header->capacity;
}

/* Open loop: records for what has become due until an instant.  Returns when the next is due. */
static int64_t add_due(int64_t until)
{
    int64_t next;

    while ((next = due_ns(header->issued)) <= until && !is_full()) {
        add_record(next);
    }
    return next;
}

static void note_end(void)
{
    if (header && !header->end_ns) {
        int64_t end = now_ns();

        if (is_running && options.rate > 0) {
            add_due(end);
        }
        header->cpu_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID) - start_cpu_ns;
        header->end_ns = end;
    }
}

static void __attribute__((noreturn, format(printf, 1, 2))) fail(const char *format, ...)
{
    va_list arguments;

    note_end();
    printf("error ");
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\n");
    fflush(stdout);
    exit(1);
}

static void __attribute__((noreturn)) finish(const char *reason)
{
    note_end();
    printf("end %s\n", reason);
    fflush(stdout);
    exit(0);
}

/* Text of a reply that is safe to print on one line. */
static const char *shown(const struct connection *c)
{
    static char text[LINE_BYTES];
    size_t kept = c->line_bytes < LINE_BYTES - 1 ? c->line_bytes : LINE_BYTES - 1;

    for (size_t i = 0; i < kept; i++) {
        text[i] = c->line[i] >= ' ' && c->line[i] <= '~' ? c->line[i] : '?';
    }
    text[kept] = 0;
    return text;
}

static const char *asked(const struct connection *c)
{
    switch (c->operation) {
    case OP_PING: return "PING";
    case OP_GET: return "GET";
    default: return "SET";
    }
}

static void __attribute__((noreturn)) lost(const struct connection *c, int error)
{
    const char *why = error ? strerror(error) : "the server closed the connection";

    if (error == ECONNREFUSED) {
        fail("nothing listens there");
    }
    if (c->operation == OP_PING) {
        fail("%s before it answered a PING", why);
    }
    fail("%s after %" PRIu64 " requests", why, header->completed);
}

static void watch(struct connection *c, bool write)
{
    struct epoll_event event = {
        .events = EPOLLIN | (write ? EPOLLOUT : 0),
        .data.u32 = (uint32_t)(c - connections),
    };

    if (c->wants_write != write) {
        c->wants_write = write;
        epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &event);
    }
}

/* Send what the socket takes of the rest of a request. */
static void flush_request(struct connection *c)
{
    static char end_of_line[] = "\r\n";
    struct iovec all[3] = {
        {c->head, c->head_bytes},
        {(void *)(uintptr_t)c->value, c->value_bytes},
        {end_of_line, c->value ? 2 : 0},
    };
    size_t total = all[0].iov_len + all[1].iov_len + all[2].iov_len;

    while (c->sent_bytes < total) {
        struct iovec rest[3];
        struct msghdr message = {.msg_iov = rest};
        size_t skip = c->sent_bytes;
        ssize_t sent;

        for (int i = 0; i < 3; i++) {
            size_t skipped = skip < all[i].iov_len ? skip : all[i].iov_len;

            skip -= skipped;
            if (all[i].iov_len > skipped) {
                rest[message.msg_iovlen].iov_base = (char *)all[i].iov_base + skipped;
                rest[message.msg_iovlen++].iov_len = all[i].iov_len - skipped;
            }
        }
        sent = sendmsg(c->fd, &message, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR) {
            continue;
        }
        if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == ENOTCONN)) {
            watch(c, true);
            return;
        }
        if (sent < 0) {
            lost(c, errno);
        }
        c->sent_bytes += (size_t)sent;
    }
    watch(c, false);
}

static void begin(struct connection *c, enum operation operation)
{
    c->operation = operation;
    c->is_busy = true;
    c->sent_bytes = 0;
    c->value = NULL;
    c->value_bytes = 0;
    c->line_bytes = 0;
    c->line_ended_r = false;
    c->in_bulk = false;
}

static void set_head(struct connection *c, const char *key, uint64_t value_bytes, bool with_value)
{
    int length;

    if (with_value) {
        length = snprintf(c->head, sizeof(c->head),
                          "*3\r\n$3\r\nSET\r\n$%zu\r\n%s\r\n$%" PRIu64 "\r\n", strlen(key), key,
                          value_bytes);
    } else {
        length = snprintf(c->head, sizeof(c->head), "*2\r\n$3\r\nGET\r\n$%zu\r\n%s\r\n",
                          strlen(key), key);
    }
    c->head_bytes = (size_t)length;
}

static void make_key_request(struct connection *c, enum operation operation, uint64_t index)
{
    char key[40];

    begin(c, operation);
    snprintf(key, sizeof(key), "lab:key:%012" PRIu64, index);
    set_head(c, key, options.value_bytes, operation != OP_GET);
    if (operation != OP_GET) {
        c->value = pool + random_below(POOL_SPARE);
        c->value_bytes = options.value_bytes;
    }
}

static void make_sequence_request(struct connection *c)
{
    char key[40], number[24];
    size_t length;

    begin(c, OP_SET);
    c->number++;
    snprintf(key, sizeof(key), "lab:%u", (unsigned)(c - connections));
    length = (size_t)snprintf(number, sizeof(number), "%" PRIu64, c->number);
    set_head(c, key, length, true);
    memcpy(c->head + c->head_bytes, number, length);
    memcpy(c->head + c->head_bytes + length, "\r\n", 2);
    c->head_bytes += length + 2;
}

static void send_recorded(struct connection *c, uint64_t slot, int64_t now)
{
    struct record *record = &records[slot];

    if (options.sequence) {
        make_sequence_request(c);
        record->number = c->number;
    } else {
        make_key_request(c, record->operation, random_below(options.keys));
    }
    c->slot = slot;
    record->client = (uint16_t)(c - connections);
    record->sent_ns = now;
    flush_request(c);
}

static void set_timer(int fd, int64_t at_ns)
{
    struct itimerspec when = {
        .it_value = {.tv_sec = at_ns / NS_PER_S, .tv_nsec = at_ns % NS_PER_S},
    };

    timerfd_settime(fd, TFD_TIMER_ABSTIME, &when, NULL);
}

/* Open loop: note what has become due, send what can be sent, and wait for the next. */
static void issue_due(void)
{
    static int64_t armed_ns;
    int64_t now = now_ns(), next = add_due(now);

    if (next <= now) {
        finish("full");
    }
    while (n_free && next_sent < header->issued) {
        struct connection *c = &connections[free_connections[--n_free]];

        send_recorded(c, next_sent++, now_ns());
    }
    if (!n_free && next < now + WAITING_NS) {
        next = now + WAITING_NS;
    }
    if (next != armed_ns) {
        set_timer(due_timer_fd, armed_ns = next);
    }
}

static void start(void)
{
    int64_t now = now_ns();

    header->start_ns = now;
    start_cpu_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    is_running = true;
    set_timer(end_timer_fd, options.seconds > 0 ? now + (int64_t)(options.seconds * 1e9) : 0);
    printf("ready %" PRId64 "\n", now);
    fflush(stdout);
    for (uint32_t i = 0; i < options.clients; i++) {
        if (options.rate > 0) {
            free_connections[n_free++] = (uint32_t)options.clients - 1 - i;
        } else {
            if (is_full()) {
                finish("full");
            }
            now = now_ns();
            send_recorded(&connections[i], add_record(now), now);
        }
    }
    if (options.rate > 0) {
        issue_due();
    }
}

/* After the PINGs: every key once, then the load. */
static void prepare(struct connection *c)
{
    if (options.fill && fill_next < options.keys) {
        make_key_request(c, OP_FILL, fill_next++);
        flush_request(c);
    }
}

static void add_watch(int fd, uint32_t which)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = which};

    /* stdin may be a file or /dev/null, which does not end. */
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) && fd != STDIN_FILENO) {
        fail("epoll: %s", strerror(errno));
    }
}

/*
 * Connect one more and send its PING.  One after the other, each when the one before has its answer:
 * QEMU's user network listens on a forwarded port for one connection at a time, and the kernel lets
 * those that come meanwhile hang for seconds or for ever.
 */
static void connect_next(void)
{
    static char ping[] = "*1\r\n$4\r\nPING\r\n";
    struct sockaddr_in address = {
        .sin_family = AF_INET,
        .sin_port = htons((uint16_t)options.port),
        .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
    };
    struct connection *c = &connections[n_ready];
    const int one = 1;

    begin(c, OP_PING);
    c->number = options.sequence ? options.sequence - 1 : 0;
    memcpy(c->head, ping, sizeof(ping) - 1);
    c->head_bytes = sizeof(ping) - 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) {
        fail("socket: %s", strerror(errno));
    }
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    if (connect(c->fd, (struct sockaddr *)&address, sizeof(address)) && errno != EINPROGRESS) {
        lost(c, errno);
    }
    add_watch(c->fd, (uint32_t)n_ready);
    flush_request(c);
}

static void replied(struct connection *c, bool ok)
{
    c->is_busy = false;
    if (c->operation == OP_PING) {
        if (!ok) {
            fail("the server answers PING with \"%s\"", shown(c));
        }
        if (++n_ready == options.clients) {
            set_timer(end_timer_fd, 0);
            for (uint32_t i = 0; i < options.clients; i++) {
                prepare(&connections[i]);
            }
            if (!options.fill) {
                start();
            }
        } else {
            connect_next();
        }
    } else if (c->operation == OP_FILL) {
        if (!ok) {
            fail("the server answers SET with \"%s\"", shown(c));
        }
        if (++filled == options.keys) {
            start();
        } else {
            prepare(c);
        }
    } else {
        struct record *record = &records[c->slot];
        int64_t now = now_ns();

        record->status = ok ? OK : REFUSED;
        atomic_store_explicit(&record->done_ns, now, memory_order_release);
        if (!ok && !header->refused++) {
            snprintf(header->first_error, sizeof(header->first_error), "%s", shown(c));
        }
        atomic_store_explicit(&header->completed, header->completed + 1, memory_order_release);
        if (options.rate > 0) {
            free_connections[n_free++] = (uint32_t)(c - connections);
        } else {
            if (is_full()) {
                finish("full");
            }
            send_recorded(c, add_record(now), now);
        }
    }
}

/* The length that a line `$n` announces; -1 for none, -2 for nonsense. */
static int64_t bulk_length(const struct connection *c)
{
    const char *text = c->line + 1;
    size_t digits = c->line_bytes - 1;
    int64_t length = 0;

    if (digits == 2 && !memcmp(text, "-1", 2)) {
        return -1;
    }
    if (!digits || digits > 10) {
        return -2;
    }
    for (size_t i = 0; i < digits; i++) {
        if (text[i] < '0' || text[i] > '9') {
            return -2;
        }
        length = length * 10 + (text[i] - '0');
    }
    return length <= LONGEST_BULK ? length : -2;
}

static void __attribute__((noreturn)) not_redis(const struct connection *c)
{
    fail("what answers %s is no Redis: \"%s\"", asked(c), shown(c));
}

/* A whole line is there, without its end.  Returns whether the reply is complete. */
static bool line_done(struct connection *c)
{
    bool wants_bulk = c->operation == OP_GET;

    if (c->line_bytes && c->line[0] == '-') {
        return true;
    }
    if (c->line_bytes && c->line[0] == (wants_bulk ? '$' : '+')) {
        int64_t length = wants_bulk ? bulk_length(c) : -1;

        if (length == -1) {
            return true;
        }
        if (length >= 0) {
            c->in_bulk = true;
            c->bulk_left = length + 2;
            return false;
        }
    }
    not_redis(c);
}

/* Take bytes of a reply.  Returns how many belonged to it; `*complete` says whether it ended. */
static size_t parse_reply(struct connection *c, const char *bytes, size_t n, bool *complete)
{
    size_t i = 0;

    *complete = false;
    while (i < n && !*complete) {
        if (c->in_bulk) {
            size_t skip = n - i;

            if (c->bulk_left > 2) {
                if ((int64_t)skip > c->bulk_left - 2) {
                    skip = (size_t)c->bulk_left - 2;
                }
                c->bulk_left -= (int64_t)skip;
                i += skip;
                continue;
            }
            if (bytes[i++] != (c->bulk_left-- == 2 ? '\r' : '\n')) {
                fail("the server's reply to GET is longer than it says");
            }
            *complete = c->bulk_left == 0;
        } else if (c->line_ended_r) {
            if (bytes[i++] != '\n') {
                not_redis(c);
            }
            *complete = line_done(c);
        } else if (bytes[i] == '\r') {
            c->line_ended_r = true;
            i++;
        } else if (bytes[i] == '\n') {
            not_redis(c);
        } else {
            if (c->line_bytes < LINE_BYTES) {
                c->line[c->line_bytes] = bytes[i];
            }
            c->line_bytes++;
            i++;
        }
    }
    return i;
}

static void readable(struct connection *c)
{
    static char bytes[READ_BYTES];
    ssize_t n = recv(c->fd, bytes, sizeof(bytes), 0);
    bool complete;

    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) {
        return;
    }
    if (n <= 0) {
        lost(c, n ? errno : 0);
    }
    if (!c->is_busy) {
        fail("the server sent what nobody asked for");
    }
    if (parse_reply(c, bytes, (size_t)n, &complete) < (size_t)n) {
        fail("the server sent more than the reply to %s", asked(c));
    }
    if (complete) {
        /* An error names the request's end, too: nothing of it may be sent with the next. */
        if (c->wants_write) {
            fail("the server answered before it had the whole request: \"%s\"", shown(c));
        }
        replied(c, c->line[0] != '-');
    }
}

static uint64_t whole(const char *key, const char *text, uint64_t lowest, uint64_t highest)
{
    char *end;
    uint64_t value;

    errno = 0;
    value = strtoull(text, &end, 10);
    if (errno || *end || end == text || *text == '-' || value < lowest || value > highest) {
        fail("%s=%s is not a number from %" PRIu64 " to %" PRIu64, key, text, lowest, highest);
    }
    return value;
}

static double real(const char *key, const char *text)
{
    char *end;
    double value = strtod(text, &end);

    if (*end || end == text || !(value >= 0 && value <= 1e9)) {
        fail("%s=%s is not a number from 0 to 1e9", key, text);
    }
    return value;
}

static void parse_options(int argc, char **argv)
{
    static const struct {
        const char *key;
        uint64_t *value;
        uint64_t lowest, highest, normal;
    } wholes[] = {
        {"port", &options.port, 1, 65535, 6379},
        {"clients", &options.clients, 1, MAX_CLIENTS, 50},
        {"keys", &options.keys, 1, UINT32_MAX, 100000},
        {"value_bytes", &options.value_bytes, 1, MAX_VALUE_BYTES, 100},
        {"seed", &options.seed, 0, UINT64_MAX, 1},
        {"max_requests", &options.max_requests, 1, UINT32_MAX, 5000000},
        {"get_percent", &options.get_percent, 0, 100, 0},
        {"sequence", &options.sequence, 0, UINT64_MAX / 2, 0},
        {"fill", &options.fill, 0, 1, 0},
    };
    const size_t n_wholes = sizeof(wholes) / sizeof(wholes[0]);

    for (size_t k = 0; k < n_wholes; k++) {
        *wholes[k].value = wholes[k].normal;
    }
    options.ready_s = 30;
    for (int i = 1; i < argc; i++) {
        char *value = strchr(argv[i], '=');
        size_t k = 0;

        if (!value) {
            fail("%s is not KEY=VALUE", argv[i]);
        }
        *value++ = 0;
        while (k < n_wholes && strcmp(argv[i], wholes[k].key)) {
            k++;
        }
        if (k < n_wholes) {
            *wholes[k].value = whole(argv[i], value, wholes[k].lowest, wholes[k].highest);
        } else if (!strcmp(argv[i], "rate")) {
            options.rate = real(argv[i], value);
        } else if (!strcmp(argv[i], "seconds")) {
            options.seconds = real(argv[i], value);
        } else if (!strcmp(argv[i], "ready_s")) {
            options.ready_s = real(argv[i], value);
        } else if (!strcmp(argv[i], "records")) {
            options.records = value;
        } else {
            fail("%s is no option", argv[i]);
        }
    }
    if (options.sequence && options.get_percent) {
        fail("a sequence only writes");
    }
    if (!options.records) {
        fail("records=FILE is missing");
    }
}

static void map_records(void)
{
    size_t bytes = HEADER_BYTES + options.max_requests * sizeof(struct record);
    int fd = open(options.records, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    char *map;

    if (fd < 0 || ftruncate(fd, 0) || ftruncate(fd, (off_t)bytes)) {
        fail("%s: %s", options.records, strerror(errno));
    }
    map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) {
        fail("%s: %s", options.records, strerror(errno));
    }
    close(fd);
    header = (struct header *)(void *)map;
    records = (struct record *)(void *)(map + HEADER_BYTES);
    header->record_bytes = sizeof(struct record);
    header->capacity = options.max_requests;
    header->magic = MAGIC;
}

int main(int argc, char **argv)
{
    struct epoll_event events[EVENTS];
    uint32_t timer, ends, signals, input;
    sigset_t stop;

    prctl(PR_SET_PDEATHSIG, SIGTERM);
    /* By default the kernel may be 50 us late. */
    prctl(PR_SET_TIMERSLACK, 1);
    parse_options(argc, argv);
    random_state = options.seed;
    connections = calloc(options.clients, sizeof(*connections));
    free_connections = calloc(options.clients, sizeof(*free_connections));
    pool = malloc(options.value_bytes + POOL_SPARE + 8);
    if (!connections || !free_connections || !pool) {
        fail("out of memory");
    }
    for (size_t i = 0; i < options.value_bytes + POOL_SPARE; i += 8) {
        uint64_t noise = random_u64();

        memcpy(pool + i, &noise, 8);
    }
    map_records();

    sigemptyset(&stop);
    sigaddset(&stop, SIGTERM);
    sigaddset(&stop, SIGINT);
    sigprocmask(SIG_BLOCK, &stop, NULL);
    timer = (uint32_t)options.clients;
    ends = timer + 1;
    signals = timer + 2;
    input = timer + 3;
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    due_timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    end_timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (epoll_fd < 0 || due_timer_fd < 0 || end_timer_fd < 0) {
        fail("epoll and timers: %s", strerror(errno));
    }
    add_watch(due_timer_fd, timer);
    add_watch(end_timer_fd, ends);
    add_watch(signalfd(-1, &stop, SFD_CLOEXEC), signals);
    add_watch(STDIN_FILENO, input);
    set_timer(end_timer_fd, now_ns() + (int64_t)(options.ready_s * 1e9));
    connect_next();

    for (;;) {
        int n = epoll_wait(epoll_fd, events, EVENTS, -1);

        for (int i = 0; i < n; i++) {
            uint32_t which = events[i].data.u32;

            if (which < options.clients) {
                struct connection *c = &connections[which];

                if (events[i].events & EPOLLOUT) {
                    flush_request(c);
                }
                if (events[i].events & (EPOLLIN | EPOLLERR | EPOLLHUP)) {
                    readable(c);
                }
            } else if (which == signals) {
                finish("stopped");
            } else if (which == input) {
                char bytes[64];

                if (read(STDIN_FILENO, bytes, sizeof(bytes)) <= 0) {
                    finish("stopped");
                }
            } else if (which == ends) {
                if (is_running) {
                    finish("seconds");
                }
                fail("%" PRIu64 " of %" PRIu64 " connections answered a PING within %g s",
                     n_ready, options.clients, options.ready_s);
            }
        }
        if (is_running && options.rate > 0) {
            issue_due();
        }
    }
}
