/* sink port=N readers=N [extra=N] [slow=N] [stalled=N] [slow_bps=1000] [ramp=1000] [warm=2] [seconds=8] [linger=10]
 *      [tokens=0] [method=POST] [path=/v1/chat/completions] [body=JSON] [stalled_body=JSON]
 *
 * Readers of one server, cheap enough to leave the machine to what is measured: `readers` are watched, `extra` read just
 * the same but aren't, `slow` take slow_bps bytes a second each, `stalled` send their request and never read. Each decodes
 * the chunked coding and checks that its tokens ("@<k>.<ns> ", see source.c) come in order: a hole counts as lost, a
 * repetition as doubled. Ages, gaps between tokens and the time to the first token are those of the watched, the first two
 * within the window: from `warm` seconds after the last connection was opened, `seconds` long. With tokens=N the program
 * ends when all that read are complete, or `linger` seconds after the window; else with the window. SIGTERM ends it at once.
 *
 * A group is told by its source address, so that `ss` can tell it too: watched and extra 127.0.0.1 and up (another one every
 * 20,000 ports), slow 127.0.1.1, stalled 127.0.2.1. Prints one line of JSON. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { CONNECTING, ASKED, READING, CLOSED };
enum { WATCHED, EXTRA, SLOW, STALLED, GROUPS };
enum { HEAD, SIZE, DATA, DATA_END, RAW, OVER }; /* of the body's decoding */
#define CARRY_MAX 48                            /* the longest token, cut anywhere */
#define SLICES_PER_S 10                         /* a slow reader reads so often */
#define BUCKETS 2000000                         /* of 10 us: up to 20 s */

struct reader {
    int fd;
    unsigned char state, group, decoding, carry, head_seen, done;
    long chunk_left; /* DATA: bytes; SIZE: the hex digits so far */
    long next;       /* the token that is due */
    long long asked_ns, token_ns;
    char tail[CARRY_MAX];
};

static unsigned ages[BUCKETS], gaps[BUCKETS], firsts[BUCKETS];
static long count[GROUPS];
static long answered, failed, closed, not_200, lost, doubled, complete[GROUPS], gap_events, tokens, window_tokens, window_reads, slow_bps = 1000, tokens_all, bytes;
static long long window_from, window_to, age_max, age_sum;
static volatile sig_atomic_t stopping;
static int poll_fd, port;
static char *method = "POST", *path = "/v1/chat/completions", *body = "{\"model\":\"synthetic\",\"stream\":true,\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}", *stalled_body;

static void on_signal(int number) { (void)number; stopping = 1; }

static long long now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void count_in(unsigned *histogram, long long ns) {
    long long b = ns < 0 ? 0 : ns / 10000;
    histogram[b < BUCKETS ? b : BUCKETS - 1]++;
}

static double quantile_ms(const unsigned *histogram, double q) {
    double all = 0, seen = 0;
    for (int b = 0; b < BUCKETS; b++) all += histogram[b];
    for (int b = 0; b < BUCKETS && all; b++)
        if ((seen += histogram[b]) >= all * q) return (b + 1) / 100.;
    return 0;
}

static void close_reader(struct reader *r) {
    close(r->fd);
    if (!r->done) closed++;
    r->state = CLOSED;
}

static void token(struct reader *r, long k, long long sent, long long now) {
    tokens++;
    if (k > r->next) lost += k - r->next;
    if (k < r->next) doubled++;
    else r->next = k + 1;
    if (r->group != WATCHED) return;
    if (!r->token_ns) count_in(firsts, now - r->asked_ns);
    if (window_from && now >= window_from && now < window_to) {
        long long age = now - sent;
        window_tokens++;
        age_sum += age;
        if (age > age_max) age_max = age;
        count_in(ages, age);
        if (r->token_ns) count_in(gaps, now - r->token_ns);
    }
    r->token_ns = now;
}

/* The text of a stream, whatever it stands in: find the tokens, carry a cut one over. `text` has CARRY_MAX room in front. */
static void scan(struct reader *r, char *text, long len, long long now) {
    char *from = text - r->carry, *stop = text + len, *at = from, *cut = stop;
    memcpy(from, r->tail, r->carry);
    while ((at = memchr(at, '@', stop - at))) {
        char *dot, *end;
        long k = strtol(at + 1, &dot, 10);
        if (dot >= stop) { cut = at; break; }
        if (*dot != '.' || dot == at + 1) { at++; continue; }
        long long sent = strtoll(dot + 1, &end, 10);
        if (end >= stop) { cut = at; break; }
        token(r, k, sent, now);
        at = end;
    }
    if (memmem(from, stop - from, "event: gap", 10)) gap_events++;
    if (memmem(from, stop - from, "[DONE]", 6) && !r->done) {
        r->done = 1;
        if (!tokens_all || r->next == tokens_all) complete[r->group]++;
    }
    /* Without a token being cut, the end of "data: [DONE]" may be. */
    if (cut == stop && stop - from > 5 && !r->done && stop[-1] != '\n') cut = stop - 5;
    r->carry = stop - cut < CARRY_MAX ? stop - cut : 0;
    memcpy(r->tail, cut, r->carry);
}

static char plain[(1 << 17) + CARRY_MAX + 1];

static char *pass_head(struct reader *r, char *p, char *stop) {
    if (!r->head_seen) {
        r->head_seen = 1;
        answered++;
        if (stop - p < 12 || memcmp(p + 8, " 200", 4)) not_200++;
    }
    char *end = memmem(p, stop - p, "\r\n\r\n", 4); /* heads are small and come whole; else the stream counts as lost */
    if (!end) return stop;
    *end = 0;
    r->decoding = strcasestr(p, "transfer-encoding: chunked") ? SIZE : RAW;
    return end + 4;
}

/* Take a read apart into plain text, and scan that. */
static void take(struct reader *r, char *p, long len, long long now) {
    char *stop = p + len, *out = plain + CARRY_MAX;
    while (p < stop && r->decoding != OVER) {
        if (r->decoding == HEAD) { p = pass_head(r, p, stop); continue; }
        if (r->decoding == RAW) { memcpy(out, p, stop - p); out += stop - p; break; }
        if (r->decoding == DATA) {
            long n = r->chunk_left < stop - p ? r->chunk_left : stop - p;
            memcpy(out, p, n);
            out += n;
            p += n;
            if (!(r->chunk_left -= n)) r->decoding = DATA_END;
            continue;
        }
        char c = *p++;
        if (r->decoding == DATA_END) { if (c == '\n') r->decoding = SIZE; continue; }
        if (c >= '0' && c <= '9') r->chunk_left = r->chunk_left * 16 + c - '0';
        else if ((c | 32) >= 'a' && (c | 32) <= 'f') r->chunk_left = r->chunk_left * 16 + (c | 32) - 'a' + 10;
        else if (c == '\n') r->decoding = r->chunk_left ? DATA : OVER;
    }
    *out = 0;
    if (out > plain + CARRY_MAX) scan(r, plain + CARRY_MAX, out - plain - CARRY_MAX, now);
}

static void arm(struct reader *r, unsigned events, int how, unsigned index) {
    struct epoll_event e = {.events = events, .data.u32 = index};
    epoll_ctl(poll_fd, how, r->fd, &e);
}

static void connected(struct reader *r, unsigned index, long long now) {
    char request[8192];
    const char *what = r->group == STALLED && stalled_body ? stalled_body : body;
    int err = 0, n = snprintf(request, sizeof request,
        "%s %s HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s", method, path, strlen(what), what);
    socklen_t size = sizeof err;
    getsockopt(r->fd, SOL_SOCKET, SO_ERROR, &err, &size);
    if (err || write(r->fd, request, n) != n) { failed++; close(r->fd); r->state = CLOSED; return; }
    r->state = r->group == WATCHED || r->group == EXTRA ? READING : ASKED;
    r->asked_ns = now;
    arm(r, r->state == READING ? EPOLLIN : 0, EPOLL_CTL_MOD, index);
}

static void open_reader(struct reader *r, unsigned index) {
    int small = 4096, one = 1;
    r->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (r->fd < 0) { failed++; r->state = CLOSED; return; }
    if (r->group == SLOW || r->group == STALLED) setsockopt(r->fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    unsigned host = r->group == STALLED ? 0x7f000201 : r->group == SLOW ? 0x7f000101 : 0x7f000001 + index / 20000;
    struct sockaddr_in from = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(host)};
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    setsockopt(r->fd, IPPROTO_IP, 24 /* IP_BIND_ADDRESS_NO_PORT */, &one, sizeof one);
    bind(r->fd, (void *)&from, sizeof from);
    connect(r->fd, (void *)&to, sizeof to);
    arm(r, EPOLLOUT, EPOLL_CTL_ADD, index);
}

static void read_some(struct reader *r, long most, long long now) {
    static char chunk[1 << 17];
    ssize_t n = read(r->fd, chunk, most < (long)sizeof chunk - 1 ? most : (long)sizeof chunk - 1);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) { close_reader(r); return; }
    bytes += n;
    if (r->group == WATCHED && window_from && now >= window_from && now < window_to) window_reads++;
    take(r, chunk, n, now);
    if (r->done) close_reader(r);
}

static double number(int argc, char **argv, const char *key, double otherwise) {
    for (int i = 1; i < argc; i++)
        if (!strncmp(argv[i], key, strlen(key)) && argv[i][strlen(key)] == '=') return atof(argv[i] + strlen(key) + 1);
    return otherwise;
}

static char *text(int argc, char **argv, const char *key, char *otherwise) {
    for (int i = 1; i < argc; i++)
        if (!strncmp(argv[i], key, strlen(key)) && argv[i][strlen(key)] == '=') return argv[i] + strlen(key) + 1;
    return otherwise;
}

/* Groups are mixed evenly over the ramp: each opening takes from the group that is furthest behind its share. */
static int next_group(const long *opened) {
    int best = 0;
    for (int g = 1; g < GROUPS; g++)
        if (count[g] && (!count[best] || opened[g] * count[best] < opened[best] * count[g])) best = g;
    return best;
}

static void report(long n, long opened, double ramp_s) {
    double window_s = window_from ? ((now_ns() < window_to ? now_ns() : window_to) - window_from) / 1e9 : 0;
    printf("{\"connections\": %ld, \"opened\": %ld, \"answered\": %ld, \"failed\": %ld, \"closed\": %ld, \"not_200\": %ld, \"ramp_s\": %.2f, ", n, opened, answered, failed, closed, not_200, ramp_s);
    printf("\"lost\": %ld, \"doubled\": %ld, \"gap_events\": %ld, \"complete\": {\"watched\": %ld, \"extra\": %ld, \"slow\": %ld}, ", lost, doubled, gap_events, complete[WATCHED], complete[EXTRA], complete[SLOW]);
    printf("\"tokens\": %ld, \"bytes\": %ld, \"window_tokens\": %ld, \"window_reads\": %ld, \"tokens_per_s\": %.0f, ", tokens, bytes, window_tokens, window_reads, window_s > 0 ? window_tokens / window_s : 0);
    printf("\"age_ms\": {\"mean\": %.3f, \"p50\": %.2f, \"p99\": %.2f, \"p999\": %.2f, \"max\": %.1f}, ", window_tokens ? age_sum / 1e6 / window_tokens : 0, quantile_ms(ages, .5), quantile_ms(ages, .99), quantile_ms(ages, .999), age_max / 1e6);
    printf("\"gap_ms\": {\"p50\": %.2f, \"p99\": %.2f}, \"ttft_ms\": {\"p50\": %.2f, \"p99\": %.2f}}\n", quantile_ms(gaps, .5), quantile_ms(gaps, .99), quantile_ms(firsts, .5), quantile_ms(firsts, .99));
}

int main(int argc, char **argv) {
    const char *names[GROUPS] = {"readers", "extra", "slow", "stalled"};
    long n = 0, opened = 0, opened_of[GROUPS] = {0}, slice = 0;
    for (int g = 0; g < GROUPS; g++) n += count[g] = number(argc, argv, names[g], 0);
    port = number(argc, argv, "port", 0);
    if (!port || !n) { fprintf(stderr, "usage: sink port=N readers=N [extra= slow= stalled= slow_bps= ramp= warm= seconds= linger= tokens= method= path= body= stalled_body=]\n"); return 2; }
    double ramp = number(argc, argv, "ramp", 1000), warm = number(argc, argv, "warm", 2), seconds = number(argc, argv, "seconds", 8), linger = number(argc, argv, "linger", 10), ramp_s = 0;
    slow_bps = number(argc, argv, "slow_bps", 1000);
    tokens_all = number(argc, argv, "tokens", 0);
    method = text(argc, argv, "method", method);
    path = text(argc, argv, "path", path);
    body = text(argc, argv, "body", body);
    stalled_body = text(argc, argv, "stalled_body", 0);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGTERM, on_signal);
    struct rlimit rl;
    getrlimit(RLIMIT_NOFILE, &rl);
    rl.rlim_cur = rl.rlim_max;
    setrlimit(RLIMIT_NOFILE, &rl);
    struct reader *readers = calloc(n, sizeof *readers);
    poll_fd = epoll_create1(0);
    static struct epoll_event ready[1024];
    long long start = now_ns();
    while (!stopping) {
        long long now = now_ns();
        for (long due = (now - start) / 1e9 * ramp + 1; opened < n && opened < due; opened++) {
            int g = next_group(opened_of);
            opened_of[g]++;
            readers[opened].group = g;
            open_reader(&readers[opened], opened);
        }
        if (opened == n && !window_from) {
            ramp_s = (now - start) / 1e9;
            window_from = now + warm * 1e9;
            window_to = window_from + seconds * 1e9;
        }
        int all_done = opened == n && complete[WATCHED] + complete[EXTRA] == count[WATCHED] + count[EXTRA];
        if (window_from && now >= window_to && (!tokens_all || all_done || now >= window_to + linger * 1e9)) break;
        int k = epoll_wait(poll_fd, ready, 1024, opened < n ? 1 : 20);
        now = now_ns();
        for (int i = 0; i < k; i++) {
            struct reader *r = &readers[ready[i].data.u32];
            if (r->state == CONNECTING) connected(r, ready[i].data.u32, now);
            else if (r->state == READING) read_some(r, 1 << 17, now);
            else if (r->state == ASKED && ready[i].events & (EPOLLHUP | EPOLLERR)) close_reader(r);
        }
        for (; count[SLOW] && slice < (now - start) / (1000000000LL / SLICES_PER_S); slice++)
            for (long i = 0; i < opened; i++)
                if (readers[i].group == SLOW && readers[i].state == ASKED) read_some(&readers[i], readers[i].decoding == HEAD ? 2048 : slow_bps / SLICES_PER_S, now);
    }
    report(n, opened, ramp_s);
    return 0;
}
